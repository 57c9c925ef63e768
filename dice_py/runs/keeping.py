"""What of a run may be removed: by `rounds.keep_models` and `rounds.keep_samples`, or by `dice clean`.

Nothing goes that a later stage of the run reads, or a stage that a resume does again (runs/needed.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dice_py.config.rounds import KeepModels
from dice_py.config.run import RunConfig
from dice_py.errors import DataError, UsageError
from dice_py.runs.best import best_round, stored_outcome
from dice_py.runs.folder import Run, check_plain, is_running, locked, round_name, stage_names
from dice_py.runs.needed import Needed
from dice_py.runs.removal import KINDS, Removable, leftovers, remove, size_of
from dice_py.runs.round_models import TRAINING_STAGES, models_of_round
from dice_py.runs.stored_config import CONFIG_FILE, has_config, stored_config
from dice_py.stages.evaluate import FAILURES
from dice_py.stages.inspect import CREDIT_FAILURE
from dice_py.stages.job import FAILURE
from dice_py.storage.files import Manifest

_FAILURES = (FAILURE, CREDIT_FAILURE, FAILURES)
_WEIGHTS = "*.safetensors"
_WHAT = {"models": "the weights", "samples": "the shards"}


@dataclass(frozen=True)
class Keep:
    """What is kept of the rounds, and who says so."""

    models: KeepModels
    samples: bool
    models_by: str
    samples_by: str

    @classmethod
    def of(cls, config: RunConfig) -> Keep:
        """As the config of a run says."""
        rounds = config.rounds
        samples = "true" if rounds.keep_samples else "false"
        return cls(
            rounds.keep_models,
            rounds.keep_samples,
            f"rounds.keep_models={rounds.keep_models}",
            f"rounds.keep_samples={samples}",
        )


def removable(folder: Path, manifest: Manifest, config: RunConfig, keep: Keep, through: int) -> Iterator[Removable]:
    """The models and samples of the rounds 1 to `through`, which are complete, that need not be kept."""
    if not through:
        return
    needed = Needed(config, through, _done_again(manifest, config, through))
    if keep.models != "all":
        kept = needed.models() | _kept(manifest, keep, through)
        for number in sorted(set(range(1, through + 1)) - kept):
            for place in models_of_round(manifest.data["stages"], round_name(number)):
                files = tuple(sorted(path.name for path in (folder / place).glob(_WEIGHTS) if path.is_file()))
                if files:
                    yield Removable("models", place, keep.models_by, files, number + needed.depth + 1)
    if not keep.samples:
        pool = config.mine.pool_rounds
        for stage, kept in (("generate", needed.samples()), ("score", needed.scores())):
            for number in range(1, through + 1):
                name = f"{round_name(number)}/{stage}"
                files = tuple(_shards(folder, manifest, name)) if number not in kept else ()
                if files:
                    yield Removable("samples", Path(name), keep.samples_by, files, number + pool - 1)


def _done_again(manifest: Manifest, config: RunConfig, through: int) -> tuple[int, ...]:
    """The complete rounds of which a resume does a stage again."""
    stages = stage_names(config)
    return tuple(
        number
        for number in range(1, through + 1)
        if any(_is_done_again(manifest, name) for name in stages if name.startswith(f"{round_name(number)}/"))
    )


def _kept(manifest: Manifest, keep: Keep, through: int) -> set[int]:
    """The rounds whose models are asked for: the last ones, the best one, and the new policy.

    All, where the best is asked for and is not known, as after a benchmark that failed.
    """
    last = keep.models if isinstance(keep.models, int) else 1
    kept = set(range(through - last + 1, through + 1))
    outcome = stored_outcome(manifest.data)
    best = None if outcome is None else best_round(outcome.comparisons)
    if best is None and keep.models == "best":
        return set(range(1, through + 1))
    if outcome is not None:
        kept.add(_number(outcome.policy.parts[0]))
    return kept if best is None else kept | {_number(best)}


def _number(name: str) -> int:
    return int(name.removeprefix("round-"))


def _shards(folder: Path, manifest: Manifest, name: str) -> Iterator[str]:
    """The names of a stage's shards that are there, as the manifest lists them."""
    for made in (manifest.stage(name) or {}).get("files", []):
        file = folder / made["file"]
        if file.suffix == ".parquet" and file.parent == folder / name and file.is_file():
            yield file.name


def _is_done_again(manifest: Manifest, name: str) -> bool:
    """Whether a resume does a stage of a complete round again: it failed, and the run went on without it."""
    entry = manifest.stage(name) or {}
    counts = entry.get("counts", {})
    return entry.get("status") != "done" or any(counts.get(failure) for failure in _FAILURES)


def drop(run: Run, number: int) -> bool:
    """Removes what the settings of a run do not keep of its rounds up to `number`, which has just ended.

    Returns:
        Whether anything was removed.
    """
    items = removable(run.folder, run.manifest, run.config, Keep.of(run.config), number)
    removed = remove(run.folder, run.manifest, items)
    for item in removed:
        run.report("removed", place=str(item.place), kind=item.kind, by=item.by)
        run.report("note", text=f"{_WHAT[item.kind]} of {item.place} are removed ({item.by})")
    return bool(removed)


def clean(
    folder: Path, *, models: KeepModels | None = None, samples: bool | None = None, dry_run: bool = False
) -> dict[str, Any]:
    """Removes of a run that no process works in what its settings, or the arguments, do not keep.

    Always removed: checkpoints of trainings that are done, temporary files, and files that were set aside as damaged.

    Args:
        models, samples: in place of rounds.keep_models and rounds.keep_samples.
        dry_run: nothing is removed.

    Returns:
        `run`, `dry_run`; `bytes` by kind (removal.KINDS); `freed`, their sum; `removed`: `place`, `kind` and `bytes`
        of each; `kept`: None, or why models and samples were all kept.

    Raises:
        UsageError: the folder holds no run, or a process works in it, or it has links; or the best model is to be kept,
            and the rounds were not compared.
        DataError: its manifest is damaged.
    """
    if not (folder / CONFIG_FILE).is_file() and not has_config(folder):
        raise UsageError(f"{folder} holds no run (no {CONFIG_FILE}); `dice status` lists those under runs/")
    if not dry_run:
        with locked(folder):
            return _clean(folder, models, samples, False)
    check_plain(folder, links=False)
    if is_running(folder):
        raise UsageError(f"{folder} is in use by another `dice` process; wait for it, or stop it")
    return _clean(folder, models, samples, True)


def _clean(folder: Path, models: KeepModels | None, samples: bool | None, dry_run: bool) -> dict[str, Any]:
    config, _ = stored_config(folder)
    manifest = Manifest(folder / "manifest.json")
    if manifest.is_damaged:
        raise DataError(f"{manifest.path} is damaged; `dice resume {folder}` makes it again")
    keep = Keep.of(config)
    keep = Keep(
        keep.models if models is None else models,
        keep.samples if samples is None else samples,
        keep.models_by if models is None else f"dice clean --keep-models {models}",
        keep.samples_by if samples is None else "dice clean --no-samples",
    )
    if models == "best":
        _check_compared(folder, manifest)
    through = _complete_rounds(manifest, config)
    asked = keep.models != "all" or not keep.samples
    kept = None
    if asked and not through:
        kept = (
            f"no round is known to be complete with the settings of {folder}, so that a resume may need all models and "
            "samples: they are kept. Resume the run, and clean it then"
        )
    items = [*removable(folder, manifest, config, keep, through), *_checkpoints(folder, manifest)]
    complete = {item.place for item in items if not item.files}
    items += [item for item in leftovers(folder) if complete.isdisjoint(item.place.parents)]
    sizes = {item.place: size_of(folder, item) for item in items}
    removed = items if dry_run else remove(folder, manifest, items)
    bytes_by_kind = {kind: sum(sizes[item.place] for item in removed if item.kind == kind) for kind in KINDS}
    return {
        "run": str(folder),
        "dry_run": dry_run,
        "bytes": bytes_by_kind,
        "freed": sum(bytes_by_kind.values()),
        "removed": [{"place": str(item.place), "kind": item.kind, "bytes": sizes[item.place]} for item in removed],
        "kept": kept,
    }


def _check_compared(folder: Path, manifest: Manifest) -> None:
    outcome = stored_outcome(manifest.data)
    if outcome is None or not outcome.comparisons:
        raise UsageError(
            f"--keep-models best: the rounds of {folder} were not compared, so that none is known to be the best. Give "
            "the number of rounds whose models are kept; or compare them, for which nothing is made again: dice resume "
            f"{folder} --set rounds.keep_models=best"
        )


def _complete_rounds(manifest: Manifest, config: RunConfig) -> int:
    """How many rounds the run has gone through with its settings of now, so that a resume makes none of them again."""
    outcome = stored_outcome(manifest.data)
    if outcome is None:
        return 0
    if outcome.through is not None:
        return min(outcome.through, config.rounds.count)
    # An earlier version did not note it: all or none.
    last = config.rounds.count if outcome.ended_after is None else outcome.ended_after
    done = all((manifest.stage(name) or {}).get("status") == "done" for name in stage_names(config, last))
    return last if done else 0


def _checkpoints(folder: Path, manifest: Manifest) -> Iterator[Removable]:
    """The checkpoints of trainings that are done."""
    for place in sorted(each for stage in TRAINING_STAGES for each in folder.glob(f"round-*/{stage}/checkpoints")):
        name = str(place.parent.relative_to(folder))
        if (manifest.stage(name) or {}).get("status") == "done":
            yield Removable("checkpoints", place.relative_to(folder), "dice clean")
