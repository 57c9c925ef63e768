"""Columns of any Arrow or Polars type in any role: the miner returns pairs or a clear error, and never panics."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import uuid
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from property_examples import examples

from dice_py import mine_pairs
from dice_py.errors import DataError, DiceError

small_integers = st.integers(-3, 9)
# As an Arrow type writes it, and what it holds. Most values are small, so that prompts have several rows.
TYPES: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (pa.null(), st.none()),
    (pa.bool_(), st.booleans()),
    *[(t, st.one_of(st.integers(0, 5), st.sampled_from([-128, 127]))) for t in (pa.int8(), pa.int16())],
    *[(t, st.one_of(small_integers, st.sampled_from([-(2**31), 2**31 - 1]))) for t in (pa.int32(), pa.int64())],
    (pa.int64(), st.sampled_from([-(2**63), 2**63 - 1, 2**32, 0])),
    *[(t, st.one_of(st.integers(0, 5), st.just(255))) for t in (pa.uint8(), pa.uint16(), pa.uint32())],
    (pa.uint64(), st.sampled_from([0, 1, 2, 2**63, 2**64 - 1])),
    (pa.float16(), st.floats(-8, 8, width=16).map(np.float16)),
    (pa.float32(), st.floats(width=32)),
    (pa.float64(), st.floats()),
    (pa.decimal128(10, 2), st.decimals(-9, 9, places=2)),
    (pa.decimal128(38, 0), st.just(decimal.Decimal(10) ** 37)),
    (pa.decimal256(60, 3), st.decimals(-9, 9, places=3)),
    (pa.date32(), st.dates()),
    (pa.date64(), st.dates()),
    (pa.time32("s"), st.times().map(lambda t: t.replace(microsecond=0))),
    (pa.time64("us"), st.times()),
    (pa.timestamp("us"), st.datetimes()),
    (pa.timestamp("ns", "UTC"), st.datetimes(datetime.datetime(1990, 1, 1), datetime.datetime(2100, 1, 1))),
    (pa.duration("ms"), st.integers(-5, 5).map(lambda n: datetime.timedelta(milliseconds=n))),
    (pa.month_day_nano_interval(), st.just(pa.MonthDayNano([1, 2, 3]))),
    (pa.string(), st.text(max_size=2)),
    (pa.large_string(), st.sampled_from(["", "a", "b"])),
    (pa.string_view(), st.sampled_from(["", "a", "longer than twelve bytes"])),
    (pa.binary(), st.binary(max_size=2)),
    (pa.binary_view(), st.binary(max_size=2)),
    (pa.binary(2), st.binary(min_size=2, max_size=2)),
    (pa.list_(pa.int32()), st.lists(small_integers, max_size=2)),
    (pa.large_list(pa.float32()), st.lists(st.floats(width=32), max_size=2)),
    (pa.list_(pa.string()), st.lists(st.text(max_size=1), max_size=2)),
    (pa.list_(pa.list_(pa.int8())), st.just([[1], []])),
    (pa.list_(pa.int16(), 2), st.just([1, 2])),
    (pa.struct({"a": pa.int32(), "b": pa.string()}), st.just({"a": 1, "b": "x"})),
    (pa.map_(pa.string(), pa.int32()), st.just([("k", 1)])),
    (pa.dictionary(pa.int32(), pa.string()), st.sampled_from(["a", "b"])),
    (pa.dictionary(pa.int8(), pa.large_string()), st.sampled_from(["a", "b"])),
    (pa.dictionary(pa.int8(), pa.int64()), small_integers),
    (pa.dictionary(pa.uint16(), pa.float32()), st.floats(-2, 2, width=32)),
]
ROLES = {
    "prompt_id": "prompt_column", "reward": "reward_column", "response_tokens": "length_column",
    "same": "duplicate_column", "round": "policy_column", "second": "second_reward_column", "cut": "truncated_column",
}  # fmt: skip
FIT: dict[str, Any] = {
    "prompt_id": pa.int64(), "reward": pa.float64(), "response_tokens": pa.uint32(), "same": pa.int64(),
    "round": pa.int64(), "second": pa.float64(), "cut": pa.bool_(),
}  # fmt: skip


def values(dtype: Any, strategy: st.SearchStrategy[Any], rows: int, nulls: bool) -> st.SearchStrategy[Any]:
    one = st.one_of(st.none(), strategy) if nulls else strategy
    return st.lists(one, min_size=rows, max_size=rows).map(lambda drawn: pa.array(drawn, type=dtype))


@st.composite
def tables(draw: st.DrawFn) -> tuple[pa.Table, dict[str, str]]:
    """Columns for some of the roles, one or two of them of any type and the others as they should be."""
    rows = draw(st.integers(1, 12))
    optional = draw(st.lists(st.sampled_from(list(ROLES)[3:]), unique=True, max_size=2))
    names = ["prompt_id", "reward", "response_tokens", *optional]
    odd = draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
    columns = {}
    for name in names:
        if name in odd:
            dtype, strategy = draw(st.sampled_from(TYPES))
            columns[name] = draw(values(dtype, strategy, rows, draw(st.booleans())))
        else:
            kind = st.booleans() if name == "cut" else st.integers(0, 4)
            columns[name] = draw(values(FIT[name], kind, rows, False))
    table = pa.table(columns)
    start = draw(st.integers(0, rows))
    table = table.slice(start) if draw(st.booleans()) else table
    cut = draw(st.integers(0, table.num_rows))
    return pa.concat_tables([table.slice(0, cut), table.slice(cut)]), {ROLES[name]: name for name in names}


def mined_or_refused(frame: Any, **options: Any) -> None:
    try:
        mined = mine_pairs(frame, **options)
    except DiceError:
        return
    pairs = mined.pairs
    assert not (pairs["chosen_row"] == pairs["rejected_row"]).any()
    assert all((pairs[side] < mined.rows).all() for side in ("chosen_row", "rejected_row"))
    assert not pairs["margin"].is_nan().any()
    assert sum(mined.dropped.values()) <= mined.rows


OPTIONS: list[dict[str, Any]] = [
    {},
    {"debias": "none", "pairing": "all_pairs"},
    {"debias": "bucket", "buckets": 2, "pairing": "max_random"},
    {"debias": "per_token", "pairing": "max_sweet_spot", "win_rates": True},
    {"debias": "matched", "length_ratio": 0.5, "soft_labels": True},
]
RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@settings(RELAXED, max_examples=examples(250))
@given(made=tables(), options=st.sampled_from(OPTIONS), kind=st.sampled_from(["table", "reader", "batch", "polars"]))
def test_any_types(made: tuple[pa.Table, dict[str, str]], options: dict[str, Any], kind: str) -> None:
    table, named = made
    frame: Any = table
    if kind == "reader":
        frame = table.to_reader()
    elif kind == "batch":
        frame = next(iter(table.combine_chunks().to_batches()), table)
    elif kind == "polars":
        # Of a type that Polars does not know no such frame can be made.
        with contextlib.suppress(pl.exceptions.PolarsError, pl.exceptions.PanicException):
            frame = pl.DataFrame(pl.from_arrow(table, rechunk=False))
    mined_or_refused(frame, **named, **options)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("number", range(len(TYPES)), ids=lambda n: str(TYPES[n][0]).replace(" ", ""))
def test_every_type_in_every_role(role: str, number: int) -> None:
    """One example each: six rows, one of them null."""
    dtype, strategy = TYPES[number]
    columns = {name: pa.array([1, 1, 1, 2, 2, 2], type=FIT[name]) for name in list(ROLES)[:3]}

    @settings(RELAXED, max_examples=2, database=None, derandomize=True)
    @given(drawn=values(dtype, strategy, 5, False))
    def run(drawn: Any) -> None:
        column = pa.concat_arrays([drawn, pa.array([None], type=dtype)])
        named = {ROLES[name]: name for name in (*columns, role)}
        mined_or_refused(pa.table(columns | {role: column}), **named)

    run()


def encoded() -> dict[str, Any]:
    """Layouts that no list of values makes."""
    numbers = pa.array([1, 1, 2, 2, 2, 2])
    tags = pa.array([0, 1, 0, 1, 0, 1], pa.int8())
    ids = pa.array([uuid.UUID(int=i).bytes for i in range(6)], pa.binary(16))
    indices = pa.array([0, None, 1, 0, 1, 1], pa.int8())
    return {
        "run-end": pc.run_end_encode(numbers),
        "sparse-union": pa.UnionArray.from_sparse(tags, [numbers, numbers]),
        "dense-union": pa.UnionArray.from_dense(tags, pa.array(range(6), pa.int32()), [numbers, numbers]),
        "uuid": pa.ExtensionArray.from_storage(pa.uuid(), ids),
        "nested-dictionary": pa.array([["a"], ["b"]] * 3).cast(pa.list_(pa.dictionary(pa.int32(), pa.string()))),
        "null-dictionary": pa.DictionaryArray.from_arrays(indices, pa.array([5, None])),
    }


@pytest.mark.parametrize("layout", encoded())
@pytest.mark.parametrize("role", ROLES)
def test_unusual_layouts(role: str, layout: str) -> None:
    columns = {name: pa.array([1, 1, 1, 2, 2, 2], type=FIT[name]) for name in list(ROLES)[:3]}
    named = {ROLES[name]: name for name in (*columns, role)}
    mined_or_refused(pa.table(columns | {role: encoded()[layout]}), **named)


@pytest.mark.parametrize(
    "column",
    [
        pl.Series([object()] * 6, dtype=pl.Object),
        pl.Series([1] * 6, dtype=pl.Int128),
        pl.Series([2**100, -(2**100)] * 3, dtype=pl.Int128),
        pl.Series([1] * 6, dtype=pl.UInt128),
        pl.Series([decimal.Decimal("1.5")] * 6, dtype=pl.Decimal(38, 10)),
        pl.Series([None] * 6, dtype=pl.Null),
        pl.Series([[1, 2]] * 6, dtype=pl.Array(pl.Int8, 2)),
        pl.Series(["a", "b"] * 3, dtype=pl.Enum(["b", "a"])),
        pl.Series([b"a", b"b"] * 3),
        pl.Series([True, False] * 3),
        pl.Series([float("nan"), 1.0, -0.0, 0.0, float("inf"), None], strict=False),
    ],
    ids=lambda series: str(series.dtype),
)
@pytest.mark.parametrize("role", ROLES)
def test_polars_types(role: str, column: pl.Series) -> None:
    frame = pl.DataFrame({name: [1, 1, 1, 2, 2, 2] for name in list(ROLES)[:3]}).with_columns(column.alias(role))
    mined_or_refused(frame, **{ROLES[name]: name for name in (*list(ROLES)[:3], role)})


def test_one_column_in_several_roles() -> None:
    frame = pl.DataFrame({"n": [1, 1, 2, 2]})
    mined = mine_pairs(frame, prompt_column="n", reward_column="n", length_column="n")
    assert mined.dropped_prompts["tied"] == 2
    mined_or_refused(
        frame, prompt_column="n", reward_column="n", length_column="n", duplicate_column="n", policy_column="n"
    )


def test_columns_named_like_those_of_the_answer() -> None:
    """No name of a user's column gets in the way of ours."""
    base = pl.DataFrame({"p": [1, 1, 2, 2], "r": [1.0, 0.0, 3.0, 5.0], "l": [3, 4, 5, 6]})
    expected = mine_pairs(base, prompt_column="p", reward_column="r", length_column="l").pairs
    for names in (["length", "prompt", "reward"], ["chosen_row", "margin", "prompt_id"], ["row", "rows", "truncated"]):
        frame = base.rename(dict(zip(base.columns, names, strict=True)))
        p, r, n = names
        assert mine_pairs(frame, prompt_column=p, reward_column=r, length_column=n).pairs.equals(expected)


def test_no_rows_of_any_type() -> None:
    for dtype, _ in TYPES:
        table = pa.schema([(name, dtype) for name in list(ROLES)[:3]]).empty_table()
        with pytest.raises(DataError):
            mine_pairs(table)
