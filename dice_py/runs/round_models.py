"""The models that a round has made: by training, by reinforcement learning after it, by extrapolation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dice_py.config.run import RunConfig

TRAINING_STAGES = ("train", "reinforce")
"""Stages with a trainer's log, in order of work."""

MODEL_STAGES = (*TRAINING_STAGES, "extrapolate")
"""Stages whose files are models, in order of work: the last model is the round's new policy."""


def training_stages(config: RunConfig) -> tuple[str, ...]:
    """Those of `TRAINING_STAGES` that a run with these settings has."""
    return TRAINING_STAGES if config.train.method == "mpo" else TRAINING_STAGES[:1]


def model_stages(config: RunConfig) -> tuple[str, ...]:
    """Those of `MODEL_STAGES` that a run with these settings has: of others a manifest may have earlier results."""
    return (*training_stages(config), *(["extrapolate"] if config.extrapolate.tried else []))


def models_of_round(stages: Mapping[str, Any], name: str, of: Sequence[str] = MODEL_STAGES) -> list[Path]:
    """The folders of a round's models, relative to the run, in order of work; a stage that was skipped made none.

    Args:
        stages: the manifest's entries of stages.
        name: of the round.
        of: the stages, in order of work.
    """
    entries = [stages.get(f"{name}/{stage}") or {} for stage in of]
    files = [Path(made["file"]) for entry in entries for made in entry.get("files", [])]
    return [file for file in files if file.suffix != ".json"]
