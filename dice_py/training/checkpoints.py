"""Stamps of complete models and checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from dice_py.storage.files import read_json
from dice_py.training.parallelism import ProcessLayout

STAMP = "dice.json"
"""The file of a whole model, or a whole checkpoint, that says what made it."""


def is_trained(folder: Path, key: str) -> bool:
    """True when `folder` holds the whole model that `train` makes for `key`."""
    stamp = folder / STAMP
    return stamp.is_file() and read_json(stamp).get("key") == key


def last_checkpoint(folder: Path, stamp: dict[str, Any]) -> Path | None:
    """The latest whole checkpoint of this very training in a like layout; any other checkpoints are removed."""
    whole: list[tuple[int, Path]] = []
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / STAMP).is_file() and read_json(checkpoint / STAMP) == stamp:
            whole.append((int(checkpoint.name.rsplit("-", 1)[1]), checkpoint))
        else:
            shutil.rmtree(checkpoint)
    return max(whole)[1] if whole else None


def checkpoint_stamp(key: str, layout: ProcessLayout) -> dict[str, Any]:
    """What the stamp of a checkpoint says: which training it is of, and how it is laid out."""
    return {"key": key, "layout": layout.checkpoints}
