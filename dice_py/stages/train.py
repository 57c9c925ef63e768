"""Stage 5, train: one DPO run from π_t with π_t itself as the reference.

Loss: −log σ(β·[(log π(y_w|x) − ref_w) − (log π(y_l|x) − ref_l)]) (Rafailov et al., arXiv 2305.18290, eq. 7),
plus, if asked, sft_weight × the mean NLL of the chosen tokens. At step 0 the policy is the reference and the
DPO term is ln 2. A run in which it is not stops, since tokens, masks, templates or types then differ between
scorer and trainer.

Training is done by one or several processes, each of which calls `train_rank` (training/trainer.py): this process if
there is one, else ranks that this process launches (training/launcher.py), as training/parallelism.py lays them out.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dice_py.compute.devices import Group, device_in_group, only_these_gpus
from dice_py.compute.worker import Work
from dice_py.config.shared import DevicesConfig, ModelConfig
from dice_py.config.training import TrainConfig
from dice_py.events import Report, no_report
from dice_py.models.loading import model_identity, require
from dice_py.models.sizes import model_size
from dice_py.stages.job import Job, StageFile, StageResult, model_key_fields
from dice_py.storage.files import read_json
from dice_py.storage.keys import digest, versions
from dice_py.training.checkpoints import STAMP, checkpoint_stamp, is_trained, last_checkpoint
from dice_py.training.dataset import load_training_set
from dice_py.training.launcher import launch
from dice_py.training.parallelism import ProcessLayout, lay_out, write_accelerate_config
from dice_py.training.trainer import train_rank


@dataclass(frozen=True)
class TrainJob(Job):
    """Trains from `policy` on `training_set`; the new policy is `out/model`, in the Hugging Face layout.

    Weights are held in float32 and computed with in the configured type: at the paper's learning rate of
    5e-7 an update vanishes in bfloat16's 8 bits. The model is saved in the type that `policy` is stored in
    (with zero3, by way of the computing type: what DeepSpeed gathers). With LoRA the adapters are merged before saving.

    Several processes (train.processes, train.strategy, train.accelerate_config) make the same steps as one: a step's
    pairs are the same, and only the order of sums differs. Where the pairs of an epoch do not divide among the
    processes, its last step is filled up with pairs of its start. accelerate's config is `out/accelerate.yaml`.

    A model under the job's key is left as it is. Training resumes from checkpoints of the same key and kind of layout.
    The counts: `pairs`, `pairs_too_long`, `steps`, `step0_loss`, `step0_max_abs_difference`, `final_loss`.

    Raises, when run:
        DataError: an unusable training set, or a loss at step 0 that is not ln 2.
        UsageError: a layout that this machine cannot have.
        OutOfMemoryError: on any rank.
    """

    config: TrainConfig
    models: ModelConfig
    policy: Path
    training_set: Path
    """Parquet with `prompt_ids`, `chosen_ids`, `rejected_ids`, `ref_chosen_logps`, `ref_rejected_logps`
    (storage.schemas.TRAINING_SET)."""
    training_set_key: str
    out: Path
    beta: float
    seed: int
    devices: DevicesConfig | None = None
    """GPUs to use; None: train.processes "auto" is one."""
    time_updates: bool = False
    """Whether each optimizer step's update is timed and reported (training/update_timer.py). For `dice plan`."""

    def key(self) -> str:
        """A digest of the training set, the config, the policy, the seed and versions; not of the processes."""
        return digest(
            "train",
            self.training_set_key,
            self.config.key_fields(),
            model_key_fields(self.models),
            model_identity(self.policy),
            self.beta,
            self.seed,
            versions("torch", "transformers", "trl", "accelerate", "peft"),
        )

    @property
    def target(self) -> Path:
        """The folder of the new policy."""
        return self.out / "model"

    def is_complete(self, files: Sequence[StageFile]) -> bool:
        """True when the new policy is there."""
        return all(is_trained(folder, key) for folder, key in files)

    def run(self, report: Report = no_report) -> StageResult:
        """Trains, or returns the counts of the model that is there."""
        key = self.key()
        if not is_trained(self.target, key):
            self._train(key, report)
        return StageResult([(self.target, key)], dict(read_json(self.target / STAMP)["counts"]))

    def _train(self, key: str, report: Report) -> None:
        require("torch", "transformers", "trl", "accelerate", "datasets", extra="train")
        layout = lay_out(self.config, self.models, self.devices, report)
        vocabulary = model_size(self.policy).vocabulary or None
        load_training_set(
            self.training_set, self.config.max_length, vocabulary
        )  # its errors come before processes start
        checkpoints = self.out / "checkpoints"
        checkpoint = last_checkpoint(checkpoints, checkpoint_stamp(key, layout)) if checkpoints.exists() else None
        if checkpoint is not None:
            report("note", text=f"training resumes from {checkpoint.name}")
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
            checkpoint=checkpoint,
            time_updates=self.time_updates,
        )
        if layout.strategy == "none":
            with only_these_gpus(Group(1, layout.gpus)) if layout.gpus else contextlib.nullcontext():
                work(report=report)
        else:
            self._launch(layout, work, report)
            if not is_trained(self.target, key):
                raise RuntimeError(f"every process of the training succeeded, but {self.target} is not complete")
        shutil.rmtree(checkpoints, ignore_errors=True)

    def _launch(self, layout: ProcessLayout, work: Work, report: Report) -> None:
        """Trains in ranks that `accelerate launch` starts."""
        file = write_accelerate_config(layout, self.config, self.out)
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), "--module"]
        environment: dict[str, str] = {}
        if layout.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(layout.gpus)
        if "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // layout.processes))
        report("note", text=f"training runs in {layout.processes} processes ({layout.strategy}, {file})")
        launch(
            [*command, "dice_py.training.launcher"],
            layout.processes,
            work,
            environment=environment,
            report=report,
        )
