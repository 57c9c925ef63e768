"""Stage 6 of a round with train.method=mpo, reinforce: reinforcement learning on the hard prompts.

It starts from the policy that the train stage made of the easy pairs, which is also the reference of its KL divergence
(Gou & Nguyen, arXiv 2403.19443). The trainer is TRL's GRPOTrainer or RLOOTrainer; its responses are sampled from the
policy as it is then (reinforcement/sampler.py), and rewarded by the round's debiased implicit reward or a judge
(reinforcement/rewards.py). Before the first step the trainer must give the responses the log-probabilities that they
were sampled with.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dice_py.compute.devices import device_in_group
from dice_py.config.extras import TRAINING, require
from dice_py.config.shared import DevicesConfig, ModelConfig
from dice_py.config.stages import GenerateConfig
from dice_py.config.training import TrainConfig
from dice_py.errors import DataError, UsageError
from dice_py.events import Report, no_report
from dice_py.generation.engines.factory import choose_engine
from dice_py.generation.limits import check_fits
from dice_py.models.checkpoint import check_checkpoint
from dice_py.models.identity import model_identity
from dice_py.models.loading import placement
from dice_py.reinforcement.prompts import hard_prompts
from dice_py.reinforcement.rank import ReinforceSettings, reinforce_rank
from dice_py.reinforcement.rewards import RewardSource
from dice_py.reinforcement.sampler import on_policy
from dice_py.stages.job import Job, StageResult, model_key_fields, skip
from dice_py.stages.trained import trained_model
from dice_py.storage.keys import versions
from dice_py.training.checkpoints import is_trained, resume_from
from dice_py.training.parallelism import lay_out
from dice_py.training.ranks import run_ranks
from dice_py.training.schedule import setting_notes
from dice_py.training.settings_check import check_training_settings


@dataclass(frozen=True)
class ReinforceJob(Job):
    """Trains from `policy` on the hard prompts of `training_set`; the new policy is `out/model`.

    Weights are held, computed with and saved as by `TrainJob`, and so are adapters. A model under the job's key is left
    as it is. Training resumes from checkpoints of the same key. The counts are those of `reinforce_rank`, and
    `saved_dtype` and `update_rms` as of `TrainJob`.

    Raises, when run:
        DataError: an unusable policy, a training set without hard prompts, a first ratio that is not 1.
        UsageError: settings that the trainer refuses, or a layout that this machine cannot have.
        OutOfMemoryError: on any rank.
    """

    config: TrainConfig
    generate: GenerateConfig
    models: ModelConfig
    policy: Path
    training_set: Path
    """Parquet with `prompt`, `prompt_ids`, `source` and `difficulty` (storage.schemas.TRAINING_SET)."""
    training_set_key: str
    rewards: RewardSource
    out: Path
    seed: int
    devices: DevicesConfig | None = None
    """GPUs to use; None: train.processes "auto" is one."""
    may_skip: bool = False
    """Whether a training set without hard prompts leaves the policy as it is, with a note; else it is an error."""

    def key_fields(self) -> dict[str, Any]:
        """The training set, the settings, the rewards, the policy, the seed and versions; not the processes."""
        return {
            "training set": self.training_set_key,
            "train": self.config.of_reinforcement().key_fields(),
            "train.mpo": self.config.mpo.key_dump(),
            "generate": on_policy(self.generate).key_dump(exclude={"samples", "shard_prompts", "token_budget"}),
            "rewards": self.rewards.key_fields(),
            "model": model_key_fields(self.models),
            "policy": model_identity(self.policy),
            "seed": self.seed,
            "versions": versions("torch", "transformers", "trl", "accelerate", "peft", "vllm"),
        }

    @property
    def target(self) -> Path:
        """The folder of the new policy."""
        return self.out / "model"

    def run(self, report: Report = no_report) -> StageResult:
        """Trains, or returns the counts of the model that is there."""
        key = self.key()
        if self.config.mpo.steps == 0:
            return skip(self.out, key, "train.mpo.steps is 0", report)
        if self.may_skip and not hard_prompts(self.training_set)[1].hard:
            return skip(self.out, key, "no prompt is hard: the policy is that of stage 1", report)
        inputs = [self.training_set, self.policy, *self.rewards.folders()]
        return trained_model(self.target, key, inputs, lambda: self._train(key, report), report)

    def _train(self, key: str, report: Report) -> None:
        require(*TRAINING, extra="train")
        check_checkpoint(self.policy, "policy", self.models)
        prompts, split = hard_prompts(self.training_set)
        if prompts.is_empty():
            raise DataError(
                f"{self.training_set} has no hard prompt ({split.easy} are easy); raise mine.difficulty_quantile and "
                "mine again"
            )
        steps = self.config.mpo.steps_for(split.hard_pairs, self.config.num_train_epochs)
        config = self.config.of_reinforcement(steps)
        layout = lay_out(config, self.models, self.devices, report)
        if layout.strategy in ("zero3", "own"):
            raise UsageError(
                "train.method is mpo, whose second stage samples from the policy that it trains, and so needs its "
                f"weights on each process; {'train.accelerate_config' if layout.strategy == 'own' else 'zero3'} does "
                "not give them: set train.strategy=fsdp2 or ddp"
            )
        check_training_settings(self.config, self.policy, remote_code=self.models.trust_remote_code)
        ids = prompts["prompt_ids"]
        lengths, largest = ids.list.len().max(), ids.list.max().max()
        assert isinstance(lengths, int)
        assert isinstance(largest, int)
        check_fits(self.policy, self.models, lengths, largest, self.generate.max_new_tokens)
        for note in setting_notes(config, steps):
            report("note", text=note)
        uses_vllm = self._uses_vllm(report)
        checkpoint = resume_from(self.out, key, layout, report)
        settings = ReinforceSettings(
            config=config,
            models=self.models if self.devices is None else device_in_group(self.models),
            generate=on_policy(self.generate),
            uses_vllm=uses_vllm,
            rewards=self.rewards,
            policy=self.policy,
            training_set=self.training_set,
            out=self.out,
            seed=self.seed,
            key=key,
        )
        work = functools.partial(reinforce_rank, settings, layout=layout, checkpoint=checkpoint)
        needs = [self.policy, *self.rewards.folders()]
        run_ranks(layout, work, config, out=self.out, devices=self.devices, needs=needs, report=report)
        if layout.strategy != "none" and not is_trained(self.target, key):
            raise RuntimeError(f"every process of the training succeeded, but {self.target} is not complete")

    def _uses_vllm(self, report: Report) -> bool:
        """Whether TRL's vLLM samples: where `generate.engine` picks vLLM, and there is a GPU."""
        name, why = choose_engine(self.generate, self.models, None)
        on_gpu = placement(self.models).device.startswith("cuda")
        if name == "vllm" and not on_gpu:
            name, why = "transformers", "vLLM samples in a trainer's process on GPUs alone"
        report("note", text=f"engine: {name} ({why})")
        cut = [
            name
            for name, value, off in (("top_p", self.generate.top_p, 1.0), ("top_k", self.generate.top_k, 0))
            if value != off
        ]
        cut += [
            f"sampling_params.{each}"
            for each in self.generate.sampling_params
            if each not in ("stop", "stop_token_ids")
        ]
        if cut:
            report(
                "note",
                text=f"stage 2 samples from the policy itself: generate.{', generate.'.join(cut)} "
                f"{'is' if len(cut) == 1 else 'are'} left out",
            )
        return name == "vllm"
