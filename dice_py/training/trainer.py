"""Training in one process, alone or as a rank: TRL's DPOTrainer on stored tokens and reference log-probabilities.

The training set has token ids and the reference log-probabilities that the score stage computed. So nothing is
tokenized again, no reference model is loaded, and the weights are not hashed.

A step's pairs are packed into rows of `train.packed_tokens` tokens, each prompt once (training/pair_trainer.py). The
memory for the layers' activations grows with the tokens of a row. A model that fails the trial of packed rows
(training/packing_trial.py) is trained on padded rows of `train.per_device_train_batch_size` pairs.

This package relies on the following parts of TRL (tests/training/test_trl_contract.py has a test for each;
pyproject.toml has the range of versions):

    DPOTrainer._prepare_dataset, _precompute_ref_logps
                             can be overridden: they do all of the tokenization, and all of the reference pass
    trl.trainer.dpo_trainer.hash_module
                             is called only for the reference pass, so it may return None
    DPOTrainer.__init__      reads `is_fsdp_enabled` only to decide on a reference model, after `_validate_args`
    DPOConfig                `precompute_ref_log_probs` and lists of losses with weights; dropout is disabled
    DPOTrainer.data_collator chosen before rejected, padded on the right, stored tokens and log-probabilities unchanged
    add_fused_lm_head, model(fused_lm_head=True).log_probs
                             (2 × pairs, tokens − 1), zero outside the response; training/packed_forward.py adds to it
    DPOTrainer._compute_loss first the loss, from the log-probabilities; then metrics (training/loss.py)
    DPOTrainer.loss_types, loss_weights
                             the loss is the sum of the types' means over a batch, each times its weight

The loss is a sum of TRL's types. A training method (training/methods/) adds terms to each pair's, which
training/pair_loss.py puts into it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from dice_py.config.loss import loss_terms
from dice_py.config.shared import ModelConfig
from dice_py.config.training import TrainConfig
from dice_py.errors import UsageError
from dice_py.events import Report, no_report
from dice_py.models.loading import load_model, placement
from dice_py.models.tokenization import load_tokenizer
from dice_py.storage.files import read_json, read_sealed, write_sealed
from dice_py.training.callback import StageFiles, check_complete, stage_callback
from dice_py.training.checkpoints import PACKING_FILE, STEP0_FILE, checkpoint_stamp, save_model
from dice_py.training.lora import hold_in_float32, peft_config
from dice_py.training.pair_terms import TRAINER_COLUMNS, load_pairs
from dice_py.training.parallelism import SHARDED, ProcessLayout
from dice_py.training.schedule import training_steps, warmup_steps
from dice_py.training.step0 import Step0, check_step0, measure_step0
from dice_py.training.update_timer import update_timer

if TYPE_CHECKING:
    from dice_py.training.pair_trainer import PairTrainer

_FINAL = {"loss": "loss", "chosen_logps": "logps/chosen", "chosen_change": "logps/chosen_change"}
"""Measures of the end of a training, by their names in the trainer's log."""


def final_mean(log: list[dict[str, Any]], name: str, steps: int) -> float | None:
    """The mean of the last `steps` steps, or of a few more: an entry of Trainer's log is a mean of several.

    Args:
        name: in the log's entries, such as "loss".
    """
    entries = [entry for entry in log if name in entry]
    total, count = 0.0, 0
    for number in range(len(entries) - 1, -1, -1):
        covered = entries[number]["step"] - (entries[number - 1]["step"] if number else 0)
        total, count = total + covered * entries[number][name], count + covered
        if count >= steps:
            break
    return total / count if count else None


def _accumulation_steps(config: TrainConfig, processes: int) -> int:
    steps, rest = divmod(config.batch_size, config.per_device_train_batch_size * processes)
    if rest:
        raise UsageError(
            f"train.batch_size ({config.batch_size}) must be a multiple of train.per_device_train_batch_size × "
            f"processes ({config.per_device_train_batch_size} × {processes})"
        )
    return steps


def world_size() -> int:
    """Processes of this training."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def loss_arguments(config: TrainConfig, beta: float) -> dict[str, Any]:
    """The arguments of TRL's DPOConfig that set the loss. What a method adds is in its terms (training/methods/)."""
    terms = loss_terms(config)
    smoothing = config.label_smoothing if config.method != "spa" else None
    return {
        "beta": beta,
        "loss_type": [term.type for term in terms],
        "loss_weights": [term.weight for term in terms],
        "ld_alpha": config.ld_alpha,
        "f_divergence_type": config.f_divergence_type,
        "label_smoothing": smoothing or 0.0,
        "use_weighting": config.use_weighting,
    }


def trainer_arguments(
    config: TrainConfig, models: ModelConfig, folder: Path, beta: float, seed: int, *, pairs: int
) -> Any:
    """TRL's DPOConfig for this process of a training.

    Args:
        folder: of the checkpoints.
        pairs: that are trained on, in all processes.

    Raises:
        UsageError: a device other than the first visible GPU, or a batch that the processes cannot divide.
    """
    from trl import DPOConfig

    arguments = DPOConfig(
        **common_arguments(config, models, folder, seed, steps=training_steps(config, pairs, world_size())),
        **loss_arguments(config, beta),
        precompute_ref_log_probs=True,
        max_length=None,  # load_pairs leaves longer pairs out; nothing is truncated.
        max_steps=config.max_steps or -1,
        num_train_epochs=config.num_train_epochs,
        **{"dataloader_pin_memory": placement(models).device != "cpu"} | config.trainer_args,
    )
    return on_one_gpu(arguments)


def on_one_gpu(arguments: Any) -> Any:
    """Arguments with which a single process trains on the first of several GPUs.

    Trainer would wrap the model in nn.DataParallel, which TRL rejects.
    """
    if world_size() == 1 and arguments.n_gpu > 1:  # `n_gpu` is read first, so that the value below is kept
        arguments._n_gpu = 1
    return arguments


def common_arguments(
    config: TrainConfig, models: ModelConfig, folder: Path, seed: int, *, steps: int
) -> dict[str, Any]:
    """The arguments that all trainers of TRL's have, for this process of a training.

    Args:
        folder: of the checkpoints.
        steps: optimizer steps of the training.

    Raises:
        UsageError: as of `trainer_arguments`.
    """
    where = placement(models)
    if where.device not in ("cpu", "cuda", "cuda:0"):
        raise UsageError(
            f"model.device is {where.device!r}, but training uses the first visible GPU; set model.device=auto and "
            "choose the GPU with CUDA_VISIBLE_DEVICES"
        )
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": _accumulation_steps(config, world_size()),
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type,
        "warmup_steps": warmup_steps(config, steps),
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "optim": config.optim,
        "adam_beta2": config.adam_beta2,
        "bf16": where.dtype == "bfloat16",
        "fp16": where.dtype == "float16",
        "use_cpu": where.device == "cpu",
        # FSDP checkpoints the activations of what it shards (training/parallelism.py), and rejects a second setting.
        "gradient_checkpointing": config.gradient_checkpointing
        and os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() != "true",
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "seed": seed % 2**32,
        "data_seed": seed % 2**32,
        "save_strategy": "no" if config.save_steps is None else "steps",
        "save_steps": config.save_steps or 500,
        "save_total_limit": 2,
        "logging_steps": config.logging_steps,
        # It would read every step's loss on the host, to leave NaN out of the logged means. Here NaN is logged, and
        # weights that are not finite are not saved.
        "logging_nan_inf_filter": False,
        "report_to": config.report_to or "none",
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,  # Every weight is used, and a search takes time at each step.
    }


def build_trainer(
    config: TrainConfig,
    models: ModelConfig,
    *,
    policy: Path,
    pairs: pl.DataFrame,
    folder: Path,
    beta: float,
    seed: int,
    report: Report = no_report,
) -> PairTrainer:
    """Loads the policy into a trainer for `pairs`.

    Args:
        pairs: of `load_pairs`.
        folder: of the checkpoints.
        report: receives a note when rows are padded, or memory runs out.

    Raises:
        UsageError: as of `trainer_arguments`; or `train.packed` is true, and the model fails the trial of packed rows.
    """
    from datasets import Dataset

    from dice_py.training.packing_trial import why_padded
    from dice_py.training.pair_trainer import PairTrainer

    # Before the model is loaded, since this joins the ranks, and transformers then loads into one rank, or into shards.
    arguments = trainer_arguments(config, models, folder, beta, seed, pairs=pairs.height)
    # Trained weights are held in float32. With adapters, the frozen base stays in the dtype that it computes in.
    held = models if config.lora is not None else models.model_copy(update={"dtype": "float32"})
    model = load_model(policy, held, training=True)
    # Trainer writes this into the config that is saved. All forwards here pass use_cache=False themselves.
    arguments.use_cache = getattr(model.config, "use_cache", True)
    if not getattr(model.config.get_text_config(), "output_router_logits", False):
        # TRL adds the loss that balances experts to that of every mixture, with the outputs of its own forward.
        arguments.router_aux_loss_coef = 0.0
    tokens: int | None = None
    if config.packed is not False:
        reason = why_padded(model, pairs, arguments)
        if reason is None:
            tokens = config.row_tokens(cuda=placement(models).device != "cpu")
            # A batch of Trainer's is a step; the trainer splits it into rows.
            arguments.per_device_train_batch_size = config.batch_size // world_size()
            arguments.gradient_accumulation_steps = 1
        elif config.packed is True:
            raise UsageError(f"train.packed is true, but {reason}; set train.packed=auto")
        else:
            report("note", text=f"{reason}: trained on padded rows, each with its own prompt (slower)")
    trainer = PairTrainer(
        packed_tokens=tokens,
        report=report,
        model=model,
        args=arguments,
        train_dataset=Dataset(
            pairs.select(name for name in TRAINER_COLUMNS if name in pairs.columns).to_arrow(
                compat_level=pl.CompatLevel.oldest()
            )
        ),
        processing_class=load_tokenizer(policy, models),
        peft_config=None if config.lora is None else peft_config(config.lora, model),
    )
    if config.lora is not None:
        hold_in_float32(trainer.model)
    return trainer


def check_strategy(trainer: Any, strategy: str, config: TrainConfig) -> None:
    """Checks that accelerate uses the strategy of its config, since it silently falls back to another one.

    Raises:
        UsageError: adapters, with an accelerate file of the user's that shards the model.
        RuntimeError: accelerate uses another strategy or another number of processes.
    """
    accelerator = trainer.accelerator
    kind = accelerator.distributed_type.value
    expected = {"none": ["NO"], "ddp": ["MULTI_GPU", "MULTI_CPU"], "fsdp2": ["FSDP"], "zero3": ["DEEPSPEED"]}
    world = world_size()
    if accelerator.num_processes != world or kind not in expected.get(strategy, [kind]):
        raise RuntimeError(
            f"accelerate trains with {kind} in {accelerator.num_processes} process(es), not with {strategy} in {world}"
        )
    if config.lora is not None and kind in SHARDED:
        raise UsageError(
            f"the file of train.accelerate_config uses {kind}, but adapters are small and their base is frozen, so "
            "that sharding does not help; with train.lora, use a file for MULTI_GPU"
        )


def _checked_step0(trainer: PairTrainer, config: TrainConfig, file: Path, key: str) -> Step0:
    """Measures and checks step 0; what was measured is kept in `file`, for a training that resumes."""
    step0 = measure_step0(trainer, config.step0_pairs)
    if trainer.is_world_process_zero():
        write_sealed(file, step0._asdict(), key)
    check_step0(step0, config, float32=not (trainer.args.bf16 or trainer.args.fp16))
    return step0


def _counts(trainer: PairTrainer, pairs: pl.DataFrame, step0: Step0 | None, config: TrainConfig) -> dict[str, Any]:
    log, steps = trainer.state.log_history, config.logging_steps
    in_a_pass = sum(int(pairs[f"{side}_ids"].list.len().sum()) for side in ("chosen", "rejected"))
    return {
        "steps": trainer.state.global_step,
        "response_tokens": round(trainer.state.epoch * in_a_pass),
        "forwards": sum(len(step["pairs"]) for step in trainer.packing) or None,
        "step0_loss": step0.loss if step0 else None,
        "step0_max_abs_difference": step0.max_abs_difference if step0 else None,
        **{f"final_{name}": final_mean(log, logged, steps) for name, logged in _FINAL.items()},
    }


def train_rank(
    config: TrainConfig,
    models: ModelConfig,
    *,
    policy: Path,
    training_set: Path,
    out: Path,
    beta: float,
    seed: int,
    key: str,
    layout: ProcessLayout,
    checkpoint: Path | None,
    time_updates: bool = False,
    report: Report = no_report,
) -> dict[str, Any]:
    """Trains in this process, alone or as one of several ranks, and saves `out/model`; its log is `out/log.jsonl`.

    Args:
        policy: the model folder to start from.
        training_set: a Parquet file for `load_pairs`.
        out: the stage's folder, with `checkpoints` and, in the end, `model`.
        beta: of the DPO loss.
        key: of the training, for the stamps of its checkpoints and its model.
        layout: the processes of the training. This process's rank is in the environment.
        checkpoint: to resume from.
        time_updates: reports the seconds of each update (training/update_timer.py).

    Returns:
        Counts, the same on every rank but for `forwards`: `pairs`, `pairs_too_long`, `steps`, `response_tokens` (that
        were trained on, each as often as it was), `forwards` (packed rows; None if rows are padded), `step0_loss`,
        `step0_max_abs_difference`; and means over the last train.logging_steps steps: `final_loss`,
        `final_chosen_logps` (nats a response) and `final_chosen_change` (their difference from those of the policy at
        the start; None with another reference and train.ld_alpha).

    Raises:
        DataError: on every rank, for a loss at step 0 that is not ln 2, or weights that are not finite.
        UsageError: a batch, a device or a strategy that cannot be used.
        StoppedTrainingError: on every rank, after the same step, if one was asked to stop (compute/stopping.py).
    """
    import torch

    pairs, too_long = load_pairs(training_set, config, beta)
    if layout.processes > 1 and layout.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    folder = out / "checkpoints"
    trainer = build_trainer(
        config, models, policy=policy, pairs=pairs, folder=folder, beta=beta, seed=seed, report=report
    )
    check_strategy(trainer, layout.strategy, config)
    measured: list[Step0] = []

    def at_start() -> None:
        trainer.count_tokens_on(trainer.state.log_history)
        if trainer.state.global_step == 0:
            measured.append(_checked_step0(trainer, config, folder / STEP0_FILE, key))

    stage = StageFiles(out, checkpoint_stamp(key, layout), "train", packing=lambda: trainer.packing)
    trainer.add_callback(stage_callback(trainer, stage, report, at_start=at_start))
    if time_updates:
        trainer.add_callback(update_timer(trainer, report))
    if checkpoint is not None:
        trainer.packing = read_json(checkpoint / PACKING_FILE)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    check_complete(trainer)
    step0 = measured[0] if measured else None
    if step0 is None:  # A resumed training did not measure again.
        stored = read_sealed(folder / STEP0_FILE, key)
        step0 = None if stored is None else Step0(**stored)
    counts = {"pairs": pairs.height, "pairs_too_long": too_long, **_counts(trainer, pairs, step0, config)}
    save_model(
        trainer,
        config=config,
        models=models,
        policy=policy,
        target=out / "model",
        stamp={"key": key, "counts": counts},
    )
    trainer.accelerator.wait_for_everyone()
    if layout.processes > 1:
        torch.distributed.destroy_process_group()
    return counts
