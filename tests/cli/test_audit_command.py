"""`dice audit` on files: what it prints, what it keeps, and what it refuses."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from command_line import contents, jsonl
from hostile_texts import HOSTILE, obeyed

Dice = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]
CPU = ("--set", "model.device=cpu", "--set", "model.dtype=float32")


def rows(count: int = 30, **more: Any) -> list[dict[str, Any]]:
    rng = random.Random(0)

    def text() -> str:
        return "".join(rng.choices("abcdef ", k=rng.randint(1, 15))) + "."

    return [{"prompt": f"{n} {text()}", "chosen": text(), "rejected": text(), **more} for n in range(count)]


@pytest.fixture(autouse=True)
def _in_this_process(request: pytest.FixtureRequest) -> None:
    """All jobs, except in the test that is marked slow."""
    if request.node.get_closest_marker("slow") is None:
        request.getfixturevalue("in_this_process")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "pairs.jsonl", *rows())


@pytest.fixture
def models(llama: Path, other: Path) -> tuple[Any, ...]:
    return ("--policy", llama, "--reference", other, *CPU)


@pytest.mark.slow
def test_figures_as_one_object_and_as_a_table(dice: Dice, pairs: Path, models: tuple[Any, ...], tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, err = dice("audit", pairs, *models, "--beta", 0.5, "--out", out, "--json")
    assert code == 0, err
    figures = json.loads(text)
    assert (figures["file"], figures["round"], figures["beta"]) == (str(pairs), None, 0.5)
    assert figures["references"] == {"previous": str(models[3])}
    assert {entry["choice"] for entry in figures["choices"]} >= {"previous, sum", "none, per token"}
    kept = json.loads((out / "audit.json").read_text())
    assert kept["choices"] == figures["choices"]
    assert pl.read_parquet(out / "pairs.parquet").height == 30
    code, text, err = dice("audit", pairs, *models, "--beta", 0.5, "--out", out)
    assert code == 0
    assert f"the same audit is in {out} already" in err
    lines = text.splitlines()
    assert lines[0] == "30 comparisons of 30 prompts (preference pairs), with 95 % intervals"
    assert lines[-1] == f"verdict: {figures['verdict']}: {figures['reason']}"
    for name in [*(entry["choice"] for entry in figures["choices"]), "length alone"]:
        assert any(line.startswith(name) for line in lines)
    assert sum("previous, penalized *" in line for line in lines) == 1
    accuracy = figures["choices"][0]["metrics"]["accuracy"]
    low, high = accuracy["ci95"]
    shown = f"{accuracy['value']:.3f} ({low:.3f} to {high:.3f})"
    assert any(line.startswith("previous, sum") and shown in line for line in lines)


def test_nothing_is_written_without_out(dice: Dice, pairs: Path, models: tuple[Any, ...], empty_folder: Path) -> None:
    code, _, err = dice("audit", pairs, *models)
    assert code == 0, err
    assert contents(empty_folder) == {}


def test_a_system_prompt_of_the_settings_is_as_one_of_the_rows(
    dice: Dice, models: tuple[Any, ...], tmp_path: Path
) -> None:
    plain = jsonl(tmp_path / "plain.jsonl", *rows(12))
    with_system = jsonl(tmp_path / "with-system.jsonl", *rows(12, system="Be brief."))
    found = [
        json.loads(dice("audit", file, *models, "--json", *more)[1])["choices"]
        for file, more in ((plain, ()), (plain, ("--set", "data.system_prompt=Be brief.")), (with_system, ()))
    ]
    assert found[1] == found[2] != found[0]


def test_the_form_of_the_verdict_is_that_of_mining(dice: Dice, pairs: Path, models: tuple[Any, ...]) -> None:
    for debias, main in (("none", "sum"), ("linear", "penalized"), ("per_token", "per token")):
        code, text, _ = dice("audit", pairs, *models, "--json", "--set", f"mine.debias={debias}")
        assert code == 0
        assert json.loads(text)["main"] == f"previous, {main}"
    code, text, _ = dice("audit", pairs, *models, "--json", "--alpha", "0.25")
    alphas = {entry["alpha"] for entry in json.loads(text)["choices"]}
    assert (code, alphas) == (0, {None, 0.25})


def test_scored_responses(dice: Dice, models: tuple[Any, ...], tmp_path: Path) -> None:
    rng = random.Random(1)
    scored = [
        {"question": row["prompt"], "text": answer, "right": rng.random() < 0.5, "by": f"m{k}"}
        for row in rows(12)
        for k, answer in enumerate((row["chosen"], row["rejected"], f"{row['chosen']} and {row['rejected']}"))
    ]
    named = ("--prompt-column", "question", "--response-column", "text", "--correct-column", "right",
             "--model-column", "by")  # fmt: skip
    file = jsonl(tmp_path / "scored.jsonl", *scored)
    code, text, err = dice("audit", file, *models, *named, "--out", tmp_path / "out")
    assert code == 0, err
    for head in ("ROC AUC", "end score", "Kendall", "not measured: row wise pearson", "k from 1 to 3"):
        assert head in text
    assert pl.read_parquet(tmp_path / "out" / "responses.parquet").height == 36


def test_hostile_names_are_shown_harmlessly(dice: Dice, models: tuple[Any, ...], tmp_path: Path) -> None:
    names = [text for text in HOSTILE.values() if "\udcff" not in text]
    shown = [HOSTILE[name] for name in ("escape", "bidirectional", "markup", "line separator")]
    hostile = [
        {**row, "subset": shown[n % len(shown)], "chosen_model": names[n % len(names)], "rejected_model": "m"}
        for n, row in enumerate(rows(22 * len(shown)))
    ]
    file = jsonl(tmp_path / "pairs.jsonl", *hostile)
    code, text, err = dice("audit", file, *models)
    assert code == 0, err
    assert obeyed(text + err) == []
    assert "source [bold red]x" in text
    code, text, _ = dice("audit", file, *models, "--json")
    assert code == 0
    assert len(text.splitlines()) == 1
    assert set(json.loads(text)["models"]) == {*names, "m"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "nothing to audit: give FILE and --policy"),
        (("FILE",), "nothing to audit"),
        (("FILE", "--policy", "x", "--round", 1), "--round is of a run: name its folder with --run"),
        (("FILE", "--policy", "x", "--alpha", "-1"), "--alpha is '-1', but must be auto or a finite number"),
        (("FILE", "--policy", "x", "--alpha", "nan"), "--alpha is 'nan'"),
        (("FILE", "--policy", "x", "--alpha", "much"), "--alpha is 'much'"),
        (("FILE", "--policy", "x", "--score-column", "a", "--correct-column", "b"), "name the same thing"),
        (("--run", "RUN"), "holds no run"),
        (("--run", "RUN", "--policy", "x"), "--policy is the run's own with --run"),
    ],
)
def test_wrong_options(refused: Refused, pairs: Path, tmp_path: Path, arguments: tuple[Any, ...], said: str) -> None:
    named = {"FILE": pairs, "RUN": tmp_path}
    assert said in refused(2, "audit", *(named.get(argument, argument) for argument in arguments))


def test_wrong_numbers_and_data(
    refused: Refused, pairs: Path, models: tuple[Any, ...], tmp_path: Path, llama: Path
) -> None:
    assert "--beta is nan" in refused(2, "audit", pairs, *models, "--beta", "nan")
    assert "--beta is 0.0" in refused(2, "audit", pairs, *models, "--beta", 0)
    assert "does not exist" in refused(3, "audit", tmp_path / "no.jsonl", *models)
    (tmp_path / "empty").mkdir()
    assert "is a folder without a file of .jsonl" in refused(3, "audit", tmp_path / "empty", *models)
    assert "policy and reference are the same model" in refused(
        2, "audit", pairs, "--policy", llama, "--reference", llama, *CPU
    )
    inside = jsonl(tmp_path / "pairs.parquet", "x")
    assert "would replace it: give another --out" in refused(2, "audit", inside, *models, "--out", tmp_path)
    assert inside.read_text() == "x\n"
