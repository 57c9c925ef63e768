"""What `dice audit --run` takes from a run folder: the models of the reward after a round, and the held-out pairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dice_py.config.run import RunConfig
from dice_py.errors import DataError, UsageError
from dice_py.runs.folder import check_plain, round_name
from dice_py.runs.round_models import model_stages, models_of_round
from dice_py.runs.stored_config import CONFIG_FILE, has_config, stored_config
from dice_py.storage.files import Manifest
from dice_py.storage.parquet import parquet_key
from dice_py.storage.removed import check_not_removed
from dice_py.synthetic.world import World


@dataclass(frozen=True)
class AuditedRound:
    """The reward after a round: that of the pairs of the next one."""

    number: int
    """0: the start of the run."""
    policy: Path
    references: dict[str, Path]
    """By role: "previous", that of the reward, and "initial", the run's first one."""
    pairs: Path | None
    """The held-out pairs; None: the run has none."""
    config: RunConfig


def audited_round(folder: Path, number: int | None) -> AuditedRound:
    """The reward after round `number` of a run. Nothing is changed.

    Args:
        number: None: the last round whose training is done, or the start if there is none.

    Raises:
        UsageError: the folder holds no run, or the run has not made that round.
        DataError: its manifest is damaged, or a model is gone (RemovedError: to free its space).
    """
    if not (folder / CONFIG_FILE).is_file() and not has_config(folder):
        raise UsageError(f"--run: {folder} holds no run (no {CONFIG_FILE}); `dice status` lists those under runs/")
    check_plain(folder, links=True)
    config, _ = stored_config(folder)
    manifest = Manifest(folder / "manifest.json")
    if manifest.is_damaged:
        raise DataError(f"{manifest.path} is damaged; `dice resume {folder}` makes it again")
    start, reference = _start(folder, config, manifest.data)
    policies = [start]
    while (policy := _policy_of(folder, manifest, config, len(policies))) is not None:
        policies.append(policy)
    last = len(policies) - 1
    if number is None:
        number = last
    if not 0 <= number <= last:
        made = f"rounds 0 (its start) to {last}" if last else "round 0, its start,"
        raise UsageError(f"--round {number}: {folder} has {made} alone so far")
    previous = policies[number - 1] if number and config.reward_reference == "previous" else reference
    for role, model in (("policy", policies[number]), ("previous", previous), ("initial", reference)):
        check_not_removed(model)
        if not model.is_dir():
            raise DataError(f"the {role} of round {number}, {model}, is gone; `dice resume {folder}` makes it again")
    models = config.model.model_copy(update={"template_time": _template_time(config, manifest.data)})
    inputs = folder / "inputs"
    pairs = World(inputs / "world").eval_pairs if config.is_world else inputs / "eval_pairs.parquet"
    return AuditedRound(
        number,
        policies[number],
        {"previous": previous, "initial": reference},
        pairs if parquet_key(pairs) is not None else None,
        config.model_copy(update={"model": models}),
    )


def _start(folder: Path, config: RunConfig, data: dict[str, Any]) -> tuple[Path, Path]:
    """The policy that the rounds start from, and the reference of the first one."""
    if config.is_world:
        world = World(folder / "inputs" / "world")
        return world.policy, world.reference
    try:
        policy, reference = (Path(data[role]["folder"]) for role in ("policy", "reference"))
    except (KeyError, TypeError):
        raise UsageError(
            f"--run: {folder} has no models yet; wait until its first round, or name models and a file"
        ) from None
    own = folder / round_name(0) / "train" / "model"
    return own if config.has_round_zero else policy, reference


def _policy_of(folder: Path, manifest: Manifest, config: RunConfig, number: int) -> Path | None:
    """The new policy of a round; None while it has none, or if the run has fewer rounds."""
    if number > config.rounds.count:
        return None
    name = round_name(number)
    stages = model_stages(config)
    if any((manifest.stage(f"{name}/{stage}") or {}).get("status") != "done" for stage in stages):
        return None
    models = models_of_round(manifest.data["stages"], name, stages)
    return folder / models[-1] if models else None


def _template_time(config: RunConfig, data: dict[str, Any]) -> str | None:
    stored = data.get("template_time")
    return config.model.template_time or (stored if isinstance(stored, str) else None)
