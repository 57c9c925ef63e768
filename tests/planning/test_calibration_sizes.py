"""How much a calibration measures: sizes that follow from rates. Nothing is timed."""

from __future__ import annotations

import pytest

from dice_py.planning.calibration_sizes import (
    Sampling,
    Step,
    Training,
    complete_sampling_fits,
    first_prompts,
    per_device_pairs,
    reduced_sampling,
    scored_responses,
    training_size,
)


def test_the_first_prompts_are_few_and_short() -> None:
    assert first_prompts([10] * 100, samples=8, responses=64, most_tokens=512) == 8
    assert first_prompts([10] * 5, samples=8, responses=64, most_tokens=512) == 5
    assert first_prompts([200] * 100, samples=8, responses=64, most_tokens=512) == 2
    # One prompt, however long it is and however many samples it has.
    assert first_prompts([9000, 1], samples=200, responses=64, most_tokens=512) == 1


def test_complete_responses_are_sampled_where_they_are_cheap() -> None:
    assert complete_sampling_fits(Step(64, 0.01), tokens=24, seconds=12)
    assert not complete_sampling_fits(Step(64, 0.2), tokens=128, seconds=12)


def sampling(seconds: float, prompts: int = 32, tokens: int = 100) -> Sampling:
    # 0.02 s a step and 0.001 s a row; 0.1 s a prompt.
    steps = [Step(10, 0.03), Step(60, 0.08)]
    return reduced_sampling(steps, 0.1, tokens, samples=2, prompts=prompts, seconds=seconds)


def test_prompts_are_as_many_as_can_be_answered_completely() -> None:
    # 20 prompts: 40 rows, 0.06 s a step, 2 s of prefill.
    assert sampling(8.01) == Sampling(20, 100)
    assert sampling(1000.0) == Sampling(32, 100)
    assert sampling(1000.0, prompts=3) == Sampling(3, 100)


def test_responses_are_cut_where_even_few_take_too_long() -> None:
    # 16 prompts: 32 rows, 0.052 s a step, 1.6 s of prefill.
    assert sampling(1.6 + 50.5 * 0.052) == Sampling(16, 50)
    # A least number of tokens, of prompts that there are, but no more than the run samples.
    assert sampling(-5.0) == Sampling(16, 8)
    assert sampling(-5.0, prompts=1) == Sampling(1, 8)
    assert sampling(-5.0, tokens=4) == Sampling(16, 4)


def test_steps_that_contradict_each_other_still_give_a_size() -> None:
    # Noise: more rows were faster; rows then cost nothing.
    odd = reduced_sampling([Step(16, 0.05), Step(64, 0.04)], 0.0, 100, samples=2, prompts=32, seconds=5.01)
    assert odd == Sampling(32, 100)


def test_scored_responses() -> None:
    assert scored_responses(1000, 0.01, passes=2, seconds=4.01) == 200
    assert scored_responses(100, 0.01, passes=2, seconds=4.01) == 100
    assert scored_responses(100, 10.0, passes=2, seconds=4.01) == 4
    assert scored_responses(3, 10.0, passes=2, seconds=4.01) == 3
    assert scored_responses(100, 0.0, passes=2, seconds=4.01) == 100


def training(seconds: float, processes: int = 1, batch_size: int = 32) -> Training:
    # 0.3 s a pair for forward and backward; 5 pairs in a row.
    return training_size(
        batch_size, processes, pair_tokens=100.0, per_token=0.00075, row_tokens=512, seconds=seconds * 1.0001
    )


def test_steps_of_the_training() -> None:
    assert training(6 * 32 * 0.3) == Training(32, 6, 1)  # the run's own
    assert training(6 * 20 * 0.3) == Training(20, 6, 1)  # fewer pairs
    assert training(4 * 5 * 0.3) == Training(5, 4, 1)  # a full row, fewer steps
    assert training(2.2 * 5 * 0.3) == Training(5, 3, 1)  # a little more than the seconds
    assert training(4 * 0.3) == Training(2, 3, 1)  # part of a row
    assert training(0.01) == Training(1, 3, 1)
    assert training(4 * 5 * 0.3, batch_size=2) == Training(2, 6, 1)  # never more than the run's


def test_several_processes_share_a_step() -> None:
    assert training(6 * 17 * 0.3 / 4, processes=4) == Training(20, 5, 4)  # a full row each
    assert training(6 * 23 * 0.3 / 4, processes=4) == Training(20, 6, 4)
    assert training(0.01, processes=4) == Training(4, 3, 4)


@pytest.mark.parametrize(("batch", "processes", "pairs"), [(32, 1, 4), (5, 1, 1), (6, 1, 3), (2, 1, 2), (8, 4, 2)])
def test_padded_forwards_divide_a_smaller_step(batch: int, processes: int, pairs: int) -> None:
    assert per_device_pairs(batch, processes, configured=4) == pairs
    assert batch % (pairs * processes) == 0
