"""Attention over a packed row of tokens: a prompt attends to itself, a response to its prompt and itself.

Registered with transformers as an attention implementation, for any model whose layers use the attention interface.
Queries, keys and values of the complete batch come as (1, heads, tokens, head size). `use_packed_attention` sets the
layout (`PackedLayout` in models/packing.py) that says which tokens belong together.

On a GPU in float16 or bfloat16 the batch is one call of the flash kernel for sequences of different lengths. Its
causal mask is aligned to the end of queries and keys, as a response after its prompt needs. Elsewhere sequences of
similar length are padded together, within attention only, and use `scaled_dot_product_attention`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AttentionInterface

from dice_py.models.packing import PackedLayout
from dice_py.models.sequence_attention import MEAN_TOKENS, SequencePlan, sequence_attention
from dice_py.models.transfer import to_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "dice_packed"

_LENGTH_RATIO = 1.4  # lengths within this factor are padded to one
_MASK_ENTRIES = 2**25  # bounds the memory of a block of long sequences


@dataclass(frozen=True)
class _Block:
    """Sequences of similar length: the tokens of their queries and keys, and which queries attend to which keys."""

    queries: torch.Tensor
    """(rows, queries) int64 indices of tokens."""
    keys: torch.Tensor
    """(rows, keys) int64 indices of tokens."""
    mask: torch.Tensor | None
    """(rows or 1, 1, queries, keys) bool; None for a plain causal mask."""


@dataclass(frozen=True)
class _Blocks:
    """All sequences of a layout in blocks."""

    blocks: list[_Block]
    order: torch.Tensor
    """(tokens,) int64: where each token's query stands among the queries of all blocks, padding counted."""


@dataclass
class DeviceLayout:
    """A layout on a device, with the tensors that each kernel needs (made once, used by every layer)."""

    layout: PackedLayout
    device: torch.device
    _blocks: dict[int | None, _Blocks] = field(default_factory=dict)
    _varlen: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int] | None = None
    _plan: SequencePlan | None = None

    def sequences(self) -> np.ndarray:
        """(sequences, 4) int64: start and length of the queries, then of the prefix that they also attend to."""
        prompts = np.pad(self.layout.prompts, ((0, 0), (0, 2)))
        return np.concatenate([prompts, self.layout.responses])

    def sequence_plan(self) -> SequencePlan | None:
        """The plan for attention one sequence at a time; None where padded blocks are faster."""
        if self.device.type != "cpu" or self.sequences()[:, 1].mean() < MEAN_TOKENS:
            return None
        if self._plan is None:
            self._plan = SequencePlan.of(self.layout)
        return self._plan

    def blocks(self, window: int | None) -> _Blocks:
        """Padded blocks under a sliding window of `window` tokens, or without one."""
        if window not in self._blocks:
            self._blocks[window] = _blocks(self.sequences(), window, self.device)
        return self._blocks[window]

    def varlen(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
        """Inputs of the flash kernel.

        Returns:
            (keys,) int64 indices of tokens; cumulative lengths of queries and of keys, (sequences + 1,) int32 each;
            the longest query and the longest key, in tokens.
        """
        if self._varlen is None:
            sequences = self.sequences()
            sequences = sequences[np.argsort(sequences[:, 0])]  # queries stand in the order of the tokens
            parts = []
            for start, length, prefix_start, prefix in sequences:
                parts += [np.arange(prefix_start, prefix_start + prefix), np.arange(start, start + length)]
            lengths = np.stack([sequences[:, 1], sequences[:, 1] + sequences[:, 3]])
            ends = np.pad(lengths.cumsum(axis=1), ((0, 0), (1, 0))).astype(np.int32)
            keys = to_device(np.concatenate(parts), self.device)
            q_ends, k_ends = (to_device(end, self.device) for end in ends)
            self._varlen = (keys, q_ends, k_ends, int(lengths[0].max()), int(lengths[1].max()))
        return self._varlen


def _blocks(sequences: np.ndarray, window: int | None, device: torch.device) -> _Blocks:
    bins: dict[tuple[int, int], list[int]] = {}
    for number, (_, length, _, prefix) in enumerate(sequences.tolist()):
        prefix_bin = math.ceil(math.log(prefix, _LENGTH_RATIO)) if prefix else -1
        bins.setdefault((math.ceil(math.log(length, _LENGTH_RATIO)), prefix_bin), []).append(number)
    blocks, order, end = [], np.empty(int(sequences[:, 1].sum()), dtype=np.int64), 0
    for numbers in bins.values():
        similar = sequences[numbers]
        size = int(similar[:, 1].max()) * int((similar[:, 1] + similar[:, 3]).max())
        step = max(1, _MASK_ENTRIES // size)
        for first in range(0, len(similar), step):
            part = similar[first : first + step]
            blocks.append(_block(part, window, device))
            queries = int(part[:, 1].max())
            for row, (start, length) in enumerate(part[:, :2].tolist()):
                order[start : start + length] = end + row * queries + np.arange(length)
            end += len(part) * queries
    return _Blocks(blocks, to_device(order, device))


def _block(sequences: np.ndarray, window: int | None, device: torch.device) -> _Block:
    starts, lengths, prefix_starts, prefixes = sequences.T
    queries, prefix = int(lengths.max()), int(prefixes.max())
    own = np.arange(queries)
    query_at = np.where(own < lengths[:, None], starts[:, None] + own, starts[:, None])
    # A prefix is padded on the left, so that it ends where the queries' own keys begin.
    offset = np.arange(prefix) - (prefix - prefixes[:, None])
    prefix_at = np.where(offset >= 0, prefix_starts[:, None] + offset, starts[:, None])
    key_at = np.concatenate([prefix_at, query_at], axis=1)
    plain_causal = prefix == 0 and (window is None or queries <= window)
    mask = None
    if not plain_causal:
        distance = (prefix + own)[:, None] - np.arange(prefix + queries)
        causal = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        rows = causal[None]
        if (prefixes != prefix).any():
            real_keys = np.concatenate([offset >= 0, np.ones((len(sequences), queries), dtype=bool)], axis=1)
            rows = causal[None] & real_keys[:, None]
        mask = to_device(rows[:, None].copy(), device)
    return _Block(to_device(query_at, device), to_device(key_at, device), mask)


_current: list[DeviceLayout] = []


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
    """transformers' attention interface: (1, heads, tokens, head size) in, (1, tokens, heads, head size) out."""
    del module, attention_mask
    layout, kind = _current[-1], query.device.type
    if torch.is_autocast_enabled(kind):
        # Where weights are float32, rotary embeddings make float32 of queries and keys, but not of values.
        query, key, value = (part.to(torch.get_autocast_dtype(kind)) for part in (query, key, value))
    if kind == "cuda" and query.dtype in (torch.float16, torch.bfloat16):
        return flash_attention(layout, query, key, value, scaling, sliding_window), None
    # Training computes gradients, for which one sequence at a time is faster.
    if query.requires_grad and sliding_window is None and (plan := layout.sequence_plan()) is not None:
        return sequence_attention(plan, query, key, value, scaling), None
    return padded_attention(layout, query, key, value, scaling, sliding_window), None


@functools.cache
def takes_enable_gqa() -> bool:
    """Whether torch's wrapper of the flash kernel has the keyword `enable_gqa`.

    torch 2.11 has not, and passes fewer heads of keys than of queries to its kernel, which takes them. Later versions
    refuse them without the keyword.
    """
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def flash_attention(
    layout: DeviceLayout,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """`attend` by one call of the flash kernel for sequences of different lengths; with gradients on a GPU."""
    from torch.nn.attention.varlen import varlen_attn

    keys, q_ends, k_ends, longest_query, longest_key = layout.varlen()
    # The kernel takes one head size, a multiple of 8. Zeros at the end of queries and keys change no score, and those
    # of values come out as zeros.
    size, of_value = query.shape[-1], value.shape[-1]
    width = -(-max(size, of_value) // 8) * 8
    q, k, v = (_widened(part[0].transpose(0, 1), width) for part in (query, key, value))
    grouped = {"enable_gqa": query.shape[1] != key.shape[1]} if takes_enable_gqa() else {}
    out = varlen_attn(
        q,
        k[keys],
        v[keys],
        q_ends,
        k_ends,
        longest_query,
        longest_key,
        scale=size**-0.5 if scaling is None else scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )
    assert isinstance(out, torch.Tensor)
    return out[None, ..., :of_value]


def _widened(part: torch.Tensor, width: int) -> torch.Tensor:
    """`part` with its last dimension padded by zeros to `width`; `part` itself where it has that already."""
    missing = width - part.shape[-1]
    return torch.nn.functional.pad(part, (0, missing)) if missing else part


def padded_attention(
    layout: DeviceLayout,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """`attend` in blocks of sequences of similar length, padded to the longest; with gradients on any device."""
    # Tokens first: all heads of a token are gathered as one contiguous piece.
    q, k, v = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
    of_layout = layout.blocks(window)
    attended = []
    for block in of_layout.blocks:
        out = grouped_attention(
            q[block.queries].transpose(1, 2),
            k[block.keys].transpose(1, 2),
            v[block.keys].transpose(1, 2),
            mask=block.mask,
            scaling=scaling,
        )
        attended.append(out.transpose(1, 2).flatten(0, 1))
    # Gathered, not written block by block into one tensor: each such write would copy all of its gradient.
    return torch.cat(attended)[of_layout.order][None]


def grouped_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """`scaled_dot_product_attention` that repeats no keys and values for the query heads that share them.

    torch's kernel for the CPU reads shared heads where they are. Its float32 kernel for a GPU does not. With
    `enable_gqa`, torch falls back to plain operations there, which repeat keys and values and hold all scores. So there
    the first query heads of all groups are one call, the second ones the next, and so on.

    Args:
        query, key, value: (rows, heads, tokens, head size); queries have a multiple of the keys' heads.
        mask: (rows or 1, 1, queries, keys) bool; None for a causal mask.

    Returns:
        (rows, heads, queries, head size).
    """
    attention = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, attn_mask=mask, is_causal=mask is None, scale=scaling
    )
    shared = query.shape[1] // key.shape[1]
    if shared == 1 or reads_shared_heads(query.device):
        return attention(query, key, value, enable_gqa=shared > 1)
    parts = [attention(query[:, number::shared], key, value) for number in range(shared)]
    return torch.stack(parts, dim=2).flatten(1, 2)


def reads_shared_heads(device: torch.device) -> bool:
    """Whether the device's float32 kernel takes fewer heads of keys than of queries.

    On a CPU, `enable_gqa` keeps 8.6 MB a layer for the backward pass of a row of 1,054 tokens with 9 query heads on 3
    heads of keys; with keys and values repeated it is 12.5 MB. To stack the queries of shared heads into one longer
    query needs a larger mask (9.0 MB) and is as fast.
    """
    return bool(device.type == "cpu")


AttentionInterface.register(NAME, attend)


@contextlib.contextmanager
def use_packed_attention(model: PreTrainedModel, layout: PackedLayout) -> Iterator[None]:
    """Within the block, forwards of `model` are of one packed row of tokens with this layout."""
    before = model.config._attn_implementation
    _current.append(DeviceLayout(layout, model.device))
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        _current.pop()
