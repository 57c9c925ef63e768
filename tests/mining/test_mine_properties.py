"""Properties of the miner that hold for any input: Hypothesis searches for rows that break one.

Any column types: test_mine_raw_input.py. Many prompts: test_mine_large.py.
"""

from __future__ import annotations

import math
import struct
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import pairwise, product
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mine_data import PAIRINGS, check, moved_prompts, random_frame, random_options, shuffled
from mine_oracle import splitmix64
from property_examples import examples

from dice_py import MinedPairs, mine_pairs
from dice_py.errors import DataError

RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

# Many ties, some numbers with a long tail of bits, and what is no number.
tied = st.integers(-8, 8).map(lambda n: n / 8)
rewards = st.one_of(tied, tied, st.floats(-2, 2, width=16), st.sampled_from([None, math.nan, math.inf, -math.inf]))
lengths = st.one_of(st.integers(0, 9), st.integers(0, 9), st.none())


def framed(rows: list[tuple[Any, ...]]) -> pl.DataFrame:
    """A frame with all the columns that `random_options` may name."""
    schema = {"prompt_id": pl.Int64, "reward": pl.Float64, "response_tokens": pl.Int64, "hash": pl.Int64,
              "round": pl.Int64, "second": pl.Float64}  # fmt: skip
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    texts = {"text": pl.format("text {}", "hash"), "policy": pl.format("{}", "round"), "tokens": pl.concat_list("hash")}
    with_texts = frame.with_columns(**texts)
    return with_texts.with_columns(tokens=pl.when(pl.col("hash").is_not_null()).then("tokens"))


@st.composite
def frames(draw: st.DrawFn, most: int = 40) -> pl.DataFrame:
    hashes = st.one_of(st.none(), st.integers(0, 3))
    row = st.tuples(st.integers(0, 5), rewards, lengths, hashes, st.integers(8, 11), rewards)
    return framed(draw(st.lists(row, min_size=1, max_size=most)))


ANY_PENALTY = framed([*((0, 0.0, length, None, 8, 0.0) for length in (0, 0, 0, 0, 0, 1)), (0, 0.125, 1, None, 9, 0.0)])
"""With seed 146, the penalty found is the least number above 0: any at all takes the longer of the equal rewards."""


def exact_options(seed: int) -> dict[str, Any]:
    """As `random_options`, but no rounded scores where the nearest to a mean is looked for."""
    options = random_options(seed)
    if options.get("pairing") == "max_sweet_spot":
        options |= {"debias": "linear", "alpha": 0.03125}
    return options


@settings(RELAXED, max_examples=examples(150))
@given(frame=frames(), seed=st.integers(0, 10**6))
@example(frame=ANY_PENALTY, seed=146)
def test_against_the_oracle(frame: pl.DataFrame, seed: int) -> None:
    options = exact_options(seed)
    check(frame, search="policy_column" in options, **options)


SUMS = ("reward_length_correlation_before", "reward_length_correlation_after", "mean_consistency")


def assert_same_summary(one: MinedPairs, other: MinedPairs) -> None:
    """The same numbers, but for the last bits of what is summed over all rows."""
    ours, theirs = ({k: v for k, v in mined.summary().items() if k not in SUMS} for mined in (one, other))
    assert ours == theirs
    for name in SUMS:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        assert a is None or a == pytest.approx(b, nan_ok=True, abs=1e-9)
    assert one.curve.equals(other.curve)


def assert_same_content(one: MinedPairs, other: MinedPairs) -> None:
    """But for row numbers, the policies of responses that are equal, and the last bits of win rates."""
    assert one.pairs.columns == other.pairs.columns
    rates = [name for name in one.pairs.columns if name.endswith("win_rate")]
    moves = ["chosen_row", "rejected_row", "chosen_policy", "rejected_policy", *rates]
    assert one.pairs.drop(moves, strict=False).equals(other.pairs.drop(moves, strict=False))
    for name in rates:
        assert np.allclose(one.pairs[name], other.pairs[name], rtol=1e-6)
    assert_same_summary(one, other)


def cut(frame: pl.DataFrame, cuts: list[int]) -> pl.DataFrame:
    edges = [0, *sorted(cuts), frame.height]
    return pl.concat([frame[a:b] for a, b in pairwise(edges)], rechunk=False)


@settings(RELAXED, max_examples=examples(60))
@given(frame=frames(), seed=st.integers(0, 10**6), data=st.data())
def test_rows_may_move(frame: pl.DataFrame, seed: int, data: st.DataObject) -> None:
    # Which of two equal texts or of two equal rewards is taken does depend on the order of a prompt's own rows.
    options = exact_options(seed) | {"duplicate_column": None}
    moved = moved_prompts(frame, data.draw(st.permutations(range(frame.height))))
    one, other = (mine_pairs(rows, **options) for rows in (frame, moved))
    assert_same_content(one, other)
    grouped = mine_pairs(moved.sort("prompt_id", maintain_order=True), **options)
    assert_same_content(one, grouped)


@settings(RELAXED, max_examples=examples(60))
@given(frame=frames(), seed=st.integers(0, 10**6), data=st.data())
def test_kinds_chunks_and_slices_agree(frame: pl.DataFrame, seed: int, data: st.DataObject) -> None:
    options = exact_options(seed)
    expected = mine_pairs(frame, **options)
    cuts = data.draw(st.lists(st.integers(0, frame.height), max_size=6))
    chunked = cut(frame, cuts)
    # Slices of something longer: offsets of values, of null bits and of text.
    before, after = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))
    padding = frame[[0] * (before + after)]
    longer = pl.concat([padding[:before], frame, padding[before:]])
    table = longer.to_arrow()
    for kind in (
        chunked, chunked.lazy(), chunked.to_arrow(), chunked.to_arrow().to_reader(max_chunksize=3),
        longer.slice(before, frame.height), longer.lazy().slice(before, frame.height),
        table.slice(before, frame.height), table.combine_chunks().to_batches()[0].slice(before, frame.height),
    ):  # fmt: skip
        mined = mine_pairs(kind, **options)
        assert mined.pairs.equals(expected.pairs)
        assert_same_summary(mined, expected)


def first_float_from(number: Fraction) -> float:
    try:
        near = number.numerator / number.denominator
    except OverflowError:
        return math.inf
    return near if Fraction(near) >= number else math.nextafter(near, math.inf)


Scored = tuple[Fraction, int, int, int]
"""Reward, length, hash, row."""


def pair_by_fractions(group: list[Scored], alpha: float) -> tuple[Scored, Scored] | None:
    """Of all pairs of different reward the one of the greatest margin, then of the least gap of lengths, then that with
    the best chosen, then the worst rejected."""

    def ranks(response: Scored) -> tuple[Any, Any]:
        reward, length, tie, _ = response
        score = reward - Fraction(alpha) * length
        length = length if alpha else 0  # without a penalty the length does not count
        return (-score, length, tie), (score, -length, tie)

    def key(best: tuple[Any, Any, Any], worst: tuple[Any, Any, Any]) -> tuple[Any, ...]:
        return worst[2][0] + best[1][0], best[1][1] + worst[2][1], best[1], worst[2]

    ranked = [(response, *ranks(response)) for response in group]
    pairs = [(key(b, w), b[0], w[0]) for b in ranked for w in ranked if b[0][0] != w[0][0]]
    return min(pairs)[1:] if pairs else None


def step_by_fractions(groups: dict[int, list[Scored]]) -> tuple[float, float, Fraction]:
    """[low, high) in floats of the least |gap|, the lower of two, and its mean gap: every break point is tried."""
    points = {0.0, math.ulp(0.0)}
    for group in groups.values():
        for reward, length, _, row in group:
            points |= {first_float_from((reward - r) / (length - n)) for r, n, *_ in group if n < length and reward > r}
            # Best and worst of equal reward: one of them makes way for another response.
            for _, other, _, _ in (x for x in group if x[0] == reward and x[3] != row):
                for (r, n, *_), (r2, n2, *_) in product(group, group):
                    over, under = r + r2 - 2 * reward, n + n2 - length - other
                    if over * under > 0:
                        points.add(first_float_from(over / under))
    points.discard(math.inf)
    steps: list[tuple[float, list[tuple[Scored, Scored]]]] = []
    for alpha in sorted(points):
        pairs = [pair for group in groups.values() if (pair := pair_by_fractions(group, alpha)) is not None]
        if not steps or steps[-1][1] != pairs:
            steps.append((alpha, pairs))
    gaps = [sum(chosen[1] - rejected[1] for chosen, rejected in pairs) for _, pairs in steps]
    best = min(range(len(steps)), key=lambda i: (abs(gaps[i]), i))
    high = steps[best + 1][0] if best + 1 < len(steps) else math.inf
    return steps[best][0], high, Fraction(gaps[best], max(len(steps[best][1]), 1))


def as_f32(number: float) -> float:
    return float(struct.unpack("f", struct.pack("f", number))[0])


near = st.integers(0, 3).flatmap(lambda e: st.integers(-4, 4).map(lambda n: 1 + n * 2.0 ** -(50 + e % 3)))
any_reward = {
    "f32": st.one_of(st.floats(width=32, allow_nan=False, allow_infinity=False), st.floats(-1, 1, width=32)),
    "f64": st.one_of(st.floats(-3e38, 3e38), st.floats(-1, 1), near),
}
any_length = st.one_of(st.integers(0, 2**32 - 1), st.integers(0, 40), st.integers(2**32 - 5, 2**32 - 1))


@pytest.mark.parametrize("width", ["f32", "f64"])
@settings(RELAXED, max_examples=examples(400))
@given(data=st.data())
def test_alpha_is_exact_for_any_floats(width: str, data: st.DataObject) -> None:
    """Against rational arithmetic: rewards and lengths over their full ranges, and to the last bit."""
    row = st.tuples(st.integers(0, 2), any_reward[width], any_length)
    rows = sorted(data.draw(st.lists(row, min_size=2, max_size=12)), key=lambda r: r[0])
    schema = {
        "prompt_id": pl.UInt32, "reward": pl.Float32 if width == "f32" else pl.Float64, "response_tokens": pl.UInt32
    }  # fmt: skip
    mined = mine_pairs(pl.DataFrame(rows, schema=schema, orient="row"))
    groups: dict[int, list[Scored]] = {}
    for row, (prompt, reward, length) in enumerate(rows):
        place = row - [other[0] for other in rows].index(prompt)
        tie = splitmix64(splitmix64(splitmix64(0) ^ prompt) ^ place)
        if length:  # an empty response is too short
            groups.setdefault(prompt, []).append((Fraction(reward), length, tie, row))
    low, high, gap = step_by_fractions({k: group for k, group in groups.items() if len(group) > 1})
    assert (mined.alpha_low, mined.alpha_high) == (low, high)
    assert mined.alpha is not None
    assert low <= mined.alpha < high
    if mined.pairs.height:
        assert mined.mean_length_gap_after == pytest.approx(float(gap), rel=1e-12)
    for prompt, *found in mined.pairs.select("prompt_id", "chosen_row", "rejected_row").iter_rows():
        pair = pair_by_fractions(groups[prompt], mined.alpha)
        assert pair is not None
        assert found == [response[3] for response in pair]


IDS: dict[Any, list[Any]] = {
    pl.Int8: [-128, -1, 0, 127],
    pl.Int32: [-(2**31), -1, 10**9, 2**31 - 1],
    pl.Int64: [-(2**63), -(10**9), 10**9, 2**63 - 1],
    pl.UInt32: [0, 7, 10**9, 2**32 - 1],
    pl.UInt64: [3, 2**63 - 1, 2**63, 2**64 - 1],
    pl.String: ["A", "a", "ab", "é" * 40],
    pl.Categorical: ["a", "b", "c", "d"],
    pl.Enum(["a", "b", "c", "d"]): ["a", "b", "c", "d"],
    pl.Float64: [-0.5, 0.25, 1.0, 1e300],
}


@pytest.mark.parametrize("dtype", IDS, ids=str)
@settings(RELAXED, max_examples=20)
@given(frame=frames(), seed=st.integers(0, 10**6))
def test_prompt_ids_of_any_type(dtype: Any, frame: pl.DataFrame, seed: int) -> None:
    """All that matters of them is their order (and for a random draw their value, which the oracle knows)."""
    ids = pl.Series(IDS[dtype], dtype=dtype)
    named = frame.with_columns(prompt_id=ids.gather(frame["prompt_id"].clip(0, 3)))
    options = exact_options(seed)
    mined = check(named, search=False, **options)
    assert mined.pairs.schema["prompt_id"] == dtype
    if dtype in (pl.String, pl.Categorical) and named.height > 1:
        table = named.with_columns(pl.col("prompt_id").cast(pl.String)).to_arrow()
        at = table.schema.get_field_index("prompt_id")
        coded = table.set_column(at, "prompt_id", table["prompt_id"].dictionary_encode())
        assert pa.types.is_dictionary(coded.schema.field("prompt_id").type)
        coded_pairs, plain = mine_pairs(coded.slice(1), **options), mine_pairs(named[1:], **options)
        text = pl.col("prompt_id").cast(pl.String)
        assert coded_pairs.pairs.with_columns(text).equals(plain.pairs.with_columns(text))


@settings(RELAXED, max_examples=examples(40))
@given(frame=frames(), seed=st.integers(0, 10**6))
def test_widths_of_rewards_and_lengths(frame: pl.DataFrame, seed: int) -> None:
    """These rewards are the same numbers in float32, and the lengths in any integer type."""
    options = exact_options(seed)
    expected = mine_pairs(frame, **options)
    for reward, length in ((pl.Float32, pl.UInt8), (pl.Float32, pl.Int16), (pl.Float64, pl.UInt64)):
        mined = mine_pairs(frame.cast({"reward": reward, "response_tokens": length}), **options)
        assert mined.pairs.equals(expected.pairs)
        assert_same_summary(mined, expected)


@settings(RELAXED, max_examples=examples(40))
@given(frame=frames(), seed=st.integers(0, 10**6), data=st.data())
def test_a_negative_length_is_refused(frame: pl.DataFrame, seed: int, data: st.DataObject) -> None:
    """Whatever else is wrong with its row, and it names the first of them."""
    rows = data.draw(st.lists(st.integers(0, frame.height - 1), min_size=1, max_size=3))
    bad = pl.when(pl.int_range(pl.len()).is_in(rows)).then(-7).otherwise("response_tokens")
    with pytest.raises(DataError, match=f"row {min(rows)}: the length is -7"):
        mine_pairs(frame.with_columns(response_tokens=bad), **exact_options(seed))


@settings(RELAXED, max_examples=examples(30))
@given(frame=frames(), pairing=st.sampled_from(PAIRINGS))
def test_equal_lengths_need_no_penalty(frame: pl.DataFrame, pairing: str) -> None:
    level = frame.with_columns(response_tokens=pl.lit(5))
    mined = mine_pairs(level, pairing=pairing)
    assert (mined.alpha, mined.alpha_low, mined.alpha_high) == (0.0, 0.0, math.inf)
    assert mined.pairs.equals(mine_pairs(level, pairing=pairing, debias="none").pairs)
    assert not (mined.pairs["margin"] == 0).any()


@settings(RELAXED, max_examples=examples(30))
@given(frame=frames(), reward=st.sampled_from([0.0, -0.0, 1.5, -3e38]))
def test_constant_rewards_are_no_preference(frame: pl.DataFrame, reward: float) -> None:
    level = frame.with_columns(reward=pl.lit(reward)).filter(pl.col("response_tokens") > 0)
    if level.is_empty():
        return
    signs = level.with_columns(reward=pl.when(pl.int_range(pl.len()) % 2 == 0).then("reward").otherwise(-0.0))
    for rows in (level, signs) if reward == 0 else (level,):
        several = rows.filter(pl.len().over("prompt_id") > 1)["prompt_id"].n_unique()
        for options in ({"debias": "none"}, {"debias": "per_token"}, *({"pairing": pairing} for pairing in PAIRINGS)):
            mined = mine_pairs(rows, truncated_column=None, **options)
            assert mined.pairs.is_empty()
            assert (mined.dropped_prompts["tied"], mined.dropped_prompts["no_contrast"]) == (several, 0)
    mined = mine_pairs(level)
    assert mined.alpha == 0.0
    if abs(reward) < 2:
        # Of larger ones the mean is rounded.
        assert math.isnan(mined.reward_length_correlation_before)


@settings(RELAXED, max_examples=examples(30))
@given(frame=frames(), seed=st.integers(0, 10**6))
def test_one_response_a_prompt_gives_no_pair(frame: pl.DataFrame, seed: int) -> None:
    alone = frame.with_columns(prompt_id=pl.int_range(pl.len()))
    mined = mine_pairs(alone, **exact_options(seed))
    assert mined.pairs.is_empty()
    assert mined.dropped_prompts["too_few_responses"] == mined.prompts == frame.height
    assert sum(mined.dropped.values()) == mined.rows
    with pytest.raises(DataError, match="no rows"):
        mine_pairs(alone.clear(), **exact_options(seed))


def test_threads_at_once_answer_as_one_after_another() -> None:
    """Unlike tasks side by side: no state is shared."""
    tasks = [(shuffled(random_frame(300, seed), seed) if seed % 2 else random_frame(300, seed), random_options(seed))
             for seed in range(16)]  # fmt: skip

    def run(task: tuple[pl.DataFrame, dict[str, Any]]) -> MinedPairs:
        return mine_pairs(task[0], **task[1])

    alone = [run(task) for task in tasks]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(run, tasks * 3))
    for one, other in zip(alone * 3, together, strict=True):
        assert one.pairs.equals(other.pairs)
        assert one.summary() == other.summary()
        assert one.curve.equals(other.curve)
