"""The end of a round with `evaluate.command`: a benchmark of the user's own, of which the round reports the numbers.

The program gets the folder of the new policy, and prints a JSON object of numbers to stdout: as all that it prints, or
as its last line that is one. No shell runs it. What it prints goes to `stdout.log` and `stderr.log`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dice_py.config.rounds import COMMAND_PREFIX
from dice_py.errors import UsageError
from dice_py.events import Report, no_report
from dice_py.models.identity import model_identity
from dice_py.stages.job import Job, StageFile, StageResult
from dice_py.storage.files import make_folder, read_sealed, write_sealed
from dice_py.storage.integrity import check_intact
from dice_py.storage.keys import file_digest

MODEL = "{model}"
GRACE = 10.0
"""Seconds between SIGTERM and SIGKILL."""
_LAST_LINES = 5
_MOST_BYTES = 2**24
"""Of stdout, that are read: the end of it."""
_LONGEST_NAME = 100


@dataclass(frozen=True)
class BenchmarkJob(Job):
    """Runs `command` on `policy`, and writes `out/benchmark.json`.

    The counts: `metrics`, the numbers by name; `failure`, None or a sentence with the program's last lines; `left_out`,
    names of values that are no finite number; `run_seconds`. A failure is no error: the round has no such metrics, and
    the next call runs the program again.
    """

    policy: Path
    command: tuple[str, ...]
    """The program and its arguments; {model} in one of them is the policy's folder, which else comes last."""
    folder: Path
    """The working directory of the program."""
    timeout: float
    """Seconds after which it is stopped, with all processes that it started in its session."""
    out: Path

    def key_fields(self) -> dict[str, Any]:
        """The policy, the command, and the content of the files that it names."""
        files = [self.folder / part for part in self.command]
        return {
            "policy": model_identity(self.policy),
            "command": list(self.command),
            "files": [file_digest(file) if _is_file(file) else None for file in files],
        }

    def incomplete(self, files: Sequence[StageFile]) -> list[Path]:
        """As of every stage; also the result of a program that failed."""
        result = read_sealed(self.out / "benchmark.json", self.key())
        return super().incomplete(files) or ([self.out / "benchmark.json"] if result and result["failure"] else [])

    def run(self, report: Report = no_report) -> StageResult:
        """Runs the program to its end, or to its time limit."""
        check_intact([self.policy])
        make_folder(self.out)
        started = time.monotonic()
        text, failure = self._output()
        metrics: dict[str, float] = {}
        left_out: list[str] = []
        if failure is None:
            found = last_object(text)
            if found is None:
                failure = f"it printed no JSON object to stdout{self._last_lines()}"
            else:
                metrics, left_out = _numbers(found)
                if not metrics:
                    failure = f"its JSON object has no finite number{self._last_lines()}"
        counts: dict[str, Any] = {"metrics": metrics, "failure": failure, "left_out": left_out}
        counts["run_seconds"] = time.monotonic() - started
        file, key = self.out / "benchmark.json", self.key()
        write_sealed(file, counts, key)
        report(
            "note", text=f"benchmark: {failure or ', '.join(f'{name} {value:g}' for name, value in metrics.items())}"
        )
        return StageResult([(file, key)], counts)

    def _output(self) -> tuple[str, str | None]:
        """What the program printed to stdout, and None or how it failed."""
        arguments = [part.replace(MODEL, str(self.policy)) for part in self.command]
        if not any(MODEL in part for part in self.command):
            arguments.append(str(self.policy))
        stdout, stderr = self.out / "stdout.log", self.out / "stderr.log"
        with stdout.open("wb") as out, stderr.open("wb") as errors:
            try:
                process = subprocess.Popen(
                    arguments,
                    cwd=self.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=errors,
                    start_new_session=True,
                )
            except OSError as error:
                return "", f"{arguments[0]} cannot be started in {self.folder}: {error.strerror or error}"
            try:
                code = process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        if code is None:
            why = f"it was stopped at evaluate.command_timeout ({self.timeout:g} s)"
            return "", why + self._last_lines()
        if code:
            ended = f"signal {-code}" if code < 0 else f"exit code {code}"
            return "", f"it ended with {ended}{self._last_lines()}"
        return _end_of(stdout), None

    def _last_lines(self) -> str:
        """The last lines of stderr, or else of stdout, as the end of a sentence."""
        for name in ("stderr.log", "stdout.log"):
            lines = [line for line in _end_of(self.out / name, 4096).splitlines() if line.strip()]
            if lines:
                return f"; the last lines of {self.out / name}: " + " | ".join(lines[-_LAST_LINES:])
        return f"; it printed nothing ({self.out})"


def benchmark_metrics(counts: dict[str, Any]) -> dict[str, float]:
    """The numbers of a benchmark by their names among the metrics of a round, from the counts of `BenchmarkJob`."""
    return {COMMAND_PREFIX + name: value for name, value in counts["metrics"].items()}


def check_command(command: Sequence[str], folder: Path) -> None:
    """Checks, before a run, that the program is there.

    Raises:
        UsageError: it is not, or its folder is not.
    """
    if not folder.is_dir():
        raise UsageError(f"evaluate.command_folder: {folder} is no folder")
    program = command[0]
    found = (folder / program).is_file() if "/" in program else shutil.which(program) is not None
    if not found:
        raise UsageError(f"evaluate.command: there is no program {program} (in {folder}, or on the PATH)")


def last_object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is, or that its last such line is; None where there is none."""
    for part in _candidates(text):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(part)
            if isinstance(value, dict):
                return value
    return None


def _candidates(text: str) -> Iterator[str]:
    yield text
    for line in reversed(text.splitlines()):
        if line.lstrip().startswith("{"):
            yield line


def _numbers(values: dict[str, Any]) -> tuple[dict[str, float], list[str]]:
    """The finite numbers by name, and the names of all other values."""
    numbers: dict[str, float] = {}
    others: list[str] = []
    for name, value in values.items():
        number = math.nan
        if isinstance(value, int | float) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):
                number = float(value)
        if math.isfinite(number) and name and name.isprintable() and len(name) <= _LONGEST_NAME:
            numbers[name] = number
        else:
            others.append(ascii(name[:_LONGEST_NAME])[1:-1])
    return numbers, others


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends what is left of the program and of the processes that it started in its session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
            if number == signal.SIGTERM:
                time.sleep(0.05)  # its children had the signal too
    process.wait()


def _end_of(file: Path, most: int = _MOST_BYTES) -> str:
    with file.open("rb") as handle:
        handle.seek(max(0, file.stat().st_size - most))
        return handle.read().decode("utf-8", errors="replace")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # an argument that is longer than a name of a file
        return False
