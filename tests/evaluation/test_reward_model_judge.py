"""Reward models as judges: against transformers alone, one conversation at a time, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from safetensors.torch import load_file, save_file
from tiny_classifiers import FAMILIES, POSITIONS, Family, make_classifier, plain_scores
from tiny_models import make_llama
from transformers import AutoTokenizer

from dice_py.config.judges import JudgesConfig, RewardModelConfig
from dice_py.config.shared import ModelConfig
from dice_py.data import prompts_frame
from dice_py.errors import DataError, DiceError, UsageError
from dice_py.evaluation.judges.registry import build_judges
from dice_py.evaluation.judges.reward_model import RewardModelJudge

FLOAT32 = ModelConfig(device="cpu", dtype="float32")
QUESTIONS = ["hi", "what is the tallest mountain on this planet?", "2 + 2"]
ANSWERS = ["", "4", "x" * 90, "a sentence of some words", "ends with a control token <|im_end|>"]
PROMPTS = prompts_frame([[{"role": "user", "content": question}] for question in QUESTIONS])
SAMPLES = pl.DataFrame(
    [(prompt, answer) for answer in ANSWERS for prompt in range(len(QUESTIONS))],
    schema={"prompt_id": pl.UInt32, "response": pl.String},
    orient="row",
)


def judge_of(folder: Path, models: ModelConfig = FLOAT32, **settings: Any) -> RewardModelJudge:
    return RewardModelJudge.of(RewardModelConfig(model=str(folder), **settings), models)


def conversation(prompt: int, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": QUESTIONS[prompt]}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_transformers_alone(family: Family, tmp_path: Path) -> None:
    folder = make_classifier(tmp_path / family, family)
    # What transformers encodes as a control token is text here: that row has a test of its own.
    plain = SAMPLES.filter(~pl.col("response").str.contains("<|", literal=True))
    expected = plain_scores(folder, [conversation(*row) for row in plain.iter_rows()])
    assert max(expected) - min(expected) > 0.01  # else any order of the rows would pass
    for budget in (1, 300, 8192):  # one at a time, a few, and all in one padded batch
        scores = judge_of(folder, token_budget=budget).scores(PROMPTS, plain)
        assert scores.dtype == pl.Float64
        assert scores.to_list() == pytest.approx(expected, abs=2e-5)


def test_a_control_token_in_a_response_is_text(tmp_path: Path) -> None:
    judge = judge_of(make_classifier(tmp_path / "llama", "llama"))
    spelled, other = "yes<|im_end|>", "yes<|im_end|"
    samples = pl.DataFrame({"prompt_id": [0, 0], "response": [spelled, other]}, schema=SAMPLES.schema)
    scores = judge.scores(PROMPTS, samples)
    (as_token,) = plain_scores(judge.model, [conversation(0, spelled)])
    assert abs(scores[0] - as_token) > 1e-3  # transformers ends the turn there
    assert scores[0] != scores[1]


def test_progress_counts_every_response(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    judge = judge_of(make_classifier(tmp_path / "bert", "bert"), token_budget=300)
    judge.scores(PROMPTS, SAMPLES, lambda event, **fields: events.append({"event": event, **fields}))
    done = [event["done"] for event in events if event["event"] == "progress"]
    assert done == sorted(done)
    assert len(done) > 2
    assert done[-1] == SAMPLES.height


@pytest.mark.parametrize(("family", "fitting"), [("llama", POSITIONS), ("roberta", POSITIONS - 1)])
def test_nothing_is_cut_off(family: Family, fitting: int, tmp_path: Path) -> None:
    folder = make_classifier(tmp_path / family, family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(conversation(0, ""), tokenize=False)
    room = fitting - len(tokenizer(text, add_special_tokens=False)["input_ids"])
    fits = pl.DataFrame({"prompt_id": [0], "response": ["x" * room]}, schema=SAMPLES.schema)
    longer = pl.DataFrame({"prompt_id": [0], "response": ["x" * (room + 1)]}, schema=SAMPLES.schema)
    assert judge_of(folder).scores(PROMPTS, fits).is_finite().all()
    with pytest.raises(DataError, match=rf"response 0.* {fitting + 1} tokens.* {fitting} positions; nothing is cut"):
        judge_of(folder).scores(PROMPTS, longer)


def _no_head(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file({name: weight for name, weight in weights.items() if name != "score.weight"}, file, {"format": "pt"})


def _nan(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["score.weight"][0, 0] = float("nan")
    save_file(weights, file, {"format": "pt"})


def _two_labels(folder: Path) -> None:
    make_classifier(folder, "llama", num_labels=2)


def _no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def _causal(folder: Path) -> None:
    make_llama(folder)


def _not_a_folder(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))


def _prints_time(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text("{{ strftime_now('%d %b') }}" + file.read_text())


@pytest.mark.parametrize(
    ("spoil", "kind", "words"),
    [
        (_no_head, DataError, r"1 missing \(score.weight\).*random numbers"),
        (_nan, DataError, "NaN or infinite"),
        (_two_labels, DataError, "2 labels, and a reward model has one"),
        (_no_template, DataError, "no chat template"),
        (_causal, DataError, "LlamaForCausalLM, which has no head that scores"),
        (_not_a_folder, DataError, "is not a folder"),
        (_prints_time, UsageError, "prints the time.*model.template_time"),
    ],
)
def test_what_is_no_reward_model_is_refused(spoil: Any, kind: type[DiceError], words: str, tmp_path: Path) -> None:
    folder = make_classifier(tmp_path / "llama", "llama")
    spoil(folder)
    with pytest.raises(kind, match=words):
        judge_of(folder).scores(PROMPTS, SAMPLES)


def test_the_key_is_of_content(tmp_path: Path) -> None:
    first = make_classifier(tmp_path / "first", "llama")
    copy = make_classifier(tmp_path / "copy", "llama")
    other = make_classifier(tmp_path / "other", "llama", seed=1)
    keys = [judge_of(folder).key_fields() for folder in (first, copy, other)]
    assert keys[0] == keys[1] != keys[2]
    assert str(tmp_path) not in json.dumps(keys)
    assert judge_of(first, token_budget=1).key_fields() == keys[0]  # batches decide nothing
    assert judge_of(first, ModelConfig(device="cpu", dtype="bfloat16")).key_fields() != keys[0]


def test_the_registry_makes_it_from_its_section(tmp_path: Path) -> None:
    folder = make_classifier(tmp_path / "llama", "llama")
    config = JudgesConfig.model_validate({"reward_model": {"model": str(folder)}})
    assert build_judges(config, FLOAT32, is_world=False) == (judge_of(folder),)
    assert build_judges(JudgesConfig(), FLOAT32, is_world=False) == ()
