"""Metrics of a policy's samples against plain arithmetic, and the bootstrap of sums against a plain one."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy.stats import linregress

from dice_py.evaluation.metrics import RESAMPLES
from dice_py.evaluation.resampling import Resamples, column_ratio, r_squared, statistic_ci95
from dice_py.evaluation.samples import (
    distinct_share,
    kl_metrics,
    mean_ci95,
    reward_length_metrics,
    sample_metrics,
    sampling_note,
)


def samples(*rows: tuple[int, str, list[int], str, float]) -> pl.DataFrame:
    """Rows of (prompt, text, token ids, finish reason, log π)."""
    return pl.DataFrame(
        [(p, text, ids, len(ids), len(text), reason, logp) for p, text, ids, reason, logp in rows],
        schema={
            "prompt_id": pl.UInt32, "response": pl.String, "token_ids": pl.List(pl.Int32),
            "response_tokens": pl.UInt32, "response_chars": pl.UInt32, "finish_reason": pl.String,
            "sampled_logp": pl.Float32,
        },
        orient="row",
    )  # fmt: skip


def drawn(prompts: int, each: int, seed: int = 0) -> pl.DataFrame:
    rng = random.Random(seed)
    rows = []
    for prompt in range(prompts):
        level = rng.gauss(0, 5)
        for _ in range(each):
            ids = [rng.randint(0, 9) for _ in range(rng.randint(1, 12))]
            rows.append((prompt, str(ids), ids, rng.choice(["stop", "length"]), -abs(level + rng.gauss(0, 1)) - 0.1))
    return samples(*rows)


def test_by_hand() -> None:
    found = sample_metrics(
        samples(
            (0, "aa", [1, 1, 2], "stop", -3.0),
            (0, "b", [1, 2], "length", -1.0),
            (1, "aa", [5], "stop", -2.0),
            (1, "c", [], "stop", 0.0),
        ),
        seed=0,
    )
    values = {name: value for name, value in found.items() if not name.endswith("_ci95")}
    assert values == {
        "mean_response_tokens": 1.5,
        "mean_response_chars": 1.5,
        "cut_off_share": 0.25,
        "duplicate_share": 0.5,  # one text, of two prompts
        "entropy_per_token": 1.0,
        "distinct_1": pytest.approx((2 / 5 + 1) / 2),
        "distinct_2": pytest.approx(2 / 3),  # (1, 1), (1, 2) and (1, 2); the other prompt has no bigram
    }
    for name, value in values.items():
        low, high = found[f"{name}_ci95"]
        assert low <= value <= high


def test_no_response_has_a_token() -> None:
    found = sample_metrics(samples((0, "", [], "stop", 0.0), (1, "", [], "stop", 0.0)), seed=0)
    for name in ("entropy_per_token", "distinct_1", "distinct_2"):
        assert (found[name], found[f"{name}_ci95"]) == (None, None)
    assert (found["mean_response_tokens"], found["duplicate_share"]) == (0.0, 1.0)


def test_distinct_n_grams_of_responses_together() -> None:
    assert distinct_share([[1, 2, 1], [2, 1]], 2) == 2 / 3
    assert distinct_share([[1], []], 2) is None


def plain_draws(frame: pl.DataFrame, statistic: Any, seed: int) -> list[float]:
    """The statistic of complete resamples of prompts, each with all of its rows."""
    parts = frame.partition_by("prompt_id", maintain_order=True)
    rng = np.random.default_rng(seed)
    return [statistic(pl.concat([parts[n] for n in rng.integers(0, len(parts), len(parts))])) for _ in range(400)]


def test_intervals_are_those_of_resampled_prompts() -> None:
    """Samples of a prompt stay together: the interval is that of drawing prompts, and wider than that of rows."""
    frame = drawn(prompts=30, each=6)

    def entropy(part: pl.DataFrame) -> float:
        return -float(part["sampled_logp"].sum()) / float(part["response_tokens"].sum())

    found = sample_metrics(frame, seed=1)
    low, high = found["entropy_per_token_ci95"]
    want = np.percentile(plain_draws(frame, entropy, 2), [2.5, 97.5])
    assert (low, high) == pytest.approx(want, rel=0.08)
    of_rows = statistic_ci95(
        np.stack([-frame["sampled_logp"].to_numpy(), frame["response_tokens"].to_numpy()], axis=1).astype(float),
        column_ratio,
        1,
    )
    assert of_rows is not None
    assert high - low > 1.2 * (of_rows[1] - of_rows[0])


def test_kl_is_the_mean_log_ratio() -> None:
    frame = drawn(prompts=40, each=2)
    rng = random.Random(3)
    other = pl.Series([logp - rng.gauss(0.5, 0.2) for logp in frame["sampled_logp"]])
    found = kl_metrics("kl_to_start", frame["sampled_logp"], other, frame, seed=0)
    assert found["kl_to_start"] == pytest.approx(0.5, abs=0.06)
    low, high = found["kl_to_start_ci95"]
    assert low < found["kl_to_start"] < high
    assert high - low == pytest.approx(2 * 1.96 * 0.2 / math.sqrt(80), rel=0.25)
    same = kl_metrics("kl", frame["sampled_logp"], frame["sampled_logp"], frame, seed=0)
    assert same == {"kl": 0.0, "kl_ci95": [0.0, 0.0]}


@pytest.mark.parametrize("slope", [0.0, 0.3, -2.0])
def test_r_squared_of_reward_and_length(slope: float) -> None:
    rng = random.Random(0)
    frame = drawn(prompts=25, each=4).with_columns(pl.col("response_tokens") + 100_000)
    lengths = frame["response_tokens"].to_list()
    rewards = pl.Series([slope * length + rng.gauss(0, 1) for length in lengths])
    found = reward_length_metrics(frame, rewards, seed=0)
    assert found["reward_length_r2"] == pytest.approx(linregress(lengths, rewards.to_list()).rvalue ** 2, rel=1e-6)

    def of(part: pl.DataFrame) -> float:
        return float(linregress(part["response_tokens"].to_list(), part["reward"].to_list()).rvalue ** 2)

    want = np.percentile(plain_draws(frame.with_columns(reward=rewards), of, 5), [2.5, 97.5])
    assert found["reward_length_r2_ci95"] == pytest.approx(want, abs=0.05)


def test_r_squared_needs_two_values() -> None:
    frame = samples((0, "a", [1], "stop", -1.0), (1, "b", [2], "stop", -1.0))
    absent = {"reward_length_r2": None, "reward_length_r2_ci95": None}
    assert reward_length_metrics(frame, pl.Series([1.0, 2.0]), 0) == absent  # equal lengths
    longer = samples((0, "a", [1], "stop", -1.0), (1, "b", [2, 3], "stop", -1.0))
    assert reward_length_metrics(longer, pl.Series([0.1, 0.1]), 0) == absent
    # Of two prompts, half of the draws have one of them twice.
    found = reward_length_metrics(longer, pl.Series([1.0, 2.0]), 0)
    assert found == {"reward_length_r2": pytest.approx(1.0), "reward_length_r2_ci95": None}


def test_draws_are_seeded_and_keep_their_size() -> None:
    sums = np.ones((7, 1))
    assert Resamples(7, 0).sums(sums).shape == (RESAMPLES, 1)
    assert (Resamples(7, 0).sums(sums) == 7.0).all()
    values = np.arange(50.0)[:, None]
    assert (Resamples(50, 4).sums(values) == Resamples(50, 4).sums(values)).all()
    assert (Resamples(50, 4).sums(values) != Resamples(50, 5).sums(values)).any()


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_log_probabilities_that_are_not_finite_give_no_figure(wrong: float) -> None:
    frame = samples((0, "a", [1], "stop", wrong), (1, "b", [2, 3], "stop", -1.0))
    found = sample_metrics(frame, seed=0)
    assert (found["entropy_per_token"], found["entropy_per_token_ci95"]) == (None, None)
    assert found["mean_response_tokens"] == 1.5
    logps = frame["sampled_logp"]
    assert kl_metrics("kl", logps, pl.Series([0.0, 0.0]), frame, 0) == {"kl": None, "kl_ci95": None}
    assert reward_length_metrics(frame, logps, 0) == {"reward_length_r2": None, "reward_length_r2_ci95": None}


def test_ratios_and_r_squared_without_a_value() -> None:
    assert column_ratio(np.array([[1.0, 2.0]])) == [0.5]
    assert np.isnan(column_ratio(np.array([[1.0, 0.0]]))).all()
    assert np.isnan(r_squared(np.array([[3.0, 0.0, 0.0, 0.0, 1.0, 0.0]]))).all()
    assert statistic_ci95(np.array([[1.0, 0.0]]), column_ratio, 0) is None


def test_mean_interval_of_rows_in_groups() -> None:
    items, values = pl.Series([1, 1, 2, 2]), pl.Series([1.0, 1.0, 3.0, 3.0])
    assert mean_ci95(items, values, 0) == [1.0, 3.0]
    assert mean_ci95(pl.Series([5, 5, 5]), pl.Series([1.0, 2.0, 6.0]), 0) == [3.0, 3.0]  # one prompt: one draw


def test_the_note_names_what_changes_the_distribution() -> None:
    assert sampling_note(1.0, 1.0, 0) is None
    text = sampling_note(0.7, 0.9, 0)
    assert text is not None
    assert "truncated distribution (temperature 0.7, top_p 0.9)" in text
    text = sampling_note(0.7, 1.0, 0, ["min_p"])
    assert text is not None
    assert "changed distribution (temperature 0.7, min_p)" in text
    assert "top_k 5" in str(sampling_note(1.0, 1.0, 5))
