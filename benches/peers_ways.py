"""The data and the ways that `peers.py` compares: one frame in two row orders, and every way to mine it.

A way takes the frame (`prompt_id u32`, `reward f32`, `length u32`) and returns the pairs of `dice_py.mine_pairs`, in
any order of rows. The peers are written as an expert would write them: they compute only row numbers, gather the other
columns by row number, and need not sort their answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa

import dice_py

Engine = Literal["in-memory", "streaming"]
Pass = Callable[[pl.DataFrame, float], pl.DataFrame]
Gap = Callable[[pl.DataFrame, float], int]

ORDERS = ("grouped", "shuffled")
FIXED_ALPHA = 0.0017
LENGTH_SLOPE = 0.002
"""Reward per unit of length in the data: near this alpha the mean length gap is zero."""
BRACKET = 0.01
"""The bisection searches for alpha between 0 and this."""
STEPS = 14
TIE = 1e-9
"""Penalized rewards that differ by less count as tied: float64 and exact arithmetic may order them differently."""
DUCKDB_ROWS = 122_880
"""Rows of one row group of DuckDB: Arrow batches of this size are scanned by all its threads."""


class MismatchError(Exception):
    """Two ways that should agree do not."""


def make_frame(rows: int, responses: int, seed: int, order: str) -> pl.DataFrame:
    """`rows // responses` prompts with `responses` rows each; both orders hold the same rows.

    Lengths are log-normal (median 300) within 10..2000; rewards are standard normal plus
    `LENGTH_SLOPE * length`. "grouped": by ascending prompt; "shuffled": in random order.
    """
    rows -= rows % responses
    length = np.empty(rows, np.uint32)
    reward = np.empty(rows, np.float32)
    # In pieces: the float64 draws of 1e8 rows at once would need more memory than the miner.
    for number, start in enumerate(range(0, rows, 1 << 20)):
        rng = np.random.default_rng([seed, number])
        piece = slice(start, min(start + (1 << 20), rows))
        size = piece.stop - piece.start
        length[piece] = np.clip(rng.lognormal(5.7, 0.7, size), 10, 2000)
        reward[piece] = rng.standard_normal(size, np.float32) + np.float32(LENGTH_SLOPE) * length[piece]
    prompt = np.repeat(np.arange(rows // responses, dtype=np.uint32), responses)
    columns = {"prompt_id": prompt, "reward": reward, "length": length}
    del prompt, reward, length
    if order == "shuffled":
        shuffle = np.random.default_rng(seed).permutation(rows)
        for name in columns:
            columns[name] = columns[name][shuffle]
    return pl.DataFrame(columns)


PLAIN_BISECTION = "polars_bisection_arg_max"
"""The obvious bisection; the other ones are faster."""


# --- Polars -----------------------------------------------------------------------------------------------

ROW = pl.int_range(pl.len(), dtype=pl.UInt32).alias("row")
LAST_OF_RUN = (pl.col("prompt_id") != pl.col("prompt_id").shift(-1)).fill_null(True)
FIRST_OF_RUN = (pl.col("prompt_id") != pl.col("prompt_id").shift(1)).fill_null(True)


def penalized(alpha: float) -> pl.Expr:
    return (pl.col("reward").cast(pl.Float64) - alpha * pl.col("length")).alias("s")


def penalized_f32(alpha: float) -> pl.Expr:
    """Half the memory traffic, and precise enough for a sum of gaps, but not for the pairs."""
    return (pl.col("reward") - pl.lit(alpha, pl.Float32) * pl.col("length").cast(pl.Float32)).alias("s")


def finish(frame: pl.DataFrame, rows: pl.DataFrame, alpha: float) -> pl.DataFrame:
    """Adds rewards, lengths and margins to `rows`: `prompt_id`, `chosen_row`, `rejected_row`."""
    numbers = pl.col("reward", "length")
    chosen = frame.select(numbers.gather(rows["chosen_row"]).name.prefix("chosen_"))
    rejected = frame.select(numbers.gather(rows["rejected_row"]).name.prefix("rejected_"))
    gap = pl.col("chosen_length").cast(pl.Int64) - pl.col("rejected_length")
    margin = pl.col("chosen_reward").cast(pl.Float64) - pl.col("rejected_reward") - alpha * gap
    return rows.hstack(chosen).hstack(rejected).with_columns(margin.cast(pl.Float32).alias("margin"))


def group_pass(frame: pl.DataFrame, alpha: float, best: pl.Expr, worst: pl.Expr, engine: Engine) -> pl.DataFrame:
    rows = (
        frame.lazy()
        .select("prompt_id", ROW, penalized(alpha))
        .group_by("prompt_id")
        .agg(best.alias("chosen_row"), worst.alias("rejected_row"))
        .collect(engine=engine)
    )
    return finish(frame, rows, alpha)


_row, _s, _length = pl.col("row"), pl.col("s"), pl.col("length")
max_by = partial(group_pass, best=_row.max_by("s"), worst=_row.min_by("s"))
arg_max = partial(group_pass, best=_row.get(_s.arg_max()), worst=_row.get(_s.arg_min()))
sort_by = partial(group_pass, best=_row.sort_by("s").last(), worst=_row.sort_by("s").first())


def declared(frame: pl.DataFrame) -> pl.DataFrame:
    """The grouped frame, with its prompts flagged as sorted."""
    return frame.with_columns(pl.col("prompt_id").set_sorted())


def declared_pass(frame: pl.DataFrame, alpha: float) -> pl.DataFrame:
    return max_by(declared(frame), alpha, engine="streaming")


def window_pass(frame: pl.DataFrame, alpha: float) -> pl.DataFrame:
    extremes = [_s.max().over("prompt_id").alias("high"), _s.min().over("prompt_id").alias("low")]
    ends = (
        frame.lazy()
        .select("prompt_id", ROW, penalized(alpha))
        .with_columns(extremes)
        .filter((_s == pl.col("high")) | (_s == pl.col("low")))
        .collect(engine="streaming")
    )
    chosen = ends.filter(_s == pl.col("high")).select("prompt_id", chosen_row="row")
    rejected = ends.filter(_s == pl.col("low")).select("prompt_id", rejected_row="row")
    return finish(frame, chosen.join(rejected, on="prompt_id"), alpha)


def sort_group_pass(frame: pl.DataFrame, alpha: float) -> pl.DataFrame:
    ranked = frame.lazy().select("prompt_id", ROW, penalized(alpha)).sort("prompt_id", "s")
    groups = ranked.group_by("prompt_id", maintain_order=True)
    return finish(frame, groups.agg(chosen_row=_row.last(), rejected_row=_row.first()).collect(), alpha)


def sort_runs_pass(frame: pl.DataFrame, alpha: float) -> pl.DataFrame:
    ranked = frame.lazy().select("prompt_id", ROW, penalized(alpha)).sort("prompt_id", "s").collect()
    chosen = ranked.filter(LAST_OF_RUN).select("prompt_id", chosen_row="row")
    return finish(frame, chosen.hstack(ranked.filter(FIRST_OF_RUN).select(rejected_row="row")), alpha)


def max_by_gap(frame: pl.DataFrame, alpha: float) -> int:
    groups = frame.lazy().select("prompt_id", "length", penalized_f32(alpha)).group_by("prompt_id")
    ends = groups.agg(chosen=_length.max_by("s"), rejected=_length.min_by("s"))
    gap = (pl.col("chosen").cast(pl.Int64) - pl.col("rejected")).sum()
    return int(ends.select(gap).collect(engine="streaming").item())


def arg_max_gap(frame: pl.DataFrame, alpha: float) -> int:
    """The obvious form: the same as the pass by arg_max, without row numbers."""
    groups = frame.lazy().select("prompt_id", "length", penalized(alpha)).group_by("prompt_id")
    ends = groups.agg(chosen=_length.get(_s.arg_max()), rejected=_length.get(_s.arg_min()))
    return int(ends.select((pl.col("chosen").cast(pl.Int64) - pl.col("rejected")).sum()).collect().item())


def window_gap(frame: pl.DataFrame, alpha: float) -> int:
    extremes = [_s.max().over("prompt_id").alias("high"), _s.min().over("prompt_id").alias("low")]
    rows = frame.lazy().select("prompt_id", "length", penalized_f32(alpha)).with_columns(extremes)
    length = _length.cast(pl.Int64)
    gap = length.filter(_s == pl.col("high")).sum() - length.filter(_s == pl.col("low")).sum()
    return int(rows.select(gap).collect(engine="streaming").item())


def sort_prompts(frame: pl.DataFrame) -> pl.DataFrame:
    """Sorts once, so that each step groups adjacent rows."""
    return frame.lazy().sort("prompt_id").collect(engine="streaming")


@dataclass(frozen=True)
class Answer:
    """The result of a way."""

    pairs: pl.DataFrame | None = None
    """None: the way computes no pairs."""
    alpha: float | None = None
    """None: the way does not search for it."""
    interval: tuple[float, float] | None = None
    """The penalties that give the same pairs; None: not known."""


def bisect(
    frame: pl.DataFrame, *, gap: Gap, last: Pass, prepare: Callable[[pl.DataFrame], pl.DataFrame] | None = None
) -> Answer:
    """`STEPS` halvings of 0..`BRACKET` by the sign of the total gap, then one pass for the pairs."""
    ready = frame if prepare is None else prepare(frame)
    low, high = 0.0, BRACKET
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if gap(ready, middle) > 0 else (low, middle)
    alpha = (low + high) / 2
    return Answer(last(frame, alpha), alpha)


# --- DuckDB, NumPy, ours ----------------------------------------------------------------------------------


def duckdb_pass(
    connection: duckdb.DuckDBPyConnection, all_columns: bool, frame: pl.DataFrame, alpha: float
) -> pl.DataFrame:
    """With `all_columns`, DuckDB returns rewards and lengths too; otherwise Polars gathers them by row number."""
    table = frame.with_row_index("row").to_arrow()
    connection.register("responses", pa.Table.from_batches(table.to_batches(max_chunksize=DUCKDB_ROWS)))
    value = "struct_pack(row, reward, length)" if all_columns else "row"
    ends = connection.sql(
        f"SELECT prompt_id, arg_max({value}, s) AS chosen_row, arg_min({value}, s) AS rejected_row "
        "FROM (SELECT *, reward::DOUBLE - $1::DOUBLE * length::DOUBLE AS s FROM responses) GROUP BY prompt_id",
        params=[alpha],
    ).to_arrow_table()
    connection.unregister("responses")
    pairs = pl.DataFrame(pl.from_arrow(ends))
    if not all_columns:
        return finish(frame, pairs, alpha)
    fields = [
        pl.col(f"{end}_row").struct.field(field).alias(f"{end}_{field}")
        for end in ("chosen", "rejected")
        for field in ("row", "reward", "length")
    ]
    gap = pl.col("chosen_length").cast(pl.Int64) - pl.col("rejected_length")
    margin = pl.col("chosen_reward").cast(pl.Float64) - pl.col("rejected_reward") - alpha * gap
    return pairs.select("prompt_id", *fields).with_columns(margin.cast(pl.Float32).alias("margin"))


def numpy_sum(frame: pl.DataFrame, widening: bool) -> Answer:
    for name in frame.columns:
        column = frame[name].to_numpy()
        column.sum() if widening else column.sum(dtype=column.dtype)
    return Answer()


def ours(frame: pl.DataFrame, alpha: float | Literal["auto"] = "auto") -> Answer:
    mined = dice_py.mine_pairs(frame, length_column="length", alpha=alpha)
    if mined.alpha is None or mined.alpha_low is None or mined.alpha_high is None:
        raise MismatchError("mine_pairs returned no alpha")
    return Answer(mined.pairs, mined.alpha, (mined.alpha_low, mined.alpha_high))


@dataclass(frozen=True)
class Way:
    """One way to mine the frame."""

    kind: Literal["numpy", "polars_pass", "polars_bisection", "duckdb_pass", "ours_fixed", "ours_auto"]
    title: str
    run: Callable[[pl.DataFrame], Answer]
    orders: tuple[str, ...] = ORDERS


def make_ways(connection: duckdb.DuckDBPyConnection) -> dict[str, Way]:
    """All ways, by their names in the results."""

    def at_fixed(run: Pass) -> Callable[[pl.DataFrame], Answer]:
        return lambda frame: Answer(run(frame, FIXED_ALPHA))

    streaming_max_by = partial(max_by, engine="streaming")
    passes: list[tuple[str, str, Pass, tuple[str, ...]]] = [
        ("max_by_in_memory", "group_by, max_by, in-memory", partial(max_by, engine="in-memory"), ORDERS),
        ("max_by", "group_by, max_by, streaming", streaming_max_by, ORDERS),
        ("max_by_declared", "group_by, max_by, streaming, declared sorted", declared_pass, ("grouped",)),
        ("arg_max", "group_by, get(arg_max)", partial(arg_max, engine="in-memory"), ORDERS),
        ("sort_by", "group_by, sort_by.last, streaming", partial(sort_by, engine="streaming"), ORDERS),
        ("window", "max over the prompt, filter, join", window_pass, ORDERS),
        ("sort_group", "sort, group_by, first and last", sort_group_pass, ORDERS),
        ("sort_runs", "sort, filter the ends of runs", sort_runs_pass, ORDERS),
    ]
    by_arg_max = partial(bisect, gap=arg_max_gap, last=partial(arg_max, engine="in-memory"))
    by_max_by = partial(bisect, gap=max_by_gap, last=streaming_max_by)
    by_declared = partial(bisect, gap=max_by_gap, last=declared_pass, prepare=declared)
    by_sorted = partial(bisect, gap=max_by_gap, last=streaming_max_by, prepare=sort_prompts)
    by_window = partial(bisect, gap=window_gap, last=streaming_max_by)
    row_pass, struct_pass = (partial(duckdb_pass, connection, all_columns) for all_columns in (False, True))
    kind: Literal["polars_bisection"] = "polars_bisection"
    return {
        "ours_auto": Way("ours_auto", "dice, exact alpha", ours),
        "ours_fixed": Way("ours_fixed", "dice, fixed alpha", partial(ours, alpha=FIXED_ALPHA)),
        "numpy_sum": Way("numpy", "NumPy, sum of the three columns", partial(numpy_sum, widening=True)),
        "numpy_sum_narrow": Way(
            "numpy", "NumPy, the same in the columns' own types", partial(numpy_sum, widening=False)
        ),
        **{
            f"polars_{name}": Way("polars_pass", f"Polars: {title}", at_fixed(run), orders)
            for name, title, run, orders in passes
        },
        PLAIN_BISECTION: Way(kind, f"Polars, {STEPS} steps: get(arg_max)", by_arg_max),
        "polars_bisection_max_by": Way(kind, f"Polars, {STEPS} steps: max_by", by_max_by),
        "polars_bisection_declared": Way(
            kind, f"Polars, {STEPS} steps: max_by, declared sorted", by_declared, ("grouped",)
        ),
        "polars_bisection_sorted": Way(
            kind, f"Polars, {STEPS} steps: max_by, sorted by prompt first", by_sorted, ("shuffled",)
        ),
        "polars_bisection_window": Way(kind, f"Polars, {STEPS} steps: max over the prompt", by_window),
        "duckdb_rows": Way("duckdb_pass", "DuckDB: arg_max of the row, gathered by Polars", at_fixed(row_pass)),
        "duckdb_whole": Way("duckdb_pass", "DuckDB: arg_max of row, reward and length", at_fixed(struct_pass)),
    }


# --- Comparison of the answers ---------------------------------------------------------------------------------------


def tied_prompts(frame: pl.DataFrame, alpha: float) -> pl.DataFrame:
    """`prompt_id` of the prompts whose best or worst penalized reward is shared by several rows (within `TIE`)."""
    extremes = [_s.max().over("prompt_id").alias("high"), _s.min().over("prompt_id").alias("low")]
    rows = frame.lazy().select("prompt_id", penalized(alpha)).with_columns(extremes)
    near = [
        rows.filter(condition).group_by("prompt_id").len().filter(pl.col("len") > 1).select("prompt_id")
        for condition in (_s >= pl.col("high") - TIE, _s <= pl.col("low") + TIE)
    ]
    return pl.concat(near).unique().collect(engine="streaming")


def check_pairs(name: str, pairs: pl.DataFrame, expected: pl.DataFrame, tied: pl.DataFrame) -> None:
    """Raises MismatchError unless both have the same pairs, apart from `tied` prompts."""
    schema = expected.drop("margin").schema
    columns = [pl.col(name).cast(dtype) for name, dtype in schema.items()]
    left, right = (
        frame.join(tied, on="prompt_id", how="anti").sort("prompt_id").select(*columns, "margin")
        for frame in (pairs, expected)
    )
    if left.height != right.height:
        raise MismatchError(f"{name}: {left.height} pairs, but dice has {right.height}")
    for column in schema:
        differs = left[column].ne_missing(right[column])
        if differs.any():
            row = differs.arg_max()
            raise MismatchError(
                f"{name}: {differs.sum()} of {left.height} pairs differ from dice's in {column}; the first: "
                f"{left.row(row or 0, named=True)} against {right.row(row or 0, named=True)}"
            )
    largest = (left["margin"] - right["margin"]).abs().max()
    if isinstance(largest, float) and not largest <= 1e-5:
        raise MismatchError(f"{name}: margins differ from dice's by up to {largest}")


def check_alpha(name: str, alpha: float, interval: tuple[float, float]) -> None:
    """Raises MismatchError unless `alpha` is at most one last step of the bisection from the exact interval."""
    low, high = interval
    distance = max(low - alpha, alpha - high, 0.0)
    if not distance <= BRACKET / 2**STEPS:
        raise MismatchError(f"{name}: alpha is {alpha}, but dice's is in [{low}, {high})")
