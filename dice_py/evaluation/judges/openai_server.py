"""A judge behind any server that has OpenAI's chat completions: it is shown two responses, and says which is better.

Each pair is asked in both orders, since judges prefer a place (Zheng et al., arXiv 2306.05685), and a pair has a
verdict only if both answers can be read. Answers are kept under all that decides them (served/answers.py), so that a
judge that was stopped, by its budget or by its server's end, asks only for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import polars as pl

from dice_py.config.extras import require
from dice_py.config.judges import OpenAIConfig
from dice_py.config.shared import ModelConfig
from dice_py.errors import DataError
from dice_py.evaluation.judges.base import PairwiseJudge, Verdicts, places
from dice_py.evaluation.judges.served.answers import first_wins
from dice_py.evaluation.judges.served.asking import Asking, Chat, unread_error
from dice_py.evaluation.judges.served.client import request_fields
from dice_py.evaluation.judges.served.template import read_template, render
from dice_py.events import Report, no_report
from dice_py.storage.keys import digest


@dataclass(frozen=True)
class Asked:
    """A pair, shown in one order."""

    pair: int
    ours_first: bool
    key: str


@dataclass(frozen=True)
class OpenAIJudge(PairwiseJudge):
    """Asks a model behind a server."""

    name: ClassVar[str] = "openai"

    config: OpenAIConfig
    template: str
    """The text of the template of its prompt."""

    @staticmethod
    def of(config: OpenAIConfig, models: ModelConfig) -> OpenAIJudge:
        """The judge of a config section. `models` does not matter: the server has the model.

        Raises:
            DataError: the template cannot be read.
            UsageError: the client is not installed.
        """
        del models
        require("openai", "jinja2", "numpy", "scipy", extra="judge")
        file = None if config.template is None else Path(config.template).expanduser()
        return OpenAIJudge(config, read_template(file, config.verdict))

    @property
    def annotator(self) -> str:
        """With the model's name."""
        return f"dice_{self.name}_{self.config.model}"

    def key_fields(self) -> dict[str, Any]:
        """The server's model, the template, and the fields of the requests."""
        return {**self._request_key(), "template": self.template, "both_orders": self.config.both_orders}

    def _request_key(self) -> dict[str, Any]:
        config = self.config
        return {
            "base_url": config.base_url,  # a model of the same name at another server may be another
            "model": config.model,
            "verdict": config.verdict,
            "request": request_fields(config),
        }

    def preferences(
        self, prompts: pl.DataFrame, ours: pl.DataFrame, theirs: pl.DataFrame, report: Report = no_report
    ) -> pl.Series:
        """For each row, the probability that `ours` is better, averaged over the orders; null without a verdict.

        Raises:
            DataError: the template refuses a prompt, a request is too long, or too many answers have no verdict.
            JudgeError: the server cannot be reached, or the budget is spent.
            UsageError: the server refuses the key, the model or the request.
        """
        return self.verdicts(prompts, ours, theirs, report).preferences

    def verdicts(
        self, prompts: pl.DataFrame, ours: pl.DataFrame, theirs: pl.DataFrame, report: Report = no_report
    ) -> Verdicts:
        """The preferences and counts. Equal responses are a tie, without a request. Arguments as of `preferences`.

        The counts: `identical` pairs; pairs with `no_verdict`; `answers_unread`; `first_shown_win_rate`, the mean
        probability that the response that is shown first is better (0.5 without a bias of the place); and
        `orders_disagree`, the share of the pairs whose verdict changes sides with the order; and `usage`.
        """
        asked, chats = self._requests(prompts, ours, theirs)
        asking = Asking(self.config, chats, ours.height, report)
        answers = asking.answers()
        values = [first_wins(answers[one.key], self.config.verdict) for one in asked]
        unread = [answers[one.key] for one, value in zip(asked, values, strict=True) if value is None]
        by_pair: dict[int, list[float | None]] = {}
        for one, value in zip(asked, values, strict=True):
            of_ours = value if value is None or one.ours_first else 1.0 - value
            by_pair.setdefault(one.pair, []).append(of_ours)
        preferences = [_mean(by_pair[pair]) if pair in by_pair else 0.5 for pair in range(ours.height)]
        missing = preferences.count(None)
        if missing > self.config.max_unread * len(preferences):
            raise unread_error(self.config, missing, len(preferences), unread[0])
        read = [value for value in values if value is not None]
        both = [(first, second) for first, *rest in by_pair.values() for second in rest]
        sides = [(first - 0.5) * (second - 0.5) for first, second in both if first is not None and second is not None]
        counts = {
            "identical": ours.height - len(by_pair),
            "no_verdict": missing,
            "answers_unread": len(unread),
            "first_shown_win_rate": sum(read) / len(read) if read else None,
            "orders_disagree": sum(side < 0 for side in sides) / len(sides) if sides else None,
            "usage": asking.usage.counts(),
        }
        self._note(counts, report)
        return Verdicts(pl.Series(preferences, dtype=pl.Float64), counts)

    def _requests(
        self, prompts: pl.DataFrame, ours: pl.DataFrame, theirs: pl.DataFrame
    ) -> tuple[list[Asked], dict[str, Chat]]:
        """What is asked of each pair, and the messages of each request by its key."""
        messages = dict(prompts.select("prompt_id", "messages").iter_rows())
        own = self._request_key()
        asked: list[Asked] = []
        chats: dict[str, Chat] = {}
        rows = zip(places(ours), ours["prompt_id"], ours["response"], theirs["response"], strict=True)
        for pair, (place, prompt_id, one, other) in enumerate(rows):
            if one == other:
                continue
            orders = (True, False) if self.config.both_orders else (_ours_first(messages[prompt_id], one, other),)
            for ours_first in orders:
                shown = (one, other) if ours_first else (other, one)
                try:
                    chat = render(self.template, messages[prompt_id], *shown)
                except DataError as error:
                    raise DataError(f"{place}: {error}") from None
                key = digest("answer", own, chat)
                chats[key] = chat
                asked.append(Asked(pair, ours_first, key))
        return asked, chats

    def _note(self, counts: dict[str, Any], report: Report) -> None:
        first = counts["first_shown_win_rate"]
        if first is None:
            return
        usage = counts["usage"]
        text = (
            f"judge {self.config.model}: {usage['requests']} requests, {usage['requests_kept']} answers kept from "
            f"before, {usage['input_tokens'] + usage['output_tokens']} tokens"
            + ("" if usage["cost"] is None else f", cost {usage['cost']:.6g}")
            + f"; the response that is shown first wins {first:.1%}"
        )
        if counts["no_verdict"]:
            text += f"; {counts['no_verdict']} pairs without a verdict are left out"
        report("note", text=text)


def _mean(values: list[float | None]) -> float | None:
    """The mean over the orders; None where one of them has no verdict, since the other is of one place alone."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _ours_first(prompt: Any, one: str, other: str) -> bool:
    """The order in which a pair is shown if it is shown once: by its content, and the same whichever side is ours."""
    low, high = sorted((one, other))
    is_low_first = int(digest("order", prompt, low, high)[:8], 16) % 2 == 0
    return (one == low) == is_low_first
