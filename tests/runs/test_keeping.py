"""What is kept of a run's rounds: what is removed when, what a resume makes of it, and `dice clean`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from damage import notes
from faked_stages import faked_stages, no_evaluation
from own_run import Events
from places import child_environment

from dice_py.config.rounds import KeepModels, RoundsConfig
from dice_py.config.run import RunConfig
from dice_py.errors import RemovedError, UsageError
from dice_py.runs import folder as run_folder
from dice_py.runs import loop, removal
from dice_py.runs.keeping import clean
from dice_py.runs.status import run_status
from dice_py.runs.verify import verify_run
from dice_py.stages.evaluate import FAILURES, EvaluateJob
from dice_py.stages.job import Job, StageResult
from dice_py.storage.files import Manifest, write_sealed
from dice_py.storage.removed import RECORD, was_removed


def with_rounds(config: RunConfig, *, mine: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    mined = config.mine.model_copy(update=mine or {})
    return config.model_copy(update={"rounds": RoundsConfig(**changes), "mine": mined})


def weights(folder: Path) -> list[int]:
    """The rounds whose model has its weights."""
    return sorted(int(path.parts[-4][-2:]) for path in folder.glob("round-*/train/model/model.safetensors"))


def shards(folder: Path, stage: str) -> list[int]:
    return sorted(int(path.parts[-3][-2:]) for path in folder.glob(f"round-*/{stage}/*-00000.parquet"))


def reads_only_what_is_there(monkeypatch: pytest.MonkeyPatch, seen: Callable[[Job], None] = lambda _: None) -> None:
    """No stage that runs may be given a model or a shard that was removed."""
    spawn = run_folder.Run.spawn

    def checked(self: Any, job: Job, folder: Path, **given: Any) -> StageResult:
        for each in fields(job):  # type: ignore[arg-type]
            value = getattr(job, each.name)
            for path in value if isinstance(value, list) else [value]:
                assert not (isinstance(path, Path) and was_removed(path)), (job, each.name)
        seen(job)
        return spawn(self, job, folder, **given)

    monkeypatch.setattr(run_folder.Run, "spawn", checked)


@pytest.fixture(scope="module")
def made(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three rounds, whose stages were faked, that keeps everything."""
    folder = tmp_path_factory.mktemp("three") / "run"
    with pytest.MonkeyPatch.context() as patch:
        faked_stages(patch, weights=True)
        loop.run(with_rounds(config, count=3), folder)
    return folder


@pytest.fixture
def three(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that run, which goes on with faked stages."""
    faked_stages(monkeypatch, weights=True)
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def resumed(folder: Path, *assignments: str) -> tuple[set[str], Events]:
    """What became of the stages, and the events of a resume."""
    events = Events()
    loop.resume(folder, events, assignments=assignments)
    return {status for _, status in events.stages()}, events


def test_models_and_samples_go_when_no_round_reads_them(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faked_stages(monkeypatch, weights=True)
    folder, at_evaluation = tmp_path / "run", []

    def seen(job: Job) -> None:
        if isinstance(job, EvaluateJob):
            at_evaluation.append((weights(folder), shards(folder, "generate"), shards(folder, "score")))

    reads_only_what_is_there(monkeypatch, seen)
    rounds = {"count": 4, "keep_models": 1, "keep_samples": False}
    events = Events()
    loop.run(with_rounds(config, mine={"pool_rounds": 2}, **rounds), folder, events)
    # When round t is evaluated: M_t, M_{t−1} and M_{t−2}, which was the reference of the round's reward.
    assert [models for models, _, _ in at_evaluation] == [[1], [1, 2], [1, 2, 3], [2, 3, 4]]
    # The pool of a round has the samples of the one before.
    assert [samples for _, samples, _ in at_evaluation] == [[1], [1, 2], [2, 3], [3, 4]]
    assert [scores for _, _, scores in at_evaluation] == [[1], [2], [3], [4]]
    assert (weights(folder), shards(folder, "generate"), shards(folder, "score")) == ([4], [], [])
    assert "the weights of round-01/train/model are removed (rounds.keep_models=1)" in notes(events)

    listed = Manifest(folder / "manifest.json").data["removed"]
    assert listed["round-01/train/model"]["files"] == ["model.safetensors"]
    assert listed["round-02/score"]["by"] == "rounds.keep_samples=false"
    assert listed["round-02/score"]["files"] == ["scores-00000.parquet", "scores-00001.parquet"]
    found = verify_run(folder)
    assert (found["damaged"], found["missing"]) == ([], [])
    assert {item["place"] for item in found["removed"]} == set(listed)
    assert run_status(folder)["removed"] == found["removed"]

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name in (RECORD, "mined.parquet")}
    statuses, events = resumed(folder)
    assert statuses == {"kept"}
    assert not [fields for event, fields in events.events if event == "removed"]
    assert {path: path.stat().st_mtime_ns for path in before} == before

    # One more round would have the samples of round 4 in its pool.
    with pytest.raises(RemovedError, match="round-04/generate"):
        loop.resume(folder, assignments=["rounds=5"])


@pytest.mark.parametrize(("keep", "second", "left"), [("all", False, [1, 2, 3]), (2, False, [2, 3]), (1, True, [3])])
def test_which_models_are_left(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: KeepModels, second: bool, left: list[int]
) -> None:
    faked_stages(monkeypatch, weights=True)
    reads_only_what_is_there(monkeypatch)
    mine = {"second_reward": "previous"} if second else {}
    monkeypatch.setattr("dice_py.stages.mine.MineJob.run", mined_without_reading)
    loop.run(with_rounds(config, mine=mine, count=3, keep_models=keep), tmp_path / "run")
    assert weights(tmp_path / "run") == left
    assert shards(tmp_path / "run", "generate") == [1, 2, 3]


def mined_without_reading(job: Any, _: Any) -> StageResult:
    file = job.out / "mining.json"
    write_sealed(file, {}, job.key())
    return StageResult([(file, job.key())], {})


def test_a_lost_manifest_brings_nothing_removed_back(three: Path) -> None:
    clean(three, models=1, samples=False)
    manifest = three / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:100])
    _, events = resumed(three)
    # What can be found by keys is; no stage that would need a removed file runs.
    assert not {"round-01/score", "round-01/mine", "round-02/generate", "round-02/evaluate"} & {
        stage for stage, status in events.stages() if status != "kept"
    }
    assert weights(three) == [3]
    assert set(Manifest(manifest).data["removed"]) >= {"round-01/train/model", "round-03/generate"}


def test_what_needs_a_removed_file_says_so(three: Path) -> None:
    clean(three, samples=False)
    with pytest.raises(RemovedError, match=r"round-01/generate/generations-00000.parquet was removed .*--no-samples.*"):
        loop.resume(three, assignments=["mine.alpha=0"])
    # The settings from before are as good as they were.
    assert resumed(three, "mine.alpha=auto")[0] == {"kept"}
    # The remedy of the message.
    for stage in ("generate", "score"):
        for number in (1, 2, 3):
            (three / f"round-{number:02d}" / stage / RECORD).unlink()
    resumed(three)
    assert shards(three, "generate") == shards(three, "score") == [1, 2, 3]
    assert verify_run(three)["removed"] == []
    assert not Manifest(three / "manifest.json").data["removed"]


def test_a_clean_run_says_what_it_freed(three: Path, dice: Any) -> None:
    checkpoints = three / "round-02/train/checkpoints/checkpoint-2"
    checkpoints.mkdir(parents=True)
    (checkpoints / "optimizer.pt").write_bytes(b"x" * 5000)
    (three / "round-01/mine/.mined.parquet.123.tmp").write_bytes(b"x" * 700)
    aside = three / "round-01/train/model.damaged"
    aside.mkdir()
    (aside / "model.safetensors").write_bytes(b"x" * 300)
    before = {path for path in three.rglob("*") if path.is_file()}
    size = sum((three / f"round-0{n}/train/model/model.safetensors").stat().st_size for n in (1, 2))

    code, out, _ = dice("clean", three, "--dry-run", "--json", "--keep-models", "1")
    shown = json.loads(out)
    assert code == 0
    assert shown["bytes"] == {"models": size, "samples": 0, "checkpoints": 5000, "leftovers": 1000}
    assert {path for path in three.rglob("*") if path.is_file()} == before

    code, out, _ = dice("clean", three, "--keep-models", "1", "--json")
    assert (code, json.loads(out)) == (0, shown | {"dry_run": False})
    assert (weights(three), aside.exists(), checkpoints.parent.exists()) == ([3], False, False)
    code, out, _ = dice("clean", three, "--no-samples")
    assert code == 0
    assert "freed" in out
    assert "round-03/generate" in out
    assert json.loads(dice("clean", three, "--json")[1])["freed"] == 0
    assert resumed(three)[0] == {"kept"}
    code, out, _ = dice("status", three, "--verify")
    assert (code, "removed by dice clean --keep-models 1: round-01/train/model" in out) == (0, True)
    assert "removed: round-01/train/model" in dice("status", three)[1]


def test_what_clean_refuses(three: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    assert "give all, best, or the number" in refused(2, "clean", three, "--keep-models", "0")
    assert "holds no run" in refused(2, "clean", tmp_path)
    with run_folder.locked(three):
        for more in ([], ["--dry-run"]):
            assert "is in use by another" in refused(2, "clean", three, *more)
    assert "were not compared" in refused(2, "clean", three, "--keep-models", "best")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / ".x.1.tmp").write_text("theirs")
    (three / "round-01" / "link").symlink_to(outside)
    for more in ([], ["--dry-run"]):
        assert "is a symbolic link" in refused(2, "clean", three, *more)
    assert (outside / ".x.1.tmp").exists()
    assert weights(three) == [1, 2, 3]


def test_clean_keeps_what_an_unfinished_run_needs(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"

    def failing(job: EvaluateJob) -> StageResult:
        if job.out.parent.name == "round-03" and "stop" in monkeypatched:
            raise UsageError("stopped")
        return no_evaluation(job)

    monkeypatched = {"stop"}
    faked_stages(monkeypatch, failing, weights=True)
    with pytest.raises(UsageError, match="stopped"):
        loop.run(with_rounds(config, count=4), folder)
    found = clean(folder, models=1, samples=False)
    # Two rounds are complete: round 3 reads M_2, and M_1 as the reference.
    assert (weights(folder), found["kept"]) == ([1, 2, 3], None)
    assert (shards(folder, "generate"), shards(folder, "score")) == ([3], [3])
    monkeypatched.clear()
    reads_only_what_is_there(monkeypatch)
    events = Events()
    loop.resume(folder, events)
    assert next(stage for stage, status in events.stages() if status == "done") == "round-03/evaluate"
    assert weights(folder) == [1, 2, 3, 4]

    # Settings that were changed, with no round gone through since: nothing is known to be of use no more.
    monkeypatch.setattr(loop, "prepare", stops)
    with pytest.raises(UsageError, match="stopped"):
        loop.resume(folder, assignments=["train.learning_rate=0.002"])
    found = clean(folder, models=1)
    assert weights(folder) == [1, 2, 3, 4]
    assert "Resume the run, and clean it then" in found["kept"]


def stops(_: Any) -> None:
    raise UsageError("stopped")


def test_a_stage_that_a_resume_does_again_keeps_its_models(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(job: EvaluateJob) -> StageResult:
        result = no_evaluation(job)
        return StageResult(result.files, {FAILURES: {"openai": "not reached"}} if "round-02" in str(job.out) else {})

    faked_stages(monkeypatch, failed, weights=True)
    loop.run(with_rounds(config, count=4, keep_models=1), tmp_path / "run")
    assert weights(tmp_path / "run") == [1, 2, 4]


@pytest.mark.parametrize("writes", [1, 4])
def test_a_removal_that_is_killed_is_finished(three: Path, writes: int) -> None:
    # SIGKILL at one of the deletions, in another process.
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom dice_py.runs.keeping import clean\n"
        "unlink, left = Path.unlink, [int(sys.argv[2])]\n"
        "def counted(self, missing_ok=False):\n"
        "    if self.suffix in ('.safetensors', '.parquet'):\n"
        "        left[0] -= 1\n"
        "        if not left[0]:\n            os.kill(os.getpid(), signal.SIGKILL)\n"
        "    unlink(self, missing_ok)\n"
        "Path.unlink = counted\nclean(Path(sys.argv[1]), models=1, samples=False)\n"
    )
    command = [sys.executable, "-c", script, str(three), str(writes)]
    killed = subprocess.run(command, env=child_environment(), check=False)
    assert killed.returncode == -9
    assert len(weights(three)) + len(shards(three, "generate")) + len(shards(three, "score")) == 9 - (writes - 1)
    found = verify_run(three)
    assert (found["damaged"], found["missing"]) == ([], [])
    assert resumed(three)[0] == {"kept"}
    clean(three, models=1, samples=False)
    assert (weights(three), shards(three, "generate"), shards(three, "score")) == ([3], [], [])
    assert resumed(three)[0] == {"kept"}
    sizes = [item["bytes"] for item in removal.removed_list(three)]
    assert len(sizes) == 8
    assert min(sizes) > 0
