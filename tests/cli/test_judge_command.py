"""`dice judge`: the oracle, a reward model and a DPO pair on files of the user's, and calls that are refused.

The judge behind a server is in tests/evaluation/test_openai_judge.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from command_line import contents, jsonl
from tiny_classifiers import make_classifier, plain_scores
from tiny_models import make_llama

from dice_py.evaluation.winrate.alpaca_eval import read_annotations
from dice_py.synthetic.task import LETTERS, WORD_LENGTH, answer, prompt_messages

Dice = Callable[..., tuple[int, str, str]]
FLOAT32 = ("-s", "model.device=cpu", "-s", "model.dtype=float32")


def files(folder: Path, count: int = 6) -> tuple[Path, Path]:
    """Responses of two models, of which the first prompt's are equal; one more of each has no counterpart."""
    sides = {"ours": [], "theirs": []}  # type: dict[str, list[Any]]
    for n in range(count):
        sides["ours"].append({"prompt": f"question {n}", "response": f"answer {n * n} [bold] \x1b[31m"})
        sides["theirs"].append(
            {"prompt": f"question {n}", "response": "z" * (5 * n) if n else sides["ours"][0]["response"]}
        )
    for name, rows in sides.items():
        jsonl(folder / f"{name}.jsonl", *rows, {"prompt": f"of {name} alone", "response": "x"})
    return folder / "ours.jsonl", folder / "theirs.jsonl"


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_a_reward_model(dice: Dice, tmp_path: Path) -> None:
    ours, theirs = files(tmp_path)
    model = make_classifier(tmp_path / "reward", "llama", seed=2)
    out = tmp_path / "annotations.json"
    code, printed, err = dice(
        "judge",
        "reward-model",
        ours,
        theirs,
        "--model",
        model,
        "--out",
        out,
        "--theirs-name",
        "start",
        "--json",
        *FLOAT32,
    )
    assert code == 0, err
    result = json.loads(printed)
    talks = [
        [
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
            for row in read(file)[:6]
        ]
        for file in (ours, theirs)
    ]
    one, other = (plain_scores(model, side) for side in talks)
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(one, other, strict=True)]
    assert len(set(wins)) == 3
    assert result["win_rate"] == pytest.approx(sum(wins) / 6)
    assert (result["wins"], result["ties"], result["losses"]) == tuple(wins.count(value) for value in (1.0, 0.5, 0.0))
    low, high = result["win_rate_ci95"]
    assert 0 <= low < result["win_rate"] < high <= 1
    assert (result["prompts"], result["pairs"], result["only_ours"], result["only_theirs"]) == (6, 6, 1, 1)
    written = read_annotations(out)
    assert written["preference"].to_list() == [1 + value for value in wins]
    assert written["output_1"].to_list() == [row["response"] for row in read(theirs)[:6]]
    assert written["output_2"].to_list() == [row["response"] for row in read(ours)[:6]]
    assert set(written["generator_1"]) | set(written["generator_2"]) == {"start", "ours"}
    assert set(written["annotator"]) == {"dice_reward_model"}
    # The same call, as a person reads it.
    code, printed, _ = dice("judge", "reward-model", ours, theirs, "--model", model, *FLOAT32)
    assert code == 0
    assert f"win rate: {result['win_rate']:.4g}\n" in printed


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_an_implicit_reward(dice: Dice, tmp_path: Path) -> None:
    ours, theirs = files(tmp_path)
    policy, reference = make_llama(tmp_path / "policy", 1), make_llama(tmp_path / "reference", 2)
    command = ("judge", "implicit", "--policy", policy, "--reference", reference, "--json", *FLOAT32)
    there = json.loads(dice(*command, ours, theirs)[1])
    back = json.loads(dice(*command, theirs, ours)[1])
    assert (there["wins"], there["losses"], there["ties"]) == (back["losses"], back["wins"], 1)
    assert there["win_rate"] + back["win_rate"] == pytest.approx(1.0)
    exchanged = json.loads(
        dice("judge", "implicit", ours, theirs, "--policy", reference, "--reference", policy, "--json", *FLOAT32)[1]
    )
    assert exchanged["wins"] == there["losses"]  # r = log π − log π_ref changes its sign


def test_the_oracle_of_the_world(dice: Dice, tmp_path: Path) -> None:
    tasks = [("reverse", LETTERS[:WORD_LENGTH]), ("copy", LETTERS[1 : WORD_LENGTH + 1])]
    prompts = [prompt_messages(*task) for task in tasks]
    right = [" ".join(answer(*task)) + " ." for task in tasks]
    ours = jsonl(
        tmp_path / "ours.jsonl",
        *({"prompt": prompt, "response": text} for prompt, text in zip(prompts, right, strict=True)),
    )
    theirs = jsonl(tmp_path / "theirs.jsonl", *({"prompt": p, "response": "nonsense"} for p in prompts))
    code, printed, err = dice("judge", "oracle", ours, theirs, "--json")
    assert code == 0, err
    result = json.loads(printed)
    assert (result["win_rate"], result["wins"]) == (1.0, 2)
    assert json.loads(dice("judge", "oracle", theirs, ours, "--json")[1])["win_rate"] == 0.0


def test_answers_of_another_world_are_refused(dice: Dice, tmp_path: Path) -> None:
    code, out, err = dice("judge", "oracle", *files(tmp_path))
    assert (code, out) == (3, "")
    assert "'question 0' is not of the synthetic world" in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("openai", "OURS", "THEIRS"), 2, "this judge needs --base-url and --model"),
        (("openai", "OURS", "THEIRS", "--base-url", "http://127.0.0.1:9/v1"), 2, "evaluate.judges.openai.model"),
        (("openai", "OURS", "THEIRS", "--base-url", "http://u:pw@h/v1", "--model", "m"), 2, "must be a plain URL"),
        (("reward-model", "OURS", "THEIRS"), 2, "this judge needs --model"),
        (("reward-model", "OURS", "THEIRS", "--model", "absent/folder/x"), 3, "is not a folder"),
        (("implicit", "OURS", "THEIRS", "--policy", "x/y/z"), 2, "evaluate.judges.implicit.reference"),
        (("implicit", "OURS", "THEIRS", "--policy", "x/y/z", "--reference", "x/y/w"), 3, "--policy: x/y/z is not"),
        (("oracle", "OURS", "OURS"), 2, "both sets of responses are named 'ours'"),
        (("oracle", "OURS", "absent.jsonl"), 3, "absent.jsonl does not exist"),
        (("oracle", "OURS", "THEIRS", "--out", "OURS"), 2, "holds the responses and would be replaced"),
        (("oracle", "OURS", "THEIRS", "--out", "FOLDER"), 2, "is a folder: name a file"),
        (("oracle", "OURS", "/dev/null"), 3, "not a regular file"),
        (("oracle", "OURS", "FOLDER"), 3, "has no generations-*.parquet"),
        (("oracle", "OURS", "https://host/x.jsonl"), 2, "looks like a URL"),
        (("oracle", "OURS", "THEIRS", "--prompt-column", "nope"), 3, "no column 'nope'"),
        (("judge-me", "OURS", "THEIRS"), 2, "No such command"),
    ],
)
def test_calls_that_are_refused(
    arguments: tuple[str, ...], code: int, words: str, dice: Dice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = files(tmp_path)
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    named = {"OURS": ours, "THEIRS": theirs, "FOLDER": tmp_path / "folder"}
    found, out, err = dice("judge", *(named.get(argument, argument) for argument in arguments))
    assert (found, out) == (code, "")
    assert words in err
    assert contents(tmp_path) == before


def test_a_missing_package_is_named(dice: Dice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "openai" else found(name, *rest)
    )
    call = ("judge", "openai", *files(tmp_path), "--base-url", "http://127.0.0.1:9/v1", "--model", "m")
    code, _, err = dice(*call)
    assert code == 2
    assert "openai is not installed; add it with: pip install 'dice-align[judge]'" in err


def test_settings_of_a_config_file(dice: Dice, tmp_path: Path) -> None:
    ours, theirs = files(tmp_path)
    model = make_classifier(tmp_path / "reward", "bert")
    file = tmp_path / "config.yaml"
    file.write_text(
        f"model: {{device: cpu, dtype: float32}}\nevaluate: {{judges: {{reward_model: {{model: {model}}}}}}}\n"
    )
    code, printed, err = dice("judge", "reward-model", ours, theirs, "-c", file, "--json")
    assert code == 0, err
    assert json.loads(printed)["pairs"] == 6


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_generations_of_two_folders(dice: Dice, tmp_path: Path) -> None:
    """What `dice generate` writes: folders of shards, with prompts.parquet beside them."""
    model = make_classifier(tmp_path / "reward", "qwen2")
    prompts = jsonl(tmp_path / "prompts.jsonl", *({"prompt": f"question {n}"} for n in range(3)))
    llama = make_llama(tmp_path / "llama")
    generate = ("generate", "--policy", llama, "--prompts", prompts, "--samples", 2, "-s", "generate.max_new_tokens=8")
    for name, seed in (("one", 1), ("two", 2)):
        code, _, err = dice(*generate, "--seed", seed, "--out", tmp_path / name, *FLOAT32)
        assert code == 0, err
    command = ("judge", "reward-model", tmp_path / "one", tmp_path / "two", "--model", model, "--json", *FLOAT32)
    result = json.loads(dice(*command)[1])
    assert (result["ours"], result["theirs"], result["prompts"], result["pairs"]) == ("one", "two", 3, 6)
    moved = shutil.copytree(tmp_path / "one", tmp_path / "moved")
    pl.read_parquet(moved / "prompts.parquet").head(1).write_parquet(moved / "prompts.parquet")
    code, _, err = dice("judge", "reward-model", moved, tmp_path / "two", "--model", model)
    assert code == 3
    assert "prompts.parquet does not have" in err
