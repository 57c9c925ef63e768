"""Lengths of responses that a calibration cut."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from plan_data import own

from dice_py.planning.response_lengths import calibrated_lengths, extend, share_with_enough


def responses(lengths: list[int], reasons: list[str], samples: int = 2) -> pl.DataFrame:
    ids = [number // samples for number in range(len(lengths))]
    return pl.DataFrame(
        {"prompt_id": ids, "response_tokens": lengths, "finish_reason": reasons},
        schema_overrides={"response_tokens": pl.UInt32},
    )


def cut(lengths: np.ndarray, at: int) -> pl.DataFrame:
    """Responses of these lengths, cut."""
    return responses(np.minimum(lengths, at).tolist(), ["stop" if length <= at else "length" for length in lengths])


def test_lengths_beyond_the_cut_are_those_of_a_geometric_distribution() -> None:
    true = np.random.default_rng(1).geometric(1 / 80, 20_000)
    extended, count = extend(cut(true, 30), 30, 128)
    assert count == (true > 30).sum()
    found = extended["response_tokens"].to_numpy()
    # Means within 2 %, where the cut ones have a mean of 25; as many reach the limit.
    assert found.mean() == pytest.approx(np.minimum(true, 128).mean(), rel=0.02)
    assert (extended["finish_reason"] == "length").mean() == pytest.approx((true > 128).mean(), abs=0.01)
    assert found.max() == 128
    uncut = (true <= 30).tolist()
    assert (found[uncut] == true[uncut]).all()
    assert extend(cut(true, 30), 30, 128)[0].equals(extended)


def test_a_sample_in_which_nothing_stopped_gives_lengths() -> None:
    config = own("generate.samples=8", "generate.max_new_tokens=1000")
    found = calibrated_lengths(config, responses([8] * 16, ["length"] * 16), 8)
    assert (found.extrapolated, found.cut_at) == (16, 8)
    assert min(found.lengths) > 8
    assert max(found.lengths) <= 1000
    assert 0.0 < found.usable <= 1.0


def test_empty_responses_give_lengths() -> None:
    found = calibrated_lengths(own("generate.samples=2"), responses([0, 0], ["stop", "stop"]), 8)
    assert (found.lengths, found.extrapolated, found.cut_at) == ([0, 0], 0, None)


def test_responses_at_the_runs_own_limit_are_left_as_they_are() -> None:
    config = own("generate.samples=2", "generate.max_new_tokens=8")
    for cut_at in (None, 8):
        found = calibrated_lengths(config, responses([8, 3], ["length", "stop"]), cut_at)
        assert (found.lengths, found.cut_off, found.extrapolated, found.cut_at) == ([8, 3], 0.5, 0, None)
        assert found.usable == 0.0  # one of two


def test_fewer_samples_than_the_runs_still_give_usable_prompts() -> None:
    config = own("generate.samples=8", "generate.max_new_tokens=8", "mine.min_responses=2")
    found = calibrated_lengths(config, responses([8, 3, 8, 3], ["length", "stop"] * 2), None)
    # Half of the responses: all but the 1 + 8 ways of 256 to have fewer than two.
    assert found.usable == pytest.approx(1 - 9 / 256)


def test_the_share_of_prompts_with_enough() -> None:
    assert share_with_enough(0.5, 2, 2) == pytest.approx(0.25)
    assert (share_with_enough(0.0, 8, 2), share_with_enough(1.0, 8, 2), share_with_enough(1.0, 1, 2)) == (0, 1, 0)
    assert share_with_enough(0.5, 65535, 100) == pytest.approx(1.0)
