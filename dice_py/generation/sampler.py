"""Samples the shards of one group of devices. Several shards are open at a time, so that the engine stays busy.

The last, long responses of a shard are decoded beside the first ones of the next shard. A finished response is in its
shard's journal before the engine's next step, so that no process samples it again.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from dice_py.compute.shard_queue import ShardQueue
from dice_py.config.shared import ModelConfig
from dice_py.config.stages import GenerateConfig
from dice_py.events import Report
from dice_py.generation.engines.base import Engine, Request, SampleId
from dice_py.generation.engines.factory import build_engine
from dice_py.generation.shard import ShardWriter, read_prompts
from dice_py.models.tokenization import load_tokenizer
from dice_py.models.vocabulary import KnownTokens
from dice_py.storage.parquet import parquet_key


@dataclass(frozen=True)
class SampleShards:
    """The work of one group: samples the shards that it receives, and writes their files.

    Calling it raises:
        DiskFullError: the responses in journals are kept.
        DiceError: as the engine raises it.
    """

    config: GenerateConfig
    models: ModelConfig
    engine: str
    """A name in `ENGINES` (generation/engines/factory.py)."""
    policy: Path
    stops: list[int]
    """Token ids that end a response."""
    longest: int
    """Tokens of the longest prompt of all shards."""
    prompts: Path
    """The file of `write_prompts`."""
    files: list[Path]
    """Of all shards; a shard's number is its index here."""
    keys: list[str]
    """Of all shards."""
    seed: int
    round_number: int

    def __call__(self, shards: ShardQueue, *, report: Report) -> None:
        """Samples until `shards` has no more.

        Args:
            shards: the queue of shard numbers.
            report: receives the events `advance`, `shard`, `throughput` and `shard_complete`.
        """
        with contextlib.ExitStack() as stack:
            _Sampling(self, shards, report, stack).run()


class _Sampling:
    """One call of `SampleShards`: the engine, the open shards, and the requests that the engine has no room for yet."""

    def __init__(self, work: SampleShards, shards: ShardQueue, report: Report, stack: contextlib.ExitStack) -> None:
        self.work, self.shards, self.report, self.stack = work, shards, report, stack
        self.tokenizer = load_tokenizer(work.policy, work.models)
        self.open: dict[int, ShardWriter] = {}
        self.queue: deque[list[tuple[SampleId, Request]]] = deque()  # of open shards, by prompt
        self.engine: Engine | None = None  # built for the first request, since journals may have all responses
        self.since = 0.0  # time.monotonic() of the last complete shard, or of the engine's start
        stack.callback(self._close_journals)

    def run(self) -> None:
        while True:
            self._fill()
            if self.engine is None or not self.open:
                return
            self._step(self.engine)

    def _fill(self) -> None:
        """Adds requests while the engine has room. Opens the next shard when the open ones have no more requests."""
        while self.engine is None or self.engine.has_room:
            if self.queue:
                if self.engine is None:
                    self.engine = self._build()
                self.engine.add(self.queue.popleft())
                continue
            number = self.shards.receive(wait=not self.open)
            if number is None:
                return
            self._open(number)

    def _build(self) -> Engine:
        work = self.work
        pad = int(self.tokenizer.pad_token_id)
        known = KnownTokens.of(self.tokenizer, work.stops)
        engine = build_engine(work.engine, work.config, work.models, work.policy, work.stops, work.longest, pad, known)
        self.stack.callback(engine.close)
        self.since = time.monotonic()
        return engine

    def _open(self, number: int) -> None:
        work = self.work
        file, key = work.files[number], work.keys[number]
        if parquet_key(file) == key:  # another process wrote it, and was killed before it could report that
            self.report("shard_complete", number=number)
            return
        shard = ShardWriter(
            number, file, key, read_prompts(work.prompts, number), work.config.samples, work.config.thinking
        )
        self.open[number] = shard
        if len(shard.journal):
            self.report("advance", count=len(shard.journal), number=number, at=len(shard.journal))
        self.queue.extend(shard.requests(work.seed, work.round_number))
        if shard.is_complete:
            self._finish(shard)

    def _step(self, engine: Engine) -> None:
        counts: dict[int, int] = {}
        for (number, row), sample in engine.step():
            self.open[number].add(row, sample)
            counts[number] = counts.get(number, 0) + 1
        for number, count in counts.items():
            shard = self.open[number]
            shard.journal.flush()
            self.report("advance", count=count, number=number, at=len(shard.journal))
            if shard.is_complete:
                self._finish(shard)

    def _finish(self, shard: ShardWriter) -> None:
        shard.write(self.tokenizer)
        del self.open[shard.number]
        self.report("shard", file=shard.file.name, key=shard.key, rows=shard.rows)
        if shard.sampled_here.sequences:  # The journal may have had all of it.
            self.report("throughput", stage="generate", **shard.throughput(self.since))
        self.since = time.monotonic()
        self.report("shard_complete", number=shard.number)

    def _close_journals(self) -> None:
        for shard in self.open.values():
            shard.journal.close()
