"""What rounds.keep_models and rounds.keep_samples free of the disk when a round of a planned run ends."""

from __future__ import annotations

from typing import Any

from dice_py.config.run import RunConfig
from dice_py.runs.needed import Needed
from dice_py.runs.round_models import MODEL_STAGES

_SAMPLES = ("generate", "score")


def add_freed(stages: dict[str, dict[str, Any]], config: RunConfig) -> None:
    """Adds `freed_disk_bytes` to the entry of each round's last stage, by the rules of runs/keeping.py.

    Args:
        stages: in order of work, by name ("round-01/generate"), with `disk_bytes`.
    """
    gone: set[str] = set()
    for through in range(1, config.rounds.count + 1):
        freed = _removed(config, through) - gone
        gone |= freed
        last = [name for name in stages if name.startswith(f"round-{through:02d}/")][-1]
        stages[last]["freed_disk_bytes"] = sum(stages[name]["disk_bytes"] for name in freed if name in stages)


def _removed(config: RunConfig, through: int) -> set[str]:
    """The stages whose models or shards are gone when round `through` has ended.

    Which round is the best is not known before: the first one stands for it.
    """
    needed, keep, rounds = Needed(config, through), config.rounds, range(1, through + 1)
    removed = set()
    if keep.keep_models != "all":
        last = keep.keep_models if isinstance(keep.keep_models, int) else 1
        kept = needed.models() | set(range(through - last + 1, through + 1)) | ({1} if keep.are_compared else set())
        removed |= {f"round-{number:02d}/{stage}" for number in rounds if number not in kept for stage in MODEL_STAGES}
    if not keep.keep_samples:
        for stage, samples in zip(_SAMPLES, (needed.samples(), needed.scores()), strict=True):
            removed |= {f"round-{number:02d}/{stage}" for number in rounds if number not in samples}
    return removed
