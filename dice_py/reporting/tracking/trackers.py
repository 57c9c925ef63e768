"""TensorBoard and Trackio, by their own writers. Imports neither torch nor transformers.

A session of a run passes all of its records from the beginning, also those of what it kept (records.py):

    TensorBoard   gets a new event file each time. It opens with a restart at step 0, by which TensorBoard drops what it
                  has read before. Older event files in the run folder are removed.
    Trackio       cannot forget a step. What it has been told is kept in `trackio.jsonl`, and not told again. When a
                  stage has been made again with other settings, a new run begins, "NAME-2", with all that holds.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Protocol

from dice_py.reporting.foreign_text import visible
from dice_py.reporting.tracking.records import SAMPLES, Identity, Record, config_text, markdown_table

PLACE = "tracking"
"""The folder of a run for what its trackers keep."""


class Tracker(Protocol):
    """What a run's records go to."""

    def add(self, record: Record) -> None:
        """Takes a record. It has its place on disk, or in a queue of the tracker's own."""

    def close(self) -> None:
        """Waits until all is written."""


def run_name(folder: Path, options: dict[str, Any]) -> str:
    """The name of a run in a tracker: train.trainer_args.run_name, else that of its folder."""
    name = options.get("run_name") or folder.resolve().name or "run"
    return " ".join(visible(str(name)).split())[:100]


class TensorBoard:
    """An event file in `RUN/tracking/tensorboard`, or in a folder of the run's name in $TENSORBOARD_LOGGING_DIR."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        elsewhere = os.environ.get("TENSORBOARD_LOGGING_DIR")
        options = config["train"]["trainer_args"]
        own = folder / PLACE / "tensorboard"
        place = Path(elsewhere).expanduser() / run_name(folder, options).replace("/", "-") if elsewhere else own
        earlier = list(own.glob("events.out.tfevents.*")) if place == own else []
        self._writer = EventFileWriter(str(place))
        self._event(step=0, session_log=SessionLog(status=SessionLog.START))
        self._text("config", config_text(config), 0)
        self._writer.flush()
        for file in earlier:
            file.unlink()

    def _event(self, *, step: int, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time.time(), step=step, **content))

    def _text(self, tag: str, text: str, step: int) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._event(step=step, summary=text_pb(tag, text))

    def add(self, record: Record) -> None:
        """Scalars, and the table as text."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in record.metrics.items()]
        self._event(step=record.step, summary=Summary(value=values))
        if record.table:
            self._text(SAMPLES, markdown_table(record.table), record.step)
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class Trackio:
    """A run in Trackio's project "dice", or train.trainer_args.project."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self._config = config
        self._options = config["train"]["trainer_args"]
        self._base = run_name(folder, self._options)
        self._file = folder / PLACE / "trackio.jsonl"
        self._records: list[Record] = []
        self._number, self._told = _told_before(self._file)
        self._begin(resume="allow" if self._told else "never")

    def _begin(self, resume: str) -> None:
        import trackio

        trackio.init(
            project=str(self._options.get("project") or "dice"),
            name=self._base if self._number == 1 else f"{self._base}-{self._number}",
            config=self._config,
            resume=resume,
            space_id=self._options.get("trackio_space_id"),
            bucket_id=self._options.get("trackio_bucket_id"),
            private=self._options.get("hub_private_repo"),
            auto_log_cpu=False,
        )

    def add(self, record: Record) -> None:
        """Logs what Trackio has not been told; in a new run, all that came before, too."""
        self._records.append(record)
        if any(stage == record.stage and key != record.key for stage, key, *_ in self._told):
            self.close()
            self._number, self._told = self._number + 1, set()
            self._note({"run": self._number})
            self._begin(resume="never")
        for each in self._records if not self._told else [record]:
            if each.identity not in self._told:
                self._log(each)

    def _log(self, record: Record) -> None:
        import trackio

        values: dict[str, Any] = dict(record.metrics)
        if record.table:
            columns = list(dict.fromkeys(name for row in record.table for name in row))
            rows = [[row.get(name) for name in columns] for row in record.table]
            values[SAMPLES] = trackio.Table(columns=columns, data=rows)
        trackio.log({**values, "train/global_step": record.step}, step=record.step)
        self._told.add(record.identity)
        self._note({"stage": record.stage, "key": record.key, "step": record.step, "names": sorted(record.metrics)})

    def _note(self, value: dict[str, Any]) -> None:
        with self._file.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(value) + "\n")

    def close(self) -> None:
        """Waits until Trackio has written what is in its queue."""
        import trackio

        trackio.finish()


def _told_before(file: Path) -> tuple[int, set[Identity]]:
    """The number of the run that is being told, and the identities of its records."""
    number = 1
    told: set[Identity] = set()
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        lines = []
    for line in lines:
        try:
            value = json.loads(line)
            if "run" in value:
                number, told = int(value["run"]), set()
            else:
                told.add((str(value["stage"]), str(value["key"]), int(value["step"]), tuple(value["names"])))
        except (ValueError, TypeError, LookupError):  # a line that a kill cut short: it is told again
            continue
    return number, told


TRACKERS: dict[str, type[TensorBoard] | type[Trackio]] = {"tensorboard": TensorBoard, "trackio": Trackio}
