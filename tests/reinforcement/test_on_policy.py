"""Stage 2 of MPO: its numbers, a kill and a resume, what it skips, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_reinforcement import CONFIG, GENERATE, Stage, implicit, training_set
from tiny_sets import CPU

from dice_py.config.stages import ScoreConfig
from dice_py.config.training import LoraConfig
from dice_py.errors import DamagedError, DataError, UsageError
from dice_py.models.loading import load_model
from dice_py.reinforcement.rank import ReinforceSettings, build_trainer
from dice_py.reinforcement.rewards import Responses
from dice_py.scoring.scorer import Scorer
from dice_py.storage.files import read_json
from dice_py.storage.integrity import write_stamp

TRAINERS = ("grpo", "rloo")


@pytest.fixture
def stage(llama: Path, other: Path, tmp_path: Path) -> Stage:
    return Stage(llama, other, tmp_path)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def settings(stage: Stage, **changed: Any) -> ReinforceSettings:
    job = stage.job(**changed)
    return ReinforceSettings(
        config=job.config.of_reinforcement(3),
        models=job.models,
        generate=job.generate,
        uses_vllm=False,
        rewards=job.rewards,
        policy=job.policy,
        training_set=job.training_set,
        out=job.out,
        seed=job.seed,
        key="k",
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_it_trains_on_the_hard_prompts(stage: Stage, name: str, llama: Path) -> None:
    counts = stage(mpo={"trainer": name})
    assert counts["hard_prompts"] == 3
    assert counts["steps"] == 3
    assert counts["step0_max_abs_difference"] < 1e-4
    assert counts["first_kl"] == pytest.approx(0.0, abs=1e-6)
    changes = [(value - weights(llama)[key]).abs().max().item() for key, value in weights(stage.model).items()]
    assert max(changes) > 1e-4
    log = read_json(stage.model / "train_log.json")
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3]


class Spy:
    """Rewards that keep, of each step, the policy's and the reference's token log-probabilities by the scorer."""

    def __init__(self, trainer: Any, reference: Path) -> None:
        self.trainer, self.rewards = trainer, trainer.rollouts.rewards
        self.reference = Scorer(load_model(reference, CPU), ScoreConfig())
        self.steps: list[tuple[list[np.ndarray], list[np.ndarray]]] = []

    def __call__(self, sampled: Responses, report: Any) -> list[float]:
        policy = Scorer(self.trainer.rollouts.sampler.engine.model, ScoreConfig())
        self.steps.append(
            tuple(each.token_logps(sampled.prompts, sampled.responses) for each in (policy, self.reference))
        )
        rewards: list[float] = self.rewards(sampled, report)
        return rewards


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_ratio_and_kl_are_those_of_the_sampled_tokens(stage: Stage, llama: Path, name: str) -> None:
    # In one forward: GRPO's trainer logs the mean of the means of its forwards.
    trainer = build_trainer(settings(stage, mpo={"trainer": name, "per_device_train_batch_size": 8}))
    spy = Spy(trainer, llama)
    object.__setattr__(trainer.rollouts, "rewards", spy)
    trainer.train()
    assert len(spy.steps) == 3
    log = [entry for entry in trainer.state.log_history if "kl" in entry]
    for entry, (policy, reference) in zip(log, spy.steps, strict=True):
        difference = np.concatenate(reference).astype(float) - np.concatenate(policy)
        kl = np.exp(difference) - difference - 1 if name == "grpo" else -difference
        assert entry["kl"] == pytest.approx(kl.mean(), abs=2e-6)
        # Before the update each ratio is 1, so that none is clipped.
        assert entry["clip_ratio/region_mean"] == 0
    assert log[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert log[-1]["kl"] != pytest.approx(0.0, abs=1e-6)


@pytest.mark.slow
def test_a_policy_that_is_not_the_samplers_is_refused(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def update(sampler: Any, model: Any) -> None:
        for value in sampler.engine.model.parameters():
            value.data = value.data * 1.5

    monkeypatch.setattr("dice_py.reinforcement.sampler.PolicySampler.update", update)
    with pytest.raises(DataError, match=r"differ by .* nats .* between the trainer and the sampler"):
        stage()
    assert not stage.model.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_a_killed_training_resumes_to_the_same_weights(
    stage: Stage, llama: Path, other: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "whole").mkdir()
    undisturbed = Stage(llama, other, tmp_path / "whole")
    undisturbed(mpo={"trainer": name})

    def kill(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    stage.on_step = kill
    with pytest.raises(KeyboardInterrupt):
        stage(mpo={"trainer": name})
    stage.on_step = lambda step: None
    stage(mpo={"trainer": name})
    assert "training resumes from checkpoint-2" in stage.notes()
    for key, value in weights(undisturbed.model).items():
        assert torch.equal(value, weights(stage.model)[key])
    assert stage(mpo={"trainer": name})["steps"] == 3  # kept
    assert not [fields for event, fields in stage.events if event == "progress"]


@pytest.mark.slow
def test_adapters_are_sampled_with(stage: Stage) -> None:
    config = CONFIG.model_copy(update={"lora": LoraConfig(r=4), "mpo": CONFIG.mpo})
    counts = stage(config=config)
    assert counts["steps"] == 3
    assert counts["final_kl"] != 0
    assert (stage.out / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_what_is_left_out_of_sampling_is_named(stage: Stage) -> None:
    stops = GENERATE.sampling_params
    stage(mpo={"steps": 1}, generate={"top_p": 0.9, "top_k": 4, "sampling_params": {**stops, "min_p": 0.1}})
    left_out = "stage 2 samples from the policy itself: generate.top_p, generate.top_k, generate.sampling_params.min_p"
    assert f"{left_out} are left out" in stage.notes()


def test_a_set_without_hard_prompts_is_refused(stage: Stage) -> None:
    stage.frame = training_set(["easy"])
    with pytest.raises(DataError, match=r"has no hard prompt \(1 are easy\); raise mine.difficulty_quantile"):
        stage()


def test_a_damaged_model_of_the_reward_is_refused(stage: Stage, other: Path, tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    shutil.copytree(other, reference)
    write_stamp(reference, {"key": "k"})
    with (reference / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    with pytest.raises(DamagedError, match=r"reference/model\.safetensors is damaged"):
        stage(rewards=implicit(stage.policy, reference))


def test_nothing_to_do_is_a_note(stage: Stage) -> None:
    stage.frame = training_set(["easy", "easy"])
    counts = stage(may_skip=True)
    assert counts["skipped"] == "no prompt is hard: the policy is that of stage 1"
    assert not stage.model.exists()
    stage.frame = training_set(["hard"])
    assert stage(mpo={"steps": 0})["skipped"] == "train.mpo.steps is 0"


def test_a_group_is_not_split_over_processes(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dice_py.reinforcement.rank.world_size", lambda: 4)
    with pytest.raises(UsageError, match=r"must be a multiple of num_generations × processes \(4 × 4\)"):
        build_trainer(settings(stage))
