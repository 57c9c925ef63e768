"""Attention over a packed row of tokens: a response sees its prompt and itself, a prompt sees itself.

Registered with transformers as an attention implementation of its own, which any model takes whose layers call
the attention interface. Queries, keys and values come as (1, heads, tokens, size) of the whole batch; where they
belong is in the `Layout` (scoring/packing.py) that `packed` sets for the time of a forward.

On a GPU in a short type it is one call of the flash kernel for sequences of many lengths, causal from the bottom
right, which is what a response after its prompt needs. Elsewhere sequences of like lengths are padded together,
within attention alone, and go through `scaled_dot_product_attention`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AttentionInterface

from dice_py.scoring.packing import PackedLayout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


NAME = "dice_packed"

_ALIKE = 1.4  # lengths within this factor are padded to one
_SCORES = 2**25  # entries of a mask at most, so that a block of long sequences stays small


@dataclass(frozen=True)
class _Block:
    """Sequences of like lengths: (rows, queries) and (rows, keys) token numbers, and who sees whom."""

    queries: torch.Tensor
    keys: torch.Tensor
    real: torch.Tensor
    """(rows, queries) bool: not padding."""
    mask: torch.Tensor | None
    """(rows or 1, 1, queries, keys) bool; None is plainly causal."""


@dataclass
class Packed:
    """A layout on a device, with what each kind of kernel needs of it (made once, used by every layer)."""

    layout: PackedLayout
    device: torch.device
    _blocks: dict[int | None, list[_Block]] = field(default_factory=dict)
    _varlen: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int] | None = None

    def sequences(self) -> np.ndarray:
        """(sequences, 4): start and length of the queries, start and length of what is seen before them."""
        prompts = np.pad(self.layout.prompts, ((0, 0), (0, 2)))
        return np.concatenate([prompts, self.layout.responses])

    def blocks(self, window: int | None) -> list[_Block]:
        """Padded blocks for a sliding window of that many tokens, or for none."""
        if window not in self._blocks:
            self._blocks[window] = list(_blocks(self.sequences(), window, self.device))
        return self._blocks[window]

    def varlen(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
        """(keys, ends of queries, ends of keys, longest query, longest key) of the flash kernel."""
        if self._varlen is None:
            sequences = self.sequences()
            sequences = sequences[np.argsort(sequences[:, 0])]  # queries stand in the order of the tokens
            parts = []
            for start, length, before, seen in sequences:
                parts += [np.arange(before, before + seen), np.arange(start, start + length)]
            lengths = np.stack([sequences[:, 1], sequences[:, 1] + sequences[:, 3]])
            ends = np.pad(lengths.cumsum(axis=1), ((0, 0), (1, 0))).astype(np.int32)
            keys = torch.from_numpy(np.concatenate(parts)).to(self.device)
            q_ends, k_ends = (torch.from_numpy(end).to(self.device) for end in ends)
            self._varlen = (keys, q_ends, k_ends, int(lengths[0].max()), int(lengths[1].max()))
        return self._varlen


def _blocks(sequences: np.ndarray, window: int | None, device: torch.device) -> Iterator[_Block]:
    bins: dict[tuple[int, int], list[int]] = {}
    for number, (_, length, _, seen) in enumerate(sequences.tolist()):
        place = (math.ceil(math.log(length, _ALIKE)), math.ceil(math.log(seen, _ALIKE)) if seen else -1)
        bins.setdefault(place, []).append(number)
    for numbers in bins.values():
        found = sequences[numbers]
        size = int(found[:, 1].max()) * int((found[:, 1] + found[:, 3]).max())
        step = max(1, _SCORES // size)
        for at in range(0, len(found), step):
            yield _block(found[at : at + step], window, device)


def _block(sequences: np.ndarray, window: int | None, device: torch.device) -> _Block:
    starts, lengths, before, seen = sequences.T
    queries, prefix = int(lengths.max()), int(seen.max())
    own = np.arange(queries)
    real = own < lengths[:, None]
    query_at = np.where(real, starts[:, None] + own, starts[:, None])
    # What comes before stands at the right end of its part: padding on the left, away from the queries' own.
    offset = np.arange(prefix) - (prefix - seen[:, None])
    key_at = np.concatenate([np.where(offset >= 0, before[:, None] + offset, starts[:, None]), query_at], axis=1)
    plain = prefix == 0 and (window is None or queries <= window)
    mask = None
    if not plain:
        distance = (prefix + own)[:, None] - np.arange(prefix + queries)
        causal = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        rows = causal[None]
        if (seen != prefix).any():
            there = np.concatenate([offset >= 0, np.ones((len(sequences), queries), dtype=bool)], axis=1)
            rows = causal[None] & there[:, None]
        mask = torch.from_numpy(rows[:, None].copy()).to(device)
    return _Block(
        torch.from_numpy(query_at).to(device),
        torch.from_numpy(key_at).to(device),
        torch.from_numpy(real).to(device),
        mask,
    )


_current: list[Packed] = []


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: (1, heads, tokens, size) in, (1, tokens, heads, size) out."""
    del module, attention_mask
    packed = _current[-1]
    if query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16):
        return _flash(packed, query, key, value, scaling, sliding_window), None
    return _padded(packed, query, key, value, scaling, sliding_window), None


def _flash(
    packed: Packed,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    keys, q_ends, k_ends, longest_query, longest_key = packed.varlen()
    # The kernel knows one size of a head; where values have a smaller one, what is padded comes out as zeros.
    size = value.shape[-1]
    value = torch.nn.functional.pad(value, (0, query.shape[-1] - size))
    out = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1)[keys],
        value[0].transpose(0, 1)[keys],
        q_ends,
        k_ends,
        longest_query,
        longest_key,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, torch.Tensor)
    return out[None, ..., :size]


def _padded(
    packed: Packed,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    # Tokens first: a token's heads are gathered in one piece.
    q, k, v = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
    out = torch.empty(
        (*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device
    )  # values may have a size of their own
    for block in packed.blocks(window):
        attended = torch.nn.functional.scaled_dot_product_attention(
            q[block.queries].transpose(1, 2),
            k[block.keys].transpose(1, 2),
            v[block.keys].transpose(1, 2),
            attn_mask=block.mask,
            is_causal=block.mask is None,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        out[block.queries[block.real]] = attended.transpose(1, 2)[block.real]
    return out[None]


AttentionInterface.register(NAME, attend)


@contextlib.contextmanager
def packed(model: PreTrainedModel, layout: PackedLayout) -> Iterator[None]:
    """Forwards of `model` in this block are of one packed row of tokens, laid out so."""
    before = model.config._attn_implementation
    _current.append(Packed(layout, model.device))
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        _current.pop()
