"""What a report reads of a run folder. What is absent, damaged or older becomes a sentence, and never an error.

A report is written after each round of a run of hours, and of runs that were stopped, copied or damaged: it shows what
is there, and says what is not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.config.run import RunConfig
from dice_py.errors import DiceError, UsageError
from dice_py.runs.best import StoredOutcome, stored_outcome
from dice_py.runs.folder import check_plain, is_running, round_name, stage_names
from dice_py.runs.removal import removed_list, removed_text
from dice_py.runs.round_models import TRAINING_STAGES, training_stages
from dice_py.runs.stored_config import CONFIG_FILE, has_config, stored_config
from dice_py.stages.benchmark import benchmark_metrics
from dice_py.stages.job import SKIPPED
from dice_py.storage.digests import file_state
from dice_py.storage.files import Manifest, read_json
from dice_py.storage.integrity import check_intact
from dice_py.storage.parquet import UNREADABLE, read_parquet
from dice_py.storage.schemas import INSPECTED_PAIRS, fit
from dice_py.training.log import read_training_log

_STAGE = re.compile(r"(round-\d{2,})/(\w+)")


@dataclass(frozen=True)
class StoredRound:
    """The artifacts of one round, as far as they are there."""

    name: str
    stages: dict[str, dict[str, Any]]
    """The manifest's entries by stage, in order of work."""
    metrics: dict[str, Any] | None
    """Of the evaluation and of the user's benchmark."""
    mining: dict[str, Any] | None
    distributions: dict[str, Any] | None
    log: list[dict[str, Any]]
    """Entries of the trainer's log."""
    reinforcement_log: list[dict[str, Any]] = field(default_factory=list)
    """The same of stage 2 of train.method=mpo."""

    @property
    def number(self) -> int:
        """The round, from 0 for that which makes the policy."""
        return int(self.name.removeprefix("round-"))


@dataclass(frozen=True)
class StoredRun:
    """A run as its folder has it."""

    folder: Path
    name: str
    """How the page calls it."""
    data: dict[str, Any]
    """The manifest."""
    config: RunConfig | None
    rounds: list[StoredRound]
    outcome: StoredOutcome | None
    state: str
    """As of `dice status`: "finished", "running" or "stopped"; "unknown" without a config."""
    planned: dict[str, list[str]]
    """The stages of each round that the config asks for."""
    problems: list[str] = field(default_factory=list)
    """What cannot be shown, and why, as sentences."""
    removed: list[str] = field(default_factory=list)
    """What was removed to free its space, as sentences."""

    def pairs(self) -> pl.DataFrame | None:
        """The pairs to read of all rounds (storage.schemas.INSPECTED_PAIRS); None where there are none.

        What cannot be read is added to `problems`.
        """
        frames = []
        for each in self.rounds:
            file = self.folder / each.name / "inspect" / "pairs.parquet"
            try:
                if not file.exists():
                    continue
                check_intact([file])
                frames.append(fit(read_parquet(file), INSPECTED_PAIRS))
            except (DiceError, *UNREADABLE):
                self.problems.append(_again(self.folder, f"{each.name}/inspect/pairs.parquet cannot be read"))
        return pl.concat(frames, how="vertical_relaxed") if frames else None


def check_run_folder(folder: Path) -> None:
    """Raises UsageError if a folder holds no run, or something that would be waited for, such as a pipe."""
    if not (folder / CONFIG_FILE).is_file() and not has_config(folder):
        raise UsageError(f"{folder} holds no run (no {CONFIG_FILE}); `dice status` lists those under runs/")
    check_plain(folder, links=True)


def read_run(folder: Path, name: str) -> StoredRun:
    """Reads what a report shows of a run folder, the pairs excepted.

    Args:
        name: how the page calls the run.
    """
    manifest = Manifest(folder / "manifest.json")
    problems = []
    if manifest.is_damaged:
        problems.append(_again(folder, "manifest.json is damaged, so stages, times and warnings are not known"))
    config = _config(folder, problems)
    outcome = stored_outcome(manifest.data)
    names = _round_names(folder, manifest)
    if outcome is not None and outcome.ended_after is not None:
        # Later rounds are left over of other settings.
        names = [each for each in names if each <= round_name(outcome.ended_after)]
    planned: dict[str, list[str]] = {}
    if config is not None:
        for stage in stage_names(config, None if outcome is None else outcome.ended_after):
            planned.setdefault(stage.split("/")[0], []).append(stage.split("/")[1])
    run = StoredRun(folder, name, manifest.data, config, [], outcome, _state(folder, manifest, planned), planned)
    run.problems.extend(problems)
    run.removed.extend(map(removed_text, removed_list(folder)))
    run.rounds.extend(_read_round(run, each) for each in names)
    return run


def _config(folder: Path, problems: list[str]) -> RunConfig | None:
    try:
        config, problem = stored_config(folder)
    except (DiceError, OSError) as error:
        problems.append(f"the config is not known: {error}")
        return None
    if problem is not None:
        problems.append(f"{CONFIG_FILE} {problem}; the manifest's copy is shown")
    return config


def _round_names(folder: Path, manifest: Manifest) -> list[str]:
    named = {found[1] for name in manifest.data["stages"] if (found := _STAGE.fullmatch(name))}
    if manifest.is_damaged:
        named |= {path.name for path in folder.glob("round-*") if _STAGE.fullmatch(f"{path.name}/x")}
    return sorted(named)


def _state(folder: Path, manifest: Manifest, planned: dict[str, list[str]]) -> str:
    if not planned:
        return "unknown"
    names = [f"{name}/{stage}" for name, stages in planned.items() for stage in stages]
    if all((manifest.stage(name) or {}).get("status") == "done" for name in names):
        return "finished"  # also for the process of the run itself, after its last stage
    return "running" if is_running(folder) else "stopped"


def _read_round(run: StoredRun, name: str) -> StoredRound:
    entries = run.data["stages"]
    stages = {
        found[2]: entry for key, entry in entries.items() if (found := _STAGE.fullmatch(key)) and found[1] == name
    }
    order = run.planned.get(name, [])
    stages = {stage: stages[stage] for stage in (*order, *stages) if stage in stages}
    is_done = {stage for stage, entry in stages.items() if entry.get("status") == "done"}

    def stored(stage: str, file: str) -> dict[str, Any] | None:
        path = run.folder / name / stage / file
        value = _read(path)
        if value is None and path.exists():
            run.problems.append(_again(run.folder, f"{name}/{stage}/{file} is damaged"))
        elif value is None and stage in is_done:
            run.problems.append(_again(run.folder, f"{name}/{stage}/{file} is missing"))
        return value

    metrics = stored("evaluate", "metrics.json")
    benchmark = stored("benchmark", "benchmark.json")
    if metrics is not None and benchmark is not None and isinstance(benchmark.get("metrics"), dict):
        metrics |= benchmark_metrics(benchmark)
    asked = TRAINING_STAGES if run.config is None else training_stages(run.config)
    log, reinforcement_log = (_log(run.folder / name / stage) if stage in asked else [] for stage in TRAINING_STAGES)
    if not log and "train" in is_done and SKIPPED not in stages["train"].get("counts", {}):
        run.problems.append(
            f"{name} has no log of its training: an earlier version made it, or the file cannot be read"
        )
    if "mine" in is_done and "inspect" not in stages:
        run.problems.append(
            f"{name} has no distributions of its mining and no pairs to read: an earlier version made it, or its stage "
            f"inspect is still to come (dice resume {run.folder})"
        )
    mining = stored("mine", "mining.json")
    return StoredRound(name, stages, metrics, mining, stored("inspect", "distributions.json"), log, reinforcement_log)


def _log(folder: Path) -> list[dict[str, Any]]:
    try:
        return read_training_log(folder)
    except OSError:
        return []


def _again(folder: Path, what: str) -> str:
    return f"{what}: `dice resume {folder}` makes it again"


def _read(file: Path) -> dict[str, Any] | None:
    """A JSON file of a stage, also of an older version, which wrote no digest; None if it is absent or damaged."""
    try:
        value = read_json(file) if file_state(file) in ("intact", "unmarked") else None
    except (DiceError, OSError):
        return None
    return value if isinstance(value, dict) else None
