"""Config section `train.mpo`: the second stage of train.method=mpo, reinforcement learning on the hard prompts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from dice_py.config.passthrough import PassedOptions, passed_options, refuse_own
from dice_py.config.shared import Positive, Section

Reward = Literal["implicit", "oracle", "reward_model", "openai", "function"]
"""Where the rewards of stage 2 come from: the round's own implicit reward, or a judge that scores single responses."""


class MpoConfig(Section):
    """Stage 2 of MPO (Gou & Nguyen, arXiv 2403.19443), from the policy of stage 1, which is also its reference."""

    trainer: Literal["grpo", "rloo"] = Field(default="grpo", description="TRL's trainer: GRPOTrainer or RLOOTrainer")
    steps: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        default="auto",
        description="optimizer steps, each on batch_size new responses; auto: as many responses as the hard pairs "
        "have, times num_train_epochs, so that both stages train on as many tokens as DPO on all; 0: stage 1 alone",
    )
    kl_beta: Annotated[float, Field(ge=0.0)] = Field(
        default=0.05, description="weight of the KL divergence from the policy of stage 1 (TRL's beta)"
    )
    num_generations: Annotated[int, Field(ge=2)] = Field(
        default=8, description="responses to each prompt of a step, which are compared with each other"
    )
    batch_size: Positive = Field(default=64, description="responses per optimizer step, over all devices")
    per_device_train_batch_size: Positive = Field(default=8, description="responses per forward pass of one device")
    learning_rate: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None, description="peak learning rate; none: train.learning_rate"
    )
    reward: Reward = Field(
        default="implicit",
        description="what is maximized: the round's implicit reward, corrected for length as mining corrects it; or "
        "the scores of a judge, oracle (on the synthetic world), or reward_model, openai or function, of the section "
        "evaluate.judges",
    )
    trainer_args: PassedOptions = passed_options("any further option of TRL's GRPOConfig or RLOOConfig")

    def steps_for(self, hard_pairs: int, epochs: float) -> int:
        """The optimizer steps, with `auto` resolved.

        Args:
            hard_pairs: mined pairs of the hard prompts.
            epochs: train.num_train_epochs.
        """
        if self.steps != "auto":
            return self.steps
        return max(1, round(2 * hard_pairs * epochs / self.batch_size)) if hard_pairs else 0

    @property
    def prompts_per_step(self) -> int:
        """Prompts whose responses make one step."""
        return self.batch_size // self.num_generations

    @field_validator("trainer_args")
    @classmethod
    def _refuse_own(cls, value: PassedOptions) -> PassedOptions:
        return refuse_own(value, {name: f"it is train.mpo.{name}" for name in cls.model_fields} | _OWN_ARGUMENTS)

    @model_validator(mode="after")
    def _check_batch(self) -> MpoConfig:
        for name in ("num_generations", "per_device_train_batch_size"):
            if self.batch_size % getattr(self, name):
                raise ValueError(f"batch_size ({self.batch_size}) must be a multiple of {name} ({getattr(self, name)})")
        return self


_BY_TRAIN = "stage 2 takes it from the section train"
_BY_GENERATE = "stage 2 takes it from the section generate"
_BY_PROJECT = "it is set here already"
_OWN_ARGUMENTS = {
    "beta": "it is train.mpo.kl_beta",
    "max_steps": "it is train.mpo.steps",
    "num_train_epochs": "it is train.mpo.steps",
    "seed": "all random numbers follow from the run's seed",
    "data_seed": "all random numbers follow from the run's seed",
    "use_vllm": "generate.engine decides it",
    "vllm_mode": "vLLM runs in the trainer's process (colocate)",
    **dict.fromkeys(("temperature", "max_completion_length"), _BY_GENERATE),
    **dict.fromkeys(
        (
            "lr_scheduler_type", "warmup_steps", "warmup_ratio", "weight_decay", "max_grad_norm", "optim", "adam_beta2",
            "bf16", "fp16", "gradient_checkpointing", "save_steps", "logging_steps", "report_to",
        ),
        _BY_TRAIN,
    ),
    **dict.fromkeys(
        (
            "output_dir", "use_cpu", "gradient_accumulation_steps", "steps_per_generation", "generation_batch_size",
            "num_iterations", "shuffle_dataset", "top_p", "top_k", "min_p", "repetition_penalty", "model_init_kwargs",
            "disable_dropout",
            "gradient_checkpointing_kwargs", "save_strategy", "save_total_limit", "save_only_model",
            "load_best_model_at_end", "disable_tqdm", "remove_unused_columns", "do_train", "do_eval", "eval_strategy",
            "resume_from_checkpoint", "push_to_hub", "auto_find_batch_size", "use_transformers_continuous_batching",
            "sync_ref_model", "deepspeed", "fsdp", "fsdp_config", "accelerator_config", "local_rank", "log_completions",
        ),
        _BY_PROJECT,
    ),
}  # fmt: skip
"""Options of GRPOConfig and RLOOConfig that are set here."""
