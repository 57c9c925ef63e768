"""The pairs of an optimizer step as packed rows: no padding, and each prompt once for its chosen and rejected response.

A row holds complete pairs, so that every pair's loss is computed in one forward. Which pairs share a row follows from
the step's pairs and `train.packed_tokens`, never from the machine: a resume on another machine makes the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dice_py.models.packing import Batch, PackedLayout, group_rows
from dice_py.models.transfer import to_device

Pair = dict[str, Any]
"""A row of the training set (training/dataset.py): lists of token ids, and two reference log-probabilities."""


@dataclass(frozen=True)
class PackedRow:
    """The tokens of one forward, on its device. P pairs are 2 × P sequences: all chosen, then all rejected.

    Attributes:
        tokens, positions: (tokens,) int64.
        predicting: (response tokens,) int64, the index of the token before each response token.
        targets: (response tokens,) int64, the response tokens.
        sequences, columns: (response tokens,) int64, where a log-probability stands in TRL's
            (2 × P, longest sequence − 1) log-probabilities.
        width: the longest sequence − 1.
    """

    layout: PackedLayout
    tokens: torch.Tensor
    positions: torch.Tensor
    predicting: torch.Tensor
    targets: torch.Tensor
    sequences: torch.Tensor
    columns: torch.Tensor
    pairs: int
    width: int


def row_tokens(pairs: Sequence[Pair]) -> int:
    """Tokens of a packed row of these pairs: equal prompts count once."""
    prompts = {tuple(pair["prompt_ids"]) for pair in pairs}
    return sum(map(len, prompts)) + sum(len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs)


def split_step(pairs: Sequence[Pair], limit: int) -> list[list[int]]:
    """Distributes pairs over as few rows of about equal size as fit.

    Pairs of one prompt stay together where they fit. A pair longer than `limit` has a row of its own.

    Args:
        limit: tokens of a row.

    Returns:
        For each row, the numbers of its pairs, ascending. Every pair is in one row.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for number, pair in enumerate(pairs):
        by_prompt.setdefault(tuple(pair["prompt_ids"]), []).append(number)
    pieces = []
    for numbers in by_prompt.values():
        size = row_tokens([pairs[number] for number in numbers])
        pieces += [(size, numbers)] if size <= limit else [(row_tokens([pairs[one]]), [one]) for one in numbers]
    pieces.sort(key=lambda piece: (-piece[0], piece[1]))
    count = max(1, -(-sum(size for size, _ in pieces) // limit))
    while True:
        loads, rows = [0] * count, [list[int]() for _ in range(count)]
        alone = True
        for size, numbers in pieces:  # the largest first, each into the emptiest row
            least = loads.index(min(loads))
            alone &= not rows[least] or loads[least] + size <= limit
            loads[least] += size
            rows[least] += numbers
        if alone or count >= len(pieces):
            return [sorted(row) for row in rows if row]
        count += 1


def pack(pairs: Sequence[Pair], device: torch.device) -> PackedRow:
    """The pairs as one packed row."""
    prompts = [np.asarray(pair["prompt_ids"], dtype=np.int64) for pair in pairs] * 2
    responses = [np.asarray(pair[side], dtype=np.int64) for side in ("chosen_ids", "rejected_ids") for pair in pairs]
    batch = Batch(group_rows(prompts, range(len(responses))), responses)
    lengths = [len(responses[row]) for row in batch.rows]
    sequences = np.repeat(np.array(batch.rows, dtype=np.int64), lengths)
    columns = np.concatenate([len(prompts[row]) - 1 + np.arange(len(responses[row])) for row in batch.rows])

    return PackedRow(
        batch.layout,
        tokens=to_device(batch.tokens, device),
        positions=to_device(batch.positions, device),
        predicting=to_device(batch.predicting, device),
        targets=to_device(batch.targets, device),
        sequences=to_device(sequences, device),
        columns=to_device(columns, device),
        pairs=len(pairs),
        width=max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)) - 1,
    )
