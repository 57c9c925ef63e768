"""Stage 5, train: one DPO run from π_t with π_t itself as the reference, by TRL's DPOTrainer.

The trainer is TRL's; what it need not do, it does not. The training set holds token ids and the reference
log-probabilities that the score stage already computed, so nothing is tokenised again and no reference model
is held. The two hooks that `PairTrainer` overrides, and the two that `step0` calls, are pinned by
tests/test_trl_contract.py; pyproject.toml pins the range of TRL.

Loss: −log σ(β·[(log π(y_w|x) − ref_w) − (log π(y_l|x) − ref_l)]) (Rafailov et al., arXiv 2305.18290, eq. 7),
plus, if asked, sft_weight × the mean NLL of the chosen tokens. At step 0 the policy is the reference and the
DPO term is ln 2; a run in which it is not stops, since tokens, masks, templates or types then differ between
scorer and trainer.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from dice_py.artefacts import Report, atomic, no_report, read_json, read_parquet, write_json
from dice_py.config import LoraConfig, ModelConfig, TrainConfig
from dice_py.errors import DataError, UsageError
from dice_py.models import load_model, load_tokenizer, placement, require

if TYPE_CHECKING:
    from trl import DPOTrainer

STAMP = "dice.json"
_FLOAT32_APART = 0.1  # nats; two float32 sums over thousands of tokens stay well below, one token's error does not
_COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"]


def is_trained(folder: Path, key: str) -> bool:
    """True when `folder` holds the whole model that `train` makes for `key`."""
    stamp = folder / STAMP
    return stamp.is_file() and read_json(stamp).get("key") == key


def load_training_set(path: Path, max_length: int | None) -> tuple[pl.DataFrame, int]:
    """The columns that training needs, and how many pairs were left out as longer than `max_length` tokens.

    Raises:
        DataError: a column is missing or holds no token ids, no pair is left, or a reference log-probability is
            null or not finite.
    """
    frame = read_parquet(path, _COLUMNS)
    for column, dtype in frame.schema.items():
        if column.endswith("_ids") and not (isinstance(dtype, pl.List) and dtype.inner.is_integer()):
            raise DataError(
                f"{path}: column {column!r} is {dtype}, not a list of token ids; text is never tokenised here"
            )
    finite = pl.col("ref_chosen_logps").is_finite() & pl.col("ref_rejected_logps").is_finite()
    bad = frame.filter(~finite.fill_null(False))
    if bad.height:
        raise DataError(f"{path}: {bad.height} pairs have a reference log-probability that is not finite")
    kept = frame
    if max_length is not None:
        longer = pl.max_horizontal(pl.col("chosen_ids").list.len(), pl.col("rejected_ids").list.len())
        kept = frame.filter(pl.col("prompt_ids").list.len() + longer <= max_length)
    if kept.is_empty():
        raise DataError(f"{path}: none of its {frame.height} pairs can be trained on; is train.max_length too small?")
    return kept, frame.height - kept.height


def _trainer_class() -> type[DPOTrainer]:
    from trl import DPOTrainer

    class PairTrainer(DPOTrainer):  # type: ignore[misc]
        """DPOTrainer on token ids with given reference log-probabilities."""

        def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
            del processing_class, args, dataset_name
            return dataset  # tokens are stored, never re-made

        def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
            del name, batch_size
            return dataset  # the score stage has been here

    return PairTrainer


def step0(trainer: DPOTrainer, model: Any, pairs: int) -> tuple[float, float]:
    """(mean DPO loss, largest |log π − reference| per response) before the first step.

    Through the trainer's own collator, device, autocast and head, on the first `pairs` rows.
    """
    import torch

    rows = [trainer.train_dataset[i] for i in range(min(pairs, len(trainer.train_dataset)))]
    size = trainer.args.per_device_train_batch_size
    losses: list[float] = []
    apart = 0.0
    for start in range(0, len(rows), size):
        batch = trainer.data_collator(rows[start : start + size])
        batch = {name: value.to(trainer.accelerator.device) for name, value in batch.items()}
        reference = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        with torch.no_grad(), trainer.compute_loss_context_manager():
            logps = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                labels=labels,
                use_cache=False,
                fused_lm_head=True,
            ).log_probs.sum(dim=1)
        ratio_chosen, ratio_rejected = (logps - reference).float().chunk(2)
        losses += torch.nn.functional.softplus(-trainer.beta * (ratio_chosen - ratio_rejected)).tolist()
        apart = max(apart, (logps - reference).abs().max().item())
    return sum(losses) / len(losses), apart


def _callback(trainer: DPOTrainer, config: TrainConfig, key: str, report: Report) -> Any:
    from transformers import TrainerCallback

    class Loop(TrainerCallback):  # type: ignore[misc]
        """Checks step 0, tells the progress, and marks checkpoints that are whole."""

        step0: dict[str, float] | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step:
                return
            loss, apart = step0(trainer, model, config.step0_pairs)
            self.step0 = {"loss": loss, "max_abs_difference": apart}
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
            if state.is_world_process_zero:
                write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / STAMP, {"key": key})

    return Loop()


def _last_checkpoint(folder: Path, key: str) -> Path | None:
    """The latest whole checkpoint of this very training; checkpoints of any other are removed."""
    whole: list[tuple[int, Path]] = []
    for checkpoint in folder.glob("checkpoint-*"):
        if is_trained(checkpoint, key):
            whole.append((int(checkpoint.name.rsplit("-", 1)[1]), checkpoint))
        else:
            shutil.rmtree(checkpoint)
    return max(whole)[1] if whole else None


def _stored_dtype(policy: Path, loaded: Any) -> Any:
    """The torch dtype that a model folder's config names; an adapter's has none, and keeps what it is held in."""
    import torch

    file = policy / "config.json"
    config = read_json(file) if file.is_file() else {}
    name = config.get("dtype") or config.get("torch_dtype")
    return getattr(torch, name) if isinstance(name, str) else loaded


def _peft(lora: LoraConfig | None) -> Any:
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


def _arguments(config: TrainConfig, models: ModelConfig, folder: Path, beta: float, seed: int) -> Any:
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
    accumulate, rest = divmod(config.batch_size, config.micro_batch_size * processes)
    if rest:
        raise UsageError(
            f"train.batch_size ({config.batch_size}) must be a multiple of train.micro_batch_size × processes "
            f"({config.micro_batch_size} × {processes})"
        )
    arguments = DPOConfig(
        output_dir=str(folder),
        **losses,
        beta=beta,
        precompute_ref_log_probs=True,
        max_length=None,  # load_training_set has left out what is too long; nothing is ever truncated
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=accumulate,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler,
        warmup_steps=config.warmup_steps,
        max_steps=config.max_steps or -1,
        num_train_epochs=config.epochs,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optim,
        adam_beta2=config.adam_beta2,
        bf16=where.dtype == "bfloat16",
        fp16=where.dtype == "float16",
        use_cpu=where.device == "cpu",
        gradient_checkpointing=config.gradient_checkpointing,
        seed=seed % 2**32,
        data_seed=seed % 2**32,
        save_strategy="no" if config.save_steps is None else "steps",
        save_steps=config.save_steps or 500,
        save_total_limit=2,
        logging_steps=config.logging_steps,
        report_to=config.report_to or "none",
        disable_tqdm=True,
        dataloader_pin_memory=where.device != "cpu",
    )
    if processes == 1 and arguments.n_gpu > 1:
        # One process on a machine of several GPUs trains on the first: the Trainer would wrap the model in
        # nn.DataParallel, which TRL refuses. `n_gpu` was read above, so the value below stays.
        arguments._n_gpu = 1
    return arguments


def train(
    config: TrainConfig,
    models: ModelConfig,
    *,
    policy: Path,
    training_set: Path,
    out: Path,
    beta: float,
    seed: int,
    key: str,
    report: Report = no_report,
) -> dict[str, Any]:
    """Trains from `policy` on `training_set`; the new policy is `out/model`, in the Hugging Face layout.

    Weights are held in float32 and computed with in the configured type: at the paper's learning rate of
    5e-7 an update vanishes in bfloat16's 8 bits. The model is saved in the type that `policy` is stored in.
    With LoRA the adapters are merged before saving.

    Args:
        training_set: Parquet with `prompt_ids`, `chosen_ids`, `rejected_ids`, `ref_chosen_logps`,
            `ref_rejected_logps` (dice_py.artefacts.TRAINING_SET).
        key: of this training. A model under it is left as it is; its checkpoints are gone on from.

    Returns:
        Counts: `pairs`, `pairs_too_long`, `steps`, `step0_loss`, `step0_max_abs_difference`, `final_loss`.

    Raises:
        DataError: an unusable training set, or a loss at step 0 that is not ln 2.
    """
    target = out / "model"
    if is_trained(target, key):
        return dict(read_json(target / STAMP)["counts"])
    require("torch", "transformers", "trl", "accelerate", "datasets", extra="train")
    import torch
    from datasets import Dataset

    pairs, too_long = load_training_set(training_set, config.max_length)
    tokenizer = load_tokenizer(policy, models)
    model = load_model(policy, models, training=True)
    stored = _stored_dtype(policy, model.dtype)
    if config.lora is None:
        model = model.float()
    checkpoints = out / "checkpoints"
    trainer = _trainer_class()(
        model=model,
        args=_arguments(config, models, checkpoints, beta, seed),
        train_dataset=Dataset(pairs.select(_COLUMNS).to_arrow(compat_level=pl.CompatLevel.oldest())),
        processing_class=tokenizer,
        peft_config=_peft(config.lora),
    )
    loop = _callback(trainer, config, key, report)
    trainer.add_callback(loop)
    last = _last_checkpoint(checkpoints, key) if checkpoints.exists() else None
    if last is not None:
        report("note", text=f"training goes on from {last.name}")
    trainer.train(resume_from_checkpoint=str(last) if last else None)
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
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if config.lora is not None:
        trained = trained.merge_and_unload()
    trained = trained.to(dtype=stored)
    if not all(torch.isfinite(parameter).all() for parameter in trained.parameters()):
        raise DataError(
            "training ended with weights that are not finite; lower train.learning_rate, or set train.max_grad_norm"
        )
    if trainer.is_world_process_zero():
        with atomic(target) as temporary:
            trained.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            if (policy / "generation_config.json").is_file():
                shutil.copy(policy / "generation_config.json", temporary)
            write_json(temporary / "train_log.json", trainer.state.log_history)
            write_json(temporary / STAMP, {"key": key, "counts": counts})
        shutil.rmtree(checkpoints, ignore_errors=True)
    return counts
