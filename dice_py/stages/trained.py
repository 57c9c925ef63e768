"""What the stages that train a model have in common: a model under the key is kept, and its stamp has the counts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from dice_py.errors import DamagedError
from dice_py.events import Report
from dice_py.stages.job import StageResult
from dice_py.storage.integrity import MODEL_STAMP, check_intact, read_stamp
from dice_py.training.checkpoints import keep_model


def trained_model(
    target: Path, key: str, inputs: Sequence[Path], train: Callable[[], None], report: Report
) -> StageResult:
    """The result of a training: of the model that is there under the key, or of the one that `train` makes.

    Args:
        target: the folder of the model; checkpoints are in the folder `checkpoints` beside it.
        inputs: files and models, which must be as they were written.
    """
    if not keep_model(target, key, report):
        check_intact(inputs)
        train()
    # Also of a training by other settings that was stopped, where this model was there already.
    shutil.rmtree(target.parent / "checkpoints", ignore_errors=True)
    stamp = read_stamp(target)
    if stamp is None:
        raise DamagedError(f"{target / MODEL_STAMP} is damaged: it is not as it was written")
    return StageResult([(target, key)], dict(stamp["counts"]))
