"""Sequences packed for scoring: no padding in a batch, and each prompt once for all of its responses.

A batch is one row of tokens: a prompt, then its responses one after the other, then the next prompt. Everything
but attention works on tokens one by one and needs to know no more; attention (scoring/packed_attention.py) is told
which tokens belong together by a `Layout`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TypeAlias

import numpy as np


def seen_keys(layout: PackedLayout) -> int:
    """Pairs of a query and a key that it sees, over all sequences of a packed batch."""
    lengths, before = layout.responses[:, 1], layout.responses[:, 3]
    prompts = layout.prompts[:, 1]
    own = (lengths * (lengths + 1)).sum() + (prompts * (prompts + 1)).sum()
    return int(own // 2 + (lengths * before).sum())


Tokens: TypeAlias = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Group:
    """One prompt of a batch, and the rows (numbers of the caller's) whose responses follow it."""

    prompt: Tokens
    rows: list[int]


@dataclass(frozen=True)
class PackedLayout:
    """Where prompts and responses lie in a batch's row of tokens.

    `prompts` is (groups, 2) and `responses` (responses, 4), int64: start and length of each prompt; start, length,
    and the start and length of the prompt before it of each response.
    """

    prompts: np.ndarray
    responses: np.ndarray


@dataclass(frozen=True)
class Batch:
    """Groups that are run together."""

    groups: list[Group]
    responses: Sequence[Tokens]

    @cached_property
    def rows(self) -> list[int]:
        """Row numbers, in the order of the responses in the batch."""
        return [row for group in self.groups for row in group.rows]

    @cached_property
    def layout(self) -> PackedLayout:
        """Where everything lies."""
        prompts, found, at = [], [], 0
        for group in self.groups:
            start, length = at, len(group.prompt)
            prompts.append((start, length))
            at += length
            for row in group.rows:
                found.append((at, len(self.responses[row]), start, length))
                at += len(self.responses[row])
        return PackedLayout(np.array(prompts, dtype=np.int64), np.array(found, dtype=np.int64))

    @cached_property
    def tokens(self) -> np.ndarray:
        """(tokens,) int64 token ids."""
        parts: list[Tokens] = []
        for group in self.groups:
            parts += [group.prompt, *(self.responses[row] for row in group.rows)]
        return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])

    @cached_property
    def positions(self) -> np.ndarray:
        """(tokens,) int64: a response goes on counting where its prompt ends."""
        parts = []
        for group in self.groups:
            before = len(group.prompt)
            parts.append(np.arange(before))
            parts += [np.arange(before, before + len(self.responses[row])) for row in group.rows]
        return np.concatenate(parts)

    @cached_property
    def predicting(self) -> np.ndarray:
        """(response tokens,) int64: for each token of a response, where the one before it lies."""
        parts = []
        for start, length, prompt, before in self.layout.responses:
            part = np.arange(start - 1, start - 1 + length)
            part[0] = prompt + before - 1  # the prompt's last token
            parts.append(part)
        return np.concatenate(parts)

    @cached_property
    def targets(self) -> np.ndarray:
        """(response tokens,) int64: the tokens of the responses."""
        return np.concatenate([np.asarray(self.responses[row], dtype=np.int64) for row in self.rows])

    @property
    def unshared_tokens(self) -> int:
        """Tokens that one sequence for each response would have."""
        return int(self.layout.responses[:, [1, 3]].sum())


def group_rows(prompts: Sequence[Tokens], rows: Sequence[int]) -> list[Group]:
    """Rows of equal prompts together, in order of appearance."""
    found: dict[bytes, Group] = {}
    for row in rows:
        prompt = np.asarray(prompts[row], dtype=np.int64)
        found.setdefault(prompt.tobytes(), Group(prompt, [])).rows.append(row)
    return list(found.values())


class Packer:
    """Deals rows into batches of at most a number of tokens, which may change while it deals.

    Groups of long responses come first, so that what does not fit fails at once, and those of like length are
    together. A group that is larger than a batch is cut, and its prompt computed for each part; a sequence longer
    than the budget gets a batch of its own.
    """

    def __init__(self, prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> None:
        self._responses = responses
        groups = group_rows(prompts, range(len(responses)))
        longest = {id(group): max(len(responses[row]) for row in group.rows) for group in groups}
        # Taken from the end.
        self._open = sorted(groups, key=lambda group: (longest[id(group)], len(group.prompt), -group.rows[0]))

    def __bool__(self) -> bool:
        return bool(self._open)

    def take(self, budget: int) -> Batch:
        """The next batch: whole groups as far as they fit, and a part of one that alone does not."""
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

    def give_back(self, batch: Batch) -> None:
        """Undoes the last `take`: the batch did not fit in memory."""
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
    """Row numbers in batches whose padded size (rows × longest) is within `token_budget`.

    Sorted by length, longest first, so that padding is small and the largest batch comes first: what does
    not fit in memory fails at once. A sequence longer than the budget gets a batch of its own.
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
