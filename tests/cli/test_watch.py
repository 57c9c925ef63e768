"""`dice status --watch`: what it shows of a run of another process, that it ends with it and changes nothing."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from faked_stages import faked_stages
from hostile_texts import HOSTILE, obeyed
from own_run import Events, own_config
from tiny_models import make_llama

from cli import terminal, watch
from cli.progress import pace_text
from dice_py.runs import loop, progress
from dice_py.runs.folder import Run
from dice_py.runs.live import Watch
from dice_py.runs.progress import PROGRESS_FILE, Pace, Progress, ProgressFile, read_progress
from dice_py.runs.status import run_status
from dice_py.runs.verify import verify_run
from dice_py.stages.job import Job, StageResult
from dice_py.stages.registry import ROUND_STAGES
from dice_py.stages.train import TrainJob
from dice_py.training.log import TrainingLog

Dice = Any
LOSSES = [0.7, 0.6, 0.5, 0.2]
WARNINGS = [*HOSTILE.values(), "long " * 500]


class Seen:
    """A run of one round, and what was to be seen of it in the middle of its training."""

    def __init__(self, folder: Path) -> None:
        self.run = folder / "run"
        self.live: Any = None
        self.status: dict[str, Any] = {}
        with pytest.MonkeyPatch.context() as patch:
            faked_stages(patch)
            spawn = Run.spawn

            def spawn_and_look(run: Run, job: Job, folder: Path, **options: Any) -> StageResult:
                if isinstance(job, TrainJob):
                    log = TrainingLog(job.out, job.key(), run.report)
                    log.begin(
                        [{"loss": value, "rewards/margins": -value, "step": at} for at, value in enumerate(LOSSES)]
                    )
                    for text in WARNINGS:
                        run.report("warning", round=1, stage="mine", name="any", value=1.0, limit=0.0, text=text)
                    run.report("note", text="warning: of a note")
                    run.report("note", text="no warning")
                    run.report("gpu", stage="round-01/mine", gpus=[GPU])
                    run.report("progress", stage="train", done=3, total=12, unit="steps")
                    self.live, self.status = Watch(run.folder).look(), run_status(run.folder)
                return spawn(run, job, folder, **options)

            patch.setattr(Run, "spawn", spawn_and_look)
            loop.run(own_config(folder, make_llama, "report.pairs=0"), self.run, Events())


GPU = {
    **{"index": 0, "samples": 4, "idle_samples": 1, "mean_utilisation": 0.75},
    **{"peak_memory_bytes": 3 * 2**30, "memory_bytes": 80 * 2**30},
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return Seen(tmp_path_factory.mktemp("watched"))


def printed(live: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The view as a terminal of 80 columns gets it, without colors."""
    monkeypatch.setenv("COLUMNS", "80")
    out, stream = terminal.console(), io.StringIO()
    out.file = stream
    out.print(watch.view(live))
    return stream.getvalue().splitlines()


def test_the_view_fits_80_columns_and_shows_stages_rate_curves_and_warnings(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = printed(seen.live, monkeypatch)
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 24
    text = "\n".join(lines)
    assert f"running, {ROUND_STAGES.index('train')} of {len(ROUND_STAGES)} stages" in lines[0]
    assert re_line(lines, "round-01/mine").split()[1] == "done"
    assert re_line(lines, "round-01/train").split()[1] == "running"
    assert re_line(lines, "round-01/evaluate").split()[1:3] == ["to", "do"]
    assert "train: [#####---------------] 3/12 steps" in text
    assert re_line(lines, "loss") == "loss    █▇▅▁ 0.7 → 0.2, round-01"
    assert re_line(lines, "margin") == "margin  ▁▂▄█ -0.7 → -0.2, round-01"
    assert "GPU 0, 75% busy, 3.0 of 80 GiB at most (last stage)" in text
    assert "warning: of a note" in text
    assert "no warning" not in text
    assert text.count("warning:") == 3  # the last ones
    assert not obeyed(text)


def re_line(lines: list[str], start: str) -> str:
    (line,) = [line for line in lines if line.startswith(start)]
    return line.rstrip()


@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_warnings_are_only_text(seen: Seen, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    live = seen.live.__class__(**{**seen.live.__dict__, "warnings": [text]})
    assert not obeyed("\n".join(printed(live, monkeypatch)))


def test_status_tells_how_far_the_running_stage_is(seen: Seen) -> None:
    assert seen.status["progress"] == {
        **{"stage": "train", "done": 3, "total": 12, "unit": "steps", "per_second": 0.0, "seconds_left": None}
    }
    assert run_status(seen.run)["progress"] is None  # it is finished
    assert not (seen.run / PROGRESS_FILE).exists()
    found = verify_run(seen.run)
    assert (found["damaged"], found["missing"]) == ([], [])


def test_watching_a_finished_run_ends_at_once(seen: Seen, dice: Dice) -> None:
    before = {path: path.stat().st_mtime_ns for path in seen.run.rglob("*")}
    code, out, err = dice("status", "--watch", seen.run)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines][:2] == ["round-01/generate", "round-01/score"]
    assert any(line.startswith("  warning: round 1, mine: ") for line in lines)
    assert lines[-1] == f"new policy: {seen.run / 'round-01/train/model'}"
    assert not obeyed(out)
    assert {path: path.stat().st_mtime_ns for path in seen.run.rglob("*")} == before


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--json"], "--watch and --json"), (["--verify"], "--verify"), (["--profile"], "--profile")],
)
def test_watch_goes_with_no_other_view(seen: Seen, dice: Dice, options: list[str], says: str) -> None:
    code, _, err = dice("status", "--watch", *options, seen.run)
    assert code == 2
    assert says in err


def test_watch_needs_a_run(tmp_path: Path, dice: Dice) -> None:
    assert dice("status", "--watch")[0] == 2
    code, _, err = dice("status", "--watch", tmp_path)
    assert code == 2
    assert "holds no run" in err


def test_a_run_that_ends_while_it_is_watched(
    seen: Seen, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And Ctrl-C ends the watching alone."""
    looks = [seen.live, seen.live, Watch(seen.run).look()]
    monkeypatch.setattr(Watch, "look", lambda self: looks.pop(0))
    monkeypatch.setattr(watch.time, "sleep", lambda _: None)
    watch.watch_run(seen.run)
    out = capsys.readouterr().out.splitlines()
    assert out.count("round-01/train: running") == 1
    assert "  train: 3/12 steps, loss 0.2, margin -0.2" in out
    assert len(out) == len(set(out))
    assert not looks

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    looks.append(seen.live)
    monkeypatch.setattr(watch.time, "sleep", interrupt)
    watch.watch_run(seen.run)


def test_sparklines() -> None:
    assert watch.sparkline([1.0, 2.0, 3.0, 8.0], 4) == "▁▂▃█"
    assert watch.sparkline([5.0, 5.0], 4) == "▁▁"
    assert watch.sparkline([], 4) == watch.sparkline([math.nan], 4) == ""
    assert watch.sparkline([0.0] * 50 + [1.0] * 50, 10) == "▁▁▁▁▁█████"
    assert watch.sparkline([float(value) for value in range(1000)], 8) == "▁▂▃▄▅▆▇█"


def test_the_round_that_is_under_way() -> None:
    done, todo = [{"status": "done"}], [{"status": "to do"}]
    assert watch.current_round({"a": done, "b": todo, "c": todo}) == "b"
    assert watch.current_round({"a": done, "b": done}) == "b"


# progress.json


def test_progress_is_written_once_a_second_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    file = ProgressFile(tmp_path)
    file.begin("round-01/score")
    seen = []
    for at, done in enumerate((10, 20, 30, 40, 100)):
        now[0] = 100.0 + 0.4 * at
        file.update(stage="score", done=done, total=100, unit="rows")
        found = read_progress(tmp_path, "round-01/score")
        assert found is not None
        seen.append(found.done)
    assert seen == [10, 10, 10, 40, 100]
    assert found.per_second == pytest.approx(90 / 1.6)
    assert found.seconds_left is None
    assert [path.name for path in tmp_path.iterdir()] == [PROGRESS_FILE]
    assert read_progress(tmp_path, "round-01/train") is None


def test_progress_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    file = ProgressFile(tmp_path / "none")
    file.update(stage="score", done=1, total=2, unit="rows")
    assert read_progress(tmp_path / "none", "") is None


@pytest.mark.parametrize(
    "changed",
    [{"done": -1}, {"done": 1.5}, {"total": None}, {"unit": 3}, {"per_second": "fast"}, {"per_second": math.inf}],
)
def test_damaged_progress_is_none(tmp_path: Path, changed: dict[str, Any]) -> None:
    sound = {"of": "a", "stage": "a", "done": 1, "total": 2, "unit": "rows", "per_second": 0.5}
    (tmp_path / PROGRESS_FILE).write_text(json.dumps(sound))
    assert read_progress(tmp_path, "a") == Progress("a", 1, 2, "rows", 0.5)
    (tmp_path / PROGRESS_FILE).write_text(json.dumps(sound | changed))
    assert read_progress(tmp_path, "a") is None
    (tmp_path / PROGRESS_FILE).write_bytes(b"\xff[")
    assert read_progress(tmp_path, "a") is None


def test_steps_of_a_stage_have_a_pace_each(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    pace = Pace()
    pace("mine", 0, 100, step="scan")
    now[0] = 2.0
    assert pace_text(pace("mine", 50, 100, step="scan")) == "50/100 rows, 25.0/s, 2.0 s left"
    assert pace("mine", 10, 100, step="pairs") == Progress("mine (pairs)", 10, 100, "rows", 0.0)
    now[0] = 4.0
    pace("mine", 30, 100, step="pairs")
    assert pace("mine", 5, 40, step="pairs").per_second == 0.0  # from the start again, and not backwards
    now[0] = 5.0
    assert pace("mine", 9, 40, step="pairs").per_second == 4.0
    pace.begin()
    assert pace("mine", 60, 100, step="pairs").per_second == 0.0
