"""`mine_files`: Parquet files in every arrangement; streaming must not change the result."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

import dice_py
from dice_py.errors import DataError, UsageError
from dice_py.mining.files import mine_files
from dice_py.mining.parquet_input import ScoredFiles
from dice_py.storage.files import TEMPORARY
from dice_py.storage.parquet import parquet_meta

# Rows that a segment takes: 256 bytes each.
THOUSAND = 1000 * 256 / 2**30


def scored(prompts: int = 900, *, seed: int = 0, order: str = "ascending", most: int = 12) -> pl.DataFrame:
    random = np.random.default_rng(seed)
    ids = random.permutation(np.arange(prompts) * 7 + 3)
    prompt = np.repeat(np.sort(ids) if order == "ascending" else ids, random.integers(1, most, prompts))
    if order == "shuffled":
        random.shuffle(prompt)
    rows = len(prompt)
    length = random.integers(1, 400, rows)
    reward = random.integers(-300, 300, rows) / 64 + length / 128
    frame = pl.DataFrame(
        {
            "prompt_id": pl.Series(prompt, dtype=pl.UInt32),
            "reward": pl.Series(reward, dtype=pl.Float32),
            "response_tokens": pl.Series(length, dtype=pl.UInt32),
            "finish_reason": random.choice(["stop", "stop", "stop", "length"], rows),
            "round": random.integers(1, 4, rows),
            "token_ids": [[int(v)] for v in random.integers(0, 300, rows)],
            "judge": random.integers(0, 50, rows) / 4,
            "response": [f"text {i}" for i in range(rows)],
        }
    )
    holes = random.random(rows) < 0.02
    return frame.with_columns(reward=pl.when(~pl.Series(holes)).then("reward"))


def same(summary: dict[str, Any], out: Path, mined: dice_py.MinedPairs) -> None:
    pairs = pl.read_parquet(out)
    expected = mined.pairs
    if "difficulty" in expected.columns:
        pairs, expected = (f.with_columns(pl.col("difficulty").cast(pl.String)) for f in (pairs, expected))
    assert pairs.columns == expected.columns
    assert pairs.equals(expected)
    in_memory = mined.summary()
    assert summary.keys() == in_memory.keys()
    for name, value in in_memory.items():
        if isinstance(value, float):
            assert summary[name] == pytest.approx(value, rel=1e-9, abs=2e-9), name
        else:
            assert summary[name] == value, name


OPTIONS: list[dict[str, Any]] = [
    {},
    {"alpha": 0.004, "min_responses": 3, "min_length": 5, "max_length": 350},
    {"debias": "none", "truncated_column": None},
    {"debias": "per_token", "min_margin": 0.01},
    {"debias": "bucket", "buckets": 5},
    {"debias": "bucket", "bucket_scale": True, "duplicate_column": "token_ids"},
    {"debias": "matched", "length_tolerance": 20},
    {"pairing": "top_bottom", "pairs_per_prompt": 3, "min_margin_quantile": 0.3, "soft_labels": True},
    {"pairing": "max_random", "seed": 5, "duplicate_column": "token_ids"},
    {"pairing": "all_pairs", "pairs_per_prompt": 4, "difficulty_quantile": 0.4, "min_margin": 0.5},
    {"policy_column": "round", "chosen_from": "newest", "rejected_from": "oldest", "win_rates": True},
    {"second_reward_column": "judge", "pairing": "max_sweet_spot"},
]


@pytest.mark.parametrize("order", ["ascending", "grouped", "shuffled"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_streaming_changes_nothing(options: dict[str, Any], order: str, tmp_path: Path) -> None:
    frame = scored(order=order)
    for i, part in enumerate(frame.iter_slices(1700)):
        part.write_parquet(tmp_path / f"part-{i}.parquet", row_group_size=300)
    out = tmp_path / "out" / "pairs.parquet"
    mined = dice_py.mine_pairs(frame, **options)
    events: list[dict[str, Any]] = []
    summary = mine_files(
        [str(tmp_path / "part-*.parquet")],
        out,
        memory_gib=THOUSAND,
        report=lambda event, **fields: events.append({"event": event, **fields}),
        **options,
    )
    same(summary, out, mined)
    steps = {event["step"] for event in events}
    assert ("partition" in steps) == (order != "ascending")
    assert {"scan", "pairs"} <= steps
    assert all(0 < event["done"] <= event["total"] == frame.height for event in events)
    assert [path.name for path in out.parent.iterdir()] == ["pairs.parquet"]
    assert parquet_meta(out)["files"] == sorted(str(p) for p in tmp_path.glob("part-*.parquet"))


def test_held_in_memory_is_the_same(tmp_path: Path) -> None:
    frame = scored(order="shuffled")
    frame.write_parquet(tmp_path / "scored.parquet")
    out = tmp_path / "pairs.parquet"
    same(mine_files([str(tmp_path / "scored.parquet")], out), out, dice_py.mine_pairs(frame))


def test_a_prompt_longer_than_a_segment(tmp_path: Path) -> None:
    frame = scored(prompts=40, most=4)
    long = pl.concat([frame.with_columns(prompt_id=pl.lit(1, pl.UInt32))] * 60)
    joined = pl.concat([long, frame])
    joined.write_parquet(tmp_path / "scored.parquet", row_group_size=200)
    out = tmp_path / "pairs.parquet"
    summary = mine_files([str(tmp_path / "scored.parquet")], out, memory_gib=THOUSAND)
    same(summary, out, dice_py.mine_pairs(joined))


def test_hive_folders_give_columns(tmp_path: Path) -> None:
    frame = scored(order="shuffled").sort("round", maintain_order=True)
    for (number,), part in frame.group_by("round", maintain_order=True):
        folder = tmp_path / "scored" / f"round={number}"
        folder.mkdir(parents=True)
        part.drop("round").write_parquet(folder / "0.parquet")
    (tmp_path / "scored" / "_metadata.parquet").write_text("not a table")
    (tmp_path / "scored" / "round=1" / ".unfinished.parquet").write_text("not a table")
    options: dict[str, Any] = {"policy_column": "round", "chosen_from": "newest", "rejected_from": "oldest"}
    mined = dice_py.mine_pairs(frame, **options)
    for memory in (1.0, THOUSAND):
        out = tmp_path / "pairs.parquet"
        mine_files([str(tmp_path / "scored")], out, memory_gib=memory, **options)
        streamed = pl.read_parquet(out)
        assert streamed.drop("chosen_policy", "rejected_policy").equals(
            mined.pairs.drop("chosen_policy", "rejected_policy")
        )
        assert streamed["chosen_policy"].cast(pl.Int64).equals(mined.pairs["chosen_policy"])


def test_rows_count_through_the_arguments_in_order(tmp_path: Path) -> None:
    frame = scored()
    frame[:1000].write_parquet(tmp_path / "b.parquet")
    frame[1000:].write_parquet(tmp_path / "a.parquet")
    out = tmp_path / "pairs.parquet"
    files = [str(tmp_path / "b.parquet"), str(tmp_path / "a.parquet")]
    same(mine_files(files, out, memory_gib=THOUSAND), out, dice_py.mine_pairs(frame))
    texts = pl.read_parquet(out).pipe(dice_py.attach_text, files)
    assert texts["chosen"].equals(frame["response"].gather(texts["chosen_row"]).alias("chosen"))


@pytest.mark.parametrize("memory", [1.0, THOUSAND])
def test_errors(memory: float, tmp_path: Path) -> None:
    out = tmp_path / "pairs.parquet"
    frame = scored()
    path = tmp_path / "scored.parquet"

    def mine(*files: Path | str, **options: Any) -> dict[str, Any]:
        return mine_files([str(file) for file in files], out, memory_gib=memory, **options)

    with pytest.raises(DataError, match=r"absent.*does not exist"):
        mine(tmp_path / "absent.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \*\.parquet"):
        mine(tmp_path / "empty")
    path.write_text("not Parquet")
    with pytest.raises(DataError, match=r"scored\.parquet.*Parquet"):
        mine(path)
    frame.head(0).write_parquet(path)
    with pytest.raises(DataError, match="no rows"):
        mine(path)
    frame.write_parquet(path)
    with pytest.raises(DataError, match="column 'nothing' not found"):
        mine(path, reward_column="nothing")
    with pytest.raises(UsageError, match="memory_gib is 0"):
        mine_files([str(path)], out, memory_gib=0)
    frame.drop("reward").write_parquet(tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"other\.parquet has no column 'reward'"):
        mine(path, tmp_path / "other.parquet")
    negative = frame.with_columns(response_tokens=pl.col("response_tokens").cast(pl.Int64) - 390)
    negative.write_parquet(path)
    with pytest.raises(DataError, match="the length is -"):
        mine(path)
    holes = frame.with_columns(prompt_id=pl.when(pl.int_range(pl.len()) != 1234).then("prompt_id"))
    holes.write_parquet(path)
    with pytest.raises(DataError, match="row 1234: the prompt is null"):
        mine(path)
    frame.with_columns(pl.col("prompt_id").cast(pl.String)).write_parquet(path)
    if memory < 1.0:
        with pytest.raises(DataError, match=r"prompt column 'prompt_id' has the type.*needs integers"):
            mine(path)
    else:
        mine(path)
    assert not [left for left in tmp_path.iterdir() if left.name.endswith(TEMPORARY)]


@pytest.mark.parametrize("options", [{"min_length": 1000}, {"min_margin": 1e9, "difficulty_quantile": 0.5}], ids=str)
def test_no_pair_is_left(options: dict[str, Any], tmp_path: Path) -> None:
    frame = scored()
    frame.write_parquet(tmp_path / "scored.parquet")
    out = tmp_path / "pairs.parquet"
    summary = mine_files([str(tmp_path / "scored.parquet")], out, memory_gib=THOUSAND, **options)
    same(summary, out, dice_py.mine_pairs(frame, **options))
    assert summary["pairs"] == 0


@pytest.mark.parametrize("memory", [1.0, THOUSAND])
def test_input_is_not_overwritten(memory: float, tmp_path: Path) -> None:
    frame = scored()
    path = tmp_path / "scored.parquet"
    frame.write_parquet(path)
    with pytest.raises(UsageError, match="is one of the files"):
        mine_files([str(path)], path, memory_gib=memory)
    (tmp_path / "hard.parquet").hardlink_to(tmp_path / "scored.parquet")
    with pytest.raises(UsageError, match=r"hard.parquet is named twice"):
        mine_files([str(tmp_path / "scored.parquet"), str(tmp_path / "hard.parquet")], tmp_path / "out")
    with pytest.raises(UsageError, match=r"hard.parquet is one of the files"):
        mine_files([str(tmp_path / "scored.parquet")], tmp_path / "hard.parquet")
    (tmp_path / "hard.parquet").unlink()
    with pytest.raises(UsageError, match="named twice"):
        mine_files([str(path), str(tmp_path / "*.parquet")], tmp_path / "pairs.parquet", memory_gib=memory)
    with pytest.raises(UsageError, match="is a folder"):
        mine_files([str(path)], tmp_path, memory_gib=memory)
    assert pl.read_parquet(path).equals(frame)


@pytest.mark.parametrize("memory", [1.0, THOUSAND])
def test_files_of_other_number_types_are_refused(memory: float, tmp_path: Path) -> None:
    frame = scored()
    frame[:900].write_parquet(tmp_path / "a.parquet")
    frame[900:].with_columns(pl.col("reward").cast(pl.Float64)).write_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet has column 'reward' as double, but .*a\.parquet as float"):
        mine_files([str(tmp_path / "*.parquet")], tmp_path / "pairs.parquet", memory_gib=memory)


def test_few_prompts_and_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # So few that the sample has none.
    monkeypatch.setattr("dice_py.mining.segments.SAMPLE_ROWS", 1)
    frame = scored(prompts=6, most=900, order="shuffled").rename({"round": "length"})
    frame.write_parquet(tmp_path / "scored.parquet")
    out = tmp_path / "pairs.parquet"
    options: dict[str, Any] = {"policy_column": "length", "chosen_from": "newest"}
    summary = mine_files([str(tmp_path / "scored.parquet")], out, memory_gib=THOUSAND, **options)
    same(summary, out, dice_py.mine_pairs(frame, **options))


@pytest.mark.parametrize("memory", [1.0, THOUSAND])
def test_what_a_killed_process_left_is_removed(tmp_path: Path, memory: float) -> None:
    scored().write_parquet(tmp_path / "scored.parquet")
    # No process has the number that is one above the greatest.
    dead = int(Path("/proc/sys/kernel/pid_max").read_text()) + 1
    left, other = tmp_path / f".pairs.parquet.{dead}.x{TEMPORARY}", tmp_path / f".more.parquet.{dead}.x{TEMPORARY}"
    for folder in (left, other):
        folder.mkdir()
        (folder / "segment-00000.arrow").write_text("half")
    half = tmp_path / f".pairs.parquet.{dead}{TEMPORARY}"
    half.write_text("half")
    mine_files([str(tmp_path / "scored.parquet")], tmp_path / "pairs.parquet", memory_gib=memory)
    assert not left.exists()
    assert not half.exists()
    assert other.exists()


def test_rows_in_errors_are_those_of_the_input(tmp_path: Path) -> None:
    frame = scored(order="shuffled").with_columns(pl.col("response_tokens").cast(pl.Int64))
    row = frame.height - 7
    bad = frame.with_columns(
        response_tokens=pl.when(pl.int_range(pl.len()) != row).then("response_tokens").otherwise(-5)
    )
    bad.write_parquet(tmp_path / "scored.parquet")
    for memory in (1.0, THOUSAND):
        with pytest.raises(DataError, match=f"row {row}: the length is -5"):
            mine_files([str(tmp_path / "scored.parquet")], tmp_path / "pairs.parquet", memory_gib=memory)


@pytest.mark.parametrize("dtype", [pl.Int16, pl.Int32, pl.Int64, pl.UInt16, pl.UInt64], ids=str)
def test_lengths_of_any_width(dtype: Any, tmp_path: Path) -> None:
    frame = scored(order="shuffled").with_columns(pl.col("response_tokens").cast(dtype))
    frame.write_parquet(tmp_path / "scored.parquet")
    out = tmp_path / "pairs.parquet"
    same(mine_files([str(tmp_path / "scored.parquet")], out, memory_gib=THOUSAND), out, dice_py.mine_pairs(frame))


def test_too_many_segments_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "scored.parquet"
    scored(order="shuffled").write_parquet(path)
    with pytest.raises(UsageError, match=r"segments of --memory.*at most 256.*raise it"):
        mine_files([str(path)], tmp_path / "pairs.parquet", memory_gib=THOUSAND / 100)
    assert [left.name for left in tmp_path.iterdir()] == ["scored.parquet"]


@pytest.mark.parametrize("memory", [1.0, THOUSAND])
def test_the_footer_has_the_penalty_per_token(memory: float, tmp_path: Path) -> None:
    """R-DPO's α: of lengths in tokens, with a linear penalty."""
    frame = scored().with_columns(response_chars=pl.col("response_tokens") * 4)
    frame.write_parquet(tmp_path / "scored.parquet")

    def per_token(**options: Any) -> tuple[Any, Any]:
        out = tmp_path / "out.parquet"
        summary = mine_files([str(tmp_path / "scored.parquet")], out, memory_gib=memory, **options)
        return parquet_meta(out)["alpha_per_token"], summary["alpha"]

    found, alpha = per_token()
    assert found == alpha > 0
    assert per_token(alpha=0.25)[0] == 0.25
    assert per_token(debias="none")[0] is None
    assert per_token(length_column="response_chars")[0] is None


def test_little_is_read_ahead_of_who_takes_the_batches(tmp_path: Path) -> None:
    rows, group = 1 << 21, 1 << 14
    values = np.random.default_rng(0).standard_normal(rows, dtype=np.float32)
    pl.DataFrame({"reward": values}).write_parquet(tmp_path / "scored.parquet", row_group_size=group)
    before = pa.total_allocated_bytes()
    batches = ScoredFiles([str(tmp_path / "scored.parquet")]).batches(["reward"], group)
    next(batches)
    time.sleep(0.3)  # a reader that went on would be through by now
    assert pa.total_allocated_bytes() - before < 8 * group * values.itemsize
    assert 1 + sum(1 for _ in batches) == rows // group


@pytest.mark.parametrize("columns", [["reward", "round"], ["round"]])
def test_a_folders_name_wins_over_a_column(tmp_path: Path, columns: list[str]) -> None:
    (tmp_path / "round=1").mkdir()
    frame = pl.DataFrame({"reward": [0.5, 1.5], "round": pl.Series([5, 6], dtype=pl.Int32)})
    frame.write_parquet(tmp_path / "round=1" / "scored.parquet")
    batches = list(ScoredFiles([str(tmp_path)]).batches(columns))
    found = pa.Table.from_batches(batches)
    assert found.column_names == columns
    assert found["round"].to_pylist() == [1, 1]
