"""Keys and values of the rows that a transformers model decodes, and attention that reads them where they are.

transformers' own cache makes a new tensor of all tokens for each token, and its attention repeats keys and values for
every query head that shares them (grouped queries). On a CPU this takes longer than the model's matrix products. Here
a token is written in place, into storage that grows by blocks, and query heads that share keys are attended to
together, so that nothing is repeated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

GROWTH = 128
"""Tokens by which a layer's storage grows."""
_KNOWN_STATE = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of a cache, right-aligned: all rows have the same number of tokens, padding on the left included.

    Args:
        layer: after a prefill; its tensors are taken over.
        limit: the most tokens that a row will have.

    Attributes:
        keys, values: (rows, heads, tokens, head size), views of the storage. A sliding layer has at most the last
            `window` − 1 tokens.
        window: of a sliding layer, in tokens; None: full attention.
        tokens: that the layer has seen.
    """

    def __init__(self, layer: DynamicLayer, limit: int) -> None:
        super().__init__()
        self.window: int | None = layer.sliding_window if layer.is_sliding else None
        self.is_sliding = layer.is_sliding
        self.tokens: int = layer.get_seq_length()
        self.limit = limit
        self.dtype, self.device = layer.keys.dtype, layer.keys.device
        self.is_initialized = True
        self._use([layer.keys, layer.values], layer.keys.shape[-2])

    def _allocate(self, like: torch.Tensor, rows: int, kept: int) -> torch.Tensor:
        """Storage for `kept` tokens of each of `rows` rows, with room for more."""
        room = GROWTH if self.window is not None else min(GROWTH, max(self.limit - kept, 1))
        return like.new_empty((rows, like.shape[1], kept + room, like.shape[3]))

    def _use(self, storage: list[torch.Tensor], kept: int) -> None:
        """Takes over storage of keys and values whose first `kept` tokens are written."""
        self._storage = storage
        self._begin, self._end = 0, kept
        self._show()

    def _show(self) -> None:
        self.keys, self.values = (part[:, :, self._begin : self._end] for part in self._storage)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends (rows, heads, new tokens, head size), and returns what the new tokens attend to."""
        added = key_states.shape[-2]
        if self._end + added > self._storage[0].shape[-2]:
            kept, parts = self._end - self._begin, []
            for view in (self.keys, self.values):
                part = self._allocate(view, len(view), kept + added - 1)
                part[:, :, :kept] = view
                parts.append(part)
            self._use(parts, kept)
        for part, new in zip(self._storage, (key_states, value_states), strict=True):
            part[:, :, self._end : self._end + added] = new
        self._end += added
        self.tokens += added
        self._show()
        visible = self.keys, self.values
        if self.window is not None and self._end - self._begin >= self.window:
            self._begin = self._end - self.window + 1
            self._show()
        return visible

    def get_seq_length(self) -> int:
        """Tokens that the layer has seen."""
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that the next `query_length` tokens attend to, position of the first of them)."""
        kept = self._end - self._begin
        return kept + query_length, self.tokens - kept

    def select(self, rows: torch.Tensor) -> None:
        """Keeps the rows `rows`: int64, possibly with duplicates."""
        kept, parts = self._end - self._begin, []
        for view in (self.keys, self.values):
            part = self._allocate(view, len(rows), kept)
            torch.index_select(view, 0, rows, out=part[:, :, :kept])
            parts.append(part)
        self._use(parts, kept)

    def keep_last(self, tokens: int) -> None:
        """Drops all tokens but the last ones. For full attention only."""
        self._begin = self._end - tokens
        self.tokens = tokens
        self._show()

    def join(self, other: GrowingLayer) -> None:
        """Appends the rows of `other`, right-aligned. For full attention only."""
        self.limit = max(self.limit, other.limit)
        kept = max(self.tokens, other.tokens)
        parts = []
        for mine, others in ((self.keys, other.keys), (self.values, other.values)):
            part, first = self._allocate(mine, len(mine) + len(others), kept), 0
            for view in (mine, others):
                rows, start = part[first : first + len(view)], kept - view.shape[-2]
                rows[:, :, :start] = 0  # Masked, but a NaN would still reach the result.
                rows[:, :, start:kept] = view
                first += len(view)
            parts.append(part)
        self.tokens = kept
        self._use(parts, kept)


def grow_in_place(cache: DynamicCache, limit: int) -> None:
    """Replaces the layers of a cache that `can_select_rows` accepts. `limit`: the most tokens that a row will have."""
    cache.layers = [GrowingLayer(layer, limit) for layer in cache.layers]


def can_select_rows(model: PreTrainedModel, state: dict[str, Any]) -> bool:
    """True if a batch's rows can be copied and dropped, because everything that a forward leaves behind is known.

    Known are a cache of full and sliding attention layers, a mask and positions. Recurrent layers, custom caches and
    inputs other than tokens are not.
    """
    cache: Any = state.get("past_key_values")
    positions = state.get("position_ids")
    return (
        type(cache) is DynamicCache
        and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
        and set(state) <= _KNOWN_STATE
        and (positions is None or positions.dim() == 2)
        and type(model)._update_model_kwargs_for_generation is GenerationMixin._update_model_kwargs_for_generation
    )


def can_join(cache: DynamicCache) -> bool:
    """True if two batches can become one. Sliding layers cannot: they keep one length for all rows."""
    return not any(cache.is_sliding)


def _attend(
    forward: Callable[..., tuple[torch.Tensor, None]],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: (rows, heads, tokens, head size) in, (rows, tokens, heads, head size) out.

    `forward` is transformers' own.
    """
    rows, heads, tokens, size = query.shape
    shared = heads // key.shape[1]
    plain = kwargs.get("position_bias") is None and kwargs.get("cache") is None and not kwargs.get("dropout")
    per_row = attention_mask is None or attention_mask.shape[1:3] == (1, 1)
    if tokens > 1 or shared == 1 or not plain or not per_row:
        return forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    # The heads that share keys stand where the tokens of a query would: each attends to all keys, as without a
    # causal mask.
    out = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(rows, key.shape[1], shared, size), key, value, attn_mask=attention_mask, scale=scaling
    )
    return out.reshape(rows, 1, heads, value.shape[-1]), None


@contextlib.contextmanager
def shared_heads_together() -> Iterator[None]:
    """Within the block, models whose attention is "sdpa" attend with one query to grouped keys without repeating them.

    The name stays "sdpa", since some models ask for it and build other masks for other names.
    """
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = partial(_attend, before)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = before
