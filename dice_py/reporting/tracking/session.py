"""The trackers of train.report_to, for one `dice run` or `dice resume`: their process, and what W&B reads.

TensorBoard and Trackio are told of all rounds and stages by a process that follows the run folder (process.py). Other
trackers are transformers' own: the training processes tell them. W&B gets the environment by which all rounds, and a
resume, are one run of it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dice_py.config.run import RunConfig
from dice_py.config.training import TRACKED
from dice_py.events import Report
from dice_py.reporting.tracking.trackers import PLACE, run_name
from dice_py.runs.stored_config import stored_config
from dice_py.storage.files import Manifest
from dice_py.storage.keys import digest

LOG_FILE = "tracking.log"
"""What the trackers of the last session printed, in `RUN/tracking`."""

_PATIENCE = 60.0  # seconds that trackers have at the end of a run


class Tracked:
    """A `Report` that passes every event on, and starts the trackers of the run in `folder` with its first round.

    A context manager: at its end the trackers get what is left. A failure of theirs is a note, never the run's end.
    """

    def __init__(self, folder: Path, report: Report) -> None:
        self._folder = folder
        self._report = report
        self._begun = False
        self._process: subprocess.Popen[bytes] | None = None
        self._listener: threading.Thread | None = None
        self._problems: deque[str] = deque()
        self._set: list[str] = []

    def __enter__(self) -> Tracked:
        return self

    def __call__(self, event: str, **fields: Any) -> None:
        """Passes an event on."""
        if event in ("round", "stage") and not self._begun:  # the config is stored now, and no training has begun
            self._begun = True
            try:
                self._begin()
            except Exception as error:  # a run does not end because nobody is told of it
                self._problems.append(f"train.report_to: no tracker is told: {type(error).__name__}: {error}")
        self._report(event, **fields)
        self._pass_problems()

    def _begin(self) -> None:
        config = stored_config(self._folder)[0]
        names = config.train.report_to
        if "wandb" in names:
            self._for_wandb(config)
        tracked = [name for name in TRACKED if name in names]
        if tracked:
            self._start(tracked)

    def _for_wandb(self, config: RunConfig) -> None:
        created = Manifest(self._folder / "manifest.json").data["created"]
        values = {
            "WANDB_RUN_ID": digest("wandb", created, config.seed)[:16],
            "WANDB_RESUME": "allow",
            "WANDB_NAME": run_name(self._folder, config.train.trainer_args),
        }
        for name, value in values.items():
            if name not in os.environ:
                os.environ[name] = value  # the processes of the stages inherit it
                self._set.append(name)

    def _start(self, names: list[str]) -> None:
        place = self._folder / PLACE
        place.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "dice_py.reporting.tracking.process"]
        with (place / LOG_FILE).open("wb") as log:
            self._process = subprocess.Popen(
                [*command, str(self._folder), str(os.getpid()), *names],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=tracker_environment(self._folder),
                start_new_session=True,  # Ctrl-C stops the run, whose last records are still to be told
            )
        self._listener = threading.Thread(target=self._listen, args=(self._process,), daemon=True)
        self._listener.start()

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._problems.append(line.decode("utf-8", errors="replace").rstrip())
        if process.wait():
            log = self._folder / PLACE / LOG_FILE
            self._problems.append(f"train.report_to: the process of the trackers has failed: see {log}")

    def _pass_problems(self) -> None:
        while self._problems:
            self._report("note", text=f"warning: {self._problems.popleft()}")

    def __exit__(self, *_: object) -> None:
        for name in self._set:
            os.environ.pop(name, None)
        if self._process is not None:
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            try:
                self._process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
                self._problems.append(f"train.report_to: the trackers took over {_PATIENCE:.0f} s, and were stopped")
        if self._listener is not None:
            self._listener.join(_PATIENCE)
        self._pass_problems()


@contextlib.contextmanager
def places_alone(out: Path) -> Iterator[None]:
    """Inside, the trackers of a training that is no run's, which TRL tells, have their files in `OUT/tracking`.

    Variables of the environment say so, those apart that the user has set.
    """
    place = (out / PLACE).resolve()
    values = {"TENSORBOARD_LOGGING_DIR": str(place / "tensorboard"), "TRACKIO_DIR": str(place / "trackio")}
    ours = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def tracker_environment(folder: Path) -> dict[str, str]:
    """This process's environment, with Trackio's folder in `RUN/tracking` unless the user has set one."""
    return {"TRACKIO_DIR": str((folder / PLACE / "trackio").resolve()), **os.environ}
