"""Reinforcement learning in one process, alone or as a rank."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl

from dice_py.config.shared import ModelConfig
from dice_py.config.stages import GenerateConfig
from dice_py.config.training import TrainConfig
from dice_py.errors import DataError, UsageError
from dice_py.events import Report, no_report
from dice_py.models.loading import load_model, placement
from dice_py.models.tokenization import load_tokenizer, stop_token_ids
from dice_py.reinforcement.prompts import hard_prompts
from dice_py.reinforcement.rewards import CUT_OFF, RewardSource
from dice_py.storage.files import read_sealed, write_sealed
from dice_py.training.callback import StageFiles, check_complete, stage_callback
from dice_py.training.checkpoints import STEP0_FILE, checkpoint_stamp, save_model
from dice_py.training.lora import hold_in_float32, peft_config
from dice_py.training.parallelism import ProcessLayout
from dice_py.training.step0 import rounding_limit
from dice_py.training.trainer import check_strategy, common_arguments, final_mean, on_one_gpu, world_size

if TYPE_CHECKING:
    from dice_py.reinforcement.trainer import FirstRatio, OnPolicy

STAGE = "reinforce"
"""Its name in events."""

_MEANS = {
    "reward": "reward",
    "kl": "kl",
    "tokens": "completions/mean_length",
    "cut_off": CUT_OFF,
    "entropy": "entropy",
}
"""Measures of the begin and the end of a training, by their names in the trainer's log."""


class Measures(NamedTuple):
    """What is kept of the first step, for a training that resumes."""

    max_abs_difference: float | None
    rms_difference: float | None


@dataclass(frozen=True)
class ReinforceSettings:
    """The settings of a training, picklable.

    Attributes:
        config: of the training; its batch and steps are those of `TrainConfig.of_reinforcement`.
        models: of the policy.
        generate: as `on_policy` makes it.
        uses_vllm: responses are sampled by vLLM, in the trainer's process.
        rewards: what is maximized.
        policy: the model folder to start from, and the reference of the KL divergence.
        training_set: whose hard prompts are trained on.
        out: the stage's folder.
        seed: of the training.
        key: of the training, for the stamps of its checkpoints and its model.
    """

    config: TrainConfig
    models: ModelConfig
    generate: GenerateConfig
    uses_vllm: bool
    rewards: RewardSource
    policy: Path
    training_set: Path
    out: Path
    seed: int
    key: str

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        assert self.config.max_steps is not None
        return self.config.max_steps


def trainer_arguments(settings: ReinforceSettings) -> Any:
    """TRL's GRPOConfig or RLOOConfig for this process.

    Raises:
        UsageError: a device other than the first visible GPU, or a batch that the processes cannot divide.
    """
    from trl import GRPOConfig, RLOOConfig

    config, generate, mpo = settings.config, settings.generate, settings.config.mpo
    if (mpo.batch_size // world_size()) % mpo.num_generations:
        raise UsageError(
            f"train.mpo.batch_size ({mpo.batch_size}) must be a multiple of num_generations × processes "
            f"({mpo.num_generations} × {world_size()}), so that a process has all responses to a prompt"
        )
    kind = GRPOConfig if mpo.trainer == "grpo" else RLOOConfig
    vllm: dict[str, Any] = {}
    if settings.uses_vllm:
        vllm = {"use_vllm": True, "vllm_mode": "colocate", "generation_kwargs": dict(generate.sampling_params) or None}
    pinned = {"dataloader_pin_memory": placement(settings.models).device != "cpu"}
    arguments = kind(
        **common_arguments(config, settings.models, settings.out / "checkpoints", settings.seed, steps=settings.steps),
        max_steps=settings.steps,
        beta=mpo.kl_beta,
        num_generations=mpo.num_generations,
        temperature=generate.temperature,
        max_completion_length=generate.max_new_tokens,
        num_iterations=1,
        shuffle_dataset=False,
        disable_dropout=True,
        remove_unused_columns=False,
        **pinned | vllm | config.trainer_args,
    )
    return on_one_gpu(arguments)


def prompt_order(prompts: int, wanted: int, seed: int) -> list[int]:
    """The numbers of the prompts of all steps, one after another: passes over all of them, each in an order of its own.

    One epoch of the trainer's is all steps, since TRL's sampler would begin a resumed training with the first order.
    """
    draw, order = random.Random(seed), list[int]()
    while len(order) < wanted:
        order += draw.sample(range(prompts), prompts)
    return order[:wanted]


def _dataset(prompts: pl.DataFrame, order: list[int]) -> Any:
    """The trainer's rows: token ids, and the number of the prompt."""
    from datasets import Dataset

    rows = prompts.select(prompt="prompt_ids").with_row_index("number")
    return Dataset(rows[order].to_arrow(compat_level=pl.CompatLevel.oldest()))


def build_trainer(settings: ReinforceSettings, report: Report = no_report) -> OnPolicy:
    """Loads the policy, the sampler and the rewards into a trainer for the hard prompts.

    Raises:
        UsageError: as of `trainer_arguments`.
        DataError: a first response's log-probabilities differ between trainer and sampler by more than rounding.
    """
    from transformers import PrinterCallback

    from dice_py.reinforcement.sampler import PolicySampler
    from dice_py.reinforcement.trainer import TRAINERS, Rollouts

    config, models, policy = settings.config, settings.models, settings.policy
    # Before the model is loaded, since this joins the ranks.
    arguments = trainer_arguments(settings)
    held = models if config.lora is not None else models.model_copy(update={"dtype": "float32"})
    model = load_model(policy, held, training=True)
    arguments.use_cache = getattr(model.config, "use_cache", True)
    if not getattr(model.config.get_text_config(), "output_router_logits", False) and hasattr(
        arguments, "router_aux_loss_coef"
    ):
        arguments.router_aux_loss_coef = 0.0
    tokenizer = load_tokenizer(policy, models)
    prompts, _ = hard_prompts(settings.training_set)
    longest = prompts["prompt_ids"].list.len().max()
    assert isinstance(longest, int)
    trainer: OnPolicy = TRAINERS[config.mpo.trainer](
        rollouts=Rollouts(
            prompts=prompts,
            rewards=settings.rewards.load(report),
            sampler=None if settings.uses_vllm else PolicySampler(policy, settings.generate, models, longest),
            stops=frozenset(
                [*stop_token_ids(policy, tokenizer), *settings.generate.sampling_params.get("stop_token_ids", [])]
            ),
            max_new_tokens=settings.generate.max_new_tokens,
            thinking=settings.generate.thinking,
            seed=settings.seed,
        ),
        on_first=lambda ratio: _check_first(ratio, settings, trainer),
        report=report,
        model=model,
        args=arguments,
        train_dataset=_dataset(
            prompts, prompt_order(prompts.height, config.mpo.prompts_per_step * settings.steps, settings.seed)
        ),
        processing_class=tokenizer,
        peft_config=None if config.lora is None else peft_config(config.lora, model),
    )
    trainer.remove_callback(PrinterCallback)  # the log is a file
    if config.lora is not None:
        hold_in_float32(trainer.model)
    return trainer


def _response_tokens(trainer: OnPolicy, settings: ReinforceSettings) -> int:
    """Tokens of all responses: TRL counts them with a prompt for each."""
    mpo, prompts = settings.config.mpo, trainer.rollouts.prompts["prompt_ids"].list.len()
    order = prompt_order(len(prompts), mpo.prompts_per_step * settings.steps, settings.seed)
    return int(trainer.state.num_input_tokens_seen) - mpo.num_generations * int(prompts.gather(order).sum())


def _check_first(ratio: FirstRatio, settings: ReinforceSettings, trainer: OnPolicy) -> None:
    limit = rounding_limit(ratio.spread, ratio.responses)
    if trainer.state.is_world_process_zero:
        kept = Measures(ratio.max_abs_difference, ratio.rms_difference)._asdict()
        write_sealed(settings.out / "checkpoints" / STEP0_FILE, kept, settings.key)
    if not ratio.rms_difference <= limit:
        raise DataError(
            f"before the first step the log-probabilities of the responses differ by {ratio.rms_difference:.4g} nats "
            f"(root mean square) between the trainer and the sampler, more than rounding explains (allowed: {limit:.4g}"
            "). They would not be the policy's own: set model.dtype=float32"
        )


def reinforce_rank(
    settings: ReinforceSettings, *, layout: ProcessLayout, checkpoint: Path | None, report: Report = no_report
) -> dict[str, Any]:
    """Trains in this process, alone or as one of several ranks, and saves `out/model`; its log is `out/log.jsonl`.

    Args:
        layout: the processes of the training. This process's rank is in the environment.
        checkpoint: to resume from.

    Returns:
        Counts: `hard_prompts`, `steps`, `response_tokens` (that were sampled and trained on),
        `step0_max_abs_difference` (nats of a response's log π between trainer and sampler; None with vLLM); and
        `first_` and `final_` `reward`, `kl` (nats a token, from the policy of stage 1), `tokens` (of a response),
        `cut_off` (share of the responses) and `entropy` (nats a token): means of the first and of the last
        train.logging_steps steps.

    Raises:
        DataError: on every rank, for a first ratio that is not 1, or weights that are not finite.
        UsageError: a batch, a device or a strategy that cannot be used.
        StoppedTrainingError: on every rank, after the same step, if one was asked to stop.
    """
    import torch

    if layout.processes > 1 and layout.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if layout.strategy == "fsdp2":
        # Else rank 0 alone would read weights, and send on those of the trained model, but of no other.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    config, folder = settings.config, settings.out / "checkpoints"
    trainer = build_trainer(settings, report)
    check_strategy(trainer, layout.strategy, config)
    files = StageFiles(settings.out, checkpoint_stamp(settings.key, layout), STAGE)

    def at_start() -> None:
        if trainer.state.global_step == 0 and settings.uses_vllm and trainer.state.is_world_process_zero:
            write_sealed(folder / STEP0_FILE, Measures(None, None)._asdict(), settings.key)

    trainer.add_callback(stage_callback(trainer, files, report, at_start=at_start))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    check_complete(trainer)
    measured = read_sealed(folder / STEP0_FILE, settings.key) or {}
    log, steps = trainer.state.log_history, config.logging_steps
    counts = {
        "hard_prompts": trainer.rollouts.prompts.height,
        "steps": trainer.state.global_step,
        "response_tokens": _response_tokens(trainer, settings),
        "step0_max_abs_difference": measured.get("max_abs_difference"),
        **{
            f"first_{name}": next((each[logged] for each in log if logged in each), None)
            for name, logged in _MEANS.items()
        },
        **{f"final_{name}": final_mean(log, logged, steps) for name, logged in _MEANS.items()},
    }
    save_model(
        trainer,
        config=config,
        models=settings.models,
        policy=settings.policy,
        target=settings.out / "model",
        stamp={"key": settings.key, "counts": counts},
    )
    trainer.accelerator.wait_for_everyone()
    if layout.processes > 1:
        torch.distributed.destroy_process_group()
    return counts
