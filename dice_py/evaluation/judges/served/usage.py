"""What a judge's requests have used, and the budget that stops them."""

from __future__ import annotations

from typing import Any

from dice_py.config.judges import OpenAIConfig
from dice_py.errors import UsageError
from dice_py.evaluation.judges.served.answers import Answer


class Usage:
    """Counts the requests, tokens and cost of one call, of what was asked and not of what was kept.

    Args:
        config: prices, and the budget in tokens, money or both.
    """

    def __init__(self, config: OpenAIConfig) -> None:
        self._config = config
        self.requests = self.kept = self.input_tokens = self.output_tokens = self.uncounted = 0
        self._most_tokens, self._most_cost = 0, 0.0

    @property
    def cost(self) -> float | None:
        """In the unit of the prices; None without prices, or if the server did not count every request's tokens."""
        if self._config.input_price is None or self.uncounted:
            return None
        return self._cost(self.input_tokens, self.output_tokens)

    def add(self, answer: Answer) -> None:
        """Counts an answer that was asked for.

        Raises:
            UsageError: there is a budget, and the server does not say what it has used.
        """
        self.requests += 1
        if answer.input_tokens is None or answer.output_tokens is None:
            self.uncounted += 1
            if self._config.budget_tokens is not None or self._config.budget_cost is not None:
                raise UsageError(
                    f"the judge's server {self._config.base_url} does not say how many tokens a request has used, so "
                    "no budget can be kept: leave out openai.budget_tokens and openai.budget_cost"
                )
            return
        self.input_tokens += answer.input_tokens
        self.output_tokens += answer.output_tokens
        self._most_tokens = max(self._most_tokens, answer.input_tokens + answer.output_tokens)
        self._most_cost = max(self._most_cost, self._cost(answer.input_tokens, answer.output_tokens))

    def allows(self, running: int) -> bool:
        """Whether the budget has room for one more request beside `running` ones, each as large as the largest so far.

        Before the first answer nothing is known of their size, so the first request is asked alone.
        """
        config = self._config
        if config.budget_tokens is None and config.budget_cost is None:
            return True
        if not self.requests:
            return running == 0
        tokens = self.input_tokens + self.output_tokens + (running + 1) * self._most_tokens
        cost = self._cost(self.input_tokens, self.output_tokens) + (running + 1) * self._most_cost
        return (config.budget_tokens is None or tokens <= config.budget_tokens) and (
            config.budget_cost is None or cost <= config.budget_cost
        )

    def spent(self) -> str:
        """What was spent, in words."""
        cost = self.cost
        tokens = f"{self.input_tokens + self.output_tokens:,} tokens"
        return tokens if cost is None else f"{tokens}, which cost {cost:.6g}"

    def counts(self) -> dict[str, Any]:
        """All counts, ready for JSON."""
        return {
            "requests": self.requests,
            "requests_kept": self.kept,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "requests_not_counted": self.uncounted,
            "cost": self.cost,
        }

    def _cost(self, input_tokens: int, output_tokens: int) -> float:
        prices = (self._config.input_price or 0.0, self._config.output_price or 0.0)
        return (input_tokens * prices[0] + output_tokens * prices[1]) / 1e6
