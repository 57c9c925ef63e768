"""Rows that a transformers model decodes together: seeded draws, rows that leave and rows that join.

`generate` draws from one global generator, so a row's sample would depend on the rows beside it. Here each row has
random numbers of its own, from its seed alone (generation/engines/random_numbers.py). The last bits of the logits,
which differ from batch to batch, must not change a draw either. Inverting the cumulative distribution at one uniform
number is not robust enough: it has as many boundaries as there are tokens. With a vocabulary of 32,000 in float32, one
response of 48 tokens in thirteen changed with the batch.

The draw is an exponential race instead: with exponential random numbers E_i, token i has the largest p_i / E_i with
probability p_i. It runs first between blocks of the vocabulary, by their sums, and then within the winning block, so
that a few hundred random numbers are enough for any vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from dice_py.config.stages import GenerateConfig
from dice_py.generation.engines.base import Sample, SampleId
from dice_py.generation.engines.cache import can_join
from dice_py.generation.engines.logits import LogitChanges, MinP
from dice_py.generation.engines.nucleus import TopP
from dice_py.generation.engines.random_numbers import RandomNumbers, numbers_for
from dice_py.generation.engines.stop_strings import StopStrings
from dice_py.models.vocabulary import KnownTokens

BLOCK = 256
"""Tokens in a block of the vocabulary."""
COMPACT_BELOW = 0.875
"""Finished rows are removed when less than this share of a batch is unfinished. Removal copies the cache."""
LOGITS_AT_ONCE = 2**19
"""Logits of a draw that are worked on together on a CPU: 2 MiB of float32 stay in its cache."""
LOGITS_AT_ONCE_GPU = 2**25
"""On a GPU: enough to keep it busy; 128 MiB of float32, a few times."""


class SeededSampling(LogitsProcessor):  # type: ignore[misc]
    """Draws each row's next token with the row's own random numbers, and sums its raw log-probability.

    Temperature and top-k are transformers' own warpers. As a logits processor it leaves one finite score per
    row, which greedy search then selects.

    Args:
        seeds: one for each row.
        stops: token ids that end a row, beside those of `config.sampling_params`.
        numbers: the random numbers; None: `numbers_for` the device.
        known: the ids that may be drawn; None: all.
        prompts: token ids of each row's prompt, for penalties and stop strings.
        tokenizer: for stop strings.

    Attributes:
        steps: (rows,) int64, tokens drawn.
        lengths: (rows,) int64, tokens drawn while the row was alive: those of its response.
        alive: (rows,) bool, False once a stop token, or the last token of a stop string, was drawn.
        logp: (rows,) float32, Σ log π of the response's tokens in nats, of the raw logits.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        config: GenerateConfig,
        stops: list[int],
        device: torch.device,
        numbers: type[RandomNumbers] | None = None,
        known: KnownTokens | None = None,
        prompts: Sequence[list[int]] = (),
        tokenizer: Any = None,
    ) -> None:
        options = config.transformers_options()
        stops = list(dict.fromkeys([*stops, *options.stop_token_ids]))
        self.numbers = (numbers or numbers_for(device))(seeds, device)
        self.stops = torch.tensor(stops, device=device)
        self.known = known
        self.changes = LogitChanges(options, stops, prompts, device) if options.changes_logits else None
        self.strings = StopStrings(options, tokenizer, prompts) if options.stop else None
        self._unknown: torch.Tensor | None = None  # ids that are no token; made once the vocabulary's size is seen
        self.steps = torch.zeros(len(seeds), dtype=torch.long, device=device)
        self.lengths = torch.zeros(len(seeds), dtype=torch.long, device=device)
        self.alive = torch.ones(len(seeds), dtype=torch.bool, device=device)
        self.logp = torch.zeros(len(seeds), dtype=torch.float32, device=device)
        self.warpers = LogitsProcessorList()
        if config.temperature != 1.0:
            self.warpers.append(TemperatureLogitsWarper(config.temperature))
        if options.min_p:
            self.warpers.append(MinP(options.min_p))
        if config.top_k:
            self.warpers.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1.0:
            self.warpers.append(TopP(config.top_p))

    def draw(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(rows, tokens so far) int64 and (rows, vocabulary) logits → (rows, 1) int64, the next tokens."""
        uniforms = self.numbers.draw(-(-scores.shape[1] // BLOCK) + BLOCK)
        # The logarithm of exponential random numbers. A uniform number may be 0, which has none: hence the clamp.
        times = (-torch.log1p(-uniforms.clamp_(min=2.0**-54))).log_()
        if self.known is not None and self._unknown is None:
            self._unknown = torch.tensor(self.known.unknown(scores.shape[1]), dtype=torch.long, device=scores.device)
        at_once = LOGITS_AT_ONCE if scores.device.type == "cpu" else LOGITS_AT_ONCE_GPU
        rows = max(1, at_once // scores.shape[1])
        changed = scores if self.changes is None else self.changes.apply(scores.float(), self.steps)
        split = (tensor.split(rows) for tensor in (input_ids, scores, changed, times))
        parts = [self._race(*part) for part in zip(*split, strict=True)]
        token, token_logp = (torch.cat(part) for part in zip(*parts, strict=True))
        if self.changes is not None:
            self.changes.add(token)
        self.logp += torch.where(self.alive, token_logp, torch.zeros_like(token_logp))
        self.lengths += self.alive
        # Not `isin`, which sorts if there are many stop tokens, and then the host waits for a GPU.
        self.alive &= (token != self.stops).all(dim=1)
        self.steps += 1
        if self.strings is not None:
            completed = self.strings.add(token[:, 0].tolist(), self.alive.tolist())
            self.alive &= ~torch.tensor(completed, device=token.device)
        return token

    def _race(
        self, input_ids: torch.Tensor, scores: torch.Tensor, changed: torch.Tensor, times: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, 1) int64 tokens, and their (rows,) raw log-probabilities, for some rows of `draw`."""
        raw = scores.float()
        # The log-probability is of the raw logits, as the scorer computes it: changes and the mask come after it.
        drawable = raw if self.changes is None else changed
        if self._unknown is not None and len(self._unknown):
            drawable = drawable.index_fill(1, self._unknown, -torch.inf)
        warped = self.warpers(input_ids, drawable)  # None of them writes into its input.
        blocks = warped
        if padding := -raw.shape[1] % BLOCK:
            blocks = torch.nn.functional.pad(blocks, (0, padding), value=-torch.inf)
        blocks = blocks.view(len(raw), -1, BLOCK)
        sums = torch.logsumexp(blocks, dim=-1)
        block = (sums - times[:, :-BLOCK]).argmax(dim=1, keepdim=True)
        inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).squeeze(1)
        token = block * BLOCK + (inside - times[:, -BLOCK:]).argmax(dim=1, keepdim=True)
        total = torch.logsumexp(sums if warped is raw else raw, dim=-1)
        return token, raw.gather(1, token).squeeze(1) - total

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        """(rows, tokens so far), (rows, vocabulary) → scores with one finite entry per row."""
        return torch.full_like(scores, -torch.inf).scatter_(1, self.draw(input_ids, scores), 0.0)

    def select(self, rows: torch.Tensor) -> None:
        """Keeps the given rows. `rows` is int64, without duplicates."""
        self.numbers.select(rows.tolist())
        if self.changes is not None:
            self.changes.select(rows)
        if self.strings is not None:
            self.strings.select(rows.tolist())
        for name in ("steps", "lengths", "alive", "logp"):
            setattr(self, name, getattr(self, name)[rows])

    def join(self, other: SeededSampling) -> None:
        """Appends the rows of `other`."""
        self.numbers.join(other.numbers)
        if self.changes is not None and other.changes is not None:
            self.changes.join(other.changes)
        if self.strings is not None and other.strings is not None:
            self.strings.join(other.strings)
        for name in ("steps", "lengths", "alive", "logp"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))


class Rows:
    """Rows that are decoded together. Their last tokens are drawn, but not in the cache yet.

    Args:
        sample_ids: one for each row.
        limits: for each row, the most tokens of its prompt and response.
        sampling: of the same rows.
        state: the model's inputs, as `generate` prepared them and the prefill left them.
        tokens: (rows, max_new_tokens) int64; the first `steps` of each row are drawn.

    Attributes:
        steps: for each row, the tokens drawn: as `sampling.steps`, but known without asking a device.
    """

    def __init__(
        self,
        sample_ids: list[SampleId],
        limits: list[int],
        sampling: SeededSampling,
        state: dict[str, Any],
        tokens: torch.Tensor,
    ) -> None:
        self.sample_ids = sample_ids
        self.limits = limits
        self.sampling = sampling
        self.state = state
        self.tokens = tokens
        self.last = tokens[:, :0]
        self.steps = [0] * len(sample_ids)
        self.reported = [False] * len(sample_ids)

    def __len__(self) -> int:
        return len(self.sample_ids)

    @property
    def cache(self) -> DynamicCache:
        """Keys and values of every row's tokens but the last."""
        cache: DynamicCache = self.state["past_key_values"]
        return cache

    def draw(self, logits: torch.Tensor) -> None:
        """Draws each row's next token from (rows, vocabulary) logits, and stores it."""
        # A row that ended but was not removed yet overwrites its last column.
        column = self.sampling.steps.clamp(max=self.tokens.shape[1] - 1)[:, None]
        self.last = self.sampling.draw(self.tokens, logits)
        self.tokens.scatter_(1, column, self.last)
        self.steps = [steps + 1 for steps in self.steps]

    def advance(self, model: PreTrainedModel) -> None:
        """Runs one forward, and draws one more token for each row."""
        state = self.state
        if state.get("attention_mask") is not None:
            mask = state["attention_mask"]
            state["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if state.get("position_ids") is not None:
            state["position_ids"] = state["position_ids"][:, -1:] + 1
        inputs = model.prepare_inputs_for_generation(self.last, next_sequence_length=1, **state)
        output = model(**inputs, return_dict=True)
        state["past_key_values"] = output.past_key_values
        self.draw(output.logits[:, -1])

    def move_finished(self, finished: dict[SampleId, Sample]) -> None:
        """Moves the samples that ended into `finished`; their rows are removed once there are enough of them."""
        limit = self.tokens.shape[1]
        unfinished, ended = [], []
        for row, (alive, steps) in enumerate(zip(self.sampling.alive.tolist(), self.steps, strict=True)):
            if alive and steps < limit:
                unfinished.append(row)
            elif not self.reported[row]:
                self.reported[row] = True
                ended.append((row, steps, "length" if alive else "stop"))
        if ended:
            index = torch.tensor([row for row, _, _ in ended], device=self.tokens.device)
            tokens, logp = self.tokens[index].tolist(), self.sampling.logp[index].tolist()
            for at, (row, steps, reason) in enumerate(ended):
                finished[self.sample_ids[row]] = Sample(tokens[at][:steps], reason, logp[at])
        # Decoded beyond its limit, a row could exceed the model's positions.
        if len(unfinished) < len(self) * COMPACT_BELOW or max(self.steps) >= limit:
            self._select(unfinished)

    def _select(self, rows: list[int]) -> None:
        """Keeps the given rows, without duplicates."""
        index = torch.tensor(rows, dtype=torch.long, device=self.tokens.device)
        self.sample_ids = [self.sample_ids[row] for row in rows]
        self.limits = [self.limits[row] for row in rows]
        self.reported = [self.reported[row] for row in rows]
        self.steps = [self.steps[row] for row in rows]
        self.tokens, self.last = self.tokens[index], self.last[index]
        self.sampling.select(index)
        select_state(self.state, index)
        if rows:
            self._trim()

    def _trim(self) -> None:
        """Removes the columns that are padding in every row."""
        mask = self.state.get("attention_mask")
        if mask is None or not can_join(self.cache):
            return
        width = int(mask.sum(dim=1).max())
        mask = mask[:, -width:]
        self.state["attention_mask"] = None if bool(mask.all()) else mask
        for layer in self.cache.layers:
            layer.keep_last(width)

    def join(self, other: Rows) -> None:
        """Appends the rows of `other`, right-aligned."""
        masks = []
        width = max(rows.cache.get_seq_length() for rows in (self, other))
        for rows in (self, other):
            length = rows.cache.get_seq_length()
            mask = rows.state.get("attention_mask")
            mask = rows.tokens.new_ones(len(rows), length) if mask is None else mask
            masks.append(torch.nn.functional.pad(mask, (width - length, 0)))
        mask = torch.cat(masks)
        self.state["attention_mask"] = None if bool(mask.all()) else mask
        for mine, others in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.join(others)
        if self.state.get("position_ids") is not None:
            positions = [rows.state["position_ids"][:, -1:] for rows in (self, other)]
            self.state["position_ids"] = torch.cat(positions)
        self.sample_ids += other.sample_ids
        self.limits += other.limits
        self.reported += other.reported
        self.steps += other.steps
        self.tokens = torch.cat([self.tokens, other.tokens])
        self.last = torch.cat([self.last, other.last])
        self.sampling.join(other.sampling)


def select_state(state: dict[str, Any], index: torch.Tensor) -> None:
    """Keeps the rows `index` (int64, possibly with duplicates) of a state whose cache grows in place."""
    for layer in state["past_key_values"].layers:
        layer.select(index)
    for name in ("attention_mask", "position_ids"):
        if state.get(name) is not None:
            state[name] = state[name][index]
