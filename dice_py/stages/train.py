"""Stage 5, train: one run of DPO, or of another method, from π_t; the reference is π_t itself or the first one.

DPO's loss: −log σ(β·[(log π(y_w|x) − ref_w) − (log π(y_l|x) − ref_l)]) (Rafailov et al., arXiv 2305.18290, eq. 7). The
other methods are in training/methods/; train.loss sums other types of TRL's, and train.sft_weight adds the mean NLL of
the chosen tokens. Before the first step the policy must give the responses the log-probabilities that are stored
(training/step0.py). A run in which it does not stops, since tokens, masks, templates or types then differ between
scorer and trainer.

Training is done by one or several processes, each of which calls `train_rank` (training/trainer.py): this process if
there is one, else ranks that it starts (training/ranks.py), as training/parallelism.py lays them out.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.compute.devices import device_in_group
from dice_py.config.extras import TRAINING, require
from dice_py.config.shared import DevicesConfig, ModelConfig
from dice_py.config.training import TrainConfig
from dice_py.events import Report, no_report
from dice_py.models.checkpoint import check_checkpoint
from dice_py.models.identity import model_identity
from dice_py.models.limits import check_positions, model_positions
from dice_py.models.sizes import model_size
from dice_py.reinforcement.prompts import hard_prompts
from dice_py.stages.job import Job, StageResult, model_key_fields, skip
from dice_py.stages.trained import trained_model
from dice_py.storage.keys import versions
from dice_py.training.checkpoints import ADAPTER, is_trained, resume_from
from dice_py.training.pair_terms import label_note, load_pairs
from dice_py.training.parallelism import lay_out
from dice_py.training.ranks import run_ranks
from dice_py.training.schedule import setting_notes, training_steps
from dice_py.training.settings_check import check_training_settings
from dice_py.training.trainer import train_rank


@dataclass(frozen=True)
class TrainJob(Job):
    """Trains from `policy` on `training_set`; the new policy is `out/model`, in the Hugging Face layout.

    Weights are held in float32 and computed with in the configured type: at the paper's learning rate of
    5e-7 an update vanishes in bfloat16's 8 bits. The model is saved in the type that `policy` is stored in
    (with zero3, by way of the computing type: what DeepSpeed gathers). With LoRA the adapters are
    merged before saving, and kept as `out/adapter`, a PEFT folder for `policy`.

    Several processes (train.processes, train.strategy, train.accelerate_config) make the same steps as one: a step's
    pairs are the same, and only the order of sums differs. Where the pairs of an epoch do not divide among the
    processes, its last step is filled up with pairs of its start. accelerate's config is `out/accelerate.yaml`.

    A model under the job's key is left as it is. Training resumes from checkpoints of the same key and kind of layout.
    The counts: `pairs`, `pairs_too_long`, `steps`, `step0_loss`, `step0_max_abs_difference`; `final_loss`,
    `final_chosen_logps` and `final_chosen_reward` (means of the last train.logging_steps steps; training/trainer.py);
    `saved_dtype`, `update_rms` (root mean square of the weights' change).

    Raises, when run:
        DataError: an unusable policy (`check_checkpoint`) or training set, or a loss at step 0 that is not ln 2.
        UsageError: a layout that this machine cannot have.
        OutOfMemoryError: on any rank.
    """

    config: TrainConfig
    models: ModelConfig
    policy: Path
    training_set: Path
    """Parquet with `prompt_ids`, `chosen_ids`, `rejected_ids`, `ref_chosen_logps`, `ref_rejected_logps`
    (storage.schemas.TRAINING_SET), and the labels that the method reads (TRAINING_LABELS)."""
    training_set_key: str
    out: Path
    beta: float
    seed: int
    devices: DevicesConfig | None = None
    """GPUs to use; None: train.processes "auto" is one."""
    time_updates: bool = False
    """Whether each optimizer step's update is timed and reported (training/update_timer.py). For `dice plan`."""
    may_skip: bool = False
    """Whether a training set whose mined prompts are all hard leaves the policy as it is, with a note (method=mpo)."""

    def key_fields(self) -> dict[str, Any]:
        """The training set, the config, the policy, the seed and versions; not the processes."""
        return {
            "training set": self.training_set_key,
            "train": self.config.key_fields(),
            "model": model_key_fields(self.models),
            "policy": model_identity(self.policy),
            "beta": self.beta,
            "seed": self.seed,
            "versions": versions("torch", "transformers", "trl", "accelerate", "peft"),
        }

    @property
    def target(self) -> Path:
        """The folder of the new policy."""
        return self.out / "model"

    @property
    def adapter(self) -> Path:
        """The folder of the adapter that was merged into the new policy, if `train.lora` is set.

        It is no part of the result, which has it in its weights. It may be deleted, and earlier versions kept none.
        """
        return self.out / ADAPTER

    def run(self, report: Report = no_report) -> StageResult:
        """Trains, or returns the counts of the model that is there."""
        key = self.key()
        if self.may_skip and not hard_prompts(self.training_set)[1].easy:
            return skip(self.out, key, "every prompt is hard: stage 2 begins with the policy of the round", report)
        inputs = [self.training_set, self.policy]
        return trained_model(self.target, key, inputs, lambda: self._train(key, report), report)

    def _train(self, key: str, report: Report) -> None:
        require(*TRAINING, extra="train")
        check_checkpoint(self.policy, "policy", self.models)
        layout = lay_out(self.config, self.models, self.devices, report)
        check_training_settings(self.config, self.policy, remote_code=self.models.trust_remote_code)
        vocabulary = model_size(self.policy).vocabulary or None
        # Its errors come before processes start.
        pairs, _ = load_pairs(self.training_set, self.config, self.beta, vocabulary)
        if (note := label_note(pairs, self.config)) is not None:
            report("note", text=note)
        longer = pl.max_horizontal(pl.col("chosen_ids").list.len(), pl.col("rejected_ids").list.len())
        limit = model_positions(self.policy, self.models)
        check_positions(
            pairs.select(pl.col("prompt_ids").list.len() + longer).to_series().to_list(),
            limit,
            where=str(self.training_set),
            model=str(self.policy),
            remedy=f"leave longer pairs out with train.max_length={limit or 0:.0f}",
            noun="pair",
        )
        steps = training_steps(self.config, pairs.height, layout.processes)
        for note in setting_notes(self.config, steps):
            report("note", text=note)
        work = functools.partial(
            train_rank,
            self.config,
            self.models if self.devices is None else device_in_group(self.models),
            policy=self.policy,
            training_set=self.training_set,
            out=self.out,
            beta=self.beta,
            seed=self.seed,
            key=key,
            layout=layout,
            checkpoint=resume_from(self.out, key, layout, report),
            time_updates=self.time_updates,
        )
        run_ranks(layout, work, self.config, out=self.out, devices=self.devices, needs=[self.policy], report=report)
        if layout.strategy != "none" and not is_trained(self.target, key):
            raise RuntimeError(f"every process of the training succeeded, but {self.target} is not complete")
