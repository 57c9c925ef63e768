"""Packed batches against each row on its own: no row lost or repeated, and within the budget."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from property_examples import examples

from dice_py.models.packing import Batch, Group, Packer, batches_by_budget, group_rows


@dataclass(frozen=True)
class Rows:
    """Rows to pack; every prompt is one of a few, so that some are shared."""

    prompts: list[list[int]]
    responses: list[list[int]]

    def size(self, row: int) -> int:
        return len(self.prompts[row]) + len(self.responses[row])

    def packer(self) -> Packer:
        return Packer(self.prompts, self.responses)


_TOKENS = st.lists(st.integers(0, 9), min_size=1, max_size=12)


@st.composite
def some_rows(draw: st.DrawFn, minimum: int = 0) -> Rows:
    few = draw(st.lists(_TOKENS, min_size=1, max_size=6))
    rows = draw(st.lists(st.tuples(st.sampled_from(few), _TOKENS), min_size=minimum, max_size=30))
    return Rows([list(prompt) for prompt, _ in rows], [response for _, response in rows])


def drain(packer: Packer, budget: int) -> list[Batch]:
    batches = []
    while packer:
        batches.append(packer.next_batch(budget))
    return batches


def contents(batch: Batch) -> list[tuple[list[int], list[int]]]:
    return [(list(group.prompt), group.rows) for group in batch.groups]


def group_sizes(rows: Rows) -> dict[tuple[int, ...], int]:
    """Size of each prompt with all of its responses."""
    sizes: dict[tuple[int, ...], int] = {}
    for prompt, response in zip(rows.prompts, rows.responses, strict=True):
        sizes[tuple(prompt)] = sizes.get(tuple(prompt), len(prompt)) + len(response)
    return sizes


BUDGETS = st.integers(1, 120)


@settings(max_examples=examples(300), deadline=None)
@given(some_rows(), BUDGETS)
def test_every_row_once_and_within_the_budget(rows: Rows, budget: int) -> None:
    batches = drain(rows.packer(), budget)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(rows.prompts)))
    for batch in batches:
        assert len(batch.tokens) <= budget or len(batch.rows) == 1
        for group in batch.groups:
            assert all(rows.prompts[row] == list(group.prompt) for row in group.rows)
        prompts = [tuple(group.prompt) for group in batch.groups]
        assert len(set(prompts)) == len(prompts)  # once for all of its responses in the batch


@settings(max_examples=examples(200), deadline=None)
@given(some_rows(), BUDGETS)
def test_only_groups_larger_than_a_batch_are_cut(rows: Rows, budget: int) -> None:
    sizes = group_sizes(rows)
    batches = drain(rows.packer(), budget)
    parts = Counter(tuple(group.prompt) for batch in batches for group in batch.groups)
    for prompt, count in parts.items():
        assert count == 1 or sizes[prompt] > budget
    for batch, following in itertools.pairwise(batches):
        # The next group did not fit in the remaining room, unless the last one was cut.
        cut = parts[tuple(batch.groups[-1].prompt)] > 1
        assert cut or len(batch.tokens) + sizes[tuple(following.groups[0].prompt)] > budget


@settings(max_examples=examples(100), deadline=None)
@given(some_rows(minimum=1))
def test_with_room_for_all_each_prompt_appears_once(rows: Rows) -> None:
    (batch,) = drain(rows.packer(), 10_000)
    assert len(batch.tokens) == sum(group_sizes(rows).values())
    assert batch.unshared_tokens == sum(rows.size(row) for row in range(len(rows.prompts)))


@settings(max_examples=examples(300), deadline=None)
@given(some_rows(minimum=1), BUDGETS)
def test_a_batch_holds_each_row_as_it_is_alone(rows: Rows, budget: int) -> None:
    for batch in drain(rows.packer(), budget):
        tokens, positions = batch.tokens.tolist(), batch.positions.tolist()
        covered: list[int] = []
        for start, length in batch.layout.prompts.tolist():
            covered += range(start, start + length)
        predicting: list[int] = []
        targets: list[int] = []
        for row, (start, length, prompt, before) in zip(batch.rows, batch.layout.responses.tolist(), strict=True):
            covered += range(start, start + length)
            # The sequence on its own, and where its tokens lie in the batch.
            sequence = [*rows.prompts[row], *rows.responses[row]]
            places = [*range(prompt, prompt + before), *range(start, start + length)]
            assert [prompt, before] in batch.layout.prompts.tolist()
            assert [tokens[place] for place in places] == sequence
            assert [positions[place] for place in places] == list(range(len(sequence)))
            predicting += places[before - 1 : -1]
            targets += sequence[before:]
        assert sorted(covered) == list(range(len(tokens)))
        assert batch.predicting.tolist() == predicting
        assert batch.targets.tolist() == targets
        assert batch.unshared_tokens == sum(rows.size(row) for row in batch.rows)
        assert {part.dtype for part in (batch.tokens, batch.positions, batch.predicting, batch.targets)} == {
            np.dtype(np.int64)
        }


@settings(max_examples=examples(300), deadline=None)
@given(some_rows(), st.lists(st.tuples(BUDGETS, st.booleans()), max_size=20))
def test_put_back_undoes_next_batch(rows: Rows, steps: list[tuple[int, bool]]) -> None:
    """Also when the budget changes between batches."""
    packer, other = rows.packer(), rows.packer()
    for budget, fits in steps:
        assert bool(packer) == bool(other)
        if not packer:
            break
        batch = packer.next_batch(budget)
        if fits:
            assert contents(batch) == contents(other.next_batch(budget))
        else:
            packer.put_back(batch)
    assert [contents(batch) for batch in drain(packer, 40)] == [contents(batch) for batch in drain(other, 40)]


@settings(max_examples=examples(100), deadline=None)
@given(some_rows(minimum=1), BUDGETS)
def test_the_group_of_the_longest_response_comes_first(rows: Rows, budget: int) -> None:
    first = drain(rows.packer(), budget)[0].groups[0]
    lengths = [len(r) for p, r in zip(rows.prompts, rows.responses, strict=True) if p == list(first.prompt)]
    assert max(lengths) == max(map(len, rows.responses))


def test_a_group_is_cut_over_several_batches() -> None:
    prompts = [[1, 2, 3]] * 5
    responses = [[4, 4], [5, 5], [6, 6], [7], [8, 8]]
    batches = drain(Packer(prompts, responses), 7)
    assert [batch.rows for batch in batches] == [[0, 1], [2, 3], [4]]
    assert [batch.tokens.tolist() for batch in batches] == [[1, 2, 3, 4, 4, 5, 5], [1, 2, 3, 6, 6, 7], [1, 2, 3, 8, 8]]


def test_a_batch_by_hand() -> None:
    batch = Batch([Group([1, 2], [1, 0]), Group([3], [2])], [[5], [6, 7, 8], [9, 9]])
    assert batch.rows == [1, 0, 2]
    assert batch.tokens.tolist() == [1, 2, 6, 7, 8, 5, 3, 9, 9]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 2, 0, 1, 2]
    assert batch.predicting.tolist() == [1, 2, 3, 1, 6, 7]
    assert batch.targets.tolist() == [6, 7, 8, 5, 9, 9]
    assert batch.layout.prompts.tolist() == [[0, 2], [6, 1]]
    assert batch.layout.responses.tolist() == [[2, 3, 0, 2], [5, 1, 0, 2], [7, 2, 6, 1]]
    assert batch.unshared_tokens == 5 + 3 + 3


def test_equal_prompts_of_any_type_are_one_group() -> None:
    prompts = [[1, 2], np.array([1, 2], dtype=np.int32), [2, 1], np.array([1, 2]), [1]]
    groups = group_rows(prompts, range(5))
    assert [(list(group.prompt), group.rows) for group in groups] == [([1, 2], [0, 1, 3]), ([2, 1], [2]), ([1], [4])]
    assert [group.rows for group in group_rows(prompts, [4, 3, 0])] == [[4], [3, 0]]


@pytest.mark.parametrize("budget", [1, 4, 100])
def test_nothing_to_pack(budget: int) -> None:
    assert drain(Packer([], []), budget) == []
    assert list(batches_by_budget([], budget)) == []


@settings(max_examples=examples(200), deadline=None)
@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_batches_by_budget(lengths: list[int], budget: int) -> None:
    batches = list(batches_by_budget(lengths, budget))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[row] for row in batch)
        assert lengths[batch[0]] == longest  # what the scorer pads to
        assert len(batch) == 1 or len(batch) * longest <= budget
    assert [lengths[row] for batch in batches for row in batch] == sorted(lengths, reverse=True)
