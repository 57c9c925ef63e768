"""`dice mine`: what it prints, that every option reaches the miner, and what it refuses."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from command_line import contents, scored
from small_disk import small_disk

from dice_py.config.mining import MiningOptions
from dice_py.storage.parquet import parquet_meta, read_parquet

pytestmark = pytest.mark.usefixtures("empty_folder")


def test_mine_prints_one_json_object_and_nothing_else(dice) -> None:
    code, out, err = dice("mine", scored(Path("scored.parquet")), "-o", "pairs.parquet", "--json")
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    found = json.loads(out)
    assert {
        "pairs",
        "alpha",
        "alpha_low",
        "alpha_high",
        "mean_length_gap_before",
        "mean_length_gap_after",
    } <= set(found)
    assert found["pairs"] == read_parquet(Path("pairs.parquet")).height == 20
    assert found["alpha_low"] <= found["alpha"] <= found["alpha_high"]
    assert abs(found["mean_length_gap_after"]) <= abs(found["mean_length_gap_before"])
    assert set(found["dropped"]) >= {"not_finite", "truncated", "too_short", "too_long", "too_few_responses"}
    assert all(isinstance(count, int) for count in found["dropped"].values())
    footer = {"files": ["scored.parquet"], "alpha_per_token": found["alpha"]}
    assert parquet_meta(Path("pairs.parquet")) == found | footer
    code, out, err = dice("mine", "scored.parquet", "-o", "pairs.parquet")
    assert (code, err) == (0, "")
    lines = [re.sub("  +", "|", line) for line in out.splitlines()]
    assert lines[:2] == ["pairs in pairs.parquet", "pairs|20 (of 20 prompts with 80 responses)"]
    assert [line.split("|")[0] for line in lines[2:]] == [
        "alpha", "mean length gap", "correlation of reward and length", "chosen is the longer", "margins",
    ]  # fmt: skip
    # What was dropped, if anything was.
    out = dice("mine", "scored.parquet", "-o", "pairs.parquet", "--max-length", 7, "--min-margin", 0.5)[1]
    assert re.search(r"^dropped rows +too long 20$", out, flags=re.M)
    assert re.search(r"^dropped pairs +below min margin \d+$", out, flags=re.M)


MINE_OPTIONS: list[tuple[str, object]] = [
    ("--prompt-column", "question"), ("--reward-column", "r"), ("--length-column", "l"), ("--truncated-column", "cut"),
    ("--duplicate-column", "text"), ("--policy-column", "model"), ("--second-reward-column", "r2"),
    ("--debias", "bucket"), ("--alpha", 0.25), ("--buckets", 3), ("--bucket-scale", True), ("--length-tolerance", 4),
    ("--length-ratio", 0.5), ("--pairing", "all_pairs"), ("--top-k", 5), ("--bottom-k", 6), ("--pairs-per-prompt", 7),
    ("--sweet-spot-deviations", 1.5), ("--seed", 2**64 - 1), ("--chosen-from", "newest"), ("--rejected-from", "oldest"),
    ("--min-responses", 8), ("--min-length", 9), ("--max-length", 10), ("--min-margin", -0.5),
    ("--min-margin-quantile", 0.125), ("--win-rates", True), ("--soft-labels", True), ("--label-scale", 2.5),
    ("--difficulty-quantile", 0.75),
]  # fmt: skip
"""Every option of mining with a value that is not its default."""
NEEDED = {
    "--pairs-per-prompt": ["--pairing"],
    "--chosen-from": ["--policy-column"],
    "--rejected-from": ["--policy-column"],
}
"""Options that are refused without another one; those of --debias matched aside."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments that `dice mine` calls the miner with; the miner itself is replaced."""
    from dice_py.mining import files

    seen: dict[str, Any] = {}

    def counted(scored: list[str], out: Path, options: MiningOptions, **others: Any) -> dict[str, Any]:
        others.pop("report")("progress", stage="mine", done=3, total=3)
        seen.update(scored=scored, out=out, **options.model_dump(), **others)
        return {"pairs": 3}

    monkeypatch.setattr(files, "mine_files", counted)
    return seen


def test_every_option_of_mining_reaches_the_miner(dice, asked: dict[str, Any]) -> None:
    defaults = MiningOptions().model_dump()
    where = {"scored": ["a.parquet"], "out": Path("pairs.parquet")}
    assert dice("mine", "a.parquet", "-o", "pairs.parquet", "--json") == (0, '{"pairs": 3}\n', "")
    assert asked == where | {"memory_gib": 1.0} | defaults
    values = dict(MINE_OPTIONS)
    assert {name.removeprefix("--").replace("-", "_") for name in values} == defaults.keys()
    for name in values:
        given = {needed: values[needed] for needed in NEEDED.get(name, ())} | {name: values[name]}
        if name.startswith("--length-") and name != "--length-column":
            given["--debias"] = "matched"
        flags = [part for flag, value in given.items() for part in ((flag,) if value is True else (flag, value))]
        assert dice("mine", "a.parquet", "-o", "pairs.parquet", "--json", "--memory", "0.5", *flags)[0] == 0
        changed = {flag.removeprefix("--").replace("-", "_"): value for flag, value in given.items()}
        assert asked == where | {"memory_gib": 0.5} | defaults | changed
        assert all(defaults[key] != value for key, value in changed.items())
    # The word none turns the default off.
    dice("mine", "a.parquet", "-o", "pairs.parquet", "--json", "--truncated-column", "none")
    assert asked["truncated_column"] is None


def test_mine_takes_files_patterns_and_folders(dice, asked: dict[str, Any]) -> None:
    for given in (["a.parquet", "b.parquet"], ["shards/*.parquet"], ["by-round/", "a.parquet"]):
        assert dice("mine", *given, "-o", "pairs.parquet", "--json")[0] == 0
        assert asked["scored"] == given


def test_mine_counts_rows_through_its_files(dice) -> None:
    frame = read_parquet(scored(Path("scored.parquet")))
    for n in range(2):
        folder = Path(f"shards/part={n}")
        folder.mkdir(parents=True)
        frame[n * 40 : n * 40 + 40].write_parquet(folder / "rows.parquet")
    assert dice("mine", "scored.parquet", "-o", "whole.parquet", "--json")[0] == 0
    for given in (["shards"], ["shards/*/rows.parquet"], ["shards/part=0/rows.parquet", "shards/part=1/rows.parquet"]):
        assert dice("mine", *given, "-o", "pairs.parquet", "--json")[0] == 0
        assert read_parquet(Path("pairs.parquet")).equals(read_parquet(Path("whole.parquet")))


def test_help_of_mining_has_headings(dice) -> None:
    out = dice("mine", "--help")[1]
    headings = re.findall(r"^(\w+):$", out, flags=re.M)
    assert headings == ["Arguments", "Columns", "Length", "Pairs", "Filters", "Labels", "Options"]
    for name, _ in MINE_OPTIONS:
        assert len(re.findall(rf"^  {name}(?= )", out, flags=re.M)) == 1
    # Every command is written by the same code.
    out = dice("score", "--help")[1]
    assert re.findall(r"^(\w+):$", out, flags=re.M) == ["Arguments", "Options"]


def test_mine_with_names_and_options_of_ones_own(dice) -> None:
    frame = read_parquet(scored(Path("scored.parquet")))
    names = {"prompt_id": "question", "reward": "score", "response_tokens": "chars"}
    frame.rename(names).with_columns(pl.col("question").cast(pl.String)).write_parquet("own.parquet")
    columns = ("--prompt-column", "question", "--reward-column", "score", "--length-column", "chars")
    for options in (("--debias", "none"), ("--alpha", "0.01"), ("--debias", "bucket", "--buckets", "2")):
        code, out, err = dice("mine", "own.parquet", "-o", "deep/pairs.parquet", *columns, *options, "--json")
        assert (code, err) == (0, "")
        alpha = json.loads(out)["alpha"]
        assert alpha is None if "bucket" in options else math.isclose(alpha, 0.01 if "0.01" in options else 0.0)
    assert read_parquet(Path("deep/pairs.parquet"))["prompt_id"].dtype == pl.String


def test_mine_refuses_and_leaves_the_old_pairs(refused) -> None:
    frame = read_parquet(scored(Path("scored.parquet")))
    out = Path("pairs.parquet")
    out.write_text("pairs of yesterday")
    Path("text.parquet").write_text("no Parquet at all")
    Path("nothing.parquet").touch()
    Path("no-files").mkdir()
    frame.clear().write_parquet("empty.parquet")
    frame.with_columns(pl.col("reward").cast(pl.String)).write_parquet("words.parquet")
    for file, said in {
        "absent.parquet": "absent.parquet does not exist (or is not a file)",
        "absent/*.parquet": "absent/*.parquet does not exist (or is not a file)",
        "no-files": "no-files",
        "text.parquet": "text.parquet cannot be read as Parquet",
        "nothing.parquet": "nothing.parquet",
        "empty.parquet": "empty.parquet: there are no rows",
        "words.parquet": "reward",
    }.items():
        assert said in refused(3, "mine", file, "-o", out)
    said = refused(3, "mine", "scored.parquet", "-o", out, "--reward-column", "rewrd")
    assert "scored.parquet: column 'rewrd' not found" in said
    assert "columns are prompt_id, sample_id, reward, response_tokens" in said
    assert "--reward-column" in said
    for options, said in {
        ("--debias", "lienar"): "debias is 'lienar', but must be one of none, linear, per_token, bucket, matched",
        ("--pairing", "best"): "pairing is 'best', but must be one of max_min, max_random",
        ("--chosen-from", "newest"): "chosen_from is 'newest', which needs policy_column: name it",
        ("--length-ratio", "0.5"): "length_ratio is for debias 'matched', but debias is 'linear'",
        ("--memory", "0"): "memory_gib is 0.0, but must be a number of GiB above zero",
        ("--alpha", "much"): "--alpha is 'much', but must be 'auto' or a finite number of zero or more",
        ("--alpha", "-1"): "alpha is -1.0",
        ("--alpha", "nan"): "alpha is nan",
        ("--min-responses", "1"): "min_responses is 1",
        ("--min-length", "9", "--max-length", "3"): "min_length is 9 and max_length 3",
        ("--buckets", "0", "--debias", "bucket"): "buckets is 0",
    }.items():
        assert said in refused(2, "mine", "scored.parquet", "-o", out, *options)
    assert out.read_text() == "pairs of yesterday"
    assert not list(Path().glob(".*"))


def test_mine_into_a_folder(refused) -> None:
    scored(Path("scored.parquet"))
    Path("folder").mkdir()
    assert "folder is a folder: name a file" in refused(2, "mine", "scored.parquet", "-o", "folder")
    assert contents(Path("folder")) == {}


def test_mine_onto_a_full_disk(refused, tmp_path: Path) -> None:
    source = scored(tmp_path / "scored.parquet", prompts=20_000, responses=2)
    with small_disk(tmp_path / "disk") as disk:
        out = disk / "pairs.parquet"
        out.write_text("pairs of yesterday")
        said = refused(5, "mine", source, "-o", out)
        assert f"no room left on the disk while writing {out}" in said
        assert contents(disk) == {str(out): b"pairs of yesterday"}
