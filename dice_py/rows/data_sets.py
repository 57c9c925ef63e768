"""Data sets that the package datasets reads: of the Hugging Face hub, of a folder with splits, of `save_to_disk`.

One way for all: find the configuration, then the split, then its rows from memory-mapped Arrow files.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dice_py.errors import DataError, UsageError
from dice_py.events import Report, no_report
from dice_py.rows.file_kinds import is_data_name
from dice_py.rows.row import Origin, Row
from dice_py.rows.slices import bounds
from dice_py.rows.tables import table_row
from dice_py.storage.keys import digest, file_digest

_BATCH = 1000
_HUB_REMEDY = (
    "check the spelling (owner/name); log in for a private or gated one (hf auth login); without a network, set "
    "HF_HUB_OFFLINE=1 to use what is in the cache, or name a local file or folder"
)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of datasets wrote a folder."""
    names = (("state.json", "dataset_info.json"), ("dataset_dict.json",))
    return any(all((folder / name).is_file() for name in all_of) for all_of in names)


def has_card(folder: Path) -> bool:
    """Whether a folder has the README.md of a data set, which may name configurations and their files."""
    return (folder / "README.md").is_file()


def splits_of(folder: Path) -> dict[str, list[Path]]:
    """The splits of a folder of data files with those of the files that are read here, by the naming of datasets.

    A name is "SPLIT", or "CONFIG:SPLIT" where there are several configurations. A folder without such files has none.

    Raises:
        DataError: datasets cannot read the folder's README.md.
        UsageError: datasets is not installed.
    """
    root = _absolute(folder)
    with _library(str(folder)):
        import datasets
        from datasets.data_files import DataFilesDict, get_data_patterns

        try:
            if has_card(folder):
                configs = datasets.get_dataset_config_names(root)
                found = {name: datasets.load_dataset_builder(root, name=name).config.data_files for name in configs}
            else:  # of all kinds of files: a builder is of one, and would not see a test.csv beside a train.jsonl
                found = {"default": DataFilesDict.from_patterns(get_data_patterns(root), base_path=root)}
        except FileNotFoundError:
            return {}
    splits = {}
    for config, files_of in found.items():
        for split, files in (files_of or {}).items():
            read = [Path(file) for file in files if is_data_name(Path(file))]
            if read:
                name = f"{config}:{split}" if len(found) > 1 else str(split)
                splits[name] = [folder / file.relative_to(root) if file.is_relative_to(root) else file for file in read]
    return splits


@dataclass(frozen=True)
class DataSet:
    """The rows of one split, or of some, that datasets reads. They stay on the disk until they are read."""

    name: str
    """As the user wrote it."""
    path: str
    """A folder, or an id of the hub."""
    config: str | None = None
    spec: str | None = None
    """Split with slice, such as "train[:10%]+test"; a slice alone is of the only split; None: the only split."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    is_local: bool = True
    report: Report = no_report

    def __str__(self) -> str:
        return self.name

    def rows(self) -> Iterator[Row]:
        """Yields the rows. Their numbers count in the complete split.

        Raises:
            DataError: the data set cannot be loaded, or has no such split.
            UsageError: datasets is not installed.
        """
        for split, start, stop in self._parts:
            data = _undecoded(self._splits[split])
            origin = Origin(f"{self.path}:{split}", f"{Path(self.path).name}:{split}")
            for first in range(start, stop, _BATCH):
                with _library(self.name):
                    columns = data[first : min(first + _BATCH, stop)]
                names = list(columns)
                for index, values in enumerate(zip(*columns.values(), strict=True), start=first):
                    yield table_row(dict(zip(names, values, strict=True)), origin, index)

    def digest(self) -> str:
        """Of a folder: a digest of its files in order. Of the hub: the commit, in words (`commit_of` finds it again).

        Raises:
            DataError: as `rows`.
        """
        if not self.is_local:
            return f"{self.name} at {self._builder.hash}"
        if is_saved(Path(self.path)):
            files = sorted(file for file in Path(self.path).rglob("*") if file.is_file())
        else:
            splits = self._builder.config.data_files or {}
            named = _split_names(self.spec or "")
            used = [split for split in splits if str(split) in named] or list(splits)
            files = [Path(file) for split in used for file in splits[split]]
        return digest("data set", [file_digest(file) for file in files], self.config, self.spec)

    def _loading(self) -> contextlib.AbstractContextManager[None]:
        if self.is_local:
            return _library(self.path)
        return _library(f"{self.path} is no local file or folder, and as a data set of the hub it", f"; {_HUB_REMEDY}")

    @cached_property
    def _builder(self) -> Any:
        path = _absolute(Path(self.path)) if self.is_local else self.path
        with self._loading():
            import datasets

            if self.config is None:
                configs = datasets.get_dataset_config_names(path, revision=self.revision)
                default = datasets.get_dataset_default_config_name(path, revision=self.revision)
                if len(configs) > 1 and default is None:
                    raise DataError(
                        f"{self.path} has several configurations ({', '.join(configs)}): name one and a split, as "
                        f"{self.path}:{configs[0]}:SPLIT"
                    )
            builder = datasets.load_dataset_builder(path, name=self.config, revision=self.revision)
        # Out of reach of the hub, datasets takes what it has, of whatever revision that is.
        is_from_cache = type(builder).__module__.startswith("datasets.packaged_modules.cache")
        if is_from_cache and self.revision not in (None, builder.hash):
            raise DataError(
                f"{self.path}: the hub cannot be reached, and the cache has commit {builder.hash}, which may not be "
                f"{self.revision}; {_HUB_REMEDY}"
            )
        return builder

    @cached_property
    def _splits(self) -> dict[str, Any]:
        """All splits, by name."""
        if self.is_local and is_saved(Path(self.path)):
            if self.config is not None:
                raise DataError(f"{self.path} was saved by datasets, and has no configuration {self.config!r}")
            with _library(self.path):
                import datasets

                saved = datasets.load_from_disk(self.path)
                return dict(saved) if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
        builder = self._builder
        if not self.is_local:
            self.report("note", text=f"{self.path}: reading the data set of the Hugging Face hub at {builder.hash}")
        with self._loading():
            builder.download_and_prepare()
            return {str(name): builder.as_dataset(split=name) for name in builder.info.splits}

    @cached_property
    def _parts(self) -> list[tuple[str, int, int]]:
        """(split, first row, row behind the last), in the order of `spec`. What is wrong is told before a download."""
        names = self._names
        spec = self.spec or "[:]"
        if spec.startswith("["):
            if len(names) > 1:
                raise DataError(
                    f"{self.path} has several splits, which are not read as one ({', '.join(names)}): name one, as "
                    f"{self.path}:{self.config + ':' if self.config else ''}{names[0]}"
                )
            return [(names[0], *bounds(spec, self._splits[names[0]].num_rows))]
        missing = sorted(_split_names(spec) - set(names))
        if missing:
            raise DataError(f"{self.name}: there is no split {missing[0]!r}; its splits are {', '.join(names)}")
        with _library(self.name, f"; write a part of a split as {names[0]}[:1000] or {names[0]}[10%:20%]"):
            from datasets import ReadInstruction

            read = ReadInstruction.from_spec(spec).to_absolute(
                {name: data.num_rows for name, data in self._splits.items()}
            )
        return [(str(part.splitname), part.from_, max(part.from_, part.to)) for part in read]

    @cached_property
    def _names(self) -> list[str]:
        """The names of all splits, of their files if these are known."""
        is_unknown = self.is_local and is_saved(Path(self.path))
        files = None if is_unknown else self._builder.config.data_files
        return [str(name) for name in files or self._splits]


def _split_names(spec: str) -> set[str]:
    return {part.partition("[")[0].partition("(")[0].strip() for part in spec.split("+")}


def commit_of(content: str, name: str) -> str | None:
    """The commit in the digest of a data set of the hub that the user wrote as `name`; None for other digests."""
    start, _, commit = content.rpartition(" at ")
    return commit if start == name else None


def _absolute(folder: Path) -> str:
    """A name of a folder that datasets does not take for that of a file format, such as "csv"."""
    return str(folder.absolute())


def _undecoded(data: Any) -> Any:
    """The rows without reading images and sounds: a prompt that has some is refused by what is stored of them."""
    import datasets

    for name, feature in data.features.items():
        if isinstance(feature, datasets.Image | datasets.Audio | datasets.Video):
            data = data.cast_column(name, type(feature)(decode=False))
    return data


@contextlib.contextmanager
def _library(subject: str, remedy: str = "") -> Iterator[None]:
    """Around calls of datasets: without its progress bars, and with its errors as a sentence about `subject`.

    Raises:
        DataError: the library failed.
        UsageError: it is not installed.
    """
    if importlib.util.find_spec("datasets") is None:
        raise UsageError(f"{subject} is read by the package datasets; add it with: pip install 'dice-align[train]'")
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    except (DataError, UsageError, MemoryError):
        raise
    except Exception as error:  # of any of the libraries below it: HTTP, the hub's, Arrow's, pandas'
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(f"{subject} cannot be loaded by the package datasets ({said:.300}){remedy}") from None
    finally:
        if shown:
            datasets.enable_progress_bars()
