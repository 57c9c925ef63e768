"""Samples the shards that one group of devices is given."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from pathlib import Path

from dice_py.compute.dispatch import ShardQueue
from dice_py.config.shared import ModelConfig
from dice_py.config.stages import GenerateConfig
from dice_py.events import Report
from dice_py.generation.engines.base import Engine, Request, SampleId
from dice_py.generation.engines.factory import build_engine
from dice_py.generation.shard import ShardWriter, read_prompts
from dice_py.models.tokenization import load_tokenizer
from dice_py.storage.parquet import parquet_key


def sample_shards(
    items: ShardQueue,
    *,
    config: GenerateConfig,
    models: ModelConfig,
    engine: str,
    policy: Path,
    stops: list[int],
    longest: int,
    prompts: Path,
    files: list[Path],
    keys: list[str],
    seed: int,
    round_number: int,
    report: Report,
) -> None:
    """The working half: samples shards and writes their files, several open at a time so that the engine is busy.

    A shard's last, long responses run beside the next one's first. What ended is in the shard's journal before the
    engine's next step, and is not sampled again by whoever takes the shard up later.

    Args:
        engine: "transformers" or "vllm".
        stops: token ids that end a response.
        longest: tokens of the longest prompt of all shards.
        prompts: the file that `write_prompts` made.
        files, keys: of all shards; `items` gives indices into them.

    Raises:
        DiskFullError: nothing that was journalled is lost.
        DiceError: as the engine raises it.
    """
    tokenizer = load_tokenizer(policy, models)
    opened: dict[int, ShardWriter] = {}
    queue: deque[list[tuple[SampleId, Request]]] = deque()  # of open shards, by prompt, not given to the engine yet
    sampler: Engine | None = None
    since = 0.0

    def take_up(number: int) -> None:
        if parquet_key(files[number]) == keys[number]:  # another process wrote it, and died before it could say so
            report("item", number=number)
            return
        shard = ShardWriter(number, files[number], keys[number], read_prompts(prompts, number), config.samples)
        opened[number] = shard
        if len(shard.journal):
            report("advance", count=len(shard.journal), number=number, at=len(shard.journal))
        queue.extend(shard.requests(seed, round_number))
        if shard.is_complete:
            finish(shard)

    def finish(shard: ShardWriter) -> None:
        nonlocal since
        shard.write(tokenizer)
        del opened[shard.number]
        report("shard", file=shard.file.name, key=shard.key, rows=shard.rows)
        if shard.made.sequences:  # all of it may have been in the journal
            report("throughput", stage="generate", **shard.throughput(since))
        since = time.monotonic()
        report("item", number=shard.number)

    def close_journals() -> None:
        for shard in opened.values():
            shard.journal.close()

    with contextlib.ExitStack() as stack:
        stack.callback(close_journals)
        while True:
            while sampler is None or sampler.has_room:
                if queue:
                    if sampler is None:
                        pad = int(tokenizer.pad_token_id)
                        sampler = build_engine(engine, config, models, policy, stops, longest, pad)
                        stack.callback(sampler.close)
                        since = time.monotonic()
                    sampler.add(queue.popleft())
                    continue
                number = items.receive(wait=not opened)
                if number is None:
                    break
                take_up(number)
            if sampler is None or not opened:
                return  # no more shards, and none open
            counts: dict[int, int] = {}
            for (number, row), sample in sampler.step():
                opened[number].add(row, sample)
                counts[number] = counts.get(number, 0) + 1
            for number, count in counts.items():
                shard = opened[number]
                shard.journal.flush()
                report("advance", count=count, number=number, at=len(shard.journal))
                if shard.is_complete:
                    finish(shard)
