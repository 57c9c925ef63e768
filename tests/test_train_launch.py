"""Ranks: how the stage starts them, hears them, judges how they end, and that none outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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
    """`launch` of two ranks, with what was reported."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.on_event: Callable[[], None] = lambda: None

    def __call__(self, work: str, command: list[str] = PLAIN, **arguments: Any) -> Any:
        return launch(
            command,
            rank_works.RANKS,
            f"rank_works:{work}",
            arguments,
            environment={"PYTHONPATH": PYTHONPATH, "FLAVOUR": "vanilla"},
            report=self.report,
        )

    def report(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))
        self.on_event()


@pytest.fixture
def ranks() -> Launch:
    return Launch()


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def pids(folder: Path, count: int = rank_works.RANKS) -> list[int]:
    """Process ids that as many ranks have left in `folder`."""
    deadline = time.monotonic() + 60
    while len(found := [int(file.name) for file in folder.iterdir()]) < count:
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)
    return found


def gone(found: list[int]) -> bool:
    deadline = time.monotonic() + 30
    while any(is_there(pid) for pid in found):
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


def test_error_that_can_be_acted_on_comes_before_one_heard_first(ranks: Launch) -> None:
    with pytest.raises(DataError, match="row 7 is bad"):
        ranks("fail_in_turn")


def test_rank_that_ends_without_a_word_is_no_success(ranks: Launch) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of the training ended without a word.*last words"):
        ranks("fail", how="exit")
    with pytest.raises(RuntimeError, match="rank 1 of the training ended without a word"):
        ranks("half")


def test_launcher_that_starts_nothing_is_no_success(ranks: Launch) -> None:
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
    found: list[int] = []

    def interrupt() -> None:
        found[:] = [int(file.name) for file in tmp_path.iterdir()]
        if len(found) == rank_works.RANKS:
            raise KeyboardInterrupt

    ranks.on_event = interrupt
    with pytest.raises(KeyboardInterrupt):
        ranks("sleep", folder=str(tmp_path))
    assert gone(found)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_rank_outlives_the_stage(tmp_path: Path, number: signal.Signals) -> None:
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
        found = pids(tmp_path)
        launchers = Path(f"/proc/{stage.pid}/task/{stage.pid}/children").read_text().split()
        assert launchers
    finally:
        stage.send_signal(number)
        stage.wait()
    assert gone([*found, *map(int, launchers)])
