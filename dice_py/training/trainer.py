"""What each process of a training does, and the only one where there is one: TRL's DPOTrainer on stored tokens.

The trainer is TRL's; what it need not do, it does not. The training set holds token ids and the reference
log-probabilities that the score stage already computed, so nothing is tokenised again, no reference model is held, and
no hash is made of the weights. What `PairTrainer` and `step0` rely on is pinned by tests/test_trl_contract.py;
pyproject.toml pins the range of TRL.

Logits never exist whole: TRL's fused head projects hidden states in tiles of 4,096 positions × 32,768 entries of the
vocabulary, in the forward and again in the backward pass, and on a GPU the response's positions alone. That needs no
option. What grows with the batch is the layers' activations: train.gradient_checkpointing, or a smaller
train.per_device_train_batch_size.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import polars as pl

from dice_py.config.shared import ModelConfig
from dice_py.config.training import LoraConfig, TrainConfig
from dice_py.errors import DataError, UsageError
from dice_py.events import Report, no_report
from dice_py.models.loading import load_model, placement, require
from dice_py.models.tokenization import load_tokenizer
from dice_py.storage.files import atomic, read_json, write_json
from dice_py.training.checkpoints import STAMP, checkpoint_stamp
from dice_py.training.dataset import COLUMNS, load_training_set
from dice_py.training.parallelism import ProcessLayout

if TYPE_CHECKING:
    from trl import DPOTrainer


_SHARDED = ("FSDP", "DEEPSPEED")  # accelerate's names of what no process holds the whole model in
_FLOAT32_APART = 0.1  # nats; two float32 sums over thousands of tokens stay well below, one token's error does not


def trainer_class() -> type[DPOTrainer]:
    import torch
    from trl import DPOTrainer

    class PairTrainer(DPOTrainer):  # type: ignore[misc]
        """DPOTrainer on token ids with given reference log-probabilities."""

        def __init__(self, **arguments: Any) -> None:
            self._fsdp = False
            # The hash of all weights names the cache of TRL's pass over the reference, which there is none of.
            with mock.patch("trl.trainer.dpo_trainer.hash_module", return_value=None):
                super().__init__(**arguments)
            self.is_fsdp_enabled = self._fsdp
            plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
            if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
                # Sums of log-probabilities stay in float32, and so do sums of gradients over the ranks.
                plugin.mixed_precision_policy = dataclasses.replace(
                    plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
                )

        def _validate_args(self) -> None:
            super()._validate_args()
            # Under FSDP, TRL loads a reference model for its pass over the reference. Trainer has placed the policy by
            # now, so that until the trainer is built nothing else asks.
            self._fsdp, self.is_fsdp_enabled = self.is_fsdp_enabled, False

        def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
            del processing_class, args, dataset_name
            return dataset  # tokens are stored, never re-made

        def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
            del name, batch_size
            return dataset  # the score stage has been here

    return PairTrainer


def step0(trainer: DPOTrainer, pairs: int) -> tuple[float, float]:
    """(mean DPO loss, largest |log π − reference| per response) before the first step, the same on every rank.

    Through the trainer's own collator, device, autocast, wrapped model and head, on the first `pairs` rows. They are
    dealt over the ranks, and every rank makes as many forwards: with sharded weights each one is collective.
    """
    import torch

    accelerator, size = trainer.accelerator, trainer.args.per_device_train_batch_size
    count = min(pairs, len(trainer.train_dataset))
    mine = range(accelerator.process_index, count, accelerator.num_processes)
    forwards = math.ceil(math.ceil(count / accelerator.num_processes) / size)
    losses: list[float] = []
    apart = 0.0
    for start in range(0, forwards * size, size):
        # A rank that has no rows left makes its forward on the first one, which then does not count.
        rows = mine[start : start + size]
        batch = trainer.data_collator([trainer.train_dataset[row] for row in rows or [0]])
        batch = {name: value.to(accelerator.device) for name, value in batch.items()}
        reference = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        with torch.no_grad(), trainer.compute_loss_context_manager():
            logps = trainer.model_wrapped(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                labels=labels,
                use_cache=False,
                fused_lm_head=True,
            ).log_probs.sum(dim=1)
        if rows:
            ratio_chosen, ratio_rejected = (logps - reference).float().chunk(2)
            losses += torch.nn.functional.softplus(-trainer.beta * (ratio_chosen - ratio_rejected)).tolist()
            apart = max(apart, (logps - reference).abs().max().item())
    mine_seen = torch.tensor([[sum(losses), len(losses), apart]], dtype=torch.float64, device=accelerator.device)
    seen = accelerator.gather(mine_seen)
    total, number, _ = seen.sum(dim=0).tolist()
    return total / number, seen[:, 2].max().item()


def _callback(trainer: DPOTrainer, config: TrainConfig, stamp: dict[str, Any], report: Report) -> Any:
    from transformers import TrainerCallback

    class Loop(TrainerCallback):  # type: ignore[misc]
        """Checks step 0, tells the progress, and marks checkpoints that are whole."""

        step0: dict[str, float] | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step:
                return
            loss, apart = step0(trainer, config.step0_pairs)
            self.step0 = {"loss": loss, "max_abs_difference": apart}
            if state.is_world_process_zero:
                write_json(Path(args.output_dir) / "step0.json", self.step0)
            if not abs(loss - math.log(2)) <= config.step0_tolerance:
                raise DataError(
                    f"the DPO loss at step 0 is {loss:.5f}, not ln 2 = {math.log(2):.5f} (allowed ±"
                    f"{config.step0_tolerance:g}; a response's log-probability differs by up to {apart:.4g}). The "
                    "trainer and the scorer do not see the same thing: tokens, masks, model or type differ. Score "
                    "the training set with this policy (dice score), or, if only rounding in a short type is "
                    "behind it, raise train.step0_pairs or train.step0_tolerance"
                )
            # An offset that chosen and rejected share leaves the loss at ln 2. In float32 nothing explains it away.
            if not (args.bf16 or args.fp16) and not apart <= _FLOAT32_APART:
                raise DataError(
                    f"at step 0 a response's log-probability differs by {apart:.4g} from the reference stored in the "
                    f"training set (allowed in float32: {_FLOAT32_APART:g}), though the loss is ln 2. The trainer and "
                    "the scorer do not see the same thing: tokens, masks or model differ. Score the training set "
                    "with this policy (dice score)"
                )

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            report("progress", stage="train", done=state.global_step, total=state.max_steps, unit="steps")

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            trainer.accelerator.wait_for_everyone()  # every rank's shard is there
            if state.is_world_process_zero:
                write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / STAMP, stamp)

    return Loop()


def _stored_dtype(policy: Path, models: ModelConfig) -> Any:
    """The torch dtype that a model folder's config names; an adapter's has none, and keeps what it is held in."""
    import torch

    file = policy / "config.json"
    config = read_json(file) if file.is_file() else {}
    name = config.get("dtype") or config.get("torch_dtype")
    return getattr(torch, name if isinstance(name, str) else placement(models).dtype)


def peft_config(lora: LoraConfig | None) -> Any:
    if lora is None:
        return None
    require("peft", extra="train")
    from peft import LoraConfig as PeftLora

    return PeftLora(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )


def trainer_arguments(config: TrainConfig, models: ModelConfig, folder: Path, beta: float, seed: int) -> Any:
    from trl import DPOConfig

    where = placement(models)
    if where.device not in ("cpu", "cuda", "cuda:0"):
        raise UsageError(
            f"model.device is {where.device!r}, but training takes the first visible GPU; set model.device=auto and "
            "choose the GPU with CUDA_VISIBLE_DEVICES"
        )
    losses = {"loss_type": ["sigmoid"], "loss_weights": [1.0]}
    if config.sft_weight > 0:
        losses = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, config.sft_weight]}
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    accumulate, rest = divmod(config.batch_size, config.per_device_train_batch_size * processes)
    if rest:
        raise UsageError(
            f"train.batch_size ({config.batch_size}) must be a multiple of train.per_device_train_batch_size × "
            f"processes ({config.per_device_train_batch_size} × {processes})"
        )
    arguments = DPOConfig(
        output_dir=str(folder),
        **losses,
        beta=beta,
        precompute_ref_log_probs=True,
        max_length=None,  # load_training_set has left out what is too long; nothing is ever truncated
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=accumulate,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps,
        max_steps=config.max_steps or -1,
        num_train_epochs=config.num_train_epochs,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optim,
        adam_beta2=config.adam_beta2,
        bf16=where.dtype == "bfloat16",
        fp16=where.dtype == "float16",
        use_cpu=where.device == "cpu",
        # FSDP has its own, around what it shards (train_layout), and refuses both.
        gradient_checkpointing=config.gradient_checkpointing
        and os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() != "true",
        gradient_checkpointing_kwargs={"use_reentrant": False},
        seed=seed % 2**32,
        data_seed=seed % 2**32,
        save_strategy="no" if config.save_steps is None else "steps",
        save_steps=config.save_steps or 500,
        save_total_limit=2,
        logging_steps=config.logging_steps,
        report_to=config.report_to or "none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,  # every weight takes part; looking for others costs time at each step
        dataloader_pin_memory=where.device != "cpu",
    )
    if processes == 1 and arguments.n_gpu > 1:
        # One process on a machine of several GPUs trains on the first: the Trainer would wrap the model in
        # nn.DataParallel, which TRL refuses. `n_gpu` was read above, so the value below stays.
        arguments._n_gpu = 1
    return arguments


def _check_strategy(trainer: DPOTrainer, strategy: str, config: TrainConfig) -> None:
    """accelerate falls back to another strategy without a word where it cannot do what it was told.

    Raises:
        UsageError: adapters, in shards that the user's own accelerate file asks for.
    """
    accelerator = trainer.accelerator
    kind = accelerator.distributed_type.value
    wanted = {"none": ["NO"], "ddp": ["MULTI_GPU", "MULTI_CPU"], "fsdp2": ["FSDP"], "zero3": ["DEEPSPEED"]}
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != world or kind not in wanted.get(strategy, [kind]):
        raise RuntimeError(
            f"accelerate trains with {kind} in {accelerator.num_processes} process(es), not with {strategy} in {world}"
        )
    if config.lora is not None and kind in _SHARDED:
        raise UsageError(
            f"train.accelerate_config asks for {kind}, but adapters are small and their base is frozen: with "
            "train.lora, take a file for MULTI_GPU"
        )


def _save(
    trainer: DPOTrainer, config: TrainConfig, policy: Path, dtype: Any, target: Path, stamp: dict[str, Any]
) -> None:
    """Saves the whole model in `dtype`, from the main process; every rank takes part.

    Raises:
        DataError: on every rank alike, when a weight is not finite.
    """
    import torch

    accelerator = trainer.accelerator
    trained = accelerator.unwrap_model(trainer.model)
    weights: dict[str, Any] | None = None
    if accelerator.distributed_type.value in _SHARDED:
        # Collective; the main process alone gets the weights, in its own memory.
        weights = accelerator.get_state_dict(trainer.model_wrapped) or {}
        for tied in trained.all_tied_weights_keys:  # gathered apart, they no longer share their memory
            weights.pop(tied, None)
        for name, value in weights.items():
            weights[name] = value.to(dtype=dtype) if value.is_floating_point() else value
        values = list(weights.values())
    else:
        if config.lora is not None:
            trained = trained.merge_and_unload()
        trained = trained.to(dtype=dtype)
        values = list(trained.parameters())
    finite = torch.tensor([all(bool(value.isfinite().all()) for value in values)], device=accelerator.device)
    if not bool(accelerator.gather(finite).all()):
        raise DataError(
            "training ended with weights that are not finite; lower train.learning_rate, or set train.max_grad_norm"
        )
    if not accelerator.is_main_process:
        return
    with atomic(target) as temporary:
        trained.save_pretrained(temporary, state_dict=weights)
        if weights is not None:  # the config has the type of the master weights
            trained.config.dtype = dtype
            trained.config.save_pretrained(temporary)
        trainer.processing_class.save_pretrained(temporary)
        if (policy / "generation_config.json").is_file():
            shutil.copy(policy / "generation_config.json", temporary)
        write_json(temporary / "train_log.json", trainer.state.log_history)
        write_json(temporary / STAMP, stamp)


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
    report: Report = no_report,
) -> dict[str, Any]:
    """What each process of a training does, and the only one where there is one: trains and saves `out/model`.

    Args: as of `train`, and
        layout: as accelerate was told; the environment has this rank's number.
        checkpoint: to go on from.

    Raises:
        DataError: on every rank alike, a loss at step 0 that is not ln 2, or weights that are not finite.
    """
    import torch
    from datasets import Dataset

    pairs, too_long = load_training_set(training_set, config.max_length)
    if layout.processes > 1 and layout.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    checkpoints = out / "checkpoints"
    # First of all: it joins the ranks, which tells transformers to load a model in one rank, or in shards.
    arguments = trainer_arguments(config, models, checkpoints, beta, seed)
    # What is trained is held in float32, and read as such; adapters alone are trained on a base as it computes.
    held = models if config.lora is not None else models.model_copy(update={"dtype": "float32"})
    model = load_model(policy, held, training=True)
    # Trainer writes it into the config that is saved; TRL's forwards and step 0's say themselves that they keep none.
    arguments.use_cache = getattr(model.config, "use_cache", True)
    trainer = trainer_class()(
        model=model,
        args=arguments,
        train_dataset=Dataset(pairs.select(COLUMNS).to_arrow(compat_level=pl.CompatLevel.oldest())),
        processing_class=load_tokenizer(policy, models),
        peft_config=peft_config(config.lora),
    )
    _check_strategy(trainer, layout.strategy, config)
    loop = _callback(trainer, config, checkpoint_stamp(key, layout), report)
    trainer.add_callback(loop)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    step_logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    # A run that goes on from a checkpoint finds what was seen at step 0 beside the checkpoints.
    noted = checkpoints / "step0.json"
    if loop.step0 is None and noted.exists():
        loop.step0 = read_json(noted)
    counts = {
        "pairs": pairs.height,
        "pairs_too_long": too_long,
        "steps": trainer.state.global_step,
        "step0_loss": loop.step0["loss"] if loop.step0 else None,
        "step0_max_abs_difference": loop.step0["max_abs_difference"] if loop.step0 else None,
        "final_loss": step_logs[-1]["loss"] if step_logs else None,
    }
    dtype = _stored_dtype(policy, models)
    _save(trainer, config, policy, dtype, out / "model", {"key": key, "counts": counts})
    trainer.accelerator.wait_for_everyone()
    if layout.processes > 1:
        torch.distributed.destroy_process_group()
    return counts
