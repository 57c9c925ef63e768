"""The files and folders that a command names, checked before anything is read or made.

An input is a regular file: a FIFO would wait for a writer, and a device such as /dev/zero never ends. A result is
probed where it will go, since hours of work may lie between the call and the first write.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

from dice_py.errors import DataError, DiskFullError, UsageError

if TYPE_CHECKING:
    import polars as pl

    from dice_py.config.stages import BufferConfig

_URL = re.compile(
    r"(s3|s3a|gs|gcs|hf|https?|ftp|file|az|abfss?|adl|hdfs|memory|ssh|sftp)://?", re.IGNORECASE
)  # Path joins //
_FOLDERS_OUT = ("out", "run_dir")
_WRITTEN = {
    "generate": ("prompts.parquet", "generations-*.parquet"),
    "score": ("scores-*.parquet", "ref-logps-*.parquet", "previous-logps-*.parquet"),
    "replay": ("offline.parquet", "buffer-*.parquet", "training_set.parquet"),
    "train": ("model", "model/*", "adapter", "adapter/*", "checkpoints", "checkpoints/*"),
    "reinforce": ("model", "model/*", "adapter", "adapter/*", "checkpoints", "checkpoints/*"),
    "extrapolate": ("model", "model/*"),
    "audit": ("audit.json", "pairs.parquet", "responses.parquet"),
    "evaluate": (
        "eval_prompts.parquet",
        "eval_pairs.parquet",
        "pair-logps-*.parquet",
        "samples.parquet",
        "values.parquet",
        "samples/*",
        "start/*",
        "previous/*",
        "benchmark/*",
    ),
}
"""What the commands write into their --out, as patterns."""
_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISDIR, "a folder"),
)


class PathCommand(TyperCommand):
    """A command whose paths are checked before it runs."""

    out_is_file = False
    probes_out = True
    files_out: tuple[str, ...] = ()
    """Further parameters that are files which the command writes."""
    folders_out: tuple[str, ...] = _FOLDERS_OUT
    may_be_folders: tuple[str, ...] = ("folder",)
    """Parameters that may be folders, and are looked at by what reads them."""
    sources: tuple[str, ...] = ()
    """Parameters that are sources of rows: files, and folders too (dice_py/rows/sources.py)."""

    def invoke(self, ctx: Any) -> Any:
        """Checks the values of all parameters that are paths, then runs the command."""
        options = {param.name: param.opts[0] for param in self.get_params(ctx)}
        ctx.params.update({name: _local(value, options[name]) for name, value in ctx.params.items()})
        for name, value in ctx.params.items():
            if name in self.may_be_folders or value is None:
                continue
            if name in self.files_out:
                check_output_file(value, options[name])
            elif name not in self.folders_out:
                paths = value if isinstance(value, list) else [value]
                for path in (path for path in paths if isinstance(path, Path)):
                    check_input_file(path, options[name], is_source=name in self.sources)
            elif self.out_is_file:
                check_output_file(value, options[name])
            elif self.probes_out:
                check_output_folder(value, options[name])
        if isinstance(ctx.params.get("out"), Path):
            _check_inputs_are_kept(ctx.params, _WRITTEN.get(str(self.name), ()), options)
        return super().invoke(ctx)


class PlanCommand(PathCommand):
    """A command that writes nothing into the folder that it names."""

    probes_out = False


def _check_inputs_are_kept(params: Mapping[str, Any], written: tuple[str, ...], options: Mapping[str, str]) -> None:
    """Refuses an input, or a model, that lies where the command writes a result: it would be replaced.

    Raises:
        UsageError: naming both.
    """
    out = os.path.realpath(params["out"])
    for name, value in params.items():
        for item in value if isinstance(value, list) else [value]:
            if name == "out" or not isinstance(item, str | Path):
                continue
            file = str(item).partition("=")[2] if name == "buffer" else str(item)
            for path in (file, file.rpartition(":")[0]) if name == "buffer" else (file,):  # with its share, and without
                if not os.path.lexists(path):
                    continue
                inside = os.path.relpath(os.path.realpath(path), out)
                if any(fnmatch.fnmatch(inside, pattern) for pattern in written):
                    raise UsageError(
                        f"{options[name]}: {path} is in {params['out']}, where a result of that name is written and "
                        "would replace it: give another --out"
                    )


def _local(value: Any, option: str) -> Any:
    """A path with its ~ expanded, which shells leave in `--out=~/x`; lists of paths likewise, other values as they are.

    Raises:
        UsageError: a URL, of which a local folder would be made; or a home folder that there is not.
    """
    if isinstance(value, list):
        return [_local(item, option) for item in value]
    if not isinstance(value, Path):
        return value
    if _URL.match(str(value)):
        raise UsageError(
            f"{option}: {value} looks like a URL, and only local paths can be used: copy it to or from here"
        )
    if value.parts[:1] and Path(value.parts[0]).exists():  # a folder of that name is meant
        return value
    try:
        return value.expanduser()
    except RuntimeError:
        raise UsageError(f"{option}: {value}: there is no such user or home folder; write the complete path") from None


def kind_of(path: Path) -> str | None:
    """What is at `path`, if it is neither absent nor a regular file: "a pipe", "a folder", … Nothing is opened."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return None
    return next((words for test, words in _KINDS if test(mode)), None)


def check_input_file(path: Path, option: str, *, is_source: bool = False) -> None:
    """Refuses what is there and is no regular file; an absent file is left to the reader, which knows what it is for.

    Args:
        is_source: a folder is one too.

    Raises:
        DataError: with what it is instead.
    """
    kind = kind_of(path)
    if kind is not None and not (is_source and kind == "a folder"):
        raise DataError(
            f"{option}: {path} is {kind}, not a regular file; give a file"
            + ("" if kind == "a folder" else " (what a command prints, /dev/stdin or <(…), has to be written to one)")
        )


def check_output_file(path: Path, option: str) -> None:
    """Raises UsageError if `path` is something else than a file, or cannot be made."""
    kind = kind_of(path)
    if kind == "a folder":
        raise UsageError(f"{option}: {path} is a folder: name a file")
    if kind is not None:
        raise UsageError(f"{option}: {path} is {kind}, which a file cannot replace: name a regular file")
    if path.is_symlink():
        # The result would take the link's place: that of /dev/stdout, too, where stdout is a file.
        raise UsageError(f"{option}: {path} is a symbolic link, which the result would replace: name the file itself")
    _probe(path.parent, path, option)


def check_output_folder(path: Path, option: str) -> None:
    """Raises UsageError if `path` is no folder, or cannot be made or written."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{option}: {path}: Not a directory; name a folder")
    _probe(path, path, option)


def _probe(folder: Path, path: Path, option: str) -> None:
    """Makes a folder where `path` will go, and removes it again: permissions alone do not tell (/proc, read-only)."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        shutil.rmtree(tempfile.mkdtemp(prefix=".dice-", suffix=".tmp", dir=folder))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(f"{option}: {path}: no room left on the disk; free some space") from None
        raise UsageError(f"{option}: {path}: {error.strerror or error}; check the path and its permissions") from None


def check_table(path: Path, option: str, columns: Iterable[str], made_by: str) -> None:
    """Refuses a file that is not the one that an option means, from its footer.

    Raises:
        DataError: the file is absent, is no Parquet, or lacks one of `columns`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        from dice_py.storage.removed import check_not_removed

        check_not_removed(path)
        raise DataError(f"{path} does not exist")
    try:
        present = pq.read_schema(path.absolute()).names
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{option}: {path} cannot be read as Parquet: {str(error).strip()} Give the file that {made_by} wrote"
        ) from None
    missing = [name for name in columns if name not in present]
    if missing:
        raise DataError(
            f"{option}: {path} has no column {missing[0]!r}; its columns are {', '.join(present)}. Give the file that "
            f"{made_by} wrote"
        )


def check_shards(shards: tuple[Path | None, list[Path], list[Path], Path | None]) -> None:
    """Refuses files that were given in place of others, before the model is looked for.

    Raises:
        UsageError: mined pairs without the files that their row numbers refer to.
        DataError: a file is not the one that its option means.
    """
    mined, generations, scores, prompts = shards
    if mined is None:
        return
    if not generations or not scores or prompts is None:
        raise UsageError("--mined also needs --generations, --scores and --prompts, which its row numbers refer to")
    check_table(mined, "--mined", ("prompt_id", "chosen_row", "rejected_row"), "dice mine")
    for file in generations:
        check_table(file, "--generations", ("prompt_token_ids", "token_ids", "response"), "dice generate")
    for file in scores:
        check_table(file, "--scores", ("logp",), "dice score")
    check_table(prompts, "--prompts", ("prompt_id", "messages"), "dice generate (prompts.parquet)")


def check_buffers(buffers: Mapping[str, BufferConfig]) -> dict[str, Path]:
    """The sources of named buffers, by name; DataError where one is a pipe or a device."""
    files = {name: Path(buffer.path) for name, buffer in buffers.items()}
    for name, file in files.items():
        check_input_file(file, f"replay.buffers.{name} (--buffer)", is_source=True)
    return files


def check_oracle_prompts(file: Path | None, prompts: pl.DataFrame | None) -> None:
    """The oracle knows the answers of the synthetic world's prompts alone."""
    from dice_py.synthetic.task import is_prompt

    if file is None or prompts is None:
        raise UsageError("--oracle judges answers to prompts of the synthetic world: give them with --prompts")
    for row, messages in prompts.select("prompt_id", "messages").iter_rows():
        if not is_prompt(messages):
            raise UsageError(
                f"--oracle: prompt {row} of {file} is not of the synthetic world; leave out --oracle, or name the "
                "world's eval_prompts.parquet (dice world shows its folder)"
            )
