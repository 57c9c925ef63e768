"""`dice reinforce`: stage 2 of MPO alone, and what it refuses, in a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_reinforcement import STOPS, training_set
from tiny_sets import scored_pairs

from dice_py.storage.parquet import write_parquet

SETTINGS = [
    "model.device=cpu", "generate.engine=transformers", "generate.max_new_tokens=12", "generate.temperature=1",
    f"generate.sampling_params={json.dumps({'stop_token_ids': STOPS})}", "train.mpo.steps=1", "train.mpo.batch_size=4",
    "train.mpo.num_generations=2", "train.mpo.per_device_train_batch_size=4",
]  # fmt: skip


@pytest.fixture
def call(llama: Path, tmp_path: Path) -> list[object]:
    """The arguments that every call has."""
    file = write_parquet(tmp_path / "set.parquet", training_set(["hard", "easy"]), key="k")
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    return ["reinforce", "--policy", llama, "--training-set", file, "-o", tmp_path / "out", *settings]


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_a_policy_is_made_and_kept(call: list[object], dice: Any, llama: Path, other: Path, tmp_path: Path) -> None:
    rewards = ["--reward-policy", llama, "--reward-reference", other, "--alpha", "0.1", "--json"]
    code, out, err = dice(*call, *rewards)
    assert code == 0, err
    made = json.loads(out)
    assert (made["model"], made["hard_prompts"], made["steps"]) == (str(tmp_path / "out/model"), 1, 1)
    before = (tmp_path / "out/model/model.safetensors").stat().st_mtime_ns
    code, out, err = dice(*call, *rewards)
    assert code == 0, err
    assert json.loads(out) == made
    assert (tmp_path / "out/model/model.safetensors").stat().st_mtime_ns == before


def test_rewards_must_be_complete(call: list[object], refused: Callable[..., str], llama: Path) -> None:
    assert "needs --reward-policy and --reward-reference" in refused(2, *call, "--reward-policy", llama)
    by_judge = ["--set", "train.mpo.reward=oracle", "--reward-policy", llama]
    assert "--reward-policy is for the implicit reward" in refused(2, *call, *by_judge)
    models = ["--reward-policy", llama, "--reward-reference", llama]
    sentence = refused(2, *call, *models, "--set", "mine.debias=bucket")
    assert "set mine.debias=linear, per_token or none" in sentence


@pytest.mark.usefixtures("in_this_process")
def test_a_training_set_without_labels(refused: Callable[..., str], llama: Path, tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "plain.parquet", scored_pairs(llama, 4), key="k")
    sentence = refused(
        3, "reinforce", "--policy", llama, "--training-set", file, "-o", tmp_path / "out", "--reward-policy", llama,
        "--reward-reference", llama,
    )  # fmt: skip
    assert "has no column 'prompt'" in sentence
    assert "Give the file that dice replay wrote" in sentence


@pytest.mark.usefixtures("in_this_process")
def test_no_prompt_is_hard(call: list[object], refused: Callable[..., str], llama: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "set.parquet", training_set(["easy"]), key="k")
    sentence = refused(3, *call, "--reward-policy", llama, "--reward-reference", llama)
    assert "has no hard prompt (1 are easy)" in sentence
