"""The implicit reward as a judge: against log-softmax sums of plain forwards, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from tiny_models import MAX_POSITIONS, make_llama, make_mistral, make_qwen2
from transformers import AutoModelForCausalLM, AutoTokenizer

from dice_py.config.judges import ImplicitConfig, JudgesConfig
from dice_py.config.shared import ModelConfig
from dice_py.data import prompts_frame
from dice_py.errors import DataError, UsageError
from dice_py.evaluation.judges.implicit import ImplicitJudge
from dice_py.evaluation.judges.registry import build_judges

FLOAT32 = ModelConfig(device="cpu", dtype="float32")
QUESTIONS = ["hi", "what is the tallest mountain?"]
PROMPTS = prompts_frame([[{"role": "user", "content": question}] for question in QUESTIONS])
ANSWERS = ["", "4", "a sentence of some words", "y" * 60]
SAMPLES = pl.DataFrame(
    [(prompt, answer) for answer in ANSWERS for prompt in range(len(QUESTIONS))],
    schema={"prompt_id": pl.UInt32, "response": pl.String},
    orient="row",
)
MAKERS = {"llama": make_llama, "mistral": make_mistral, "qwen2": make_qwen2}


def judge_of(policy: Path, reference: Path, **settings: Any) -> ImplicitJudge:
    return ImplicitJudge.of(ImplicitConfig(policy=str(policy), reference=str(reference), **settings), FLOAT32)


def plain_logps(folder: Path) -> tuple[list[float], list[int]]:
    """Σ log π of each response up to and with its end token, and its number of tokens: one forward a response."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sums, counts = [], []
    for prompt, answer in SAMPLES.iter_rows():
        asked = [{"role": "user", "content": QUESTIONS[prompt]}]
        before = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        full = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": answer}], tokenize=False)
        start = len(tokenizer(before, add_special_tokens=False)["input_ids"])
        ids = tokenizer(full, add_special_tokens=False)["input_ids"]
        ids = ids[: ids.index(tokenizer.eos_token_id, start) + 1]
        with torch.inference_mode():
            logps = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        sums.append(sum(logps[at - 1, ids[at]].item() for at in range(start, len(ids))))
        counts.append(len(ids) - start)
    return sums, counts


@pytest.mark.parametrize("family", list(MAKERS))
@pytest.mark.parametrize("per_token", [False, True])
def test_scores_are_the_difference_of_plain_sums(family: str, per_token: bool, tmp_path: Path) -> None:
    policy, reference = (MAKERS[family](tmp_path / name, seed) for name, seed in (("policy", 1), ("reference", 2)))
    scores = judge_of(policy, reference, beta=0.25, per_token=per_token).scores(PROMPTS, SAMPLES)
    (ours, counts), (theirs, _) = plain_logps(policy), plain_logps(reference)
    expected = [
        0.25 * (one - other) / (count if per_token else 1)
        for one, other, count in zip(ours, theirs, counts, strict=True)
    ]
    assert scores.dtype == pl.Float64
    assert scores.to_list() == pytest.approx(expected, abs=1e-4)


def test_the_same_model_twice_is_refused(tmp_path: Path) -> None:
    policy = make_llama(tmp_path / "policy")
    copy = Path(shutil.copytree(policy, tmp_path / "copy"))
    with pytest.raises(UsageError, match=r"same model.*every pair is a tie"):
        judge_of(policy, copy).scores(PROMPTS, SAMPLES)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    policy, reference = make_llama(tmp_path / "policy"), make_mistral(tmp_path / "reference")
    file = reference / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="token"):
        judge_of(policy, reference).scores(PROMPTS, SAMPLES)


def test_nothing_is_cut_off(tmp_path: Path) -> None:
    judge = judge_of(make_llama(tmp_path / "policy", 1), make_llama(tmp_path / "reference", 2))
    long = pl.DataFrame({"prompt_id": [0], "response": ["x" * MAX_POSITIONS]}, schema=SAMPLES.schema)
    with pytest.raises(DataError, match=rf"response 0.*{MAX_POSITIONS} positions; nothing is cut off"):
        judge.scores(PROMPTS, long)


def test_the_place_in_the_users_file_is_in_the_error(tmp_path: Path) -> None:
    judge = judge_of(make_mistral(tmp_path / "policy", 1), make_mistral(tmp_path / "reference", 2))
    prompts = prompts_frame([[{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]])
    samples = pl.DataFrame({"prompt_id": [0], "response": ["yes"], "where": ["ours.jsonl, line 7"]})
    with pytest.raises(DataError, match=r"ours\.jsonl, line 7.*only user and assistant turns"):
        judge.scores(prompts, samples)


def test_the_key_is_of_content(tmp_path: Path) -> None:
    policy, reference = make_llama(tmp_path / "policy", 1), make_llama(tmp_path / "reference", 2)
    moved = Path(shutil.copytree(policy, tmp_path / "moved"))
    key = judge_of(policy, reference).key_fields()
    assert key == judge_of(moved, reference, token_budget=512).key_fields()
    assert str(tmp_path) not in json.dumps(key)
    others = [
        judge_of(reference, policy),
        judge_of(policy, reference, beta=0.2),
        judge_of(policy, reference, per_token=True),
    ]
    assert all(other.key_fields() != key for other in others)


def test_the_registry_makes_it_from_its_section(tmp_path: Path) -> None:
    policy, reference = make_llama(tmp_path / "policy", 1), make_llama(tmp_path / "reference", 2)
    section = {"policy": str(policy), "reference": str(reference)}
    config = JudgesConfig.model_validate({"implicit": section})
    oracle, judge = build_judges(config, FLOAT32, is_world=True)
    assert (oracle.name, judge) == ("oracle", judge_of(policy, reference))
