"""`dice winrate`: what it prints, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import contents
from hostile_texts import HOSTILE, obeyed
from verdicts import BASELINE, judgment, response_rows, write_annotation_rows, write_jsonl

pytestmark = pytest.mark.usefixtures("empty_folder")

FAST = ("--baseline", BASELINE, "--resamples", 20)


def rows(models: int = 6, prompts: int = 12) -> Path:
    return write_jsonl(Path("rows.jsonl"), response_rows(models, prompts))


def figures(model: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a model of the result."""
    ends = {f"{name}_{at}": end for name in model if name.endswith("_ci95") for at, end in enumerate(model[name])}
    return {name: value for name, value in model.items() if isinstance(value, int | float)} | ends


def parsed(result: tuple[int, str, str]) -> dict[str, Any]:
    code, out, _ = result
    assert code == 0
    assert out.count("\n") == 1
    return dict(json.loads(out))


def test_json_has_both_rates_and_their_intervals(dice) -> None:
    code, out, err = dice("winrate", rows(), *FAST, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert {model["model"] for model in found["models"]} == {BASELINE, *(f"model-{at}" for at in range(6))}
    for model in found["models"]:
        for rate in ("win_rate", "length_controlled_win_rate"):
            low, high = model[f"{rate}_ci95"]
            assert 0 <= low <= model[rate] <= high <= 100
        assert model["prompts"] == 12
        assert model["mean_length"] > 0
    assert (found["baseline"], found["prompts"], found["comparable"]) == (BASELINE, 12, True)
    assert (found["resamples"], found["seed"], found["notes"]) == (20, 0, [])


def test_the_table_lists_the_best_first(dice) -> None:
    code, out, err = dice("winrate", rows(), *FAST)
    assert (code, err) == (0, "")
    title, heads, *lines = [re.sub("  +", "|", line) for line in out.splitlines()]
    assert title == "win rates against baseline, in percent, with 95 % intervals"
    assert heads == "model|length-controlled|win rate|prompts|mean length"
    cells = [line.split("|") for line in lines]
    assert len(cells) == 7
    assert all(len(row) == 7 for row in cells if row[0] != "baseline (the baseline)")
    assert ["baseline (the baseline)", "50.00", "50.00", "12", "2,000"] in cells
    rates = [float(row[1]) for row in cells]
    assert rates == sorted(rates, reverse=True)


def test_columns_and_scale_reach_the_reader(dice) -> None:
    names = {"prompt_id": "q", "model": "m", "score": "p", "response": "t"}
    given = [{names.get(key, key): value for key, value in row.items()} for row in response_rows(5, 8)]
    given = [{**row, "p": 100 * row["p"], "n": len(row["t"])} for row in given]
    other = write_jsonl(Path("other.jsonl"), given)
    options = ("--prompt-column", "q", "--model-column", "m", "--preference-column", "p", "--preference-scale", 100)
    expected = parsed(dice("winrate", rows(5, 8), *FAST, "--json"))
    for length in (("--length-column", "n"), ("--response-column", "t")):
        found = parsed(dice("winrate", other, *FAST, *options, *length, "--json"))
        for one, same in zip(found["models"], expected["models"], strict=True):
            assert figures(one) == pytest.approx(figures(same))


def test_seed_and_resamples(dice) -> None:
    path = rows()
    first, again, other = (
        dice("winrate", path, *FAST, "--seed", seed, "--json")[1].replace(f'"seed": {seed}', "") for seed in (1, 1, 2)
    )
    assert first == again != other
    found = parsed(dice("winrate", path, "--baseline", BASELINE, "--resamples", 0, "--json"))
    intervals = [model["win_rate_ci95"] for model in found["models"] if not model["baseline"]]
    assert intervals == [None] * 6


def test_few_models_are_said_not_to_be_comparable(dice) -> None:
    code, out, err = dice("winrate", rows(models=3), *FAST, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["comparable"] is False
    assert err == f"note: {found['notes'][0]}\n"
    assert "not comparable" in err
    assert "--difficulty FILE" in err
    assert all(model["length_controlled_win_rate"] is not None for model in found["models"])
    assert "length-controlled (not comparable)" in dice("winrate", "rows.jsonl", *FAST)[1]


def test_difficulty_is_written_and_used(dice, refused) -> None:
    first = parsed(dice("winrate", rows(7, 20), *FAST, "--write-difficulty", "d/difficulty.json", "--json"))
    two = [row for row in response_rows(7, 20) if row["model"] in (BASELINE, "model-3")]
    path = write_jsonl(Path("two.jsonl"), two)
    found = parsed(dice("winrate", path, *FAST, "--difficulty", "d/difficulty.json", "--json"))
    assert found["comparable"] is True
    assert found["difficulty"]["from"] == "an earlier fit"
    assert found["difficulty"]["models"] == 7
    rates = {model["model"]: model["length_controlled_win_rate"] for model in first["models"]}
    same = next(model for model in found["models"] if model["model"] == "model-3")
    assert same["length_controlled_win_rate"] == pytest.approx(rates["model-3"], abs=1e-3)
    said = refused(2, "winrate", path, *FAST, "--difficulty", "d/difficulty.json", "--write-difficulty", "x.json")
    assert "leave out one" in said
    said = refused(3, "winrate", path, *FAST, "--difficulty", "d/difficulty.json", "--prompt-column", "prompt")
    assert "none of the 20 prompts is in it" in said
    assert "--prompt-column" in said


def test_alpaca_evals_files_are_written_and_read(dice) -> None:
    expected = parsed(dice("winrate", rows(5, 9), *FAST, "--write-annotations", "out", "--json"))
    files = sorted(Path("out").glob("*/annotations.json"))
    assert len(files) == 5
    found = parsed(dice("winrate", *files, *FAST, "--json"))
    for one, same in zip(found["models"], expected["models"], strict=True):
        assert figures(one) == pytest.approx(figures(same), rel=1e-5)


def test_judgments_with_their_answers(dice) -> None:
    path = write_jsonl(Path("ours.jsonl"), [judgment("B>A", "A>B"), judgment("A>>B", "A=B", question_id="r")])
    code, out, err = dice("winrate", path, *FAST, "--json")
    assert code == 0
    ours = next(model for model in json.loads(out)["models"] if not model["baseline"])
    assert ours["win_rate"] == pytest.approx(100 * (1 + 0.5 / 4) / 2)
    assert ours["length_controlled_win_rate"] is None
    assert "no length-controlled win rate of ours" in err
    assert "–" in dice("winrate", path, *FAST)[1]
    answers = [
        {"uid": prompt, "model": model, "messages": [{"content": "x" * length}]}
        for prompt, model, length in (("q", "ours", 5), ("r", "ours", 9), ("q", BASELINE, 7), ("r", BASELINE, 3))
    ]
    outputs = write_jsonl(Path("answers.jsonl"), answers)
    ours = next(
        model
        for model in parsed(dice("winrate", path, *FAST, "--outputs", outputs, "--json"))["models"]
        if not model["baseline"]
    )
    assert 0 < ours["length_controlled_win_rate"] < 100
    assert ours["mean_length"] == 7


def test_wrong_calls_are_refused_and_nothing_is_written(refused) -> None:
    path = rows()
    annotated = write_annotation_rows(Path("annotations.json"), {})
    plain = write_jsonl(Path("plain.jsonl"), [{"prompt_id": 1, "model": "a"}])
    Path("mine.json").write_text('{"notes": 1}')
    Path("full/model-0").mkdir(parents=True)
    Path("full/model-0/annotations.json").write_text("mine")
    before = contents(Path())
    for code, said, arguments in (
        (2, "name the baseline with --baseline; the models of rows.jsonl are baseline, model-0", (path,)),
        (2, "there is no model 'nobody'", (path, "--baseline", "nobody")),
        (2, "--preference-scale is '10'", (path, *FAST, "--preference-scale", 10)),
        (2, "--prompt-column is for files with one row per response", (annotated, *FAST, "--prompt-column", "x")),
        (2, "--write-difficulty: mine.json is there and holds", (path, *FAST, "--write-difficulty", "mine.json")),
        (2, "--write-difficulty: rows.jsonl is there and holds", (path, *FAST, "--write-difficulty", path)),
        (2, "--write-difficulty: full is a folder", (path, *FAST, "--write-difficulty", "full")),
        (2, "annotations.json is there", (path, *FAST, "--write-annotations", "full")),
        (2, "Not a directory", (path, *FAST, "--write-annotations", "mine.json")),
        (2, "files with one row per response", (annotated, *FAST, "--preference-scale", "1")),
        (3, "absent.jsonl does not exist", ("absent.jsonl", *FAST)),
        (3, "is a folder", ("full", *FAST)),
        (3, "no difficulty file", (path, *FAST, "--difficulty", "mine.json")),
        (3, "no column 'score'", (plain, *FAST)),
    ):  # fmt: skip
        assert said in refused(code, "winrate", *arguments)
    assert contents(Path()) == before


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "surrogate"])
def test_hostile_names_are_shown_and_not_obeyed(dice, name: str) -> None:
    given = [
        {**row, "model": HOSTILE[name] if row["model"] == "model-1" else row["model"]} for row in response_rows(3, 6)
    ]
    code, out, err = dice("winrate", write_jsonl(Path("rows.jsonl"), given), *FAST)
    assert code == 0
    assert obeyed(out + err) == []
    found = parsed(dice("winrate", "rows.jsonl", *FAST, "--json"))
    assert HOSTILE[name] in {model["model"] for model in found["models"]}
