"""Config section `train`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dice_py.config.shared import Positive, Probability, Section


class LoraConfig(Section):
    """LoRA adapters, merged into the policy after the round so that every round ends in a whole model."""

    r: Positive = 16
    alpha: Positive = 32
    dropout: Probability = 0.0
    target_modules: list[str] | Literal["all-linear"] = "all-linear"


class TrainConfig(Section):
    """One DPO run from the policy, with the policy itself as the reference."""

    learning_rate: Annotated[float, Field(gt=0.0)] = 5e-7
    lr_scheduler_type: str = Field(default="constant_with_warmup", description="a name that transformers knows")
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    max_steps: Positive | None = Field(
        default=None, description="optimizer steps; none: `num_train_epochs` over the pairs"
    )
    num_train_epochs: Annotated[float, Field(gt=0.0)] = 1.0
    batch_size: Positive = Field(default=32, description="pairs per optimizer step")
    per_device_train_batch_size: Positive = Field(default=4, description="pairs per forward and device")
    sft_weight: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0, description="weight of the NLL of the chosen, added to the loss (TRL's `sft`)"
    )
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    optim: str = "adamw_torch"
    adam_beta2: Probability = 0.999
    lora: LoraConfig | None = None
    gradient_checkpointing: bool = Field(
        default=False, description="activations of a layer are computed again in the backward pass, not kept"
    )
    max_length: Positive | None = Field(default=None, description="longer pairs are left out, and counted")
    save_steps: Positive | None = Field(default=100, description="checkpoints that a resume goes on from")
    logging_steps: Positive = 10
    report_to: list[str] = Field(default_factory=list, description="TRL's trackers: wandb, tensorboard, …")
    step0_pairs: Positive = Field(default=64, description="pairs on which the loss at step 0 is checked")
    step0_tolerance: Annotated[float, Field(gt=0.0)] = Field(
        default=1e-3, description="largest |loss − ln 2| at step 0"
    )
    processes: Literal["auto"] | Positive = Field(
        default="auto",
        description="auto: one per GPU of devices.gpus, as many as batch_size divides among; one on the CPU",
    )
    strategy: Literal["auto", "ddp", "fsdp2", "zero3"] = Field(
        default="auto", description="of several processes; auto: fsdp2 on GPUs, ddp on the CPU and with lora"
    )
    accelerate_config: str | None = Field(
        default=None, description="a YAML file of accelerate's, used as it is in place of processes and strategy"
    )

    def key_fields(self) -> dict[str, Any]:
        """What decides the trained weights: all but how the work is divided among processes."""
        return self.model_dump(exclude={"processes", "strategy", "accelerate_config"})

    @model_validator(mode="after")
    def _spread(self) -> TrainConfig:
        if self.accelerate_config is not None and (self.processes != "auto" or self.strategy != "auto"):
            raise ValueError("accelerate_config says how many processes, and how: leave out processes and strategy")
        if self.lora is not None and self.strategy in ("fsdp2", "zero3"):
            raise ValueError(
                f"strategy is {self.strategy}, but adapters are small and their base is frozen: with lora, take ddp"
            )
        several = 1 if self.processes == "auto" else self.processes
        if several > 1 and self.batch_size % (self.per_device_train_batch_size * several):
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of per_device_train_batch_size × processes "
                f"({self.per_device_train_batch_size} × {self.processes})"
            )
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> TrainConfig:
        if self.batch_size % self.per_device_train_batch_size:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of per_device_train_batch_size "
                f"({self.per_device_train_batch_size}), which it reaches by gradient accumulation"
            )
        return self
