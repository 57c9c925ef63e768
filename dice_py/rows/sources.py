"""What a user wrote where data is named, resolved: a file, a folder, a pattern, or a data set of the Hugging Face hub.

    rows.jsonl   rows.csv.gz[:1000]   data/*.parquet   folder   folder:train[:10%]   owner/name@REVISION:CONFIG:SPLIT

A path that exists is meant before anything else.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dice_py.errors import DataError
from dice_py.events import Report, no_report
from dice_py.rows.data_sets import DataSet, has_card, is_saved, splits_of
from dice_py.rows.file_kinds import READ, check_file, is_data_name, is_url
from dice_py.rows.reading import file_rows
from dice_py.rows.row import Row
from dice_py.rows.slices import bounds, cut_rows
from dice_py.storage.keys import digest, file_digest

_SLICE = r"\[[^\[\]]*\]"
_PART = rf"[^:\[\]+/]+(?:{_SLICE})?(?:\(\w+\))?"
_WITH_SPLIT = re.compile(rf"(?P<name>.+?)(?::(?P<config>[^:\[\]/]+))?:(?P<split>{_PART}(?:\+{_PART})*)")
_WITH_SLICE = re.compile(r"(?P<name>.+?):?(?P<slice>\[[^\[\]]*:[^\[\]]*\])")
_HUB = re.compile(r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_NOT_DATA = ("README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files of a data set's folder that hold no rows."""


class Source(Protocol):
    """Rows of a user's, wherever they are. `str()` of it is what the user wrote."""

    def rows(self) -> Iterator[Row]:
        """Yields the rows, each with its place."""
        ...

    def digest(self) -> str:
        """Equal for equal content only."""
        ...


Written = str | Path | Source
"""What the user wrote, as text or as a path, or what it was resolved to."""


@dataclass(frozen=True)
class Files:
    """The rows of one file after the other."""

    name: str
    files: tuple[Path, ...]
    base: Path | None = None
    """Short names of the files are relative to it; None: they are the files' own names."""
    cut: str | None = None
    """A slice of all rows."""

    def __str__(self) -> str:
        return self.name

    def rows(self) -> Iterator[Row]:
        """Yields the rows.

        Raises:
            DataError: a file cannot be read.
        """
        yield from self._all() if self.cut is None else cut_rows(self.cut, self._all)

    def _all(self) -> Iterator[Row]:
        for file in self.files:
            is_inside = self.base is not None and file.is_relative_to(self.base)
            yield from file_rows(file, file.relative_to(self.base).as_posix() if is_inside and self.base else None)

    def digest(self) -> str:
        """The digest of the file's bytes; of several, a digest of theirs in order.

        Raises:
            DataError: a file cannot be read.
        """
        if len(self.files) == 1 and self.cut is None:
            return file_digest(self.files[0])
        return digest("files", [file_digest(file) for file in self.files], self.cut)


def read_rows(written: Written) -> Iterator[Row]:
    """Yields the rows of a source.

    Raises:
        DataError: there is no such source, it has none of the kinds that are read, or it cannot be read at all.
    """
    yield from find_source(written).rows()


def find_source(written: Written, report: Report = no_report, commit: str | None = None) -> Source:
    """The source that a user means.

    Args:
        written: a path, a pattern or an id, with `:SPLIT`, `:CONFIG:SPLIT` or a slice behind it.
        report: receives notes on what was taken.
        commit: of a data set of the hub: read it at this commit.

    Raises:
        DataError: there is no such file, or several splits of which none is named.
        UsageError: it needs the package datasets, which is not installed.
    """
    if not isinstance(written, str | Path):
        return written
    text = str(written)
    if is_url(text):
        raise DataError(
            f"{text} does not exist; it looks like a URL: get the file first (of the Hugging Face hub, write the id: "
            "owner/name:SPLIT)"
        )
    there = _there(text)
    if there is not None:
        return _local(text, *there, report)
    hub = _hub(text)
    if hub is not None:
        name, revision, config, spec = hub
        return DataSet(text, name, config, spec, commit or revision, is_local=False, report=report)
    patterned = _pattern(text)
    if patterned is not None:
        name, cut = patterned
        files = _matches(name)
        if not files:
            raise DataError(f"{text}: no file of {READ} has a name of this pattern")
        return _files(text, files, Path(os.path.commonpath([file.parent for file in files])), cut, report)
    name, config, spec = _readings(text)[-1]
    return _local(text, Path(name), config, spec, report)


def absolute_name(written: str) -> str:
    """What the user wrote, with the path in it made absolute. An id of the hub stays, where there is no such path."""
    if _there(written) is None and _hub(written) is not None:
        return written
    return str(Path(_expanded(written)).absolute())


def is_there(written: str) -> bool:
    """Whether a local file or folder is meant, and is there."""
    patterned = _pattern(written)
    return _there(written) is not None or (patterned is not None and bool(_matches(patterned[0])))


def _readings(text: str) -> list[tuple[str, str | None, str | None]]:
    """(name, configuration, split or slice): the ways to read what the user wrote, that of the longest name first."""
    text = _expanded(text)
    readings: list[tuple[str, str | None, str | None]] = [(text, None, None)]
    sliced, with_split = _WITH_SLICE.fullmatch(text), _WITH_SPLIT.fullmatch(text)
    if sliced is not None and not sliced["name"].endswith(":"):
        readings.append((sliced["name"], None, sliced["slice"]))
    if with_split is not None:
        name, config, split = with_split["name"], with_split["config"], with_split["split"]
        if config is not None:
            readings.append((f"{name}:{config}", None, split))
        readings.append((name, config, split))
    return readings


def _there(text: str) -> tuple[Path, str | None, str | None] | None:
    """The path that exists of what the user wrote, with configuration, and split or slice."""
    for name, config, spec in _readings(text):
        path = Path(name)
        try:
            if path.exists():
                return path, config, spec
        except OSError:  # a name that is too long
            return None
    return None


def _hub(text: str) -> tuple[str, str | None, str | None, str | None] | None:
    """Id, revision, configuration, and split or slice of a data set of the hub; None where that cannot be meant."""
    for name, config, spec in reversed(_readings(text)):
        hub = _HUB.fullmatch(name)
        if hub is not None and not is_data_name(Path(name)):
            return hub["id"], hub["revision"], config, spec
    return None


def _is_named_as_of_hub(path: Path) -> bool:
    """Whether a path, as it would be written from here, could be an id of the hub too."""
    try:
        name = os.path.relpath(path)
    except OSError:  # the working directory is gone
        return False
    return _HUB.fullmatch(name) is not None and not is_data_name(path)


def _local(text: str, path: Path, config: str | None, spec: str | None, report: Report) -> Source:
    if _is_named_as_of_hub(path):
        report(
            "note",
            text=f"{text}: the local {'folder' if path.is_dir() else 'file'} {path}, and not a data set of the hub",
        )
    if not path.is_dir():
        check_file(path)
        if spec is not None and not spec.startswith("["):
            raise DataError(f"{text}: {path} is a file, which has no splits; a part of it is written {path}[:1000]")
        return _files(text, [path], None, spec, report)
    if is_saved(path) or (spec is not None and not spec.startswith("[")):
        return DataSet(text, str(path), config, spec, report=report)
    splits = splits_of(path)
    if len(splits) > 1:
        raise DataError(
            f"{path} has several splits, which are not read as one ({', '.join(splits)}): name one, as "
            f"{path}:{next(iter(splits))}"
        )
    # A data set's README.md may say which files the data is.
    files = next(iter(splits.values())) if splits and has_card(path) else _in_folder(path)
    if not files:
        raise DataError(f"{path} is a folder without a file of {READ}")
    return _files(text, files, path, spec, report)


def _in_folder(path: Path) -> list[Path]:
    """The files with rows below a folder, sorted by their paths; hidden ones are left out."""
    inside = (Path(folder, name).relative_to(path) for folder, _, names in os.walk(path) for name in names)
    kept = (file for file in inside if _has_rows_name(file) and not any(part.startswith(".") for part in file.parts))
    return [path / file for file in sorted(kept, key=Path.as_posix)]


def _files(text: str, files: list[Path], base: Path | None, cut: str | None, report: Report) -> Files:
    if cut is not None:
        bounds(cut, 0)
    if base is not None:
        report(
            "note",
            text=f"{text}: {len(files)} files, {files[0]} … {files[-1]}" if len(files) > 1 else f"{text}: {files[0]}",
        )
    return Files(text, tuple(files), base, cut)


def _expanded(text: str) -> str:
    """A name with its home folder, which no shell expands in a config; of an unknown user it stays as it is."""
    return os.path.expanduser(text)  # noqa: PTH111 - Path's raises for an unknown user


def _has_rows_name(file: Path) -> bool:
    return is_data_name(file) and file.name not in _NOT_DATA


def _pattern(text: str) -> tuple[str, str | None] | None:
    """A pattern of names, and the slice behind it; None where the text is no pattern."""
    text = _expanded(text)
    sliced = _WITH_SLICE.fullmatch(text)
    name, cut = (sliced["name"], sliced["slice"]) if sliced is not None else (text, None)
    return (name, cut) if any(sign in name for sign in "*?[") else None


def _matches(pattern: str) -> list[Path]:
    """The data files that a pattern names, sorted by their paths."""
    found = (Path(name) for name in glob.glob(pattern, recursive=True))  # noqa: PTH207 - of absolute patterns too
    return sorted((file for file in found if file.is_file() and _has_rows_name(file)), key=Path.as_posix)
