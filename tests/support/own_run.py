"""A run on a user's own tiny models and data: its config, its events and its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.compute.worker import Worker, work_name
from dice_py.config.loading import resolve
from dice_py.config.run import RunConfig
from dice_py.stages.job import StageResult
from dice_py.stages.registry import ROUND_STAGES

PROMPTS, PAIRS, SAMPLES, MAX_NEW, STEPS = 24, 30, 4, 64, 6
STAGE_NAMES = [f"round-01/{stage}" for stage in ROUND_STAGES]
SMALL = {
    "rounds": 1,
    "model": {"device": "cpu", "dtype": "float32"},
    "generate": {
        "engine": "transformers",
        "samples": SAMPLES,
        "max_new_tokens": MAX_NEW,
        "shard_prompts": 8,
    },
    # Sums that come with the samples differ in their last digits when a resume samples beside other rows.
    "score": {"policy_logps": "recompute"},
    "train": {
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "max_steps": STEPS,
        "save_steps": 2,
        "batch_size": 8,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
    },
    "evaluate": {"prompts": 2, "samples": 1, "pairs": 3},
}


class Events:
    """Keeps the reported events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))

    def stages(self) -> list[tuple[str, str]]:
        """(stage, status), in order."""
        return [(fields["stage"], fields["status"]) for event, fields in self.events if event == "stage"]


KEPT = [(name, "kept") for name in STAGE_NAMES]


def turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def own_config(folder: Path, make: Callable[..., Path], *assignments: str) -> RunConfig:
    """Two models and their data, made in `folder`: rows are text and messages by turns, as TRL takes both."""
    policy, reference = make(folder / "policy", seed=1), make(folder / "reference", seed=2)
    prompts = [f"question number {n}" for n in range(PROMPTS)]
    asked: list[dict[str, Any]] = [{"prompt": text if n % 2 else turn("user", text)} for n, text in enumerate(prompts)]
    pairs: list[dict[str, Any]] = []
    for n in range(PAIRS):
        prompt, chosen, rejected = f"offline question {n}", f"good {n}", f"a bad answer {n}"
        pairs.append(
            {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            if n % 2
            else {
                "prompt": turn("user", prompt),
                "chosen": turn("assistant", chosen),
                "rejected": turn("assistant", rejected),
            }
        )
    for name, rows in (("prompts", asked), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    named = [
        f"model.policy={policy}",
        f"model.reference={reference}",
        f"data.prompts={folder / 'prompts.jsonl'}",
        f"data.replay={folder / 'pairs.jsonl'}",
    ]
    return resolve([], [*named, *assignments], SMALL)


def frames(folder: Path, pattern: str) -> pl.DataFrame:
    files = sorted((folder / "round-01").glob(pattern))
    assert files
    return pl.concat([pl.read_parquet(file) for file in files])


def no_worker(work: Any, *, warm: Worker | None = None, **_: Any) -> Any:
    """In place of `run_in_subprocess`, where no stage may need a process."""
    if warm is not None:
        warm.stop()
    raise AssertionError(f"a worker was started: {work_name(work)}")


def only_preflight(work: Any, **given: Any) -> Any:
    """In place of `run_in_subprocess`, where no stage but the check before a run may need a process."""
    return StageResult([], {}) if "preflight" in work_name(work) else no_worker(work, **given)
