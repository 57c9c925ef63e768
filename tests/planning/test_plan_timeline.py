"""Decoding steps and their fitted costs, and when stages wait for their processes."""

from __future__ import annotations

import pytest

from dice_py.planning.decoding import decode_steps, draw_lengths, fit_decoding
from dice_py.planning.timeline import Task, shared_speed, timeline


@pytest.mark.parametrize(
    ("lengths", "rows", "continuous", "want"),
    [
        ([], 4, True, 0),
        ([3, 9, 4], 4, True, 9),
        # Two rows: 5 and 1; 2 continuous at 1, 4 at 3, and ends at 7.
        ([5, 1, 2, 4], 2, True, 7),
        # Two batches, each as long as its longest.
        ([5, 1, 2, 4], 2, False, 9),
        ([1] * 400_000, 1, True, 400_000),
    ],
)
def test_steps_of_a_decoding(lengths: list[int], rows: int, continuous: bool, want: int) -> None:
    assert decode_steps(lengths, rows, continuous) == want


def test_lengths_are_drawn_from_the_given_ones() -> None:
    assert set(draw_lengths([2, 7], 200)) == {2, 7}
    assert draw_lengths([2, 7], 200) == draw_lengths([2, 7], 200)


@pytest.mark.parametrize(("step", "token"), [(0.5, 0.01), (0.0, 0.02), (0.3, 0.0)])
def test_costs_of_a_step_and_of_a_token_are_separated(step: float, token: float) -> None:
    runs = [(steps, tokens, step * steps + token * tokens) for steps, tokens in ((10, 40), (14, 400))]
    assert fit_decoding(runs) == pytest.approx((step, token))


def test_no_cost_is_negative() -> None:
    # Ten times the tokens in less time: all of it is attributed to steps.
    assert fit_decoding([(10, 40, 2.0), (10, 400, 1.9)]) == (pytest.approx(0.19), 0.0)
    assert fit_decoding([(10, 40, 1.0), (20, 80, 2.0)]) == (0.0, pytest.approx(0.025))


def test_a_stage_waits_for_the_rest_of_an_import_that_was_started_ahead() -> None:
    tasks = [Task(4.0, 3.0, True), Task(5.0, 1.0, True), Task(None, 0.5), Task(2.0, 1.0)]
    # The first: 4 s, while the second's process imports, which ends in its first second of work. The second does not
    # wait; the fourth's import has 1 s of the second's work and 0.5 s of the third's, so that 0.5 s are left.
    assert timeline(tasks) == [(7.0, 4.0), (1.0, 0.0), (0.5, 0.0), (1.5, 0.5)]


def test_an_import_and_the_work_beside_it_share_the_cores() -> None:
    assert shared_speed(2) == pytest.approx(2 / 3)
    tasks = [Task(4.0, 3.0, True), Task(5.0, 1.0, True), Task(None, 0.5), Task(2.0, 1.0)]
    # As above, but a second of work beside an import takes two. The first task waits 4 s while the import is alone,
    # and its last second is beside a second of work; 1 s and 0.5 s of the next import are beside work.
    assert timeline(tasks, speed=0.5) == [(8.0, 4.0), (2.0, 0.0), (1.0, 0.0), (1.5, 0.5)]


def test_a_process_that_is_not_started_ahead_is_waited_for() -> None:
    assert timeline([Task(1.0, 9.0), Task(3.0, 1.0)]) == [(10.0, 1.0), (4.0, 3.0)]
