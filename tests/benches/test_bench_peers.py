"""The benches in Python: all ways of mining give the same pairs, and the results hold what is named.

No time is asserted here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import duckdb
import peers
import peers_ways as ways
import polars as pl
import pytest
import stream

ROWS, RESPONSES = 8000, 4
KEYS = ["prompt_id", "chosen_row", "rejected_row"]


@pytest.fixture(scope="module", params=ways.ORDERS)
def order(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def frame(order: str) -> pl.DataFrame:
    return ways.make_frame(ROWS, RESPONSES, 0, order)


def pairs_of(answer: ways.Answer) -> pl.DataFrame:
    assert answer.pairs is not None
    return answer.pairs


def as_set(pairs: pl.DataFrame) -> set[tuple[int, ...]]:
    return set(pairs.select(KEYS).iter_rows())


def plainly(frame: pl.DataFrame, alpha: float) -> set[tuple[int, ...]]:
    """The pairs by a loop over the prompts."""
    rows: dict[int, list[tuple[float, int]]] = {}
    for row, (prompt, reward, length) in enumerate(frame.iter_rows()):
        rows.setdefault(prompt, []).append((reward - alpha * length, row))
    return {(prompt, max(found)[1], min(found)[1]) for prompt, found in rows.items()}


def test_every_way_gives_our_pairs(frame: pl.DataFrame, order: str) -> None:
    assert ways.tied_prompts(frame, ways.FIXED_ALPHA).is_empty()
    fixed, exact = ways.ours(frame, ways.FIXED_ALPHA), ways.ours(frame)
    assert as_set(pairs_of(fixed)) == plainly(frame, ways.FIXED_ALPHA)
    assert exact.alpha is not None
    assert exact.interval is not None
    assert 0 < exact.alpha < ways.BRACKET
    assert as_set(pairs_of(exact)) == plainly(frame, exact.alpha)
    kinds = set()
    with duckdb.connect() as connection:
        for name, way in ways.make_ways(connection).items():
            if order not in way.orders:
                continue
            answer = way.run(frame)
            kinds.add(way.kind)
            if way.kind in ("polars_pass", "duckdb_pass", "ours_fixed"):
                assert as_set(pairs_of(answer)) == as_set(pairs_of(fixed)), name
                ways.check_pairs(name, pairs_of(answer), pairs_of(fixed), pairs_of(fixed).clear().select("prompt_id"))
            elif way.kind == "polars_bisection":
                assert answer.alpha == pytest.approx(exact.alpha, abs=2 * ways.BRACKET / 2**ways.STEPS), name
                assert as_set(pairs_of(answer)) == plainly(frame, answer.alpha), name
                ways.check_alpha(name, answer.alpha, exact.interval)
    assert kinds == {"ours_auto", "ours_fixed", "numpy", "polars_pass", "polars_bisection", "duckdb_pass"}


def test_both_orders_hold_the_same_rows() -> None:
    grouped, shuffled = (ways.make_frame(ROWS, RESPONSES, 0, order) for order in ways.ORDERS)
    assert grouped.schema == pl.Schema({"prompt_id": pl.UInt32, "reward": pl.Float32, "length": pl.UInt32})
    assert grouped["prompt_id"].to_list() == [row // RESPONSES for row in range(ROWS)]
    assert grouped.sort(pl.all()).equals(shuffled.sort(pl.all()))
    assert not shuffled["prompt_id"].is_sorted()
    assert grouped["length"].is_between(10, 2000).all()
    assert not grouped.equals(ways.make_frame(ROWS, RESPONSES, 1, "grouped"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (pl.col("chosen_row", "rejected_row").reverse(), "pairs differ from dice's in chosen_row"),
        (pl.lit(None, pl.UInt32).alias("rejected_row"), "pairs differ from dice's in rejected_row"),
        (pl.col("chosen_reward") + 1, "pairs differ from dice's in chosen_reward"),
        (pl.col("margin") + 1e-3, "margins differ"),
    ],
)
def test_pairs_that_differ_are_reported(frame: pl.DataFrame, change: pl.Expr, said: str) -> None:
    fixed = pairs_of(ways.ours(frame, ways.FIXED_ALPHA))
    none = fixed.clear().select("prompt_id")
    with pytest.raises(ways.MismatchError, match=said):
        ways.check_pairs("a way", fixed.with_columns(change), fixed, none)
    with pytest.raises(ways.MismatchError, match="1999 pairs, but dice has 2000"):
        ways.check_pairs("a way", fixed[1:], fixed, none)
    # A tied prompt is left out on both sides.
    ways.check_pairs("a way", fixed[1:], fixed, fixed[:1].select("prompt_id"))


def test_an_alpha_further_than_one_step_is_reported() -> None:
    ways.check_alpha("a way", 0.002, (0.0019999, 0.0020001))
    ways.check_alpha("a way", 0.002 - ways.BRACKET / 2**ways.STEPS, (0.002, 0.0020001))
    for alpha in (0.00199, 0.00201, float("nan")):
        with pytest.raises(ways.MismatchError, match="alpha is"):
            ways.check_alpha("a way", alpha, (0.002, 0.0020001))


def test_ties_are_found() -> None:
    tied = pl.DataFrame(
        # Of the prompts: none, the best, the worst, one in the middle.
        {
            "prompt_id": [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3],
            "reward": [0.0, 1.0, 2.0, 0.0, 2.0, 2.0, 0.0, 0.0, 2.0, 0.0, 1.0, 1.0, 2.0],
            "length": [10] * 13,
        },
        schema={"prompt_id": pl.UInt32, "reward": pl.Float32, "length": pl.UInt32},
    )
    assert sorted(ways.tied_prompts(tied, 0.001)["prompt_id"]) == [1, 2]


def run(out: Path, *more: str) -> int:
    small = ["--prompts", "2000", "--responses", "4", "--repeats", "1", "--out", str(out)]
    return peers.main([*small, *more])


@pytest.mark.long
@pytest.mark.slow
def test_results_hold_what_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "free_memory", lambda: 10**9)
    assert run(tmp_path, "--sizes", "1e4,1e8") == 0
    results: dict[str, Any] = json.loads((tmp_path / "mining.json").read_text())
    # Neither the name of the machine nor of its user.
    known = {"cpu", "cores", "memory_gb", "os", "python", "polars", "duckdb", "numpy", "dice"}
    assert set(results["machine"]) == known
    assert set(results["threads"]) == {"dice", "polars", "duckdb", "numpy"}
    assert results["parameters"]["rows"] == 8000
    assert {"ours_auto", "ours_fixed", "numpy_sum", "polars_max_by", "duckdb_rows"} <= set(results["ways"])
    for way in results["ways"].values():
        for name in {"grouped", "shuffled"} & set(way):
            assert 0 < way[name]["best_s"] <= way[name]["median_s"]
    assert results["ways"][results["fastest"]["polars_pass"]["shuffled"]]["kind"] == "polars_pass"
    for name in ("speedup_over_polars_bisection", "speedup_over_fastest_polars_bisection", "ratio_to_numpy_sum"):
        assert all(results[name][order] > 0 for order in ways.ORDERS)
    assert results["shuffled_ratio_to_polars_pass"] > 0
    assert set(results["bytes_per_row"]) == set(ways.ORDERS)
    scaled, skipped = results["scaling"][:2], results["scaling"][2:]
    assert [(point["rows"], point["order"]) for point in scaled] == [(10_000, order) for order in ways.ORDERS]
    assert all(point["median_s"] > 0 for point in scaled)
    assert [point["rows"] for point in skipped] == [10**8] * 2
    assert all("more than half of the 1 GB free" in point["skipped"] for point in skipped)
    assert (tmp_path / "mining.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "mining.md").read_text()
    assert table.startswith("| frame to pairs | grouped by prompt | shuffled |")
    printed = capsys.readouterr().out
    assert table in printed
    assert "skipped: 100,000,000 rows" in printed


def test_a_mismatch_fails_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make = peers.make_ways

    def wrong(connection: duckdb.DuckDBPyConnection) -> dict[str, ways.Way]:
        swapped = pl.col("rejected_row").alias("chosen_row")
        right = make(connection)["duckdb_rows"]
        one = ways.Way(right.kind, right.title, lambda f: ways.Answer(pairs_of(right.run(f)).with_columns(swapped)))
        return make(connection) | {"duckdb_rows": one}

    monkeypatch.setattr(peers, "make_ways", wrong)
    assert run(tmp_path / "out", "--sizes", "") == 1
    assert "duckdb_rows: 2000 of 2000 pairs differ from dice's in chosen_row" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="memory is measured on Linux only")
def test_memory_counts_what_is_given_back(frame: pl.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(rows: pl.DataFrame) -> ways.Answer:
        # Touched, and free again before the call returns.
        assert len(b"\1" * 200_000_000) == 200_000_000
        return ways.ours(rows)

    before = peers.extra_bytes_per_row(frame)
    monkeypatch.setattr(peers, "ours", greedy)
    after = peers.extra_bytes_per_row(frame)
    assert before is not None
    assert after is not None
    assert before * ROWS < 100e6 < 190e6 < after * ROWS < 300e6


@pytest.mark.parametrize("sizes", ["many", "1.5", "3", "-16", "nan", "inf"])
def test_sizes_that_are_none_are_refused(sizes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        peers.main([f"--sizes={sizes}", "--responses", "4"])
    assert stopped.value.code == 2
    assert "--sizes" in capsys.readouterr().err


@pytest.mark.parametrize("order", ways.ORDERS)
def test_streaming_is_measured(order: str, tmp_path: Path) -> None:
    stream.write_scored(tmp_path / "scored.parquet", 20_000, order, seed=0)
    # Far less memory than the rows take, so that they are streamed.
    found = stream.measure(tmp_path / "scored.parquet", tmp_path / "pairs.parquet", 0.0005)
    assert found["rows"] == 20_000
    assert found["pairs"] == pl.read_parquet(tmp_path / "pairs.parquet").height > 1000
    assert found["seconds"] > 0
    assert 0 < found["peak_resident_gib"] < 4
