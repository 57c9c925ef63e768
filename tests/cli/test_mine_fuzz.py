"""`dice mine` and `mine_pairs` on Parquet files of any schema: a documented exit code and a sentence, no traceback."""

from __future__ import annotations

import contextlib
import datetime as dt
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from property_examples import examples

from dice_py import mine_pairs
from dice_py.errors import DiceError

small = st.integers(0, 3)
text = st.sampled_from(["", "a", "b", "length", "stop", "\x1b[31m", "é"])
moments = st.datetimes(dt.datetime(1990, 1, 1), dt.datetime(2030, 1, 1))
floats = st.one_of(small.map(float), st.sampled_from([math.nan, math.inf, -0.0, 3.5, 1e300, -1.0]))
TYPES: list[tuple[pa.DataType, st.SearchStrategy[Any]]] = [
    *((kind, small) for kind in (pa.int8(), pa.int32(), pa.uint8(), pa.uint32())),
    (pa.int64(), st.one_of(small, st.sampled_from([-1, 2**32, 2**63 - 1, -(2**63)]))),
    (pa.uint64(), st.one_of(small, st.sampled_from([2**63, 2**64 - 1]))),
    (pa.float32(), floats.map(lambda value: value if abs(value) < 1e38 else math.inf)),
    (pa.float64(), floats),
    (pa.bool_(), st.booleans()),
    *((kind, text) for kind in (pa.string(), pa.large_string(), pa.string_view())),
    *((kind, text.map(str.encode)) for kind in (pa.binary(), pa.large_binary(), pa.binary_view())),
    (pa.binary(2), st.just(b"xy")),
    (pa.decimal128(20, 2), st.sampled_from([Decimal("1.00"), Decimal("2.50"), Decimal("-1.00"), Decimal(10**15)])),
    (pa.decimal256(60, 0), st.sampled_from([Decimal(1), Decimal(10**50)])),
    (pa.date32(), moments.map(dt.datetime.date)),
    (pa.time64("us"), moments.map(dt.datetime.time)),
    (pa.timestamp("us"), moments),
    (pa.timestamp("ns", "Europe/Vienna"), moments),
    (pa.duration("ms"), small.map(lambda days: dt.timedelta(days=days))),
    (pa.null(), st.none()),
    (pa.list_(pa.int32()), st.lists(small, max_size=3)),
    (pa.large_list(pa.int64()), st.lists(small, max_size=3)),
    (pa.list_(pa.string()), st.lists(text, max_size=2)),
    (pa.list_(pa.int32(), 2), st.tuples(small, small).map(list)),
    (pa.struct({"type": pa.string(), "length": pa.int64()}), st.fixed_dictionaries({"type": text, "length": small})),
    (pa.struct({"a": pa.string(), "b": pa.string()}), st.fixed_dictionaries({"a": text, "b": text})),
    (pa.struct({"a": pa.list_(pa.struct({"b": pa.int8()}))}), st.just({"a": [{"b": 1}]})),
    (pa.map_(pa.string(), pa.int32()), st.just([("k", 1)])),
    (pa.dictionary(pa.int32(), pa.string()), text),
    (pa.dictionary(pa.int8(), pa.int64()), small),
]
PLAIN = {"prompt_id": pa.int64(), "reward": pa.float64(), "response_tokens": pa.int64(), "finish_reason": pa.string()}
COLUMNS = [*PLAIN, "copy", "round", "second"]
OPTIONS = {"copy": "--duplicate-column", "round": "--policy-column", "second": "--second-reward-column"}


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    """Any type in one or two columns, plain ones in the others; at times a column is missing or there twice."""
    rows = draw(st.integers(0, 12))
    odd = draw(st.sets(st.sampled_from(COLUMNS), min_size=1, max_size=2))
    columns, fields = [], []
    for name in COLUMNS:
        if name in odd:
            kind, values = draw(st.sampled_from(TYPES))
        else:
            kind, values = PLAIN.get(name, pa.int32()), small.map(str) if name == "finish_reason" else small
        nullable = draw(st.booleans()) if name in odd else False
        values = st.one_of(values, st.none()) if nullable else values
        columns.append(pa.array(draw(st.lists(values, min_size=rows, max_size=rows)), kind))
        fields.append(pa.field(name, kind))
    change = draw(st.sampled_from(["none"] * 6 + ["missing", "twice"]))
    if change == "missing":
        at = draw(st.integers(0, len(fields) - 1))
        del columns[at], fields[at]
    elif change == "twice":
        at = draw(st.integers(0, len(fields) - 1))
        columns.append(columns[at])
        fields.append(fields[at])
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))


@settings(max_examples=examples(150), deadline=None, suppress_health_check=list(HealthCheck))
@given(table=tables(), group_rows=st.integers(1, 5), options=st.data())
def test_any_schema_ends_in_a_documented_exit_code(
    dice: Any, tmp_path_factory: pytest.TempPathFactory, table: pa.Table, group_rows: int, options: st.DataObject
) -> None:
    file = tmp_path_factory.mktemp("fuzz") / "scored.parquet"
    try:
        pq.write_table(table, file, row_group_size=group_rows)
    except (pa.ArrowException, NotImplementedError):
        assume(False)  # a type that Parquet does not have
    chosen = options.draw(st.sets(st.sampled_from(list(OPTIONS))))
    arguments = [part for name in sorted(chosen) for part in (OPTIONS[name], name)]
    arguments += options.draw(
        st.sampled_from(
            [[], ["--debias", "none"], ["--debias", "bucket"], ["--pairing", "all_pairs"], ["--memory", "1e-7"]]
        )
    )
    code, out, err = dice("mine", file, "-o", file.parent / "pairs.parquet", "--json", *arguments)  # no traceback
    assert code in (0, 2, 3)
    if code:
        assert not out
        assert err.startswith("error: ")
        assert not (file.parent / "pairs.parquet").exists()
    else:
        assert pq.read_metadata(file.parent / "pairs.parquet").num_rows >= 0
    for frame in (table, table.to_reader(max_chunksize=2)):
        keywords = {OPTIONS[name].removeprefix("--").replace("-", "_"): name for name in chosen}
        with contextlib.suppress(DiceError):
            mined = mine_pairs(frame, **keywords)
            rows = {*mined.pairs["chosen_row"], *mined.pairs["rejected_row"]}
            assert rows <= set(range(table.num_rows))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\0" * 40 + b"PAR1", b'{"a": 1}\n'])
def test_what_is_no_parquet_file(dice: Any, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "scored.parquet"
    file.write_bytes(content)
    code, out, err = dice("mine", file, "-o", tmp_path / "pairs.parquet")
    assert (code, out) == (3, "")
    assert "cannot be read as Parquet" in err
