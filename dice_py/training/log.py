"""The trainer's log, `log.jsonl` in the folder of a train stage: one entry a line, as it comes, to follow a training.

The trained model has the same entries in its `train_log.json`, which is there only in the end. The first line has the
key of the training: until a training begins, the log of an earlier one may lie there. A resumed training begins with
the entries up to its checkpoint, so that in the end its log is that of a training that was not stopped. The file has no
digest, since it grows. Imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dice_py.events import Report
from dice_py.storage.files import KEY_NAME, write_text

LOG_FILE = "log.jsonl"

_SUMMARY = "train_runtime"
"""In the trainer's last entry, which is of the whole training, and has its seconds."""

Entry = dict[str, Any]


class TrainingLog:
    """Writes the log of one training. A log that cannot be written is a note, and no end of the training."""

    def __init__(self, folder: Path, key: str, report: Report) -> None:
        self._path = folder / LOG_FILE
        self._key = key
        self._report = report
        self._writes = True

    def begin(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Begins the file with the entries of before, those up to the checkpoint of a resumed training."""
        try:
            if self._path.exists() and not _is_log(self._path):
                self._stop("it is not of this program, and is left as it is")
                return
            write_text(self._path, json.dumps({KEY_NAME: self._key}) + "\n" + "".join(map(_line, entries)))
        except OSError as error:
            self._stop(str(error))

    def add(self, entry: Mapping[str, Any]) -> None:
        """Appends an entry. The file is closed after each, so that a reader has it at once."""
        if not self._writes:
            return
        try:
            with self._path.open("a", encoding="utf-8") as handle:
                handle.write(_line(entry))
        except OSError as error:
            self._stop(str(error))

    def _stop(self, why: str) -> None:
        self._writes = False
        self._report("note", text=f"the training's log {self._path} is not written: {why}")


def read_training_log(folder: Path, key: str | None = None) -> list[Entry]:
    """The entries of the trainer's log in the folder of a train stage, in order.

    Each has `step`, an int, and finite numbers under the trainer's names: `loss`, `grad_norm`, `learning_rate`,
    `rewards/chosen`, `rewards/rejected`, `rewards/accuracies`, `rewards/margins`, `logps/chosen`, `logps/rejected`, …
    A value that is not finite is left out, and so is a damaged line. Without the file, as earlier versions left it,
    the entries are those in the trained model; without either there are none.

    Args:
        key: of the training. A log of another one has no entries for it.
    """
    path = folder / LOG_FILE
    found: list[Any]
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as lines:
            found = [_parsed(line) for line in lines]
        if key is not None and (not found or not _has_key(found[0]) or found[0][KEY_NAME] != key):
            return []
    else:
        found = _of_model(folder / "model" / "train_log.json")
    return [entry for value in found if (entry := _entry(value)) is not None]


def _line(entry: Mapping[str, Any]) -> str:
    """An entry as a line of JSON, which has no NaN: null takes its place. The summary of a training is none."""
    if _SUMMARY in entry:
        return ""
    values = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in entry.items()
    }
    # Sorted, as the entries of a checkpoint are.
    return json.dumps(values, allow_nan=False, sort_keys=True) + "\n"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _of_model(file: Path) -> list[Any]:
    try:
        stored = _parsed(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return stored if isinstance(stored, list) else []


def _entry(value: Any) -> Entry | None:
    """The usable part of an entry; None if it has no step, or is the summary."""
    if not isinstance(value, dict) or type(value.get("step")) is not int or _SUMMARY in value:
        return None
    return {name: item for name, item in value.items() if _is_finite(item)}


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def _has_key(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get(KEY_NAME), str)


def _is_log(path: Path) -> bool:
    """Whether a file is a log of this program. It is written at once with its first line, so none is cut short."""
    with path.open("rb") as handle:
        return _has_key(_parsed(handle.readline(1 << 16).decode(errors="replace")))
