"""The steps of a training, how many of them the learning rate rises over, and settings that would train nothing."""

from __future__ import annotations

import math

from dice_py.config.training import TrainConfig

_LONG = 1 / 3
"""A warm-up that is longer than this share of the steps is reported."""

LEAST_CHANGE = 1e-9
"""A change of every weight below it is none: near 0.02, a usual size of weights, float32 has steps of twice that."""


def training_steps(config: TrainConfig, pairs: int, processes: int = 1) -> int:
    """Optimizer steps, as transformers' Trainer counts them: the last step of an epoch may have fewer pairs."""
    if config.max_steps is not None:
        return config.max_steps
    size = config.per_device_train_batch_size * processes
    batches = math.ceil(pairs / size)
    return math.ceil(config.num_train_epochs * max(1, math.ceil(batches / max(1, config.batch_size // size))))


def warmup_steps(config: TrainConfig, steps: int) -> int:
    """Optimizer steps over which the learning rate rises, of `steps` in all.

    A share is rounded down: the first step of a warm-up has a learning rate of 0, so that a warm-up of one step in a
    training of one would train nothing.
    """
    if isinstance(config.warmup_steps, int):
        return config.warmup_steps
    return int(config.warmup_steps * steps)


def setting_notes(config: TrainConfig, steps: int | None, *, section: str = "train") -> list[str]:
    """Warnings of settings with which a training does nothing, or that do nothing in a training.

    Args:
        steps: optimizer steps of the training; None: not known yet.
        section: of the config, for the texts.
    """
    notes = []
    if config.learning_rate < LEAST_CHANGE:
        notes.append(
            f"warning: {section}.learning_rate is {config.learning_rate:g}, with which the policy hardly moves from "
            "its start; DPO's is 5e-7, and 1e-5 with adapters"
        )
    if config.lora is not None and config.lora.dropout:
        notes.append(
            f"warning: {section}.lora.dropout is {config.lora.dropout:g} and changes nothing: DPO trains without "
            "dropout, since rewards compare two models"
        )
    warmup = warmup_note(config, steps, section=section) if steps else None
    return notes if warmup is None else [*notes, warmup]


def warmup_note(config: TrainConfig, steps: int, *, section: str = "train") -> str | None:
    """A warning of a warm-up that takes more than a third of the steps, or a note on a share that is no step at all.

    None: neither holds.
    """
    warmup = warmup_steps(config, steps)
    if config.warmup_steps and not warmup:
        return f"{section}.warmup_steps is {config.warmup_steps} of {steps} step{'s' * (steps != 1)}: no warm-up"
    if config.lr_scheduler_type == "constant" or warmup <= steps * _LONG:
        return None
    reached = "never reached" if warmup >= steps else f"reached after {warmup / steps:.0%} of them"
    return (
        f"warning: {section}.warmup_steps is {warmup}, and the training has {steps} step{'s' * (steps != 1)}: the "
        f"learning rate of {config.learning_rate:g} is {reached}. Set {section}.warmup_steps to a share of the steps, "
        "such as 0.1"
    )
