"""Trackers are told of a whole run: all rounds and stages in one run of theirs, each step once, inside the run folder.

TensorBoard and Trackio are the real ones, offline; what they hold is read back with their own readers.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from faked_stages import faked_stages
from hostile_texts import obeyed
from own_run import Events, own_config
from tiny_models import make_llama

from dice_py.errors import InterruptedRunError
from dice_py.events import no_report
from dice_py.reporting.tracking import process, session
from dice_py.reporting.tracking.records import Follower, Record, flat_numbers, markdown_table, sample_table
from dice_py.reporting.tracking.session import Tracked, places_alone
from dice_py.runs import loop
from dice_py.runs.folder import Run
from dice_py.stages.evaluate import EvaluateJob
from dice_py.stages.inspect import InspectJob
from dice_py.stages.job import Job, StageResult
from dice_py.stages.train import TrainJob
from dice_py.storage.files import write_sealed
from dice_py.storage.parquet import write_parquet
from dice_py.storage.schemas import INSPECTED_PAIRS
from dice_py.training.log import TrainingLog

pytestmark = pytest.mark.slow  # trackers are imported in processes of their own

STEPS = 3
TEXTS = ("a question", "<script>alert(1)</script>", "| a | *b* `c` [d](e) https://x.y", "\x1b[2J\u202eabc", "five")


def message(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def inspected(texts: list[str]) -> pl.DataFrame:
    """Pairs with these prompts; the rejected response is long, and has no reward."""
    rows = []
    for number, text in enumerate(texts):
        row = dict.fromkeys(INSPECTED_PAIRS) | {"pair_id": f"r01-mined-{number}", "round": 1, "source": "mined"}
        row |= {"prompt": message(text), "chosen": message(text), "rejected": message(text * 40)}
        rows.append(row | {"chosen_reward": 0.5, "rejected_reward": math.nan})
    return pl.DataFrame(rows, schema=INSPECTED_PAIRS)


def measured(job: EvaluateJob) -> StageResult:
    metrics = {"accuracy": 0.25, "accuracy_ci95": [0.125, 0.5], "judges": {"oracle": 0.75}, "none": None}
    write_sealed(job.out / "metrics.json", metrics, job.key())
    return StageResult([(job.out / "metrics.json", job.key())], metrics)


class Tried:
    """A run of two rounds whose stages run no model, with trackers. The logged loss is the learning rate."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder / "a run"
        self.config = own_config(folder, make_llama, "rounds=2", "train.report_to=[tensorboard,trackio]")
        self.events = Events()
        self.stops_in: int | None = None

    def __call__(self, patch: pytest.MonkeyPatch, **train: Any) -> None:
        faked_stages(patch, measured)
        spawn = Run.spawn

        def spawn_and_log(run: Run, job: Job, folder: Path, **options: Any) -> StageResult:
            if isinstance(job, InspectJob):
                result = spawn(run, job, folder, **options)
                write_parquet(job.pairs_file, inspected(list(TEXTS)), key=job.key())
                return StageResult(result.files, {"pairs": 5})
            if not isinstance(job, TrainJob):
                return spawn(run, job, folder, **options)
            assert job.config.report_to == []
            log = TrainingLog(job.out, job.key(), no_report)
            log.begin([])
            for step in range(1, STEPS + 1):
                log.add({"loss": job.config.learning_rate, "rewards/margins": float(step), "epoch": 1.0, "step": step})
                if self.stops_in is not None and job.out.parent.name == f"round-{self.stops_in:02d}" and step == 2:
                    raise KeyboardInterrupt
            result = spawn(run, job, folder, **options)
            return StageResult(result.files, {"steps": STEPS, "saved_dtype": "float32"})

        patch.setattr(Run, "spawn", spawn_and_log)
        with Tracked(self.run, self.events) as report:
            if train:
                loop.resume(self.run, report, assignments=[f"train.{name}={value}" for name, value in train.items()])
            else:
                loop.run(self.config, self.run, report)

    def notes(self) -> str:
        return " ".join(fields["text"] for event, fields in self.events.events if event == "note")

    def scalars(self) -> dict[str, list[tuple[int, float]]]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (file,) = (self.run / "tracking" / "tensorboard").iterdir()
        read = EventAccumulator(str(file))
        read.Reload()
        self.texts = {
            tag: [item.tensor_proto.string_val[0].decode() for item in read.Tensors(tag)]
            for tag in read.Tags()["tensors"]
        }
        return {tag: [(item.step, item.value) for item in read.Scalars(tag)] for tag in read.Tags()["scalars"]}

    def trackio(self) -> dict[str, list[dict[str, Any]]]:
        """The logs of each run of the project, read by Trackio in a process of its own."""
        script = (
            "import json\nfrom trackio import Api\nfrom trackio.sqlite_storage import SQLiteStorage as S\n"
            "print(json.dumps({run.name: S.get_logs('dice', run.name, run_id=run.id) for run in Api().runs('dice')}))"
        )
        environment = {**os.environ, "TRACKIO_DIR": str(self.run / "tracking" / "trackio")}
        printed = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True)
        return json.loads(printed.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tried]:
    """Stopped in the second training, then resumed; with a home that must stay empty."""
    folder = tmp_path_factory.mktemp("tracked")
    made = Tried(folder)
    home = folder / "home"
    home.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        for name in ("HF_HOME", "XDG_CACHE_HOME", "TRACKIO_DIR", "TRACKIO_SPACE_ID", "TENSORBOARD_LOGGING_DIR"):
            patch.delenv(name, raising=False)
        made.stops_in = 2
        with pytest.raises(InterruptedRunError):
            made(patch)
        made.stops_in = None
        made(patch)
    yield made
    assert list(home.iterdir()) == []


SHIFTED = list(range(1, 2 * STEPS + 1))
"""The steps of both rounds, which follow each other."""


def test_tensorboard_has_all_rounds_on_one_axis_and_each_step_once(tried: Tried) -> None:
    scalars = tried.scalars()
    assert [step for step, _ in scalars["train/loss"]] == SHIFTED
    assert [value for _, value in scalars["train/rewards/margins"]] == [1.0, 2.0, 3.0] * 2
    assert [step for step, _ in scalars["generate/responses"]] == [0, STEPS]  # where each round begins
    assert scalars["evaluate/accuracy"] == [(STEPS, 0.25), (2 * STEPS, 0.25)]
    assert scalars["evaluate/accuracy_ci95/low"] == [(STEPS, 0.125), (2 * STEPS, 0.125)]
    assert scalars["evaluate/judges/oracle"] == [(STEPS, 0.75), (2 * STEPS, 0.75)]
    assert "mine/pairs" in scalars
    assert not [note for note in tried.notes().split(". ") if "report_to" in note]


def test_tensorboard_has_the_config_and_a_table_of_pairs_that_nothing_in_them_leaves(tried: Tried) -> None:
    tried.scalars()
    assert '"learning_rate": 0.001' in tried.texts["config"][0]
    for table in tried.texts["samples"]:
        lines = table.splitlines()
        assert lines[0].startswith("| pair | source | prompt | chosen | rejected | chosen_reward |")
        assert len(lines) == 2 + len(TEXTS)
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {7}
        assert not obeyed(table)
        assert "<script>" not in table
        assert "a question" in table


def test_trackio_has_the_same_in_one_run(tried: Tried) -> None:
    (run,) = tried.trackio().items()
    name, logs = run
    assert name == "a run"
    assert [log["step"] for log in logs if "train/loss" in log] == SHIFTED
    assert [log["step"] for log in logs] == sorted(log["step"] for log in logs)
    assert [(log["step"], log["evaluate/accuracy"]) for log in logs if "evaluate/accuracy" in log] == [
        (STEPS, 0.25),
        (2 * STEPS, 0.25),
    ]
    assert [log["step"] for log in logs if "samples" in log] == [0, STEPS]
    table = next(log["samples"]["_value"] for log in logs if "samples" in log)
    assert [row["pair"] for row in table] == [f"r01-mined-{number}" for number in range(len(TEXTS))]
    assert not obeyed(json.dumps(table, ensure_ascii=False))
    assert "<script>" not in json.dumps(table)


def test_a_stage_that_is_made_again_begins_a_new_run_of_trackio(tried: Tried, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has been told cannot be taken back. TensorBoard's file is written anew."""
    tried(monkeypatch, learning_rate=0.25)
    logs = tried.trackio()
    assert sorted(logs) == ["a run", "a run-2"]
    assert [(log["step"], log["train/loss"]) for log in logs["a run-2"] if "train/loss" in log] == [
        (step, 0.25) for step in SHIFTED
    ]
    assert [log["step"] for log in logs["a run-2"] if "generate/responses" in log] == [0, STEPS]
    assert [log["train/loss"] for log in logs["a run"] if "train/loss" in log] == [0.001] * len(SHIFTED)
    assert tried.scalars()["train/loss"] == [(step, 0.25) for step in SHIFTED]
    assert not [note for note in tried.notes().split(". ") if "report_to" in note]


def test_trackers_change_no_key(tried: Tried) -> None:
    """Another tracker is no reason to train again."""
    train = tried.config.train
    assert train.key_fields() == train.model_copy(update={"report_to": []}).key_fields()


class Failing:
    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.told = 0

    def add(self, record: Record) -> None:
        self.told += 1
        raise OSError("no room left\n\x1b[2J")

    def close(self) -> None:
        raise AssertionError("it was left out")


def test_a_tracker_that_fails_is_left_out(tried: Tried, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Record] = []

    class Hears(Failing):
        def add(self, record: Record) -> None:
            told.append(record)

        def close(self) -> None:
            told.sort(key=lambda record: record.step)

    said: list[str] = []
    monkeypatch.setitem(process.TRACKERS, "tensorboard", Failing)
    monkeypatch.setitem(process.TRACKERS, "trackio", Hears)
    process.follow(tried.run, os.getpid(), ["tensorboard", "trackio"], lambda: True, said.append)
    (problem,) = said
    assert problem.startswith("train.report_to: tensorboard failed, and is told no more: OSError")
    assert [record.step for record in told if record.stage.endswith("train")]


def test_trackers_that_cannot_start_are_a_note(tried: Tried, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.sys, "executable", "/bin/false")
    events = Events()
    with Tracked(tried.run, events) as report:
        report("round", number=1, rounds=2)
    (note,) = [fields["text"] for event, fields in events.events if event == "note"]
    assert "the process of the trackers has failed: see" in note
    monkeypatch.setattr(session.sys, "executable", str(tried.folder / "none"))
    events.events.clear()
    with Tracked(tried.run, events) as report:
        report("round", number=1, rounds=2)
    (note,) = [fields["text"] for event, fields in events.events if event == "note"]
    assert "no tracker is told: FileNotFoundError" in note


def test_rounds_and_resumes_are_one_run_of_wandb(tried: Tried, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes read the environment. What the user has set stands."""
    config = tried.config.model_copy(update={"train": tried.config.train.model_copy(update={"report_to": ["wandb"]})})
    monkeypatch.setattr(session, "stored_config", lambda _: (config, None))
    for name in ("WANDB_RUN_ID", "WANDB_NAME", "WANDB_RESUME"):
        monkeypatch.delenv(name, raising=False)

    def told() -> dict[str, str]:
        with Tracked(tried.run, no_report) as report:
            report("round", number=1, rounds=2)
            return {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}

    first = told()
    assert (first["WANDB_NAME"], first["WANDB_RESUME"]) == ("a run", "allow")
    assert re.fullmatch("[0-9a-f]{16}", first["WANDB_RUN_ID"])
    assert told() == first
    assert not [name for name in os.environ if name.startswith("WANDB_")]
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert told() == first | {"WANDB_RUN_ID": "mine"}


def test_what_is_counted_becomes_numbers() -> None:
    counts = {"a": {"b": 1, "c": True, "d": "x"}, "e_ci95": [0.5, 1.5], "f": [1, 2, 3], "g": math.nan, "h": 10**400}
    assert flat_numbers("mine", counts) == {"mine/a/b": 1.0, "mine/e_ci95/low": 0.5, "mine/e_ci95/high": 1.5}
    (name,) = flat_numbers("mine", {"\x1b[2J\n" + "x" * 500: 1})
    assert not obeyed(name)
    assert len(name) == 120


def test_a_run_without_pairs_to_look_at_has_no_table(tmp_path: Path) -> None:
    assert sample_table(tmp_path / "pairs.parquet") == []
    (tmp_path / "pairs.parquet").write_bytes(b"PAR1")
    assert sample_table(tmp_path / "pairs.parquet") == []
    assert markdown_table([{"a": 0.5, "b": "x"}]) == "| a | b |\n| --- | --- |\n| 0.5 | x |"


def test_events_of_other_processes_are_not_of_the_session(tmp_path: Path) -> None:
    """And a line that is not complete yet is read when it is."""
    line = {"time": 1.0, "event": "stage", "stage": "round-01/mine", "status": "done", "seconds": 1.0}
    earlier, now = ({**line, "counts": {"pairs": count}} for count in (3, 4))
    starts = [{"time": 1.0, "event": "started", "pid": pid} for pid in (1, 2)]
    lines = [json.dumps(value) + "\n" for value in (starts[0], earlier, starts[1], now)]
    events = tmp_path / "events.jsonl"
    events.write_text("broken\n" + "".join(lines)[:-9])
    follower = Follower(tmp_path, 2)
    assert follower.poll() == []
    with events.open("a") as handle:
        handle.write("".join(lines)[-9:])
    (record,) = follower.poll()
    assert record.metrics == {"mine/pairs": 4.0, "mine/seconds": 1.0}
    assert follower.poll() == []


def test_a_training_alone_has_its_trackers_beside_it_and_leaves_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "of the user")
    before = dict(os.environ)
    with places_alone(tmp_path / "out"):
        inside = dict(os.environ)
    assert inside == {**before, "TRACKIO_DIR": str(tmp_path.resolve() / "out" / "tracking" / "trackio")}
    assert dict(os.environ) == before
