"""log π(y|x) of stored tokens: Σ_t log π(y_t | x, y_<t), by one forward and no sampling.

Sequences are packed into batches without padding, in which a prompt is computed once for all of its responses
(models/packing.py). A token budget that adapts to the device's memory bounds each batch (scoring/token_budget.py).
The head runs only on positions that predict a token of a response, in tiles of positions × vocabulary with a running
float32 log-sum-exp, so the logits of a batch never exist at one time (scoring/lm_head.py). The forward is in the
model's dtype; log-probabilities are float32 and their sums float64.

A model that fails the trial of the packed attention (scoring/packed_trial.py) is scored in rows of similar length
padded on the right, and a note is reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from dice_py.compute.failures import is_out_of_memory
from dice_py.config.stages import ScoreConfig
from dice_py.errors import DataError
from dice_py.events import Report, no_report
from dice_py.models.flops import Work, matmul_rate, shape_of
from dice_py.models.limits import check_positions, positions_limit
from dice_py.models.packing import Batch, Group, Packer, Tokens, batches_by_budget, seen_keys
from dice_py.scoring import forwards
from dice_py.scoring.lm_head import LogitHead
from dice_py.scoring.packed_trial import PackedTrial
from dice_py.scoring.token_budget import TokenBudget

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Value = TypeVar("Value")
"""What a forward gives for each response: its sum, or its tokens' log-probabilities."""
PackedForward = Callable[[LogitHead, Batch], list[Value]]
PaddedForward = Callable[[LogitHead, list[int], Sequence[Tokens], Sequence[Tokens]], list[Value]]


class Scorer:
    """Log-probabilities under one model, summed or by token. The caller loads and releases the model.

    Args:
        model: a causal language model in evaluation mode, on its device.
        config: token budget and logit chunk.
        report: receives a note when the packed attention is not used or memory runs out.
    """

    def __init__(self, model: PreTrainedModel, config: ScoreConfig, report: Report = no_report) -> None:
        self.model = model
        self.report = report
        self.head = LogitHead(model, config.logit_chunk)
        self.shape = shape_of(model)
        self.budget = TokenBudget(config.token_budget, self.shape, model.dtype, model.device, report)
        self.trial = PackedTrial(self.head)
        self.packs = True
        """Whether batches are packed: true until a trial fails."""
        self.work = Work()

    def take_work(self) -> dict[str, object]:
        """Counts and rates of the work since the last call (`Work.rates` in models/flops.py)."""
        work, self.work = self.work, Work()
        return work.rates(matmul_rate(self.model.device, self.model.dtype))

    def sums(
        self,
        prompts: Sequence[Tokens],
        responses: Sequence[Tokens],
        on_batch: Callable[[int], None] = lambda _: None,
    ) -> list[float]:
        """Σ_t log π(y_t | x, y_<t) in nats for each (prompt, response) of token ids, in the given order.

        Args:
            prompts, responses: token ids; the sum runs over the response's tokens, a final EOS included.
            on_batch: called after each batch with its number of sequences.

        Raises:
            DataError: a prompt or response is empty or too long for the model's positions, a token lies outside the
                model's vocabulary, or the model transforms its logits in an unsupported way.
        """
        return self._scored(prompts, responses, on_batch, forwards.packed_sums, forwards.padded_sums)

    def token_logps(
        self,
        prompts: Sequence[Tokens],
        responses: Sequence[Tokens],
        on_batch: Callable[[int], None] = lambda _: None,
    ) -> list[np.ndarray]:
        """log π(y_t | x, y_<t) in nats of each token of each response: the addends of `sums`, by the same forwards.

        Args, Raises: as `sums`.

        Returns:
            (tokens,) float32 for each response, in the given order.
        """
        return self._scored(prompts, responses, on_batch, forwards.packed_token_logps, forwards.padded_token_logps)

    def _scored(
        self,
        prompts: Sequence[Tokens],
        responses: Sequence[Tokens],
        on_batch: Callable[[int], None],
        packed: PackedForward[Value],
        padded: PaddedForward[Value],
    ) -> list[Value]:
        """What the forwards give for each response, in the given order."""
        if not responses:
            return []
        prompts, responses = ([np.asarray(part, dtype=np.int64) for part in parts] for parts in (prompts, responses))
        self._check_tokens(prompts, responses)
        with torch.inference_mode():
            if not self.trial.longest:
                self.head.check([*prompts[0].tolist(), *responses[0].tolist()])
            if self.packs and (reason := self.trial.failure(prompts, responses)):
                self.packs = False
                self.report("note", text=f"{reason}: scored in padded rows, each with its own prompt (slower)")
            if self.packs:
                batches = self._packed_batches(prompts, responses, packed)
            else:
                batches = self._padded_batches(prompts, responses, padded)
            found: dict[int, Value] = {}
            started = time.perf_counter()
            for rows, values in batches:
                found.update(zip(rows, values, strict=True))
                now = time.perf_counter()
                self.work.seconds += now - started
                self.work.sequences += len(rows)
                started = now
                on_batch(len(rows))
        return [found[row] for row in range(len(responses))]

    def _check_tokens(self, prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> None:
        lengths = (len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
        check_positions(
            lengths,
            positions_limit(self.model.config),
            where="the responses to score",
            model="the model",
            remedy="leave longer ones out",
        )
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            if not len(prompt) or not len(response):
                raise DataError(f"row {row}: an empty {'response' if len(prompt) else 'prompt'} cannot be scored")
            if (
                max(np.max(prompt), np.max(response)) >= self.shape.vocabulary
                or min(np.min(prompt), np.min(response)) < 0
            ):
                raise DataError(
                    f"row {row}: a token id lies outside the model's vocabulary of {self.shape.vocabulary}; policy and "
                    "reference must share the tokenizer that the responses were sampled with"
                )

    def _packed_batches(
        self, prompts: Sequence[Tokens], responses: Sequence[Tokens], forward: PackedForward[Value]
    ) -> Iterator[tuple[list[int], list[Value]]]:
        packer = Packer(prompts, responses)
        while packer:
            batch = packer.next_batch(self.budget.tokens)
            values = self._run_or_halve(
                lambda batch=batch: forward(self.head, batch),  # type: ignore[misc]
                tokens=len(batch.tokens),
                sequences=len(batch.rows),
            )
            if values is None:
                packer.put_back(batch)
                continue
            self._count(batch, padding=0)
            yield batch.rows, values

    def _padded_batches(
        self, prompts: Sequence[Tokens], responses: Sequence[Tokens], forward: PaddedForward[Value]
    ) -> Iterator[tuple[list[int], list[Value]]]:
        lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
        remaining = list(range(len(lengths)))
        while remaining:
            # Batches are cut anew each time: the budget may have been halved.
            first = next(batches_by_budget([lengths[row] for row in remaining], self.budget.tokens))
            rows = [remaining[at] for at in first]
            size = len(rows) * lengths[rows[0]]
            values = self._run_or_halve(
                lambda rows=rows: forward(self.head, rows, prompts, responses),  # type: ignore[misc]
                tokens=size,
                sequences=len(rows),
            )
            if values is None:
                continue
            batch = Batch([Group(prompts[row], [row]) for row in rows], responses)
            self._count(batch, padding=size - sum(lengths[row] for row in rows))
            scored = set(rows)
            remaining = [row for row in remaining if row not in scored]
            yield rows, values

    def _run_or_halve(self, forward: Callable[[], list[Value]], *, tokens: int, sequences: int) -> list[Value] | None:
        """Runs `forward` and updates the budget; None when it ran out of memory and the budget was halved.

        A batch of one sequence, or of few tokens, cannot be made smaller: its error is raised.
        """
        self.budget.start()
        try:
            values = forward()
        except Exception as error:
            if not is_out_of_memory(error) or sequences == 1 or tokens <= self.budget.minimum:
                raise
        else:
            self.budget.record_success(tokens)
            return values
        # Outside the handler, whose traceback holds the tensors of the failed forward.
        self.budget.halve(tokens)
        return None

    def _count(self, batch: Batch, padding: int) -> None:
        self.work.tokens += len(batch.tokens)
        self.work.padded += padding
        self.work.unshared += batch.unshared_tokens
        self.work.flops += self.shape.flops(len(batch.tokens), len(batch.targets), seen_keys(batch.layout))
