"""Config section `train`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dice_py.config.loss import LossConfig
from dice_py.config.mpo import MpoConfig
from dice_py.config.passthrough import PassedOptions, passed_options, refuse_own
from dice_py.config.shared import ADDED, Positive, Probability, Section

TRACKED = ("tensorboard", "trackio")
"""The trackers that are told of a whole run (reporting/tracking/); TRL tells the others of each training."""

Warmup = Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0.0, lt=1.0)]
"""A number of optimizer steps, or a share of a training's steps."""


class LoraConfig(Section):
    """LoRA adapters. They are merged after training, so that a round ends with a complete model, and kept beside it."""

    r: Positive = Field(default=16, description="rank")
    alpha: Positive = Field(default=32, description="scale: adapters are multiplied by alpha / r, or by alpha / √r")
    use_rslora: bool = Field(
        default=False, description="scale by alpha / √r (rsLoRA, arXiv 2312.03732)", json_schema_extra=ADDED
    )
    dropout: Probability = Field(
        default=0.0,
        description="on the adapters' input; changes nothing, since DPO trains without any dropout",
    )
    target_modules: list[str] | Literal["all-linear"] = Field(
        default="all-linear", description="names of the adapted modules; all-linear: every linear layer but the head"
    )
    modules_to_save: list[str] = Field(
        default_factory=list,
        description="names of layers that are trained whole, in float32, beside the adapters: norms, head, embeddings",
        json_schema_extra=ADDED,
    )


class TrainConfig(LossConfig):
    """Training of the policy on preference pairs. Names are TRL's where TRL has the setting."""

    learning_rate: Annotated[float, Field(gt=0.0)] = Field(default=5e-7, description="peak learning rate")
    lr_scheduler_type: str = Field(default="constant_with_warmup", description="a scheduler of transformers")
    warmup_steps: Warmup = Field(
        default=0.1,
        description="optimizer steps over which the learning rate rises; below 1: this share of the training's steps, "
        "rounded down",
    )
    max_steps: Positive | None = Field(
        default=None, description="optimizer steps; none: num_train_epochs over the pairs"
    )
    num_train_epochs: Annotated[float, Field(gt=0.0)] = Field(
        default=1.0, description="passes over the pairs, unless max_steps is set"
    )
    batch_size: Positive = Field(default=32, description="pairs per optimizer step, over all devices")
    packed: Literal["auto"] | bool = Field(
        default="auto",
        description="train on packed rows, without padding and with each prompt once; auto: where the model can, else "
        "on padded rows, with a note",
    )
    packed_tokens: Literal["auto"] | Positive = Field(
        default="auto",
        description="tokens of a packed row, which is one forward pass; a pair that is longer has a row of its own; "
        "auto: 512 on a CPU, 4096 on a GPU",
    )
    per_device_train_batch_size: Positive = Field(
        default=4, description="pairs per forward pass of one device, on padded rows"
    )
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(default=0.0, description="AdamW's weight decay")
    max_grad_norm: Annotated[float, Field(gt=0.0)] = Field(
        default=1.0, description="gradients are clipped to this norm"
    )
    optim: str = Field(
        default="adamw_torch_fused", description="an optimizer of transformers; the default is also transformers' own"
    )
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(default=0.999, description="AdamW's β₂")
    lora: LoraConfig | None = Field(default=None, description="train adapters; none: train all weights")
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations in the backward pass instead of storing them"
    )
    max_length: Positive | None = Field(default=None, description="longer pairs are dropped and counted")
    mpo: MpoConfig = Field(default_factory=MpoConfig, json_schema_extra=ADDED)
    save_steps: Positive | None = Field(
        default=100, description="optimizer steps between checkpoints, from which a resume continues"
    )
    logging_steps: Positive = Field(default=10, description="optimizer steps between logged values")
    report_to: list[str] = Field(
        default_factory=list,
        description="trackers: tensorboard, trackio, and those that transformers knows besides (wandb, mlflow, …)",
    )
    save_dtype: Literal["auto", "stored", "float32"] = Field(
        default="auto",
        description="dtype of the trained policy's files; stored: as the start's; auto: as the start's, but float32, "
        "with a note, where rounding would take away more than half of the update",
    )
    step0_pairs: Positive = Field(default=64, description="pairs on which the loss at step 0 is checked")
    step0_tolerance: Literal["auto"] | Annotated[float, Field(gt=0.0)] = Field(
        default="auto",
        description="largest |loss − ln 2| at step 0; auto: 1e-3 in float32, in 16-bit dtypes as rounding is measured",
    )
    trainer_args: PassedOptions = passed_options(
        "any further option of TRL's DPOConfig, such as {adam_epsilon: 1.0e-6, lr_scheduler_kwargs: {…}}"
    )
    processes: Literal["auto"] | Positive = Field(
        default="auto",
        description="auto: one per GPU of devices.gpus, as many as batch_size can be split over; one on the CPU",
    )
    strategy: Literal["auto", "ddp", "fsdp2", "zero3"] = Field(
        default="auto", description="with several processes; auto: fsdp2 on GPUs, ddp on the CPU and with lora"
    )
    nodes: Positive = Field(
        default=1,
        description="machines that train together, each with as many processes: of the Ray cluster "
        "(devices.executor=ray), else of the Slurm allocation that the run was started in",
        json_schema_extra=ADDED,
    )
    accelerate_config: str | None = Field(
        default=None, description="a config file of accelerate (YAML), used unchanged instead of processes and strategy"
    )

    def row_tokens(self, *, cuda: bool) -> int:
        """Tokens of a packed row, with "auto" resolved by the kind of device.

        On a CPU, longer rows need more memory and are hardly faster (benches/real.py). A GPU needs them to be busy.
        """
        if self.packed_tokens != "auto":
            return self.packed_tokens
        return 4096 if cuda else 512

    def of_reinforcement(self, steps: int | None = None) -> TrainConfig:
        """The settings of the second stage of method=mpo: batches are of responses, and so many steps are made."""
        mpo = self.mpo
        return self.model_copy(
            update={
                "batch_size": mpo.batch_size,
                "per_device_train_batch_size": mpo.per_device_train_batch_size,
                "max_steps": steps,
                "learning_rate": self.learning_rate if mpo.learning_rate is None else mpo.learning_rate,
                "trainer_args": mpo.trainer_args,
            }
        )

    def key_fields(self) -> dict[str, Any]:
        """The settings that decide the trained weights: all but how work is spread over processes, and who is told.

        Those of `mpo` decide the weights of its second stage, and none of the first.
        """
        kept = self.key_dump(exclude=("processes", "strategy", "nodes", "accelerate_config", "report_to", "mpo"))
        return kept | {"report_to": []}  # as keys had it before, for a training without trackers

    @field_validator("trainer_args")
    @classmethod
    def _refuse_own(cls, value: PassedOptions) -> PassedOptions:
        return refuse_own(value, {name: f"it is train.{name}" for name in cls.model_fields} | _OWN_ARGUMENTS)

    @model_validator(mode="after")
    def _check_processes(self) -> TrainConfig:
        if self.accelerate_config is not None and (self.processes != "auto" or self.strategy != "auto"):
            raise ValueError("accelerate_config sets the processes and the strategy: leave out processes and strategy")
        if self.accelerate_config is not None and self.nodes > 1:
            raise ValueError("accelerate_config is for one machine: leave it out, or nodes")
        if self.lora is not None and self.strategy in ("fsdp2", "zero3"):
            raise ValueError(
                f"strategy is {self.strategy}, but with lora only adapters are trained, which need no sharding: set "
                "strategy=ddp"
            )
        count = 1 if self.processes == "auto" else self.processes
        if count > 1 and self.batch_size % (self.per_device_train_batch_size * count):
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of per_device_train_batch_size × processes "
                f"({self.per_device_train_batch_size} × {self.processes})"
            )
        return self

    @model_validator(mode="after")
    def _check_batch_size(self) -> TrainConfig:
        if self.batch_size % self.per_device_train_batch_size:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of per_device_train_batch_size "
                f"({self.per_device_train_batch_size}), which it reaches by gradient accumulation"
            )
        return self


_BY_PROJECT = "a training here has it set already, for what the other stages made"
_OWN_ARGUMENTS = {
    "loss_type": "it is train.loss",
    "loss_weights": "they are in train.loss",
    "beta": "it is beta, β of the reward and of the loss",
    "bf16": "it is model.dtype",
    "fp16": "it is model.dtype",
    "use_cpu": "it is model.device",
    "seed": "all random numbers follow from the run's seed",
    "data_seed": "all random numbers follow from the run's seed",
    "gradient_accumulation_steps": "it follows from train.batch_size",
    "trust_remote_code": "it is model.trust_remote_code",
    "label_smoothing_factor": "DPO does not read it; there is train.label_smoothing",
    "warmup_ratio": "train.warmup_steps below 1 is a share of the steps",
    "deepspeed": "it is train.strategy=zero3, or a file in train.accelerate_config",
    "fsdp": "it is train.strategy=fsdp2, or a file in train.accelerate_config",
    "fsdp_config": "it is train.strategy=fsdp2, or a file in train.accelerate_config",
    "accelerator_config": "it is train.accelerate_config",
    **dict.fromkeys(
        (
            "output_dir", "precompute_ref_log_probs", "precompute_ref_batch_size", "truncation_mode", "padding_free",
            "pad_to_multiple_of", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "pad_token",
            "model_init_kwargs", "disable_dropout", "dataset_num_proc", "gradient_checkpointing_kwargs",
            "save_strategy", "save_total_limit", "save_only_model", "load_best_model_at_end", "logging_nan_inf_filter",
            "disable_tqdm", "ddp_find_unused_parameters", "remove_unused_columns", "do_train", "do_eval",
            "eval_strategy", "eval_steps", "per_device_eval_batch_size", "resume_from_checkpoint", "push_to_hub",
            "auto_find_batch_size", "router_aux_loss_coef", "neftune_noise_alpha", "local_rank", "use_liger_kernel",
            "torch_compile",
        ),
        _BY_PROJECT,
    ),
}  # fmt: skip
"""Options of DPOConfig that are set here."""
