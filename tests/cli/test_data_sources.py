"""The commands of single stages on every source of data: folders, splits, slices, compressed files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import polars as pl
import pytest
from command_line import jsonl

Dice = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]

pytestmark = pytest.mark.usefixtures("empty_folder", "in_this_process")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def pairs(name: str, count: int) -> list[dict[str, Any]]:
    """As hh-rlhf has them."""
    return [
        {
            "chosen": f"\n\nHuman: {name} {n}\n\nAssistant: ok\n\nHuman: sure?\n\nAssistant: yes",
            "rejected": f"\n\nHuman: {name} {n}\n\nAssistant: ok\n\nHuman: sure?\n\nAssistant: no",
        }
        for n in range(count)
    ]


@pytest.fixture
def folder() -> Path:
    Path("hh").mkdir()
    jsonl(Path("hh/train.jsonl"), *pairs("train", 8))
    jsonl(Path("hh/test.jsonl"), *pairs("test", 4))
    return Path("hh")


def test_inspect(dice: Dice, refused: Refused, folder: Path) -> None:
    code, out, err = dice("inspect", f"{folder}:train[:3]")
    assert (code, out) == (0, "3 of 3 pairs\npage: hh-train-3.html\n")
    assert err == (
        "hh:train[:3]: 'chosen' and 'rejected' are transcripts, and read as the turns of Human and Assistant (3 rows)\n"
    )
    assert "hh has several splits, which are not read as one (train, test): name one" in refused(3, "inspect", folder)
    assert dice("inspect", folder / "t*.jsonl", "-o", "all.html")[1].startswith("12 of 12 pairs")
    Path("pairs.csv.gz").write_bytes(gzip.compress(b"prompt,chosen,rejected\na,b,c\n", mtime=0))
    assert dice("inspect", "pairs.csv.gz", "-o", "csv.html")[1].startswith("1 of 1 pairs")
    said = refused(3, "inspect", "no-owner/no-pairs:train")
    assert "as a data set of the hub it cannot be loaded" in said


def test_replay_from_splits_and_buffers(dice: Dice, folder: Path, llama: Path) -> None:
    options = ("--policy", llama, "-o", "set", "--json", "--set", "replay.total=6")
    code, out, err = dice(
        "replay", "--replay", f"{folder}:train[50%:]", "--buffer", f"more={folder}:test[:2]:2", *options
    )
    assert code == 0, err
    training = pl.read_parquet(json.loads(out)["training_set"])
    assert set(training["source"]) == {"replay", "replay:more"}
    places = {name: pl.read_parquet(f"set/{name}.parquet")["where"].to_list() for name in ("offline", "buffer-more")}
    assert places == {
        "offline": [f"hh:train, row {n}" for n in range(4, 8)],
        "buffer-more": ["hh:test, row 0", "hh:test, row 1"],
    }
    prompt = training["prompt"].to_list()[0]
    assert [turn["role"] for turn in prompt] == ["user", "assistant", "user"]


def test_generate_from_a_folder(dice: Dice, refused: Refused, llama: Path) -> None:
    Path("prompts").mkdir()
    jsonl(Path("prompts/a.jsonl"), {"question": "one"}, {"question": "two"})
    Path("prompts/b.json.gz").write_bytes(gzip.compress(b'[{"question": "three"}]', mtime=0))
    options = ("--policy", llama, "-o", "gen", "--samples", 2, "--set", "generate.max_new_tokens=4")
    code, _, err = dice("generate", "--prompts", "prompts", *options)
    assert code == 0, err
    assert "prompts: no column 'prompt', so the prompt is 'question' (3 rows)" in err
    assert pl.read_parquet("gen/prompts.parquet")["where"].to_list() == [
        "a.jsonl, line 1",
        "a.jsonl, line 2",
        "b.json.gz, item 0",
    ]
    assert "no column 'text'" in refused(3, "generate", "--prompts", "prompts", "--prompt-column", "text", *options)
