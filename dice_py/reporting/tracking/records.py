"""What trackers are told of a run: the trainer's log entries, each stage's counts, and a table of sample pairs.

All of it is read from the run folder, which a `Follower` follows while another process works in it. The rounds share
one axis, the optimizer steps: a round begins where the one before ended. What a resumed run kept is read again from the
start, so the records of a session are those of a run that was never stopped.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polars.exceptions import PolarsError

from dice_py.errors import DataError
from dice_py.reporting.foreign_text import markdown_text, visible
from dice_py.runs.event_log import Event, EventTail
from dice_py.runs.round_models import TRAINING_STAGES
from dice_py.storage.files import Manifest
from dice_py.storage.parquet import read_parquet
from dice_py.training.log import read_training_log

AFTER_TRAINING = ("extrapolate", "evaluate", "benchmark")
"""Stages that stand at the end of their round's steps; the others stand at its beginning."""

SAMPLES = "samples"
"""Name of the table of sample pairs."""

_SAMPLE_COLUMNS = ["pair_id", "source", "prompt", "chosen", "rejected", "chosen_reward", "rejected_reward"]
_SAMPLE_PAIRS = 5
_SAMPLE_TEXT = 100
"""Characters of a prompt or response in the table."""
_MOST_METRICS = 300  # of one stage
_NAME = 120  # characters of a metric's name


Row = dict[str, Any]
Identity = tuple[str, str, int, tuple[str, ...]]


@dataclass(frozen=True)
class Record:
    """Numbers of one stage at one step."""

    stage: str
    """Such as "round-01/train"."""
    key: str
    """The key of the stage. Under another one it has been made again, with other settings."""
    step: int
    """Optimizer steps since the run began."""
    metrics: dict[str, float]
    table: list[Row] = field(default_factory=list)
    """Rows of the table `SAMPLES`; each value is a number, or a text that is safe in Markdown."""

    @property
    def identity(self) -> Identity:
        """What a tracker must not be told twice."""
        return self.stage, self.key, self.step, tuple(sorted(self.metrics))


class Follower:
    """Reads a run folder from the beginning of one process's work in it."""

    def __init__(self, folder: Path, process: int) -> None:
        """`process`: the id of the process that works in the folder. The events before its start are not of it."""
        self._folder = folder
        self._process = process
        self._started = False
        self._events = EventTail(folder / "events.jsonl")
        self._training: str | None = None
        self._taken: set[Identity] = set()
        self._steps: dict[str, int] = {}
        """Steps of each training, by the name of its stage."""

    def poll(self) -> list[Record]:
        """The records that have come since the last call."""
        found: list[Record] = []
        for event in self._events.new():
            if event["event"] == "started":
                self._started = event.get("pid") == self._process
            elif event["event"] == "stage" and self._started:
                found += self._of_stage(event)
        if self._training is not None:
            found += self._of_training(self._training)
        fresh = []
        for record in found:
            if record.identity not in self._taken:
                self._taken.add(record.identity)
                fresh.append(record)
        return fresh

    def _of_stage(self, event: Event) -> list[Record]:
        name, counts = event.get("stage"), event.get("counts")
        if not isinstance(name, str) or name.count("/") != 1:
            return []
        stage = name.split("/")[1]
        if event.get("status") == "running":
            self._training = name if stage in TRAINING_STAGES else None
            return []
        found: list[Record] = []
        if stage in TRAINING_STAGES:
            self._training = None
            found += self._of_training(name)
        if not isinstance(counts, dict):
            return found
        if stage in TRAINING_STAGES and isinstance(counts.get("steps"), int):
            self._steps[name] = counts["steps"]
        metrics = flat_numbers(stage, {"seconds": event.get("seconds"), **counts})
        step = self._step_before(name)
        if stage in TRAINING_STAGES:
            step += self._steps.get(name, 0)
        table = sample_table(self._folder / name / "pairs.parquet") if stage == "inspect" else []
        return [*found, Record(name, self._key(name), step, metrics, table)]

    def _of_training(self, name: str) -> list[Record]:
        """The log of a trainer, under the names that transformers gives its entries."""
        key, before, prefix = self._key(name), self._step_before(name), name.split("/")[1]
        return [
            Record(name, key, before + entry["step"], {f"{prefix}/{of}": entry[of] for of in entry if of != "step"})
            for entry in read_training_log(self._folder / name, key)
        ]

    def _step_before(self, name: str) -> int:
        """Steps of all trainings before a stage."""
        place = _place(name)
        return sum(steps for training, steps in self._steps.items() if _place(training) < place)

    def _key(self, name: str) -> str:
        return str((Manifest(self._folder / "manifest.json").stage(name) or {}).get("key"))


def _place(name: str) -> tuple[int, str, int]:
    """The place of a stage among all others: its round, and whether it comes before, in, or after the trainings."""
    round_name, stage = name.split("/")
    if stage in TRAINING_STAGES:
        return len(round_name), round_name, 1 + TRAINING_STAGES.index(stage)
    return len(round_name), round_name, 1 + len(TRAINING_STAGES) if stage in AFTER_TRAINING else 0


def flat_numbers(prefix: str, value: Any) -> dict[str, float]:
    """The finite numbers of nested counts, by names such as "mine/dropped/cut_off"; an interval has two of them."""
    found: dict[str, float] = {}

    def add(name: str, item: Any) -> None:
        if isinstance(item, dict):
            for key, inner in item.items():
                add(f"{name}/{key}", inner)
        elif isinstance(item, list) and len(item) == 2 and name.endswith("_ci95"):
            add(f"{name}/low", item[0])
            add(f"{name}/high", item[1])
        elif _is_number(item) and len(found) < _MOST_METRICS:
            found[visible(name).replace("\n", " ")[:_NAME]] = float(item)

    add(prefix, value)
    return found


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def sample_table(file: Path) -> list[Row]:
    """A handful of a round's inspected pairs, over all of the file, with texts cut; none without the file."""
    try:
        frame = read_parquet(file, _SAMPLE_COLUMNS)
    except (OSError, DataError, PolarsError):
        return []
    every = max(1, frame.height // _SAMPLE_PAIRS)
    rows = []
    for pair in frame.gather_every(every).head(_SAMPLE_PAIRS).iter_rows(named=True):
        texts = {"pair": pair["pair_id"] or "", "source": pair["source"] or ""}
        texts |= {name: _text_of(pair[name]) for name in ("prompt", "chosen", "rejected")}
        rewards = {name: pair[name] for name in ("chosen_reward", "rejected_reward") if _is_number(pair[name])}
        rows.append({name: markdown_text(text, _SAMPLE_TEXT) for name, text in texts.items()} | rewards)
    return rows


def _text_of(messages: list[dict[str, Any]] | None) -> str:
    """The last message: of a prompt what was asked, of a response all of it."""
    return str(messages[-1]["content"] or "") if messages else ""


def markdown_table(rows: list[Row]) -> str:
    """The rows of `sample_table` as a table in Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    for row in rows:
        cells = (row.get(name, "") for name in names)
        lines.append(" | ".join(f"{cell:.4g}" if isinstance(cell, float) else cell for cell in cells))
    return "\n".join(f"| {line} |" for line in lines)


def config_text(values: dict[str, Any]) -> str:
    """The settings of a run as a block of code in Markdown."""
    text = visible(json.dumps(values, indent=2, default=str, ensure_ascii=True))
    return "\n".join(f"    {line}" for line in text.splitlines())
