"""Rows that a transformers model decodes together: seeded draws, rows that leave and rows that join.

`generate` draws from one global generator, so a row's sample would depend on the rows beside it. Here each row has
random numbers of its own, from its seed alone, and a draw that the last bits of the logits hardly ever change: they
differ with the batch that a row is in. The draw is an exponential race (the token i of the greatest p_i / E_i, each
E_i an exponential random number, is i with probability p_i), first between blocks of the vocabulary by their sums and
then in the block that won: so a few hundred numbers do for any vocabulary. Inverting the cumulative distribution at
one uniform number has as many edges to fall over as there are tokens: with 32,000 of them, one response of 48 tokens
in thirteen was another one in another batch, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import (
    DynamicCache,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dice_py.config.stages import GenerateConfig
from dice_py.generation.engines.base import Sample, SampleId

BLOCK = 256
"""Tokens of a block of the vocabulary."""
_CROWD = 0.875
"""Rows that ended are taken out when fewer than this share of a batch's rows is left: it copies the cache."""
_STATE = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}


class SeededSampling(LogitsProcessor):  # type: ignore[misc]
    """Draws each row's next token with the row's own random numbers, and sums its raw log-probability.

    Temperature, top-k and top-p are transformers' own warpers. As a logits processor it leaves one finite score per
    row for the greedy search to find.

    Args:
        seeds: of the rows.
        stops: token ids that end a row.
    """

    def __init__(self, seeds: Sequence[int], config: GenerateConfig, stops: list[int], device: torch.device) -> None:
        self.draws = [np.random.Generator(np.random.Philox(key=seed)) for seed in seeds]
        self.stops = torch.tensor(stops, device=device)
        self.steps = torch.zeros(len(seeds), dtype=torch.long, device=device)
        self.alive = torch.ones(len(seeds), dtype=torch.bool, device=device)
        self.logp = torch.zeros(len(seeds), dtype=torch.float32, device=device)
        self.warpers = LogitsProcessorList()
        if config.temperature != 1.0:
            self.warpers.append(TemperatureLogitsWarper(config.temperature))
        if config.top_k:
            self.warpers.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(config.top_p))

    def draw(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(rows, tokens so far), (rows, vocabulary) → (rows, 1) the next tokens."""
        raw = scores.float()
        # A clone, since warpers may write into what they are given.
        warped = self.warpers(input_ids, raw.clone()) if self.warpers else raw
        blocks = torch.nn.functional.pad(warped, (0, -raw.shape[1] % BLOCK), value=-torch.inf)
        blocks = blocks.view(len(raw), -1, BLOCK)
        sums = torch.logsumexp(blocks, dim=-1)
        uniforms = np.stack([draw.random(blocks.shape[1] + BLOCK) for draw in self.draws])
        # log of an exponential random number; 0 is one of 2^53 numbers, and has no logarithm.
        times = (-torch.log1p(-torch.from_numpy(uniforms).to(raw.device).clamp_(min=2.0**-54))).log_()
        block = (sums - times[:, : blocks.shape[1]]).argmax(dim=1, keepdim=True)
        inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).squeeze(1)
        token = block * BLOCK + (inside - times[:, blocks.shape[1] :]).argmax(dim=1, keepdim=True)
        total = torch.logsumexp(sums if warped is raw else raw, dim=-1)
        gained = raw.gather(1, token).squeeze(1) - total
        self.logp += torch.where(self.alive, gained, torch.zeros_like(gained))
        self.alive &= ~torch.isin(token.squeeze(1), self.stops)
        self.steps += 1
        return token

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        """(rows, tokens so far), (rows, vocabulary) → scores with one finite entry per row."""
        return torch.full_like(scores, -torch.inf).scatter_(1, self.draw(input_ids, scores), 0.0)

    def select(self, rows: torch.Tensor) -> None:
        """Keeps these rows, each once."""
        self.draws = [self.draws[row] for row in rows.tolist()]
        for name in ("steps", "alive", "logp"):
            setattr(self, name, getattr(self, name)[rows])

    def join(self, other: SeededSampling) -> None:
        """Appends the rows of another."""
        self.draws += other.draws
        for name in ("steps", "alive", "logp"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))


def can_select_rows(model: PreTrainedModel, state: dict[str, Any]) -> bool:
    """Whether a batch's rows can be copied and dropped: everything that a forward leaves behind is known.

    That is a cache of plain and sliding attention layers, a mask and positions. Recurrent layers, caches of a
    model's own, and inputs beside the tokens are not.
    """
    cache: Any = state.get("past_key_values")
    positions = state.get("position_ids")
    return (
        type(cache) is DynamicCache
        and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
        and set(state) <= _STATE
        and (positions is None or positions.dim() == 2)
        and type(model)._update_model_kwargs_for_generation is GenerationMixin._update_model_kwargs_for_generation
    )


def can_join(cache: DynamicCache) -> bool:
    """Whether two batches can become one: a sliding layer counts one length for all of its rows."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


class Rows:
    """Rows that are decoded together. Their last tokens are drawn, and not in the cache yet.

    Args:
        limits: of each row, the tokens of its prompt and of its longest response.
        state: what the model is called with, as `generate` prepared it and the prefill left it.
        tokens: (rows, max_new_tokens), filled as far as `sampling.steps`.
    """

    def __init__(
        self,
        places: list[SampleId],
        limits: list[int],
        sampling: SeededSampling,
        state: dict[str, Any],
        tokens: torch.Tensor,
    ) -> None:
        self.places = places
        self.limits = limits
        self.sampling = sampling
        self.state = state
        self.tokens = tokens
        self.last = tokens[:, :0]
        self.told = [False] * len(places)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def cache(self) -> DynamicCache:
        cache: DynamicCache = self.state["past_key_values"]
        return cache

    def draw(self, logits: torch.Tensor) -> None:
        """(rows, vocabulary) → the next token of each row, written down."""
        # A row that ended and was not taken out yet goes on in its last place.
        place = self.sampling.steps.clamp(max=self.tokens.shape[1] - 1)[:, None]
        self.last = self.sampling.draw(self.tokens, logits)
        self.tokens.scatter_(1, place, self.last)

    def advance(self, model: PreTrainedModel) -> None:
        """One forward, and a token more for each row."""
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

    def take_finished(self, finished: dict[SampleId, Sample]) -> None:
        """Moves what ended into `finished`; its rows leave once they are many."""
        limit = self.tokens.shape[1]
        left, full = [], False
        now = zip(self.sampling.alive.tolist(), self.sampling.steps.tolist(), strict=True)
        for row, (alive, steps) in enumerate(now):
            full = full or steps >= limit
            if alive and steps < limit:
                left.append(row)
            elif not self.told[row]:
                self.told[row] = True
                reason = "length" if alive else "stop"
                tokens = self.tokens[row, :steps].tolist()
                finished[self.places[row]] = Sample(tokens, reason, float(self.sampling.logp[row]))
        # A row that goes on behind its limit would leave the model's positions.
        if len(left) < len(self) * _CROWD or full:
            self._select(left)

    def _select(self, rows: list[int]) -> None:
        """Keeps these rows, each once."""
        index = torch.tensor(rows, dtype=torch.long, device=self.tokens.device)
        self.places = [self.places[row] for row in rows]
        self.limits = [self.limits[row] for row in rows]
        self.told = [self.told[row] for row in rows]
        self.tokens, self.last = self.tokens[index], self.last[index]
        self.sampling.select(index)
        select_state(self.state, index)
        if rows:
            self._trim()

    def _trim(self) -> None:
        """Takes out the columns that are padding in every row that is left."""
        mask = self.state.get("attention_mask")
        if mask is None or not can_join(self.cache):
            return
        width = int(mask.sum(dim=1).max())
        mask = mask[:, -width:]
        self.state["attention_mask"] = None if bool(mask.all()) else mask
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, -width:], layer.values[:, :, -width:]

    def join(self, other: Rows) -> None:
        """Takes the rows of another batch in, right-aligned."""
        width = max(rows.cache.get_seq_length() for rows in (self, other))

        def joined(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
            padded = []
            for part in parts:
                shape = list(part.shape)
                shape[dim] = width - shape[dim]
                padded.append(torch.cat([part.new_zeros(shape), part], dim=dim) if shape[dim] else part)
            return torch.cat(padded)

        masks = []
        for rows in (self, other):
            mask = rows.state.get("attention_mask")
            masks.append(rows.tokens.new_ones(len(rows), rows.cache.get_seq_length()) if mask is None else mask)
        mask = joined(masks, 1)
        self.state["attention_mask"] = None if bool(mask.all()) else mask
        for mine, others in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.keys = joined([mine.keys, others.keys], 2)
            mine.values = joined([mine.values, others.values], 2)
        if self.state.get("position_ids") is not None:
            positions = [rows.state["position_ids"][:, -1:] for rows in (self, other)]
            self.state["position_ids"] = torch.cat(positions)
        self.places += other.places
        self.limits += other.limits
        self.told += other.told
        self.tokens = torch.cat([self.tokens, other.tokens])
        self.last = torch.cat([self.last, other.last])
        self.sampling.join(other.sampling)


def select_state(state: dict[str, Any], index: torch.Tensor) -> None:
    """Keeps rows of what `can_select_rows` knows."""
    state["past_key_values"].reorder_cache(index)
    for name in ("attention_mask", "position_ids"):
        if state.get(name) is not None:
            state[name] = state[name][index]
