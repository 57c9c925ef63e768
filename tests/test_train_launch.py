"""Ranks: how the stage starts them, receives their events and failures, and that none survives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import rank_works

from dice_py.errors import DataError, DiceError, InterruptedRunError, OutOfMemoryError
from dice_py.training.launcher import launch

HERE = Path(__file__).parent
PYTHONPATH = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
PLAIN = [sys.executable, str(HERE / "rank_works.py")]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


class Launch:
    """`launch` of two ranks, with the reported events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.on_event: Callable[[], None] = lambda: None

    def __call__(self, work: str, command: list[str] = PLAIN, **arguments: Any) -> Any:
        return launch(
            command,
            rank_works.RANKS,
            partial(getattr(rank_works, work), **arguments),
            environment={"PYTHONPATH": PYTHONPATH, "FLAVOUR": "vanilla"},
            report=self.report,
        )

    def report(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))
        self.on_event()


@pytest.fixture
def ranks() -> Launch:
    return Launch()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def pids(folder: Path, count: int = rank_works.RANKS) -> list[int]:
    """Process ids that `count` ranks have left in `folder`."""
    deadline = time.monotonic() + 60
    while len(running := [int(file.name) for file in folder.iterdir()]) < count:
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)
    return running


def have_ended(processes: list[int]) -> bool:
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_value_and_events_are_rank_0s(ranks: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ranks("answer", start=40) == 40
    assert ranks.events == [("note", {"text": "rank 0"})]
    printed = capsys.readouterr().out
    for rank in range(rank_works.RANKS):
        assert f"rank {rank} prints, FLAVOUR is vanilla" in printed
    assert "FLAVOUR" not in os.environ


@pytest.mark.parametrize(
    ("how", "rank", "kind", "code", "text"),
    [
        ("data", 0, DataError, 3, "^row 7 is bad$"),
        ("data", 1, DataError, 3, "^row 7 is bad$"),
        ("memory", 1, OutOfMemoryError, 4, "^no room for 3 tensors$"),
        ("interrupt", 1, InterruptedRunError, 5, "interrupted"),
    ],
)
def test_failure_of_any_rank_is_raised(
    ranks: Launch, how: str, rank: int, kind: type[DiceError], code: int, text: str
) -> None:
    with pytest.raises(kind, match=text) as caught:
        ranks("fail", how=how, rank=rank)
    assert caught.value.exit_code == code


def test_bug_in_a_rank_comes_with_its_traceback(ranks: Launch) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of the training failed.*in fail.*seven by nought"):
        ranks("fail", how="bug")


def test_work_that_a_rank_cannot_import_is_a_bug_with_its_traceback(ranks: Launch) -> None:
    with pytest.raises(RuntimeError, match=r"rank [01] of the training failed[\s\S]*libmissing.so"):
        ranks("unloadable")


def test_error_that_a_user_can_act_on_comes_before_an_earlier_one(ranks: Launch) -> None:
    with pytest.raises(DataError, match="row 7 is bad"):
        ranks("fail_in_turn")


def test_rank_that_ends_without_a_result_is_a_failure(ranks: Launch) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of the training ended without a result.*last words"):
        ranks("fail", how="exit")
    with pytest.raises(RuntimeError, match="rank 1 of the training ended without a result"):
        ranks("exit_silently")


def test_launcher_that_starts_no_rank_is_a_failure(ranks: Launch) -> None:
    for code in (0, 7):
        command = [sys.executable, "-c", f"print('no such option'); raise SystemExit({code})"]
        with pytest.raises(RuntimeError, match=rf"(?s)exit code of accelerate launch: {code}\).*no such option"):
            ranks("answer", command, start=1)


def test_rank_killed_under_accelerate_is_out_of_memory(ranks: Launch, tmp_path: Path) -> None:
    config = tmp_path / "accelerate.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_machines: 1\nnum_processes: 2\n"
        "machine_rank: 0\nmain_process_port: 0\nuse_cpu: true\n"
    )
    command = [*ACCELERATE, "--config_file", str(config), "--module", "dice_py.training.launcher"]
    with pytest.raises(OutOfMemoryError, match=r"rank 1 of the training was killed \(signal 9") as caught:
        ranks("fail", command, how="kill")
    assert caught.value.exit_code == 4


def test_interruption_ends_all_ranks(ranks: Launch, tmp_path: Path) -> None:
    started: list[int] = []

    def interrupt() -> None:
        started[:] = [int(file.name) for file in tmp_path.iterdir()]
        if len(started) == rank_works.RANKS:
            raise KeyboardInterrupt

    ranks.on_event = interrupt
    with pytest.raises(KeyboardInterrupt):
        ranks("sleep", folder=str(tmp_path))
    assert have_ended(started)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_rank_survives_the_stage(tmp_path: Path, number: signal.Signals) -> None:
    stage = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from test_train_launch import Launch; Launch()('sleep', folder=sys.argv[1])",
            str(tmp_path),
        ],
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )
    try:
        started = pids(tmp_path)
        launchers = Path(f"/proc/{stage.pid}/task/{stage.pid}/children").read_text().split()
        assert launchers
    finally:
        stage.send_signal(number)
        stage.wait()
    assert have_ended([*started, *map(int, launchers)])
