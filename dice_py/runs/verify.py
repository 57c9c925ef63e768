"""Reads every artifact of a run folder and names those that are not as they were written. Nothing is changed.

Logs (`events.jsonl`, `*.log`) have no digest, nor have the settings that a training hands to its processes, which are
written anew each time. A journal checks each of its records when it is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dice_py.errors import DiceError, UsageError
from dice_py.runs.removal import removed_list
from dice_py.runs.round_models import MODEL_STAGES
from dice_py.runs.stored_config import CONFIG_FILE, has_config, stored_config
from dice_py.stages.registry import ROUND_STAGES, ROUND_ZERO_STAGES
from dice_py.storage.digests import file_state, stored_digest
from dice_py.storage.files import TEMPORARY, Manifest
from dice_py.storage.integrity import DAMAGED, MODEL_STAMP, damaged_in, read_stamp
from dice_py.storage.removed import RECORD, removed_in, was_removed
from dice_py.synthetic.world import WORLD_STAMP

_STAMPS = (MODEL_STAMP, WORLD_STAMP)
_SEALED = {
    "manifest.json",
    "profile.json",
    "report.html",
    "checked.json",
    "gate.json",
    "mining.json",
    "distributions.json",
    "metrics.json",
    "choice.json",
    "skipped.json",
    "step0.json",
    "rendered-at.json",
    RECORD,
}
_TABLES = re.compile(
    r"(prompts|offline|eval_prompts|eval_pairs|buffer-.+|training_set|mined|pairs|values|pair-logps-.+"
    r"|(generations|scores|ref-logps|previous-logps)"
    r"-\d+|round-\d+)\.parquet"
)
_PLACES = ("inputs", "buffer", "evaluate")
_OF_A_ROUND = frozenset((*ROUND_STAGES, *ROUND_ZERO_STAGES, *MODEL_STAGES))


def verify_run(folder: Path) -> dict[str, Any]:
    """Reads all artifacts of a run.

    Returns:
        `run`; `files` and `bytes` that were read; `damaged`, paths of files that are not as they were written, or
        not those that the manifest lists;
        `missing`, paths that the manifest or a stamp lists and that are not there; `removed`, what was removed to free
        its space, which is neither (runs/removal.py).

    Raises:
        UsageError: the folder holds no run.
    """
    if not (folder / CONFIG_FILE).is_file() and not has_config(folder):
        raise UsageError(f"{folder} holds no run (no {CONFIG_FILE})")
    read: list[Path] = []
    bad: list[Path] = []
    for path in _artifacts(folder):
        stamp = next((name for name in _STAMPS if (path / name).exists()), None)
        if stamp is not None:
            files = [path / stamp, *(path / name for name in (read_stamp(path, stamp) or {}).get("files", {}))]
            read += [file for file in files if not _was_removed(path, file)]
            bad += damaged_in(path, stamp)
            if (path / RECORD).exists() and removed_in(path) is None:
                bad.append(path / RECORD)
        else:
            read.append(path)
            state = file_state(path)
            # An earlier version wrote no digest into the config, and no copy of it into the manifest.
            older = path.name == CONFIG_FILE and state == "unmarked" and not has_config(folder)
            foreign = state == "unmarked" and not _is_own(path.relative_to(folder))
            if state != "intact" and not older and not foreign:  # "absent": a folder or a device in place of a file
                bad.append(path)
    bad += _listed_and_other(folder)
    bad += _other_config(folder)
    bad = list(dict.fromkeys(bad))
    return {
        "run": str(folder),
        "files": len(read),
        "bytes": sum(path.stat().st_size for path in read if path.is_file()),
        "damaged": [str(path) for path in bad if path.exists()],
        "missing": [str(path) for path in bad if not path.exists()],
        "removed": removed_list(folder),
    }


def _was_removed(model: Path, file: Path) -> bool:
    record = removed_in(model)
    return record is not None and file.name in record.files and not file.exists()


def _artifacts(folder: Path) -> Iterator[Path]:
    """The files with a digest, and the folders with a stamp, in order of their paths."""
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        path = Path(entry.path)
        if entry.name.startswith(".") or DAMAGED in entry.name or entry.name.endswith(TEMPORARY):
            continue
        is_artifact = path.suffix == ".parquet" or entry.name in _SEALED or entry.name == CONFIG_FILE
        if is_artifact:
            yield path
        elif entry.is_dir(follow_symlinks=False):
            if any((path / name).exists() for name in _STAMPS):
                yield path
            else:
                yield from _artifacts(path)


def _is_own(path: Path) -> bool:
    """Whether a run writes files of this name at this place. People keep tables of their own beside them."""
    *parents, name = path.parts
    if not parents:
        return name in _SEALED or name == CONFIG_FILE
    in_round = re.fullmatch(r"round-\d+", parents[0]) is not None and parents[1:2] and parents[1] in _OF_A_ROUND
    return (name in _SEALED or _TABLES.fullmatch(name) is not None) and bool(parents[0] in _PLACES or in_round)


def _other_config(folder: Path) -> list[Path]:
    """The config, if it cannot be used, or is another one than the manifest has, intact as it may be."""
    try:
        problem = stored_config(folder)[1]
    except DiceError as error:
        problem = str(error)
    return [] if problem is None else [folder / CONFIG_FILE]


def _listed_and_other(folder: Path) -> list[Path]:
    """What the manifest names and is not there, or is another file, intact as it may be; of a model, its stamp."""
    absent = [] if (folder / CONFIG_FILE).exists() else [folder / CONFIG_FILE]
    stored = Manifest(folder / "manifest.json")
    if stored.is_damaged and stored.path.exists():  # of another kind, if its digest holds
        absent.append(stored.path)
    manifest = stored.data
    if not stored.path.exists() and any(folder.glob("round-*/*")):
        absent.append(stored.path)
    listed = manifest.get("others", {})
    for entry in manifest["stages"].values():
        listed = listed | {file["file"]: file.get("digest") for file in entry.get("files", [])}
    for name, digest in listed.items():
        path = folder / name
        path = path / MODEL_STAMP if path.is_dir() else path
        if was_removed(path) is not None:
            continue
        if not path.exists() or digest not in (None, stored_digest(path)):
            absent.append(path)
    return absent
