"""Sampling of shards: shards that overlap, responses that are kept as they end, and what a resume samples."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from small_disk import small_disk
from tiny_generation import CONFIG, CPU, Stage, questions, shard

from dice_py.config.shared import DevicesConfig
from dice_py.config.stages import GenerateConfig
from dice_py.errors import DiskFullError
from dice_py.generation.engines.base import Request, Sample, SampleId
from dice_py.generation.engines.transformers import TransformersEngine
from dice_py.generation.journal import Journal
from dice_py.generation.sampler import SampleShards
from dice_py.generation.shard import ShardWriter, journal_of, read_prompts, write_prompts
from dice_py.stages.generate import GenerateJob
from dice_py.storage.parquet import parquet_key, parquet_meta

SETTINGS = CONFIG.model_copy(update={"max_new_tokens": 16, "samples": 4})
TOTAL = 5 * 4


@pytest.fixture(scope="module")
def uninterrupted(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    run = Stage(llama, tmp_path_factory.mktemp("out") / "generate")
    run(SETTINGS)
    return run.frame()


class Interrupted(Stage):
    """A stage that counts the requests of its engines, and that `until` interrupts."""

    def __init__(self, policy: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(policy, out)
        self.requested = 0
        add = TransformersEngine.add

        def counting(engine: TransformersEngine, requests: Any) -> None:
            self.requested += len(requests)
            add(engine, requests)

        monkeypatch.setattr(TransformersEngine, "add", counting)

    def until(self, event: str, at: int) -> None:
        """Runs the stage until its `at`-th `event`, and ends it there with an error."""
        remaining = at

        def report(name: str, **fields: Any) -> None:
            nonlocal remaining
            remaining -= name == event
            if not remaining:
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            GenerateJob(SETTINGS, CPU, **self.arguments).run(report)

    def kept(self) -> int:
        """Responses that a resume does not sample."""
        in_files = sum(pl.read_parquet(file).height for file in self.out.glob("*.parquet"))
        rows = 0
        for file in self.out.glob("*.journal"):
            with tempfile.TemporaryDirectory() as folder:  # has room, and opening may change the file
                copy = Path(shutil.copy(file, folder))
                # The key is in the header, after the magic and its length.
                journal = Journal(copy, file.read_bytes()[10:34].decode())
                rows += len(journal)
                journal.close()
        return in_files + rows


def same(one: pl.DataFrame, other: pl.DataFrame) -> None:
    """Equal, except that log-probabilities from another batch differ by float32 rounding."""
    assert one.drop("sampled_logp").equals(other.drop("sampled_logp"))
    assert one["sampled_logp"].to_list() == pytest.approx(other["sampled_logp"].to_list(), abs=1e-4)


@pytest.mark.parametrize(
    ("event", "at"), [("progress", 1), ("progress", 3), ("progress", 8), ("shard", 1), ("shard", 2)]
)
def test_a_resume_samples_only_what_is_missing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: pl.DataFrame, event: str, at: int
) -> None:
    run = Interrupted(llama, tmp_path / "generate", monkeypatch)
    run.until(event, at)
    kept = run.kept()
    assert 0 < kept < TOTAL
    run.requested = 0
    result = run(SETTINGS)
    assert run.requested == TOTAL - kept
    same(run.frame(), uninterrupted)
    assert result.counts["response_tokens"] == uninterrupted["response_tokens"].sum()
    assert sorted(file.name for file in run.out.iterdir()) == [shard(0), shard(1), shard(2)]
    done = [fields["done"] for name, fields in run.events if name == "progress"]
    assert done[0] <= kept
    assert done == sorted(done)
    assert done[-1] == TOTAL
    assert all(parquet_meta(file)["response_tokens"] for file, _ in result.files)


def test_interrupted_again_and_again(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: pl.DataFrame
) -> None:
    run = Interrupted(llama, tmp_path / "generate", monkeypatch)
    for _ in range(3):
        run.until("progress", 2)
    run(SETTINGS)
    same(run.frame(), uninterrupted)


def test_complete_records_of_a_torn_journal_are_kept(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: pl.DataFrame
) -> None:
    run = Interrupted(llama, tmp_path / "generate", monkeypatch)
    run.until("progress", 4)
    kept = run.kept()
    journal = next(file for file in sorted(run.out.glob("*.journal")) if file.stat().st_size > 100)
    journal.write_bytes(journal.read_bytes()[:-1])
    assert run.kept() == kept - 1
    run.requested = 0
    run(SETTINGS)
    assert run.requested == TOTAL - kept + 1
    same(run.frame(), uninterrupted)


@pytest.mark.parametrize("changed", [{"seed": 1}, {"round_number": 2}], ids=["seed", "round"])
def test_a_journal_with_other_settings_is_dropped(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    run = Interrupted(llama, tmp_path / "generate", monkeypatch)
    run.until("progress", 4)
    run.requested = 0
    run(SETTINGS, **changed)
    assert run.requested == TOTAL
    assert not list(run.out.glob("*.journal"))


def test_all_in_the_journal_needs_no_engine(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: pl.DataFrame
) -> None:
    run = Stage(llama, tmp_path / "generate")
    monkeypatch.setattr(ShardWriter, "write", lambda *_: 1 / 0)
    run.arguments["prompts"] = questions(2)  # one shard
    with pytest.raises(ZeroDivisionError):
        run(SETTINGS)
    monkeypatch.undo()
    monkeypatch.setattr(
        "dice_py.generation.sampler.build_engine", lambda *_: pytest.fail("the model was loaded for nothing")
    )
    run(SETTINGS)
    same(run.frame(), uninterrupted[:8])
    assert [name for name, _ in run.events if name == "throughput"] == []


@pytest.mark.parametrize(
    ("samples", "size", "which"),
    [(4, "16k", r"generations-0000\d\.parquet"), (64, "16k", r"generations-0000\d\.journal")],
    ids=["while a shard is written", "while responses are"],
)
def test_full_disk_loses_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: int, size: str, which: str
) -> None:
    settings = SETTINGS.model_copy(update={"samples": samples})
    with small_disk(tmp_path / "disk", size=size) as disk:
        run = Interrupted(llama, disk / "generate", monkeypatch)
        with pytest.raises(DiskFullError, match=rf"{which}.*Free some space, then `dice resume` the run"):
            run(settings)
        kept = run.kept()
        assert 0 < kept < 5 * samples
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        run.requested = 0
        run(settings)
        assert run.requested == 5 * samples - kept
        resumed = run.frame()
    uninterrupted = Stage(llama, tmp_path / "uninterrupted")
    uninterrupted(settings)
    same(resumed, uninterrupted.frame())


@pytest.mark.slow
def test_processes_sample_the_same(llama: Path, tmp_path: Path, uninterrupted: pl.DataFrame) -> None:
    run = Stage(llama, tmp_path / "generate")
    result = run(SETTINGS, devices=DevicesConfig(cpu_processes=2))
    same(run.frame(), uninterrupted)
    assert sorted(run.written()) == [shard(0), shard(1), shard(2)]
    assert [parquet_key(file) for file, _ in result.files] == [key for _, key in result.files]
    done = [fields["done"] for name, fields in run.events if name == "progress"]
    assert done == sorted(done)
    assert done[-1] == TOTAL
    # Devices are not in a shard's key.
    alone = Stage(llama, run.out)
    assert alone(SETTINGS) == result
    assert alone.written() == []


# --- the order of shards and requests, with a scripted engine --------------------------------------


class ScriptedEngine:
    """An engine with room for `width` requests.

    Each step ends all requests except those of the rows in `stuck`, which end when no others are left.
    """

    def __init__(self, width: int, stuck: set[SampleId] = frozenset()) -> None:
        self.width = width
        self.stuck = stuck
        self.queue: dict[SampleId, Request] = {}
        self.most_queued = 0
        self.closed = False

    @property
    def unfinished(self) -> int:
        return len(self.queue)

    @property
    def has_room(self) -> bool:
        return len(self.queue) < self.width

    def add(self, requests: list[tuple[SampleId, Request]]) -> None:
        self.queue.update(requests)
        self.most_queued = max(self.most_queued, len(self.queue))

    def step(self) -> list[tuple[SampleId, Sample]]:
        ended = [sample_id for sample_id in self.queue if sample_id not in self.stuck] or list(self.queue)
        for sample_id in ended:
            self.queue.pop(sample_id)
        return [(sample_id, Sample([4], "stop", -1.0)) for sample_id in ended]

    def close(self) -> None:
        self.closed = True


class RecordingQueue:
    """A `ShardQueue` that records `wait` of each call; `ahead`: it has a next shard while others are unfinished."""

    def __init__(self, numbers: range, ahead: bool = True) -> None:
        self.remaining = deque(numbers)
        self.ahead = ahead
        self.waits: list[bool] = []

    def receive(self, *, wait: bool) -> int | None:
        self.waits.append(wait)
        if not self.remaining or not (wait or self.ahead):
            return None
        return self.remaining.popleft()


class Sampling:
    """`SampleShards` on 4 shards of 2 prompts with 3 samples each."""

    def __init__(self, llama: Path, out: Path, monkeypatch: pytest.MonkeyPatch, engine: ScriptedEngine) -> None:
        self.out, self.engine = out, engine
        self.events: list[tuple[str, dict[str, Any]]] = []
        monkeypatch.setattr("dice_py.generation.sampler.build_engine", lambda *_: engine)
        shards = [[(10 * n + m, [1, 5, 6 + m]) for m in range(2)] for n in range(4)]
        write_prompts(out / "prompts", shards)
        self.arguments: dict[str, Any] = {
            "config": GenerateConfig(samples=3),
            "models": CPU,
            "engine": "transformers",
            "policy": llama,
            "stops": [4],
            "longest": 3,
            "prompts": out / "prompts",
            "files": [out / shard(n) for n in range(4)],
            "keys": [f"key {n}" for n in range(4)],
            "seed": 0,
            "round_number": 1,
        }

    def __call__(self, shards: RecordingQueue) -> None:
        SampleShards(**self.arguments)(shards, report=lambda event, **fields: self.events.append((event, fields)))

    def fields_of(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.events if name == event]


def test_a_long_response_delays_no_other_shard(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = Sampling(llama, tmp_path, monkeypatch, ScriptedEngine(width=8, stuck={(0, 1)}))
    sampling(RecordingQueue(range(4)))
    assert [fields["number"] for fields in sampling.fields_of("shard_complete")] == [1, 2, 3, 0]
    assert [parquet_key(sampling.arguments["files"][n]) for n in range(4)] == sampling.arguments["keys"]
    frame = pl.read_parquet(tmp_path / shard(0))
    assert frame["prompt_id"].to_list() == [0, 0, 0, 1, 1, 1]
    assert frame["sample_id"].to_list() == [0, 1, 2, 0, 1, 2]
    assert not list(tmp_path.glob("*.journal"))
    assert sampling.engine.closed


def test_the_next_shard_is_opened_while_the_engine_has_room(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(llama, tmp_path, monkeypatch, ScriptedEngine(width=8))
    shards = RecordingQueue(range(4))
    sampling(shards)
    # All samples of a prompt at once, until 8 are queued: 6 of the first shard and 3 of the second.
    assert sampling.engine.most_queued == 9
    # It waits for a shard only when no shard is open, first and last.
    assert shards.waits[0]
    assert shards.waits[-1]
    assert len(sampling.fields_of("shard_complete")) == 4


def test_shard_by_shard_if_none_comes_ahead(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = Sampling(llama, tmp_path, monkeypatch, ScriptedEngine(width=100))
    sampling(RecordingQueue(range(4), ahead=False))
    assert sampling.engine.most_queued == 6
    assert [fields["number"] for fields in sampling.fields_of("shard_complete")] == [0, 1, 2, 3]


def test_events_of_a_shard(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = Sampling(llama, tmp_path, monkeypatch, ScriptedEngine(width=100, stuck={(0, 1)}))
    file, key = sampling.arguments["files"][0], sampling.arguments["keys"][0]
    journal = Journal(journal_of(file), key)
    for row in (3, 4, 5):  # all of the second prompt
        journal.append(row, Sample([7, 4], "stop", -2.0))
    journal.flush()
    journal.close()
    sampling(RecordingQueue(range(1)))
    assert sampling.fields_of("advance") == [
        {"count": 3, "number": 0, "at": 3},
        {"count": 2, "number": 0, "at": 5},
        {"count": 1, "number": 0, "at": 6},
    ]
    assert sampling.fields_of("shard") == [{"file": shard(0), "key": key, "rows": 6}]
    assert sampling.fields_of("shard_complete") == [{"number": 0}]
    (throughput,) = sampling.fields_of("throughput")
    seconds = throughput.pop("seconds")
    assert throughput == {
        "stage": "generate",
        "file": shard(0),
        "sequences": 3,
        "tokens": 3,
        "prompt_tokens": 3,
        "tokens_per_second": 3 / seconds,
    }
    meta = parquet_meta(file)
    assert len(meta.pop("samples")) == 24  # the digest
    assert meta == {"cut_off": 0, "response_tokens": 9}
    assert pl.read_parquet(file)["response_tokens"].to_list() == [1, 1, 1, 2, 2, 2]


def test_a_shard_that_another_process_finished_is_not_sampled(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(llama, tmp_path, monkeypatch, ScriptedEngine(width=100))
    sampling(RecordingQueue(range(4)))
    sampling.events.clear()
    monkeypatch.setattr(
        "dice_py.generation.sampler.build_engine", lambda *_: pytest.fail("the model was loaded for nothing")
    )
    sampling(RecordingQueue(range(4)))
    assert sampling.events == [("shard_complete", {"number": n}) for n in range(4)]


def test_journals_are_closed_after_a_failure(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = Sampling(llama, tmp_path, monkeypatch, ScriptedEngine(width=100))
    monkeypatch.setattr(ScriptedEngine, "step", lambda _: 1 / 0)
    before = sorted(Path("/proc/self/fd").iterdir())
    with pytest.raises(ZeroDivisionError):
        sampling(RecordingQueue(range(4)))
    assert sampling.engine.closed
    assert len(list(Path("/proc/self/fd").iterdir())) == len(before)


def test_a_file_in_parts_is_the_same(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames, metas = [], []
    for part in (4096, 4):
        monkeypatch.setattr("dice_py.generation.shard.ROWS_IN_MEMORY", part)
        out = tmp_path / str(part)
        out.mkdir()
        Sampling(llama, out, monkeypatch, ScriptedEngine(width=100))(RecordingQueue(range(1)))
        frames.append(pl.read_parquet(out / shard(0)))
        metas.append(parquet_meta(out / shard(0)))
    assert frames[0].equals(frames[1])
    assert metas[0] == metas[1]


def test_prompts_are_read_by_shard(tmp_path: Path) -> None:
    shards = [[(7, [1, 2]), (4_000_000_000, [3])], [(9, list(range(500)))], [(n, [n]) for n in range(1000)]]
    write_prompts(tmp_path / "prompts", shards)
    assert [read_prompts(tmp_path / "prompts", n) for n in range(3)] == shards
