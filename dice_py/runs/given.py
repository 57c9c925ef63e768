"""The given responses of a run (generate.from_files): read and checked, as copies in `inputs/`.

Like the copies of the data (runs/own_data.py), they keep the digest of their files: a run goes on without these.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dice_py.config.prompt_settings import PromptSettings
from dice_py.config.run import RunConfig
from dice_py.data import prompt_key
from dice_py.errors import DataError
from dice_py.generation.given import GIVEN, GivenReading, read_given
from dice_py.rows.file_kinds import check_file
from dice_py.storage.integrity import is_kept
from dice_py.storage.keys import digest, file_digest, versions
from dice_py.storage.parquet import intact_key, parquet_key, parquet_meta, read_parquet, write_parquet
from dice_py.storage.schemas import PROMPTS_READ

if TYPE_CHECKING:
    from dice_py.runs.folder import Run


def given_reading(run: Run) -> GivenReading:
    """How the settings of a run have the files read."""
    data = run.config.data
    complete = PromptSettings.of(run.config).complete
    return GivenReading(data.prompt_column, data.bad_rows, data.ignored_keys, complete, run.report)


def given_files(config: RunConfig) -> list[Path]:
    """The files that generate.from_files names, in its order; those of a pattern sorted by name.

    Raises:
        DataError: a file is not there or of a kind that is not read, or a pattern matches none.
    """
    files: dict[Path, None] = {}
    for pattern in config.generate.from_files or []:
        path = Path(pattern)
        is_pattern = any(sign in pattern for sign in "*?[") and not path.is_file()
        found = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor)))) if is_pattern else [path]
        if not found:
            raise DataError(f"generate.from_files (--generations): no file matches {pattern}")
        for file in found:
            check_file(file)
            files[file] = None
    return list(files)


def given_content(config: RunConfig, stored: str | None) -> str:
    """The digest of the files; `stored` where one of them is gone."""
    try:
        return digest("given", [file_digest(file) for file in given_files(config)])
    except DataError:
        if stored is None:
            raise
        return stored


def own_generations(
    run: Run, prompts: Path, eval_prompts: Path | None, eval_pairs: Path | None
) -> tuple[Path, Path] | None:
    """Brings the run's copies of the given responses, and of the prompts that they answer, up to date.

    Args:
        prompts, eval_prompts, eval_pairs: of the run.

    Returns:
        Both files, `inputs/generations.parquet` and `inputs/generated-prompts.parquet`; None where no files are given.

    Raises:
        DataError: a file is gone, and the copies are not whole; or a row cannot be used.
    """
    if run.config.generate.from_files is None:
        return None
    folder = run.folder / "inputs"
    responses, asked = folder / "generations.parquet", folder / "generated-prompts.parquet"
    content = given_content(run.config, _stored_content(responses))
    held = [parquet_key(file) if file is not None else None for file in (prompts, eval_prompts, eval_pairs)]
    data = run.config.data
    rows = [data.prompt_column, data.on_bad_row, data.max_bad_rows, data.ignored_keys]
    key = digest("given generations", content, held, rows, versions("polars"))
    kept = [is_kept(file, key, run.report) for file in (responses, asked)]  # each damaged one is set aside
    if all(kept):
        return responses, asked
    files = given_files(run.config)  # one that is gone is needed now
    known = read_parquet(prompts)
    out = [] if eval_prompts is None else read_parquet(eval_prompts)["messages"].to_list()
    keys = {prompt_key(messages) for messages in out}
    if eval_pairs is not None and not run.config.is_world:
        keys |= set(read_parquet(eval_pairs, ["key"])["key"])
    next_id = int(known["prompt_id"].max() or 0) + 1  # type: ignore[arg-type]
    if eval_prompts is not None and run.config.data.eval_prompts is None and not run.config.is_world:
        # Drawn from the same file, whose numbers they keep.
        next_id = max(next_id, int(read_parquet(eval_prompts, ["prompt_id"])["prompt_id"].max() or 0) + 1)  # type: ignore[arg-type]
    given, answered = read_given(files, known, keys, given_reading(run), next_id=next_id)
    write_parquet(asked, answered, key=key, schema=PROMPTS_READ)
    write_parquet(responses, given, key=key, schema=GIVEN, meta={"content": content})
    run.report("note", text=f"given: {given.height} responses to {answered.height} prompts ({len(files)} files)")
    return responses, asked


def _stored_content(copy: Path) -> str | None:
    """The digest of the files that a whole copy was made from."""
    meta = parquet_meta(copy) if intact_key(copy) is not None else None
    return str(meta["content"]) if isinstance(meta, dict) and "content" in meta else None
