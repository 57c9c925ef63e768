"""Ranks: how the stage starts them, receives their events and failures, and that none survives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import rank_works
from places import child_environment
from processes import gone, wait_for
from rank_launch import Launch

from dice_py.compute import allocator
from dice_py.errors import DataError, DiceError, InterruptedRunError, OutOfMemoryError

pytestmark = pytest.mark.slow

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


@pytest.fixture
def ranks() -> Launch:
    return Launch()


def pids(folder: Path) -> list[int]:
    """Process ids that all ranks have left in `folder`."""
    assert wait_for(lambda: len(list(folder.iterdir())) == rank_works.RANKS), "the ranks did not start"
    return [int(file.name) for file in folder.iterdir()]


def have_ended(processes: list[int]) -> bool:
    return wait_for(lambda: all(gone(pid) for pid in processes))


def test_value_and_events_are_rank_0s(ranks: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ranks("answer", start=40) == 40
    assert ranks.events == [("note", {"text": "rank 0"})]
    printed = capsys.readouterr().out
    for rank in range(rank_works.RANKS):
        assert f"rank {rank} prints, FLAVOUR is vanilla" in printed
    assert "FLAVOUR" not in os.environ


def test_ranks_get_the_allocators_settings(
    ranks: Launch, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocator, "GPU_FILES", ())
    for name in allocator.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    ranks("answer", start=40)
    assert capsys.readouterr().out.count("MALLOC_TRIM_THRESHOLD_ is 8589934592") == rank_works.RANKS
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")
    ranks("answer", start=40)
    assert capsys.readouterr().out.count("MALLOC_TRIM_THRESHOLD_ is 1000") == rank_works.RANKS


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
        with pytest.raises(RuntimeError, match=rf"(?s)exit code of the launcher: {code}\).*no such option"):
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
            "import sys; from rank_launch import Launch; Launch()('sleep', folder=sys.argv[1])",
            str(tmp_path),
        ],
        env=child_environment(),
    )
    try:
        started = pids(tmp_path)
        launchers = Path(f"/proc/{stage.pid}/task/{stage.pid}/children").read_text().split()
        assert launchers
    finally:
        stage.send_signal(number)
        stage.wait()
    assert have_ended([*started, *map(int, launchers)])
