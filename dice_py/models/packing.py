"""Sequences packed for scoring: a batch has no padding, and each prompt once for all of its responses.

A batch is one row of tokens: a prompt, then its responses one after the other, then the next prompt. Everything but
attention treats tokens independently. Attention (models/packed_attention.py) reads from a `PackedLayout` which
tokens belong together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np

Tokens: TypeAlias = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Group:
    """One prompt of a batch, and the row numbers (of the caller's lists) of the responses that follow it."""

    prompt: Tokens
    rows: list[int]


@dataclass(frozen=True)
class PackedLayout:
    """Where prompts and responses lie in a batch's row of tokens.

    `prompts` is (groups, 2) int64: start and length of each prompt. `responses` is (responses, 4) int64: start and
    length of each response, then start and length of its prompt.
    """

    prompts: np.ndarray
    responses: np.ndarray


@dataclass(frozen=True)
class Batch:
    """Groups that are run in one forward."""

    groups: list[Group]
    responses: Sequence[Tokens]

    @cached_property
    def rows(self) -> list[int]:
        """Row numbers, in the order of the responses in the batch."""
        return [row for group in self.groups for row in group.rows]

    @cached_property
    def layout(self) -> PackedLayout:
        """Starts and lengths of all prompts and responses."""
        prompts, responses, end = [], [], 0
        for group in self.groups:
            start, length = end, len(group.prompt)
            prompts.append((start, length))
            end += length
            for row in group.rows:
                responses.append((end, len(self.responses[row]), start, length))
                end += len(self.responses[row])
        return PackedLayout(np.array(prompts, dtype=np.int64), np.array(responses, dtype=np.int64))

    @cached_property
    def tokens(self) -> np.ndarray:
        """(tokens,) int64 token ids."""
        parts: list[Tokens] = []
        for group in self.groups:
            parts += [group.prompt, *(self.responses[row] for row in group.rows)]
        return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])

    @cached_property
    def positions(self) -> np.ndarray:
        """(tokens,) int64 position ids: every response continues from the end of its prompt."""
        parts = []
        for group in self.groups:
            prompt_length = len(group.prompt)
            parts.append(np.arange(prompt_length))
            parts += [np.arange(prompt_length, prompt_length + len(self.responses[row])) for row in group.rows]
        return np.concatenate(parts)

    @cached_property
    def predicting(self) -> np.ndarray:
        """(response tokens,) int64: for each token of a response, the index in the batch of the token before it."""
        parts = []
        for start, length, prompt_start, prompt_length in self.layout.responses:
            part = np.arange(start - 1, start - 1 + length)
            part[0] = prompt_start + prompt_length - 1  # the prompt's last token predicts the first
            parts.append(part)
        return np.concatenate(parts)

    @cached_property
    def targets(self) -> np.ndarray:
        """(response tokens,) int64: the tokens of the responses."""
        return np.concatenate([np.asarray(self.responses[row], dtype=np.int64) for row in self.rows])

    @property
    def unshared_tokens(self) -> int:
        """Tokens that the batch would have with the prompt repeated for each response."""
        return int(self.layout.responses[:, [1, 3]].sum())


def seen_keys(layout: PackedLayout) -> int:
    """Number of (query, key) pairs that attention evaluates, summed over the sequences of a packed batch."""
    lengths, prompt_lengths = layout.responses[:, 1], layout.responses[:, 3]
    prompts = layout.prompts[:, 1]
    causal = (lengths * (lengths + 1)).sum() + (prompts * (prompts + 1)).sum()
    return int(causal // 2 + (lengths * prompt_lengths).sum())


def group_rows(prompts: Sequence[Tokens], rows: Sequence[int]) -> list[Group]:
    """Groups the rows of equal prompts, in order of appearance."""
    groups: dict[bytes, Group] = {}
    for row in rows:
        prompt = np.asarray(prompts[row], dtype=np.int64)
        groups.setdefault(prompt.tobytes(), Group(prompt, [])).rows.append(row)
    return list(groups.values())


class Packer:
    """Splits rows into batches within a token budget, which may change from batch to batch.

    Groups with the longest responses come first, so that an out-of-memory error comes early and groups of similar
    length share a batch. A group larger than a batch is cut, and its prompt computed for each part. A sequence longer
    than the budget gets a batch of its own. A packer is true while rows remain.
    """

    def __init__(self, prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> None:
        self._responses = responses
        groups = group_rows(prompts, range(len(responses)))
        longest = {id(group): max(len(responses[row]) for row in group.rows) for group in groups}
        # Taken from the end.
        self._open = sorted(groups, key=lambda group: (longest[id(group)], len(group.prompt), -group.rows[0]))

    def __bool__(self) -> bool:
        return bool(self._open)

    def next_batch(self, budget: int) -> Batch:
        """Removes and returns as many complete groups as fit, or the part that fits of one that is too large."""
        groups: list[Group] = []
        room = budget
        while self._open:
            group = self._open[-1]
            size = len(group.prompt) + sum(len(self._responses[row]) for row in group.rows)
            if size > room and groups:
                break
            self._open.pop()
            if size > room:
                group = self._cut(group, room)
            groups.append(group)
            room -= size
            if room <= 0:
                break
        return Batch(groups, self._responses)

    def put_back(self, batch: Batch) -> None:
        """Undoes the last `next_batch`, for a batch that did not fit in memory."""
        for group in reversed(batch.groups):
            if self._open and self._open[-1].prompt is group.prompt:  # the rest of a group that was cut
                group = Group(group.prompt, group.rows + self._open.pop().rows)
            self._open.append(group)

    def _cut(self, group: Group, room: int) -> Group:
        """The first rows of a group that fit, at least one; the rest stays open."""
        room -= len(group.prompt)
        count = 0
        for row in group.rows:
            room -= len(self._responses[row])
            if room < 0:
                break
            count += 1
        count = max(count, 1)
        if count < len(group.rows):
            self._open.append(Group(group.prompt, group.rows[count:]))
        return Group(group.prompt, group.rows[:count])


def batches_by_budget(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Yields row numbers in batches whose padded size (rows × longest) is within `token_budget`.

    Rows are sorted by length, longest first, so that padding is small and an out-of-memory error comes early. A
    sequence longer than the budget gets a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batch: list[int] = []
    for row in order:
        longest = lengths[batch[0]] if batch else lengths[row]
        if batch and (len(batch) + 1) * longest > token_budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
