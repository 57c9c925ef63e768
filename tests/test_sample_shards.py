"""The working half of stage 1: shards that overlap, responses that are kept as they end, and what a resume asks for."""

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
from test_generate import CONFIG, CPU, Stage, questions, shard
from tiny_models import make_llama

from dice_py.config.shared import DevicesConfig
from dice_py.config.stages import GenerateConfig
from dice_py.errors import DiskFullError
from dice_py.generation.engines.base import Request, Sample, SampleId
from dice_py.generation.engines.transformers import TransformersEngine
from dice_py.generation.journal import Journal
from dice_py.generation.sampler import sample_shards
from dice_py.generation.shard import ShardWriter, journal_of, read_prompts, write_prompts
from dice_py.stages import generate as stage
from dice_py.storage.parquet import parquet_key, parquet_meta

SETTINGS = CONFIG.model_copy(update={"max_new_tokens": 16, "samples": 4})
TOTAL = 5 * 4


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def uninterrupted(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    run = Stage(llama, tmp_path_factory.mktemp("out") / "generate")
    run(SETTINGS)
    return run.frame()


class Interrupted(Stage):
    """A stage that ends with an error at its `at`-th `event`, and counts the requests that engines get."""

    def __init__(self, policy: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(policy, out)
        self.asked = 0
        add = TransformersEngine.add

        def counting(engine: TransformersEngine, requests: Any) -> None:
            self.asked += len(requests)
            add(engine, requests)

        monkeypatch.setattr(TransformersEngine, "add", counting)

    def until(self, event: str, at: int) -> None:
        left = at

        def report(heard: str, **fields: Any) -> None:
            nonlocal left
            left -= heard == event
            if not left:
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            stage.generate(SETTINGS, CPU, **self.arguments, report=report)

    def kept(self) -> int:
        """Responses that a resume need not sample."""
        whole = sum(pl.read_parquet(file).height for file in self.out.glob("*.parquet"))
        rows = 0
        for file in self.out.glob("*.journal"):
            with tempfile.TemporaryDirectory() as folder:  # where there is room, and what is opened may be changed
                copy = Path(shutil.copy(file, folder))
                # The key is in the header, behind the magic and its length.
                journal = Journal(copy, file.read_bytes()[10:34].decode())
                rows += len(journal)
                journal.close()
        return whole + rows


def same(one: pl.DataFrame, other: pl.DataFrame) -> None:
    """Equal to the bit, but for sums whose terms another batch computes: those to float32's rounding."""
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
    run.asked = 0
    result = run(SETTINGS)
    assert run.asked == TOTAL - kept
    same(run.frame(), uninterrupted)
    assert result.response_tokens == uninterrupted["response_tokens"].sum()
    assert sorted(file.name for file in run.out.iterdir()) == [shard(0), shard(1), shard(2)]
    done = [fields["done"] for name, fields in run.events if name == "progress"]
    assert done[0] <= kept
    assert done == sorted(done)
    assert done[-1] == TOTAL
    assert all(parquet_meta(file)["response_tokens"] for file in result.files)


def test_interrupted_again_and_again(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: pl.DataFrame
) -> None:
    run = Interrupted(llama, tmp_path / "generate", monkeypatch)
    for _ in range(3):
        run.until("progress", 2)
    run(SETTINGS)
    same(run.frame(), uninterrupted)


def test_of_a_torn_journal_what_is_whole_is_kept(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: pl.DataFrame
) -> None:
    run = Interrupted(llama, tmp_path / "generate", monkeypatch)
    run.until("progress", 4)
    kept = run.kept()
    journal = next(file for file in sorted(run.out.glob("*.journal")) if file.stat().st_size > 100)
    journal.write_bytes(journal.read_bytes()[:-1])
    assert run.kept() == kept - 1
    run.asked = 0
    run(SETTINGS)
    assert run.asked == TOTAL - kept + 1
    same(run.frame(), uninterrupted)


@pytest.mark.parametrize("changed", [{"seed": 1}, {"round_number": 2}], ids=["seed", "round"])
def test_a_journal_of_other_settings_is_dropped(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    run = Interrupted(llama, tmp_path / "generate", monkeypatch)
    run.until("progress", 4)
    run.asked = 0
    run(SETTINGS, **changed)
    assert run.asked == TOTAL
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
        run.asked = 0
        run(settings)
        assert run.asked == 5 * samples - kept
        resumed = run.frame()
    whole = Stage(llama, tmp_path / "whole")
    whole(settings)
    same(resumed, whole.frame())


@pytest.mark.slow
def test_processes_make_the_same(llama: Path, tmp_path: Path, uninterrupted: pl.DataFrame) -> None:
    run = Stage(llama, tmp_path / "generate")
    result = run(SETTINGS, devices=DevicesConfig(cpu_processes=2))
    same(run.frame(), uninterrupted)
    assert sorted(run.written()) == [shard(0), shard(1), shard(2)]
    assert [parquet_key(file) for file in result.files] == result.keys
    done = [fields["done"] for name, fields in run.events if name == "progress"]
    assert done == sorted(done)
    assert done[-1] == TOTAL
    # Neither devices nor where a shard was made is in its key.
    monkey = Stage(llama, run.out)
    assert monkey(SETTINGS) == result
    assert monkey.written() == []


# --- how shards are taken and fed, with an engine that does as it is told --------------------------------------


class Slow:
    """An engine that ends, at each step, all open requests but those of the rows in `stuck`, and those at the very end.

    It has room for `width` requests.
    """

    def __init__(self, width: int, stuck: set[SampleId] = frozenset()) -> None:
        self.width = width
        self.stuck = stuck
        self.queue: dict[SampleId, Request] = {}
        self.most = 0
        self.closed = False

    @property
    def unfinished(self) -> int:
        return len(self.queue)

    @property
    def has_room(self) -> bool:
        return len(self.queue) < self.width

    def add(self, requests: list[tuple[SampleId, Request]]) -> None:
        self.queue.update(requests)
        self.most = max(self.most, len(self.queue))

    def step(self) -> list[tuple[SampleId, Sample]]:
        ended = [place for place in self.queue if place not in self.stuck] or list(self.queue)
        for place in ended:
            self.queue.pop(place)
        return [(place, Sample([4], "stop", -1.0)) for place in ended]

    def close(self) -> None:
        self.closed = True


class Listed:
    """`ShardQueue` that notes how it was asked."""

    def __init__(self, numbers: range, ahead: bool = True) -> None:
        self.left = deque(numbers)
        self.ahead = ahead
        self.asked: list[bool] = []

    def receive(self, *, wait: bool) -> int | None:
        self.asked.append(wait)
        if not self.left or not (wait or self.ahead):
            return None
        return self.left.popleft()


class Half:
    """`sample_shards` on 4 shards of 2 prompts with 3 samples each."""

    def __init__(self, llama: Path, out: Path, monkeypatch: pytest.MonkeyPatch, engine: Slow) -> None:
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

    def __call__(self, items: Listed) -> None:
        sample_shards(items, **self.arguments, report=lambda event, **fields: self.events.append((event, fields)))

    def of(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.events if name == event]


def test_a_straggler_holds_nobody_back(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = Half(llama, tmp_path, monkeypatch, Slow(width=8, stuck={(0, 1)}))
    half(Listed(range(4)))
    assert [fields["number"] for fields in half.of("item")] == [1, 2, 3, 0]
    assert [parquet_key(half.arguments["files"][n]) for n in range(4)] == half.arguments["keys"]
    frame = pl.read_parquet(tmp_path / shard(0))
    assert frame["prompt_id"].to_list() == [0, 0, 0, 1, 1, 1]
    assert frame["sample_id"].to_list() == [0, 1, 2, 0, 1, 2]
    assert not list(tmp_path.glob("*.journal"))
    assert half.engine.closed


def test_the_next_shard_is_taken_while_there_is_room(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = Half(llama, tmp_path, monkeypatch, Slow(width=8))
    items = Listed(range(4))
    half(items)
    # Whole prompts, until 8 are queued: 6 of the first shard and 3 of the second.
    assert half.engine.most == 9
    # Nobody waits while something is open; the last answer ends it.
    assert items.asked[0]
    assert items.asked[-1]
    assert len(half.of("item")) == 4


def test_shard_by_shard_where_none_is_given_ahead(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = Half(llama, tmp_path, monkeypatch, Slow(width=100))
    half(Listed(range(4), ahead=False))
    assert half.engine.most == 6
    assert [fields["number"] for fields in half.of("item")] == [0, 1, 2, 3]


def test_events_of_a_shard(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = Half(llama, tmp_path, monkeypatch, Slow(width=100, stuck={(0, 1)}))
    file, key = half.arguments["files"][0], half.arguments["keys"][0]
    journal = Journal(journal_of(file), key)
    for row in (3, 4, 5):  # all of the second prompt
        journal.append(row, Sample([7, 4], "stop", -2.0))
    journal.flush()
    journal.close()
    half(Listed(range(1)))
    assert half.of("advance") == [
        {"count": 3, "number": 0, "at": 3},
        {"count": 2, "number": 0, "at": 5},
        {"count": 1, "number": 0, "at": 6},
    ]
    assert half.of("shard") == [{"file": shard(0), "key": key, "rows": 6}]
    assert half.of("item") == [{"number": 0}]
    (throughput,) = half.of("throughput")
    seconds = throughput.pop("seconds")
    assert throughput == {
        "stage": "generate",
        "file": shard(0),
        "sequences": 3,
        "tokens": 3,
        "prompt_tokens": 3,
        "tokens_per_second": 3 / seconds,
    }
    assert parquet_meta(file) == {"cut_off": 0, "response_tokens": 9}
    assert pl.read_parquet(file)["response_tokens"].to_list() == [1, 1, 1, 2, 2, 2]


def test_a_shard_that_another_process_finished_is_not_made_again(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = Half(llama, tmp_path, monkeypatch, Slow(width=100))
    half(Listed(range(4)))
    half.events.clear()
    monkeypatch.setattr(
        "dice_py.generation.sampler.build_engine", lambda *_: pytest.fail("the model was loaded for nothing")
    )
    half(Listed(range(4)))
    assert half.events == [("item", {"number": n}) for n in range(4)]


def test_journals_are_closed_whatever_happens(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = Half(llama, tmp_path, monkeypatch, Slow(width=100))
    monkeypatch.setattr(Slow, "step", lambda _: 1 / 0)
    before = sorted(Path("/proc/self/fd").iterdir())
    with pytest.raises(ZeroDivisionError):
        half(Listed(range(4)))
    assert half.engine.closed
    assert len(list(Path("/proc/self/fd").iterdir())) == len(before)


def test_a_file_in_parts_is_the_same(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = []
    for part in (4096, 4):
        monkeypatch.setattr("dice_py.generation.shard.ROWS_IN_MEMORY", part)
        out = tmp_path / str(part)
        out.mkdir()
        Half(llama, out, monkeypatch, Slow(width=100))(Listed(range(1)))
        frames.append(pl.read_parquet(out / shard(0)))
        assert parquet_meta(out / shard(0)) == {"cut_off": 0, "response_tokens": 6}
    assert frames[0].equals(frames[1])


def test_prompts_come_back_by_shard(tmp_path: Path) -> None:
    shards = [[(7, [1, 2]), (4_000_000_000, [3])], [(9, list(range(500)))], [(n, [n]) for n in range(1000)]]
    write_prompts(tmp_path / "prompts", shards)
    assert [read_prompts(tmp_path / "prompts", n) for n in range(3)] == shards
