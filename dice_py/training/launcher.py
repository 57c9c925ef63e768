"""The processes of one training (its ranks): a launcher starts them, and they end with the stage.

On one machine the launcher is `accelerate launch`. On several nodes it is `torchrun` on each, which `srun` starts
(training/slurm.py), or Ray Train (training/ray_launcher.py). The stage's process starts the launcher, and the launcher
the ranks, each in a session of its own. A signal to the stage does not reach them there, so every rank connects to the
stage: over a local socket, or over TCP from other nodes, where both sides prove that they know a secret. Over the
connection the rank receives its work (pickled) and sends reports: rank 0 its events, and every rank its result or
failure. When the connection ends, because the stage closes it or dies, the rank exits at once, and after its ranks the
launcher.

A training succeeds if every rank reports a result and the launcher exits with 0. When one rank fails, the others fail
too, in the middle of a collective operation and with misleading errors. So of several failures, the one that a user can
act on is raised.

    python -m dice_py.training.launcher ADDRESS      runs a rank; ADDRESS is a path, or HOST:PORT
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dice_py.compute.allocator import allocator_settings
from dice_py.compute.failures import Failure, failure_fields
from dice_py.compute.stopping import StopRequest, ask_to_stop, is_asked_to_stop
from dice_py.compute.worker import Work

if TYPE_CHECKING:
    from dice_py.events import Report

_GRACE = 20.0  # seconds that the other ranks have to end after a failure
_TAIL = 40  # lines of output that are kept for an error's text
_ADDRESS_BYTES = 100  # limit of a local socket's path, on every system
_GREETING = 10  # seconds that who connects over TCP has to prove that it knows the secret
SECRET = "DICE_STAGE_SECRET"
"""The environment variable in which ranks on other nodes get the secret."""


# --- in the stage's process -----------------------------------------------------------------------------------


class Launcher(Protocol):
    """What starts the ranks, and ends after them."""

    output: deque[str]
    """The last lines that it and its ranks have printed."""

    def poll(self) -> int | None:
        """Its exit code, 0 if every rank succeeded; None while it runs."""
        ...

    def finish(self) -> None:
        """Waits until its output is complete. It has ended."""
        ...

    def stop(self) -> None:
        """Ends it and its ranks, if it still runs."""
        ...


Start = Callable[[str, str], Launcher]
"""Starts the ranks, from the stage's address and its secret."""


def launch(
    command: Sequence[str],
    ranks: int,
    work: Work,
    *,
    environment: Mapping[str, str],
    report: Report,
) -> Any:
    """`launch_by` a command on this machine. The address of the stage is appended as its last argument.

    Args:
        environment: variables to set, in addition to this process's.
    """
    return launch_by(
        lambda address, secret: CommandLauncher([*command, address], environment), ranks, work, report=report
    )


def launch_by(start: Start, ranks: int, work: Work, *, host: str | None = None, report: Report) -> Any:
    """Makes every rank call `work(report=…)`, and returns the value of rank 0.

    The output of launcher and ranks goes to this process's standard output.

    Args:
        start: starts the ranks.
        ranks: their number.
        work: pickled; see `compute.worker.Work`.
        host: the name or address by which other nodes reach this machine; None: all ranks are here.
        report: receives the events of rank 0.

    Raises:
        DiceError: as raised by a rank; OutOfMemoryError (4) if torch or the kernel ran out of memory.
        RuntimeError: a bug, with the traceback of the rank or the end of the output.
    """
    with _Stage(start, ranks, work, host, report) as stage:
        return stage.listen()


@dataclass
class _Rank:
    """A connected rank, as the stage sees it."""

    connection: Connection
    number: int = -1  # until its first message
    pid: int = 0
    outcome: tuple[str, dict[str, Any]] | None = None
    disconnected: bool = False
    is_asked: bool = False  # to stop


class CommandLauncher:
    """A `Launcher` that is a process.

    Args:
        environment: variables to set, in addition to this process's.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.output: deque[str] = deque(maxlen=_TAIL)
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **allocator_settings(os.environ), **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # The stage alone handles Ctrl-C at the terminal.
        )
        self._output_thread = threading.Thread(target=self._copy_output, daemon=True)
        self._output_thread.start()

    def _copy_output(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            text = line.decode("utf-8", errors="replace")
            self.output.append(text.rstrip("\n"))
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.write(text)

    def poll(self) -> int | None:
        return self._process.poll()

    def finish(self) -> None:
        self._output_thread.join(5)

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._output_thread.join(5)
        if self._process.stdout is not None and not self._output_thread.is_alive():
            self._process.stdout.close()


def _limit(connection: socket.socket, seconds: int) -> None:
    """Sets how long a blocking read or write may take; 0: as long as it takes."""
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", seconds, 0))


class _Stage:
    """The stage's side: the launcher, and the connections to the ranks."""

    def __init__(self, start: Start, count: int, work: Work, host: str | None, report: Report) -> None:
        self._count, self._work, self._report, self._host = count, work, report, host
        self._ranks: list[_Rank] = []
        self._failed: list[_Rank] = []  # in the order of the messages
        self._secret = secrets.token_hex(32)
        self._folder: str | None = None
        if host is None:
            roots = [tempfile.gettempdir(), "/tmp"]
            root = next((root for root in roots if len(os.fsencode(root)) < _ADDRESS_BYTES - 30), roots[-1])
            self._folder = tempfile.mkdtemp(prefix="dice-", dir=root)  # readable by this user alone
            address = str(Path(self._folder) / "stage")
            self._server = socket.socket(socket.AF_UNIX)
            self._server.bind(address)
        else:
            self._server = socket.create_server(("", 0))
            address = f"{host}:{self._server.getsockname()[1]}"
        self._server.listen(count)
        self._launcher = start(address, self._secret)

    def __enter__(self) -> _Stage:
        return self

    def __exit__(self, *error: object) -> None:
        """Ends the processes that still run, in their usual order: ranks, launcher."""
        for rank in self._ranks:
            rank.connection.close()
        self._server.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._launcher.stop()
        for rank in self._ranks if self._host is None else []:
            if rank.pid and not rank.disconnected:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.pid, signal.SIGKILL)

    def listen(self) -> Any:
        """Receives messages until the training ends; returns the value of rank 0, or raises the failure."""
        deadline: float | None = None
        while deadline is None or time.monotonic() < deadline:
            ended = self._launcher.poll() is not None  # Before `wait`, so that the last messages are received below.
            sources: list[Connection | socket.socket] = [
                self._server,
                *(rank.connection for rank in self._ranks if not rank.disconnected),
            ]
            ready = wait(sources, timeout=0 if ended else 0.5)
            for source in ready:
                if source is self._server:
                    self._accept()
                else:
                    self._receive(next(rank for rank in self._ranks if rank.connection is source))
            if ended and not ready:
                break
            if is_asked_to_stop():
                self._ask_to_stop()
            if self._failed and deadline is None:
                deadline = time.monotonic() + _GRACE
        code = self._launcher.poll()
        if code is not None:
            self._launcher.finish()  # The end of the output tells which signal killed a rank.
        done = [rank for rank in self._ranks if rank.outcome and rank.outcome[0] == "result"]
        if len(done) < self._count or code != 0:
            raise self._error()
        return next(rank.outcome[1]["value"] for rank in done if rank.number == 0 and rank.outcome)

    def _ask_to_stop(self) -> None:
        for rank in self._ranks:
            if rank.number >= 0 and not (rank.is_asked or rank.disconnected):  # it has received its work
                rank.is_asked = True
                with contextlib.suppress(OSError):  # It has ended; the next `recv` fails.
                    rank.connection.send(StopRequest())

    def _accept(self) -> None:
        accepted, _ = self._server.accept()
        if self._host is None:
            self._ranks.append(_Rank(Connection(accepted.detach())))
            return
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection = Connection(os.dup(accepted.fileno()))  # of the same socket
        with accepted:
            # Who does not answer in time is left. A rank's messages may come hours apart.
            _limit(accepted, _GREETING)
            try:
                deliver_challenge(connection, self._secret.encode())
                answer_challenge(connection, self._secret.encode())
            except (AuthenticationError, EOFError, OSError):
                connection.close()
                return
            _limit(accepted, 0)
        self._ranks.append(_Rank(connection))

    def _receive(self, rank: _Rank) -> None:
        try:
            event, fields = rank.connection.recv()
        except (EOFError, OSError):
            rank.disconnected = True
            if rank.outcome is None:
                self._failed.append(rank)
            return
        if event == "rank":
            rank.number, rank.pid = fields["number"], fields["pid"]
            with contextlib.suppress(BrokenPipeError):  # It has ended; the next `recv` fails.
                rank.connection.send(self._work)
        elif event in ("result", "failed"):
            rank.outcome = (event, fields)
            if event == "failed":
                self._failed.append(rank)
        else:
            self._report(event, **fields)

    def _error(self) -> Exception:
        """The most useful error: one that a user can act on, then a killed rank, then a rank's bug."""
        failures = [(rank.number, Failure(**rank.outcome[1])) for rank in self._failed if rank.outcome]
        for _, failure in failures:
            if failure.kind != "bug":
                return failure.error(failure.text)
        output = "\n".join("    " + line for line in self._launcher.output)
        for rank in self._failed:
            if rank.outcome is None and f"Signal 9 (SIGKILL) received by PID {rank.pid}\n" in output + "\n":
                reason = "signal 9: the kernel sends it when memory runs out"
                text = f"rank {rank.number} of the training was killed ({reason})"
                return Failure("OutOfMemoryError", 4, text).error(text)
        for number, failure in failures:
            return RuntimeError(f"rank {number} of the training failed\n{failure.text}")
        code = self._launcher.poll()
        summary = "the training ended before all of its ranks reported a result"
        if self._failed:
            summary = f"rank {self._failed[0].number} of the training ended without a result or an error"
        return RuntimeError(f"{summary} (exit code of the launcher: {code}); the end of the output:\n{output}")


# --- in a rank ------------------------------------------------------------------------------------------------


def _exit_with_stage(stage: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            if isinstance(stage.recv(), StopRequest):
                ask_to_stop()
    os._exit(1)


def main() -> None:
    """Runs a rank: receives its work from the stage at the address in `sys.argv`, does it, and exits."""
    faulthandler.enable()
    code = run_rank(sys.argv[1], os.environ.pop(SECRET, ""))
    # sys.exit could hang on a library's threads, or in a collective operation that the other ranks never enter.
    os._exit(code)


def run_rank(address: str, secret: str) -> int:
    """Receives the work of this rank from the stage, does it, and reports how it ended; returns an exit code.

    The process exits at once when the stage ends.
    """
    number = int(os.environ.get("RANK", "0"))
    host, _, port = address.rpartition(":")
    try:
        if host:
            stage: Connection = Client((host, int(port)), authkey=secret.encode())
        else:
            stage = Client(address, family="AF_UNIX")
        stage.send(("rank", {"number": number, "pid": os.getpid()}))
        pickled_work = stage.recv_bytes()
    except (AuthenticationError, EOFError, OSError):
        print("the stage of this training has ended", file=sys.stderr)
        return 1
    threading.Thread(target=_exit_with_stage, args=(stage,), daemon=True).start()
    lock = threading.Lock()

    def report(event: str, **fields: Any) -> None:
        if number == 0:
            with lock:
                stage.send((event, fields))

    code = 0
    try:
        work: Work = pickle.loads(pickled_work)  # Imports its module; a failure of that is reported too.
        outcome = ("result", {"value": work(report=report)})
    except BaseException as error:
        code = 1
        outcome = ("failed", failure_fields(error))
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    with lock, contextlib.suppress(OSError):
        stage.send(outcome)
    return code


if __name__ == "__main__":
    main()
