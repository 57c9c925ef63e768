"""Counts of a run by hand: prompts, responses, pairs and steps of each round."""

from __future__ import annotations

from dataclasses import replace

from plan_data import OWN, data, own

from dice_py.config.loading import resolve
from dice_py.planning.counts import count_rounds


def test_counts_by_hand() -> None:
    config = own("generate.samples=4", "generate.shard_prompts=2", "data.max_prompt_tokens=20", "train.batch_size=4")
    tokens = {0: 10, 1: 21, 2: 12, 3: 8}  # 1 is too long
    (counts,) = count_rounds(config, data([[0, 1, 2, 3]], tokens))
    assert (counts.prompts, counts.prompts_too_long, counts.shards, counts.responses) == (3, 1, 2, 12)
    assert (counts.prompt_tokens, counts.response_tokens) == (30, 60)
    # γ = 0.5: as many replayed as mined; a pair is 2 × 10 of the prompt and 5 + 5.
    assert (counts.mined, counts.replay, counts.pairs, counts.steps) == (3, 3, 6, 2)
    assert (counts.pair_tokens, counts.replay_tokens) == (30.0, 90)


def test_given_responses_are_counted_and_not_sampled() -> None:
    config = own("generate.samples=4")
    run_data = replace(data([[0, 1], [0, 1]], {0: 10, 1: 12}), given=5)
    first, second = count_rounds(config, run_data)
    assert (first.responses, first.lengths, first.response_tokens) == (5, [], 25)
    assert (second.responses, len(second.lengths)) == (8, 8)


def test_a_pool_has_the_prompts_of_earlier_rounds_too() -> None:
    config = own("mine.pool_rounds=2", "generate.samples=2", "replay.gamma=0")
    tokens = dict.fromkeys(range(6), 10)
    first, second, third = count_rounds(config, data([[0, 1], [2, 3], [4, 0]], tokens))
    assert [first.pool_responses, second.pool_responses, third.pool_responses] == [4, 8, 8]
    assert second.pool_tokens == 2 * (20 + 20)
    assert [first.mined, second.mined, third.mined] == [2, 4, 4]


def test_replay_by_gamma_and_by_the_pairs_available() -> None:
    tokens = dict.fromkeys(range(70), 10)
    run_data = data([list(range(70))], tokens, pair_tokens=(4.0, 6.0, 8.0))
    (counts,) = count_rounds(own("replay.gamma=0.3"), run_data)
    assert (counts.mined, counts.replay, counts.replay_requested) == (70, 30, 30)
    assert counts.replay_tokens == 30 * (2 * 4 + 6 + 8)
    (short,) = count_rounds(own("replay.gamma=0.3"), replace(run_data, offline=[12]))
    assert (short.replay, short.replay_requested, short.pairs) == (12, 30, 82)
    (total,) = count_rounds(own("replay.gamma=0.25", "replay.total=40"), run_data)
    assert (total.replay, total.pairs) == (10, 40)


def test_the_runs_own_buffer_is_empty_in_the_first_round() -> None:
    config = resolve([], [*OWN[:3], "replay.gamma=0.5", "replay.buffer.capacity=3"])
    run_data = data([[0, 1], [2, 3], [4, 5]], dict.fromkeys(range(6), 10), offline=[0, 0, 0])
    assert [counts.replay for counts in count_rounds(config, run_data)] == [0, 2, 2]
    assert [counts.replay_requested for counts in count_rounds(config, run_data)] == [0, 2, 2]


def test_unusable_responses_and_long_pairs_make_no_pairs() -> None:
    tokens = dict.fromkeys(range(100), 10)
    run_data = data([list(range(100))], tokens, usable=0.25)
    (counts,) = count_rounds(own("replay.gamma=0"), run_data)
    assert counts.mined == counts.pairs == 25
    assert count_rounds(own("replay.gamma=0", "train.max_length=15"), run_data)[0].pairs == 25
    assert count_rounds(own("replay.gamma=0", "train.max_length=14"), run_data)[0].pairs == 0


def test_pairs_of_a_prompt() -> None:
    run_data = data([[0, 1]], {0: 10, 1: 10})
    several = ["mine.pairing=top_bottom", "mine.top_k=2", "mine.bottom_k=3", "replay.gamma=0", "generate.samples=8"]
    assert count_rounds(own(*several), run_data)[0].mined == 12
    assert count_rounds(own(*several, "mine.pairs_per_prompt=4"), run_data)[0].mined == 8
