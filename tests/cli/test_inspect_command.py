"""`dice inspect`: the page of a preference file, with and without models, and what it never replaces."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from command_line import jsonl
from hostile_texts import HOSTILE, obeyed

from dice_py.reporting import inspect_page
from dice_py.stages.inspect_file import InspectFileJob

Dice = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]

pytestmark = pytest.mark.usefixtures("empty_folder", "in_this_process")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[pl.DataFrame, dict[str, Any]]]:
    """The pairs and keywords of the pages that are written."""
    pages: list[tuple[pl.DataFrame, dict[str, Any]]] = []
    write = inspect_page.write_inspect_page

    def watched(frame: pl.DataFrame, out: Path, **options: Any) -> Path:
        pages.append((frame, options))
        return write(frame, out, **options)

    monkeypatch.setattr(inspect_page, "write_inspect_page", watched)
    return pages


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"question {n}",
            "chosen": f"good 😀 {n}",
            "rejected": f"bad {'very ' * (n % 7)}{n}",
            "from": "web" if n % 5 else "book",
        }
        for n in range(count)
    ]


@pytest.fixture
def file(empty_folder: Path) -> Path:
    del empty_folder
    return jsonl(Path("pairs.jsonl"), *rows(40))


def test_a_page_without_models(dice: Dice, file: Path, shown: list[Any]) -> None:
    code, out, err = dice("inspect", file)
    assert (code, err) == (0, "")
    assert out == "40 of 40 pairs\npage: pairs.html\n"
    ((frame, options),) = shown
    assert options == {"title": "pairs.jsonl", "facts": [("file", "pairs.jsonl"), ("pairs", "40 of 40")]}
    assert frame["pair_id"].to_list() == [f"file-{n}" for n in range(40)]
    assert frame["source"].unique().to_list() == ["file"]
    assert json.loads(frame["labels"][3]) == {"where": "pairs.jsonl, line 4"}
    assert frame["prompt"][3].to_list() == [{"role": "user", "content": "question 3"}]
    nothing = ("round", "chosen_credit", "chosen_reward", "chosen_tokens", "margin")
    assert [frame[name].null_count() for name in nothing] == [40] * len(nothing)
    assert "question 39" in Path("pairs.html").read_text(encoding="utf-8")


def test_credits_and_rewards(dice: Dice, file: Path, shown: list[Any], llama: Path, other: Path) -> None:
    models = ("--policy", llama, "--reference", other, "--beta", 0.5, "--set", "model.device=cpu")
    code, out, err = dice("inspect", file, *models, "-o", "page.html", "--pairs", 6, "--json")
    assert code == 0, err
    assert json.loads(out) == {
        "file": "pairs.jsonl", "page": "page.html", "of": 40, "pairs": 6,
        "tokens": int(shown[0][0].select(pl.col("chosen_tokens", "rejected_tokens").sum()).sum_horizontal().item()),
    }  # fmt: skip
    ((frame, options),) = shown
    assert dict(options["facts"])["β"] == "0.5"
    for row in frame.iter_rows(named=True):
        for side in ("chosen", "rejected"):
            credits = row[f"{side}_credit"]
            assert "".join(each["text"] for each in credits) == row[side][0]["content"] + "<|im_end|>"
            assert sum(each["credit"] for each in credits) == pytest.approx(row[f"{side}_reward"], abs=1e-4)
        assert row["margin"] == pytest.approx(row["chosen_reward"] - row["rejected_reward"], abs=1e-5)
    # The rewards are β times the difference of the sums, as twice β shows.
    dice("inspect", file, *models, "-o", "page.html", "--pairs", 6, "--beta", 1)
    assert (shown[1][0]["chosen_reward"] - 2 * frame["chosen_reward"]).abs().max() < 1e-4


def test_the_sample_has_every_source_and_is_the_same_again(dice: Dice, file: Path, shown: list[Any]) -> None:
    for seed in (0, 0, 1):
        assert dice("inspect", file, "--pairs", 10, "--source-column", "from", "--seed", seed)[0] == 0
    first, again, another = (frame["pair_id"].to_list() for frame, _ in shown)
    assert first == again != another
    counts = dict(shown[0][0]["source"].value_counts().iter_rows())
    assert counts == {"web": 8, "book": 2}


def test_a_file_that_is_no_page_of_it_is_kept(dice: Dice, refused: Refused, file: Path) -> None:
    own = Path("own.html")
    own.write_text("<p>mine</p>")
    sentence = refused(2, "inspect", file, "-o", own)
    assert "own.html is there, and is no page that dice inspect wrote" in sentence
    assert own.read_text() == "<p>mine</p>"
    assert dice("inspect", file)[0] == 0
    assert dice("inspect", file, "--pairs", 3)[0] == 0  # its own is replaced
    page = Path("pairs.html")
    page.write_text(page.read_text(encoding="utf-8").replace("question", "my notes"), encoding="utf-8")
    assert "or was changed since" in refused(2, "inspect", file)
    assert "give it a name that ends in .html" in refused(2, "inspect", file, "-o", "pairs.jsonl")
    assert file.read_text().count("\n") == 40


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (("--policy", "p"), 2, "--policy needs --reference"),
        (("--reference", "r"), 2, "--reference needs --policy"),
        (("--beta", "1"), 2, "--beta is of the reward: give --policy and --reference too"),
        (("--pairs", "2001"), 2, "'--pairs'"),
        (("--chosen-column", "better"), 3, "no column 'better'"),
        (("--policy", "./p", "--reference", "./r", "--beta", "0"), 2, "beta"),
        (("--policy", "./absent", "--reference", "./r"), 3, "absent"),
    ],
)
def test_what_is_refused(refused: Refused, file: Path, options: tuple[str, ...], code: int, sentence: str) -> None:
    assert sentence in re.sub(r"\s+", " ", refused(code, "inspect", file, *options))
    assert not Path("pairs.html").exists()


def test_hostile_texts_are_shown_harmlessly(dice: Dice, shown: list[Any]) -> None:
    texts = [text for name, text in HOSTILE.items() if name != "surrogate"]
    jsonl(Path("all.jsonl"), *({"prompt": t, "chosen": f"{t}a", "rejected": f"{t}b", "s": t} for t in texts))
    code, out, err = dice("inspect", "all.jsonl", "--source-column", "s")
    assert (code, err) == (0, "")
    assert obeyed(out) == []
    assert [turns[0]["content"] for turns in shown[0][0]["prompt"]] == texts
    assert shown[0][0]["source"].to_list() == texts
    # The page itself is tested in a browser (tests/reporting/browser).
    assert obeyed(Path("all.html").read_text(encoding="utf-8")) == []
    jsonl(Path("one.jsonl"), {"prompt": HOSTILE["surrogate"], "chosen": "a", "rejected": "b"})
    code, out, err = dice("inspect", "one.jsonl")
    assert code == 3  # which is no text
    assert obeyed(out + err) == []


def test_turns_keep_what_stands_beside_their_text(shown: list[Any], dice: Dice) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "look", "arguments": {}}]}
    jsonl(Path("pairs.jsonl"), {"prompt": "q", "chosen": [call], "rejected": "no"})
    code, _, err = dice("inspect", "pairs.jsonl")
    assert code == 0, err
    assert "look" in shown[0][0]["chosen"][0][0]["content"]


def test_the_key_is_of_pairs_and_models(tmp_path: Path) -> None:
    pairs = pl.DataFrame({"row": [0, 1]})
    one = InspectFileJob(pairs, "k", None, tmp_path)
    others = [InspectFileJob(pairs, "other", None, tmp_path), InspectFileJob(pairs.head(1), "k", None, tmp_path)]
    assert len({one.key(), *(other.key() for other in others)}) == 3
    assert InspectFileJob(pairs, "k", None, tmp_path / "x").key() == one.key()
