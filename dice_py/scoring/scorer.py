"""log π(y|x) of stored tokens: Σ_t log π(y_t | x, y_<t), by one forward and nothing else.

Batches without padding in which a prompt is computed once for all of its responses (scoring/packing.py), under a
token budget that is found (scoring/token_budget.py); the head on the positions that predict a response's token
alone, in tiles of positions × vocabulary with a running float32 log-sum-exp, so that the logits of a batch never
exist. The forward is in the model's type, what is summed is float32 and then float64.

A model whose layers do not take the packed attention, which is tried on the longest sequence and others of its
prompt, is run on rows of like length padded on the right, and that is said.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from dice_py.compute.failures import is_out_of_memory
from dice_py.config.stages import ScoreConfig
from dice_py.errors import DataError
from dice_py.events import Report, no_report
from dice_py.models.flops import Work, matmul_rate, shape_of
from dice_py.scoring.packed_attention import packed
from dice_py.scoring.packing import Batch, Group, Packer, Tokens, batches_by_budget, seen_keys
from dice_py.scoring.token_budget import TokenBudget

if TYPE_CHECKING:
    from transformers import PreTrainedModel
from dice_py.scoring.lm_head import LogitHead

_CHECKED = 3  # responses on which the packed forward is compared with the plain one


class Scorer:
    """Sums of log-probabilities under one model, which it does not own.

    Args:
        model: a causal language model in evaluation mode, on its device.
    """

    def __init__(self, model: PreTrainedModel, config: ScoreConfig, report: Report = no_report) -> None:
        self.model = model
        self.report = report
        self.head = LogitHead(model, config.logit_chunk)
        self.shape = shape_of(model)
        self.budget = TokenBudget(config.token_budget, self.shape, model.dtype, model.device, report)
        self.packs = True
        """Whether the model takes the packed attention, as far as it was tried."""
        self._tried = 0
        """Tokens of the longest sequence on which it was."""
        self.work = Work()

    def take_work(self) -> dict[str, object]:
        """What was done since the last call, with its rates."""
        work, self.work = self.work, Work()
        return work.rates(matmul_rate(self.model.device, self.model.dtype))

    def sums(
        self,
        prompts: Sequence[Tokens],
        responses: Sequence[Tokens],
        on_batch: Callable[[int], None] = lambda _: None,
    ) -> list[float]:
        """Σ_t log π(y_t | x, y_<t) for each (prompt, response) of token ids, in the given order.

        Args:
            prompts, responses: token ids; the sum is over the response's tokens, EOS included when it is there.
            on_batch: called with the number of sequences done since the last call.

        Raises:
            DataError: an empty prompt or response, or a token outside the model's vocabulary.
        """
        if not responses:
            return []
        prompts, responses = ([np.asarray(part, dtype=np.int64) for part in parts] for parts in (prompts, responses))
        self._check_tokens(prompts, responses)
        with torch.inference_mode():
            if not self._tried:
                self.head.check([*prompts[0].tolist(), *responses[0].tolist()])
            self._try_packed(prompts, responses)
            run = self._packed_batches if self.packs else self._padded_batches
            sums = [0.0] * len(responses)
            started = time.perf_counter()
            for rows, totals in run(prompts, responses):
                for row, total in zip(rows, totals, strict=True):
                    sums[row] = total
                now = time.perf_counter()
                self.work.seconds += now - started
                self.work.sequences += len(rows)
                started = now
                on_batch(len(rows))
        return sums

    def _check_tokens(self, prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> None:
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

    def _try_packed(self, prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> None:
        """Compares the packed forward with one sequence at a time, on the longest and some others of its prompt.

        Again for sequences that are longer by half: what an attention does not know of (a window, say) may only
        show there.
        """
        lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        window = getattr(self.model.config.get_text_config(), "sliding_window", None) or 0
        crosses = self._tried <= window < lengths[longest]
        if not self.packs or (2 * lengths[longest] <= 3 * self._tried and not crosses):
            return
        self._tried = lengths[longest]
        name = type(self.model).__name__
        if not getattr(self.model, "_supports_attention_backend", False):
            self._pad(f"{name} does not take other attention than its own")
            return
        prompt = np.asarray(prompts[longest])
        others = (row for row in range(len(lengths)) if row != longest and np.array_equal(prompts[row], prompt))
        rows = [longest, *itertools.islice(others, _CHECKED - 1)]
        if len(rows) == 1:
            rows *= 2  # one alone is packed as it is plain: what mixes the sequences of a batch would not show
        try:
            ours = self._packed(Batch([Group(prompt, rows)], responses))
        except Exception as error:
            if is_out_of_memory(error):
                self._pad(f"out of memory where the packed attention of {name} was to be tried")
            else:
                first = next(iter(str(error).splitlines()), "")
                self._pad(f"{name} does not run with the packed attention ({type(error).__name__}: {first})")
            return
        for row, mine in zip(rows, ours, strict=True):
            theirs = self._padded([row], prompts, responses)[0]
            tokens = len(responses[row])
            # Rounding over as many tokens; in a short type each is off by some hundredths, either way. A wrong mask
            # is off by more.
            exact = self.model.dtype == torch.float32
            allowed = 1e-5 * (abs(theirs) + tokens) if exact else 0.1 * (1 + tokens**0.5)
            if not abs(mine - theirs) <= allowed:
                self._pad(
                    f"with the packed attention {name} gives a response of {len(responses[row])} tokens {mine:.4f}, "
                    f"not {theirs:.4f}"
                )
                return

    def _pad(self, why: str) -> None:
        self.packs = False
        self.report("note", text=f"{why}: scored in padded rows, each with its own prompt (slower)")

    def _packed_batches(
        self, prompts: Sequence[Tokens], responses: Sequence[Tokens]
    ) -> Iterator[tuple[list[int], list[float]]]:
        packer = Packer(prompts, responses)
        while packer:
            batch = packer.take(self.budget.tokens)
            size = len(batch.tokens)
            self.budget.start()
            totals = self._or_halve(lambda batch=batch: self._packed(batch), size, len(batch.rows))  # type: ignore[misc]
            if totals is None:
                packer.give_back(batch)
                continue
            self.budget.fitted(size)
            self._count(batch, padded=0)
            yield batch.rows, totals

    def _padded_batches(
        self, prompts: Sequence[Tokens], responses: Sequence[Tokens]
    ) -> Iterator[tuple[list[int], list[float]]]:
        lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
        left = list(range(len(lengths)))
        while left:
            taken = next(batches_by_budget([lengths[row] for row in left], self.budget.tokens))
            rows = [left[at] for at in taken]
            size = len(rows) * lengths[rows[0]]
            self.budget.start()
            totals = self._or_halve(
                lambda rows=rows: self._padded(rows, prompts, responses),  # type: ignore[misc]
                size,
                len(rows),
            )
            if totals is None:
                continue
            self.budget.fitted(size)
            batch = Batch([Group(prompts[row], [row]) for row in rows], responses)
            self._count(batch, padded=size - sum(lengths[row] for row in rows))
            gone = set(rows)
            left = [row for row in left if row not in gone]
            yield rows, totals

    def _or_halve(self, forward: Callable[[], list[float]], tokens: int, sequences: int) -> list[float] | None:
        """What `forward` gives; None when it ran out of memory and the budget was halved.

        A batch of one sequence, or of few tokens, cannot be made smaller: its error is raised.
        """
        try:
            return forward()
        except Exception as error:
            if not is_out_of_memory(error) or sequences == 1 or tokens <= self.budget.least:
                raise
        # Out of the handler, where the traceback no longer holds the tensors of the failed forward.
        self.budget.halve(tokens)
        return None

    def _count(self, batch: Batch, padded: int) -> None:
        layout = batch.layout
        self.work.tokens += len(batch.tokens)
        self.work.padded += padded
        self.work.unshared += batch.unshared_tokens
        self.work.flops += self.shape.flops(len(batch.tokens), len(batch.targets), seen_keys(layout))

    def _packed(self, batch: Batch) -> list[float]:
        device = self.model.device
        ids, positions, predicting, targets = (
            torch.from_numpy(part).to(device)
            for part in (batch.tokens, batch.positions, batch.predicting, batch.targets)
        )
        with packed(self.model, batch.layout):
            hidden = self.head.backbone(
                input_ids=ids[None], position_ids=positions[None], use_cache=False
            ).last_hidden_state[0]
        return self._totals(self.head.token_logps(hidden[predicting], targets), batch.layout.responses[:, 1])

    def _padded(self, rows: list[int], prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> list[float]:
        device = self.model.device
        lengths = [len(prompts[row]) + len(responses[row]) for row in rows]
        # Padded on the right: with causal attention no real token sees the padding, so the padding
        # token's id does not matter, and positions count from 0 in every row.
        ids = torch.zeros((len(rows), max(lengths)), dtype=torch.long)
        mask = torch.zeros((len(rows), max(lengths)), dtype=torch.long)
        predicts = torch.zeros((len(rows), max(lengths)), dtype=torch.bool)
        for at, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            ids[at, :length] = torch.from_numpy(np.concatenate([prompts[row], responses[row]]))
            mask[at, :length] = 1
            predicts[at, len(prompts[row]) - 1 : length - 1] = True
        hidden = self.head.backbone(
            input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
        ).last_hidden_state
        targets = ids.roll(-1, dims=1)[predicts].to(device)
        logps = self.head.token_logps(hidden[predicts.to(device)], targets)
        return self._totals(logps, np.array([len(responses[row]) for row in rows]))

    def _totals(self, logps: torch.Tensor, lengths: np.ndarray) -> list[float]:
        ends = lengths.cumsum()
        summed = logps.cpu().double().cumsum(dim=0)
        at_ends = summed[torch.from_numpy(ends - 1)].numpy()
        totals: list[float] = np.diff(at_ends, prepend=0.0).tolist()
        return totals


def sequence_logps(
    model: PreTrainedModel,
    prompts: Sequence[Tokens],
    responses: Sequence[Tokens],
    config: ScoreConfig,
    on_batch: Callable[[int], None] = lambda _: None,
    report: Report = no_report,
) -> list[float]:
    """`Scorer.sums` of a model that is scored with once."""
    return Scorer(model, config, report).sums(prompts, responses, on_batch)
