"""Removes what a run need not keep: weights of models, samples, checkpoints, and leftovers of killed processes.

Records come first, in the manifest and in the folder (storage/removed.py), and files go then: after a kill the same
call finishes the work. No link is followed: `locked` refuses a run that has any.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dice_py.models.identity import model_identity
from dice_py.storage.files import TEMPORARY, Manifest
from dice_py.storage.integrity import DAMAGED, damaged_in
from dice_py.storage.parquet import parquet_key, parquet_meta
from dice_py.storage.removed import Removed, forget_removed, removals, remove_files, removed_in

Kind = Literal["models", "samples", "checkpoints", "leftovers"]
KINDS: tuple[Kind, ...] = ("models", "samples", "checkpoints", "leftovers")

_REMOVED = "removed"
_ROUND = re.compile(r"round-(\d+)/")
_SET_ASIDE = re.compile(rf".+{re.escape(DAMAGED)}(-\d+)?")


@dataclass(frozen=True)
class Removable:
    """Files of one folder that may go, with a record; without `files` all of `place`, without one."""

    kind: Kind
    place: Path
    """Relative to the run folder."""
    by: str
    files: tuple[str, ...] = ()
    """Names in the folder."""
    read_until: int = 0
    """The last round of which a stage reads them."""


def size_of(folder: Path, item: Removable) -> int:
    """The bytes that removing frees; none of a file that another run has too, as the runs of an ablation do."""
    place = folder / item.place
    return sum(map(_size, (place / name for name in item.files))) if item.files else _size(place)


def _size(path: Path) -> int:
    if path.is_dir() and not path.is_symlink():
        with os.scandir(path) as entries:
            return sum(_size(Path(entry.path)) for entry in entries)
    if not os.path.lexists(path):
        return 0
    state = path.lstat()
    return state.st_size if state.st_nlink == 1 else 0


def remove(folder: Path, manifest: Manifest, items: Iterable[Removable]) -> list[Removable]:
    """Removes files of a run, whose lock the caller holds; returns what was removed.

    A model with a damaged file stays, since its identity is no longer known.
    """
    recorded, others = [], []
    for item in items:
        if not item.files:
            others.append(item)
            continue
        record = _record_of(folder, manifest, item)
        if record is not None:
            recorded.append((item, record))
    listed = manifest.data.get(_REMOVED)
    listed = listed if isinstance(listed, dict) else {}
    for item, record in recorded:
        listed[str(item.place)] = _listed(record)
    if recorded:
        manifest.data[_REMOVED] = listed
        manifest.save()
    for item, record in recorded:
        remove_files(folder / item.place, record)
    for item in others:
        place = folder / item.place
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
    return [*(item for item, _ in recorded), *others]


def _record_of(folder: Path, manifest: Manifest, item: Removable) -> Removed | None:
    """The record of a removal, with that of an earlier one in the same folder; None for a damaged model."""
    place = folder / item.place
    earlier = removed_in(place)
    files = {} if earlier is None else dict(earlier.files)
    identity = None
    if item.kind == "models":
        if damaged_in(place):
            return None
        identity = model_identity(place)
    for name in item.files:
        if name not in files or item.kind == "models":
            files[name] = _file_of(place / name)
    by = item.by if earlier is None or files.keys() != earlier.files.keys() else earlier.by
    of_rounds = range(_round_of(str(item.place)), item.read_until + 1)
    entries = {name: entry for name, entry in manifest.data["stages"].items() if _round_of(name) in of_rounds}
    entries = {name: entry for name, entry in entries.items() if entry.get("status") == "done"}
    return Removed(by=by, files=files, identity=identity, entries=entries)


def _round_of(name: str) -> int:
    found = _ROUND.match(name)
    return -1 if found is None else int(found[1])


def _file_of(file: Path) -> dict[str, Any]:
    known: dict[str, Any] = {"bytes": file.stat().st_size}
    return known | {"key": parquet_key(file), "meta": parquet_meta(file)} if file.suffix == ".parquet" else known


def leftovers(folder: Path) -> Iterator[Removable]:
    """What killed processes left half written, and what was set aside as damaged."""
    pending = [folder]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                place = Path(entry.path).relative_to(folder)
                is_temporary = entry.name.startswith(".") and entry.name.endswith(TEMPORARY)
                if is_temporary or _SET_ASIDE.fullmatch(entry.name):
                    yield Removable("leftovers", place, "dice clean")
                elif entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))


def known_entry(manifest: Manifest, name: str, key: str) -> dict[str, Any] | None:
    """The manifest's entry of a stage; that of a record, if the stage was done under the key before files were removed.

    A stage that cannot be done again, since what it read is gone, so outlives the loss of the manifest, and other
    settings that were tried.
    """
    entry = manifest.stage(name)
    if entry is not None and entry.get("key") == key and entry.get("status") == "done":
        return entry
    for _, record in removals(manifest.path.parent):
        earlier = record.entries.get(name)
        if earlier is not None and earlier.get("key") == key:
            manifest.record(name, **earlier)
            return earlier
    return entry


def forget_stage(manifest: Manifest, name: str) -> None:
    """Drops the records of a stage that was made again. The manifest is saved by the caller."""
    forget_removed(manifest.path.parent / name)
    listed = manifest.data.get(_REMOVED)
    if isinstance(listed, dict):
        manifest.data[_REMOVED] = {
            place: record for place, record in listed.items() if place != name and not place.startswith(f"{name}/")
        }


def restore_removed(manifest: Manifest) -> None:
    """Lists what was removed in a manifest that was lost."""
    folder = manifest.path.parent
    listed = {str(place.relative_to(folder)): _listed(record) for place, record in removals(folder)}
    if listed:
        manifest.data[_REMOVED] = listed


def _listed(record: Removed) -> dict[str, Any]:
    """What the manifest says of a record."""
    return {"by": record.by, "bytes": record.bytes, "files": list(record.files)}


def has_samples(manifest: Manifest, name: str) -> bool:
    """Whether the samples and scores of a round ("round-01") are all there, as far as none was removed."""
    return all(removed_in(manifest.path.parent / name / stage) is None for stage in ("generate", "score"))


def removed_list(folder: Path) -> list[dict[str, Any]]:
    """What was removed of a run, in order: `place`, `what` ("model" or "samples"), `by`, `bytes`, `files`."""
    return [
        {
            "place": str(place.relative_to(folder)),
            "what": "samples" if record.identity is None else "model",
            "by": record.by,
            "bytes": record.bytes,
            "files": list(record.files),
        }
        for place, record in removals(folder)
    ]


def removed_text(item: dict[str, Any]) -> str:
    """A sentence on an item of `removed_list`."""
    weights = "its weights were" if item["what"] == "model" else "its shards were"
    return f"{item['place']}: {weights} removed by {item['by']}"
