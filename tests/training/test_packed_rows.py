"""Which pairs of a step share a row, and where their log-probabilities go."""

from __future__ import annotations

import random
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_sets import draw_ids

from dice_py.training.packed_rows import pack, row_tokens, split_step

CPU = torch.device("cpu")


def pair(prompt: list[int], chosen: int, rejected: int) -> dict[str, Any]:
    return {"prompt_ids": prompt, "chosen_ids": [7] * chosen, "rejected_ids": [8] * rejected}


PAIRS = st.lists(
    st.builds(pair, st.lists(st.integers(0, 2), min_size=1, max_size=3), st.integers(1, 20), st.integers(1, 20)),
    min_size=1,
    max_size=24,
)


@given(PAIRS, st.integers(1, 90))
def test_every_pair_is_in_one_row_and_rows_keep_to_the_limit(pairs: list[dict[str, Any]], limit: int) -> None:
    rows = split_step(pairs, limit)
    assert sorted(number for row in rows for number in row) == list(range(len(pairs)))
    for row in rows:
        assert row == sorted(row)
        assert len(row) == 1 or row_tokens([pairs[number] for number in row]) <= limit
    assert rows == split_step(pairs, limit)


@given(PAIRS)
def test_one_row_where_all_fit(pairs: list[dict[str, Any]]) -> None:
    assert split_step(pairs, row_tokens(pairs)) == [list(range(len(pairs)))]


def test_rows_are_of_about_equal_size() -> None:
    pairs = [pair([number], 10 + number, 10) for number in range(16)]
    rows = split_step(pairs, 130)
    sizes = [row_tokens([pairs[number] for number in row]) for row in rows]
    assert len(rows) == -(-sum(sizes) // 130)
    assert max(sizes) - min(sizes) <= 30


def test_pairs_of_one_prompt_share_a_row_and_the_prompt() -> None:
    prompt = [3] * 30
    pairs = [pair(prompt, 5, 5), pair([4], 5, 5), pair(prompt, 5, 5), pair([5], 5, 5)]
    assert row_tokens(pairs) == 30 + 1 + 1 + 40
    assert [0, 2] in split_step(pairs, 50)


def test_log_probabilities_go_where_trl_expects_them() -> None:
    rng = random.Random(0)
    prompts = [draw_ids(rng, 4), draw_ids(rng, 2)]
    pairs = [
        {"prompt_ids": prompts[at], "chosen_ids": draw_ids(rng, 3 + at), "rejected_ids": draw_ids(rng, 6 - 2 * at)}
        for at in (0, 1, 0)
    ]
    row = pack(pairs, CPU)
    assert (row.pairs, row.width) == (3, 4 + 6 - 1)
    assert len(row.tokens) == row_tokens(pairs)
    table = torch.zeros(6, row.width, dtype=torch.long).index_put((row.sequences, row.columns), row.targets)
    sequences = [(one["prompt_ids"], one[side]) for side in ("chosen_ids", "rejected_ids") for one in pairs]
    for number, (prompt, response) in enumerate(sequences):
        # Column c has the log-probability of token c + 1 of the sequence.
        assert table[number, len(prompt) - 1 :][: len(response)].tolist() == response
        assert int((table[number] != 0).sum()) == len(response)
    before = row.tokens[row.predicting]
    for number, (prompt, response) in enumerate(sequences):
        assert before[row.sequences == number].tolist() == [prompt[-1], *response[:-1]]
