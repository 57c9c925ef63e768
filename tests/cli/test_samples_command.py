"""`dice samples`: pairs of a round in 80 columns, whatever is in them."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from command_line import contents
from hostile_texts import HOSTILE, obeyed
from rich.cells import cell_len

from dice_py.config.loading import dump, resolve
from dice_py.reporting.foreign_text import visible
from dice_py.storage.parquet import write_parquet
from dice_py.storage.schemas import INSPECTED_PAIRS

pytestmark = pytest.mark.usefixtures("empty_folder")

Dice = Callable[..., tuple[int, str, str]]


def pair(number: int, text: str = "an answer", source: str = "mined", **more: Any) -> dict[str, Any]:
    """A row of INSPECTED_PAIRS; the rest of its columns are null."""
    return {
        "pair_id": f"r01-{source.partition(':')[0]}-{number}",
        "round": 1,
        "source": source,
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"question {number}: {text}"},
        ],
        "chosen": [{"role": "assistant", "content": f"{text} good"}],
        "rejected": [{"role": "assistant", "content": f"{text} bad"}],
        "chosen_tokens": 7,
        "chosen_finish_reason": "stop",
        "chosen_reward": 0.5,
        "rejected_reward": -0.25,
        "chosen_penalized_reward": 0.125,
        "margin": 0.75,
        **more,
    }


def made_run(*rounds: list[dict[str, Any]]) -> Path:
    """A run folder with pairs of these rounds; of an empty list none."""
    folder = Path("run")
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(resolve()))
    for number, rows in enumerate(rounds, start=1):
        (folder / f"round-{number:02d}").mkdir()
        if rows:
            frame = pl.DataFrame(rows, schema=INSPECTED_PAIRS)
            write_parquet(folder / f"round-{number:02d}/inspect/pairs.parquet", frame, key="k", schema=INSPECTED_PAIRS)
    return folder


def test_pairs_of_the_newest_round(dice: Dice) -> None:
    folder = made_run([pair(1)], [pair(2, labels='{"difficulty": "hard"}'), pair(3, source="replay:uf")], [])
    before = contents(folder)
    code, out, err = dice("samples", folder)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        'r01-mined-2: mined, margin 0.75, {"difficulty": "hard"}',
        "  system:",
        "    Be brief.",
        "  user:",
        "    question 2: an answer",
        "  chosen (reward 0.5, ranked by 0.125, 7 tokens, stop):",
        "    an answer good",
        "  rejected (reward -0.25):",
        "    an answer bad",
        "",
        "r01-replay-3: replay:uf, margin 0.75",
        *out.splitlines()[11:-1],
        "2 of 2 pairs that round 2 keeps to be read",
    ]
    assert contents(folder) == before
    assert "question 1" in dice("samples", folder, "--round", 1)[1]


def test_a_source_and_a_number_of_pairs(dice: Dice, refused: Callable[..., str]) -> None:
    rows = [pair(n) for n in range(30)] + [pair(n, source="replay") for n in range(30, 36)]
    folder = made_run(rows)
    _, out, _ = dice("samples", folder, "--source", "replay", "--pairs", 4, "--json")
    found = json.loads(out)
    assert (found["run"], found["round"], found["of"], len(found["pairs"])) == ("run", 1, 6, 4)
    assert {row["source"] for row in found["pairs"]} == {"replay"}
    drawn = [dice("samples", folder, "--seed", seed, "--json")[1] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(json.loads(drawn[0])["pairs"]) == 5
    sentence = refused(2, "samples", folder, "--source", "replay:uf")
    assert "its sources are mined, replay" in sentence


def test_the_rows_as_json_are_complete(dice: Dice) -> None:
    credit = [{"text": "x", "logp": -1.0, "ref_logp": -2.0, "credit": math.nan}]
    long = "y" * 5000
    folder = made_run([pair(1, long, chosen_credit=credit, margin=math.inf)])
    (row,) = json.loads(dice("samples", folder, "--json")[1])["pairs"]
    assert row.keys() == set(INSPECTED_PAIRS)
    assert row["chosen"][0]["content"] == f"{long} good"
    assert row["chosen_credit"] == [{"text": "x", "logp": -1.0, "ref_logp": -2.0, "credit": None}]
    assert row["margin"] is None


def test_nothing_of_a_text_is_obeyed(dice: Dice) -> None:
    # A Parquet file can hold no surrogate.
    texts = [text for text in HOSTILE.values() if not any(unicodedata.category(c) == "Cs" for c in text)]
    turns = [[{"role": text, "content": text}] for text in texts]
    folder = made_run(
        [
            pair(1, prompt=one, chosen=one, rejected=one, source=text, labels=text, pair_id=text)
            for one, text in zip(turns, texts, strict=True)
        ]
    )
    code, out, err = dice("samples", folder, "--pairs", len(texts))
    assert code == 0
    assert obeyed(out + err) == []
    for text in texts:
        assert out.count(f"    {visible(text)}\n") >= 3
    code, out, err = dice("samples", folder, "--pairs", len(texts), "--json")
    assert obeyed(out) == []
    assert [row["chosen"] for row in json.loads(out)["pairs"]] == turns


def test_long_and_wide_texts_stay_in_80_columns(dice: Dice, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["word " * 200_000, "漢" * 300, "x" * 300, "\x1b" * 100, "👩‍💻" * 60, "\tcode\n\n  indented\x00", ""]
    turns = [[{"role": "user", "content": text}] for text in texts]
    folder = made_run([pair(n, prompt=one, chosen=one, rejected=one) for n, one in enumerate(turns)])
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = dice("samples", folder, "--pairs", len(texts))
    assert code == 0
    assert max(map(cell_len, out.splitlines())) <= 80
    assert out.count("(… 998,000 more characters; --json has all)") == 3
    assert out.count("    (empty)") == 3
    assert out.count("漢") == 3 * 300
    assert out.count("\\x1b") == 3 * 100
    assert out.count("        code\n\n      indented\\x00\n") == 3  # a tab, line breaks and blanks stay
    assert len(out) < 30_000


def test_what_is_refused(refused: Callable[..., str]) -> None:
    assert "holds no run" in refused(2, "samples", "absent")
    folder = made_run([pair(1)], [])
    text = refused(3, "samples", folder, "--round", 2)
    assert text.startswith("error: run has no pairs to read of round-02 (it has those of round-01); ")
    assert "dice resume run makes those" in text
    file = folder / "round-01/inspect/pairs.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)
    assert "pairs.parquet is damaged" in refused(3, "samples", folder)
    file.unlink()
    assert "has no pairs to read (no round has any)" in refused(3, "samples", folder)
