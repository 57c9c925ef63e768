"""The processes of one training (its ranks): started by `accelerate launch`, heard by the stage, ended with it.

The stage's process starts the launcher, and the launcher starts the ranks, each in a session of its own, which no
signal to the stage reaches. So every rank opens a line, a local socket, to the stage. Over it the rank gets its work,
as any worker does (pickled), and sends what it has to say: rank 0 its events, every rank how it ended. And the line is
its life: when the stage closes it, or dies in whatever way, the rank ends at once, and with its ranks the launcher.

Success is that every rank said so, and the launcher ended well. Of several failures the one that a user can act on is
raised: when a rank ends, the others fail too, in the middle of a collective operation, and know not why.

    python -m dice_py.training.launcher ADDRESS      is a rank
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_py.compute.failures import Failure, failure_fields
from dice_py.compute.worker import Work

if TYPE_CHECKING:
    from dice_py.events import Report


_GRACE = 20.0  # seconds in which a training that has failed must have ended by itself
_TAIL = 40  # lines of the output that are kept for an error's text
_ADDRESS_BYTES = 100  # that a local socket's path may have, on every system


# --- in the stage ---------------------------------------------------------------------------------------------


def launch(
    command: Sequence[str],
    ranks: int,
    work: Work,
    *,
    environment: Mapping[str, str],
    report: Report,
) -> Any:
    """Makes every rank call `work(report=…)`, and returns the value of rank 0.

    What launcher and ranks print goes to this process's standard output.

    Args:
        command: starts the ranks, with the address of the stage as its last argument, which this adds.
        work: pickled; see `compute.worker.Work`.
        environment: on top of this process's.

    Raises:
        DiceError: as raised by a rank; OutOfMemoryError (4) when torch or the kernel says so.
        RuntimeError: a bug, with the traceback of the rank or the end of the output.
    """
    with _Stage(command, ranks, work, environment, report) as stage:
        return stage.listen()


@dataclass
class _Rank:
    """A rank, as the stage hears it."""

    line: Connection
    number: int = -1  # before it has said which it is
    pid: int = 0
    outcome: tuple[str, dict[str, Any]] | None = None
    gone: bool = False


class _Stage:
    """The stage's end: the launcher's process, and the lines of the ranks."""

    def __init__(
        self,
        command: Sequence[str],
        count: int,
        work: Work,
        environment: Mapping[str, str],
        report: Report,
    ) -> None:
        self._count, self._work, self._report = count, work, report
        self._ranks: list[_Rank] = []
        self._failed: list[_Rank] = []  # in the order in which it was heard
        self._output: deque[str] = deque(maxlen=_TAIL)
        roots = [tempfile.gettempdir(), "/tmp"]
        root = next((root for root in roots if len(os.fsencode(root)) < _ADDRESS_BYTES - 30), roots[-1])
        self._folder = tempfile.mkdtemp(prefix="dice-", dir=root)  # nobody else may look into it
        address = str(Path(self._folder) / "stage")
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(address)
        self._server.listen(count)
        self._launcher = subprocess.Popen(
            [*command, address],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C at the terminal is the stage's to handle
        )
        self._pump = threading.Thread(target=self._copy_output, daemon=True)
        self._pump.start()

    def __enter__(self) -> _Stage:
        return self

    def __exit__(self, *error: object) -> None:
        """Ends whatever is left, in the order in which it ends by itself: ranks, launcher."""
        for rank in self._ranks:
            rank.line.close()
        self._server.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._launcher.poll() is None:
            self._launcher.terminate()
            try:
                self._launcher.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(self._launcher.pid, signal.SIGKILL)
                self._launcher.wait()
        for rank in self._ranks:
            if rank.pid and not rank.gone:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.pid, signal.SIGKILL)
        self._pump.join(5)
        if self._launcher.stdout is not None and not self._pump.is_alive():
            self._launcher.stdout.close()

    def _copy_output(self) -> None:
        assert self._launcher.stdout is not None
        for line in self._launcher.stdout:
            text = line.decode("utf-8", errors="replace")
            self._output.append(text.rstrip("\n"))
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.write(text)

    def listen(self) -> Any:
        """Listens until the training is over."""
        deadline: float | None = None
        while deadline is None or time.monotonic() < deadline:
            over = self._launcher.poll() is not None  # asked first: what it sent before is heard below
            awaited: list[Connection | socket.socket] = [
                self._server,
                *(rank.line for rank in self._ranks if not rank.gone),
            ]
            ready = wait(awaited, timeout=0 if over else 0.5)
            for source in ready:
                if source is self._server:
                    self._accept()
                else:
                    self._hear(next(rank for rank in self._ranks if rank.line is source))
            if over and not ready:
                break
            if self._failed and deadline is None:
                deadline = time.monotonic() + _GRACE
        if self._launcher.poll() is not None:
            self._pump.join(5)  # the end of the output says what killed a rank
        done = [rank for rank in self._ranks if rank.outcome and rank.outcome[0] == "result"]
        if len(done) < self._count or self._launcher.returncode != 0:
            raise self._error()
        return next(rank.outcome[1]["value"] for rank in done if rank.number == 0 and rank.outcome)

    def _accept(self) -> None:
        accepted, _ = self._server.accept()
        self._ranks.append(_Rank(Connection(accepted.detach())))

    def _hear(self, rank: _Rank) -> None:
        try:
            event, fields = rank.line.recv()
        except (EOFError, OSError):
            rank.gone = True
            if rank.outcome is None:
                self._failed.append(rank)
            return
        if event == "rank":
            rank.number, rank.pid = fields["number"], fields["pid"]
            with contextlib.suppress(BrokenPipeError):  # it has ended, as the next round tells
                rank.line.send(self._work)
        elif event in ("result", "failed"):
            rank.outcome = (event, fields)
            if event == "failed":
                self._failed.append(rank)
        else:
            self._report(event, **fields)

    def _error(self) -> Exception:
        """What the training failed of."""
        told = [(rank.number, Failure(**rank.outcome[1])) for rank in self._failed if rank.outcome]
        for _, failure in told:
            if failure.kind != "bug":
                return failure.error(failure.text)
        output = "\n".join("    " + line for line in self._output)
        for rank in self._failed:
            if rank.outcome is None and f"Signal 9 (SIGKILL) received by PID {rank.pid}\n" in output + "\n":
                text = f"rank {rank.number} of the training was killed (signal 9: the kernel's, when memory runs out)"
                return Failure("OutOfMemoryError", 4, text).error(text)
        for number, failure in told:
            return RuntimeError(f"rank {number} of the training failed\n{failure.text}")
        code = self._launcher.returncode
        what = "the training ended before all of its ranks did"
        if self._failed:
            what = f"rank {self._failed[0].number} of the training ended without a word"
        return RuntimeError(f"{what} (exit code of accelerate launch: {code}); the end of the output:\n{output}")


# --- in a rank ------------------------------------------------------------------------------------------------


def _end_with(line: Connection) -> None:
    # The stage holds the other end, and sends nothing more: the read ends only when the stage does.
    with contextlib.suppress(EOFError, OSError):
        line.recv()
    os._exit(1)


def main() -> None:
    """A rank: gets its work from the stage at the address in `sys.argv`, does it, and ends this process."""
    faulthandler.enable()
    number = int(os.environ.get("RANK", "0"))
    try:
        line: Connection = Client(sys.argv[1], family="AF_UNIX")
        line.send(("rank", {"number": number, "pid": os.getpid()}))
        work: Work = line.recv()
    except (EOFError, OSError):
        print("the stage of this training is gone", file=sys.stderr)
        os._exit(1)
    threading.Thread(target=_end_with, args=(line,), daemon=True).start()
    lock = threading.Lock()

    def report(event: str, **fields: Any) -> None:
        if number == 0:
            with lock:
                line.send((event, fields))

    code = 0
    try:
        ending = ("result", {"value": work(report=report)})
    except BaseException as error:
        code = 1
        ending = ("failed", failure_fields(error))
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    with lock, contextlib.suppress(OSError):
        line.send(ending)
    # Not by sys.exit: a library's threads, or a collective that the others never enter, could keep it from ending.
    os._exit(code)


if __name__ == "__main__":
    main()
