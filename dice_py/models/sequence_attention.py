"""Packed attention one sequence at a time, for long sequences on a CPU: no padding, and cheap gradients.

A packed row of tokens (models/packing.py) is split into its prompts and responses, and every sequence is one call of
`scaled_dot_product_attention`. Splitting and concatenating have gradients that copy each number once. Gathering by
index, as padded blocks do, has a gradient that adds number by number.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dice_py.models.packing import PackedLayout

MEAN_TOKENS = 32
"""Sequences that are shorter on average are faster in padded blocks: the number of calls is what takes time."""


@dataclass
class SequencePlan:
    """The calls for one layout, made once and used by every layer."""

    lengths: list[int]
    """Tokens of prompts and responses in the order of the row."""
    groups: list[tuple[int, list[int]]]
    """For each prompt, its number in `lengths` and those of its responses."""
    _masks: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, layout: PackedLayout) -> SequencePlan:
        """The plan of a layout, in which every prompt is followed by its responses."""
        starts = {int(start): int(length) for start, length in layout.prompts}
        starts |= {int(start): int(length) for start, length, *_ in layout.responses}
        numbers = {start: number for number, start in enumerate(sorted(starts))}
        groups: dict[int, list[int]] = {numbers[int(start)]: [] for start, _ in layout.prompts}
        for start, _, prompt_start, _ in layout.responses.tolist():
            groups[numbers[prompt_start]].append(numbers[start])
        return cls([starts[start] for start in sorted(starts)], sorted(groups.items()))

    def mask(self, prefix: int, length: int) -> torch.Tensor:
        """(length, prefix + length) bool: a response's token sees its prompt and itself up to that token."""
        if (prefix, length) not in self._masks:
            self._masks[prefix, length] = torch.ones(length, prefix + length, dtype=torch.bool).tril(prefix)
        return self._masks[prefix, length]


def sequence_attention(
    plan: SequencePlan, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Attention of a packed row: (1, heads, tokens, head size) in, (1, tokens, heads, head size) out."""
    parts = [part.split(plan.lengths, dim=2) for part in (query, key, value)]
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for prompt, responses in plan.groups:
        # The prompt and its first response stand together: one causal sequence without a mask.
        first = [prompt, *responses[:1]]
        q, k, v = (torch.cat([part[number] for number in first], dim=2) for part in parts)
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        )
        for response in responses[1:]:
            k, v = (torch.cat([part[prompt], part[response]], dim=2) for part in parts[1:])
            outputs.append(
                torch.nn.functional.scaled_dot_product_attention(
                    parts[0][response],
                    k,
                    v,
                    attn_mask=plan.mask(plan.lengths[prompt], plan.lengths[response]),
                    scale=scaling,
                    enable_gqa=grouped,
                )
            )
    return torch.cat(outputs, dim=2).transpose(1, 2)
