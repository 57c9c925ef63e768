"""A shard of the generate stage while it is being sampled: what is asked for, what came, and its file at the end.

Responses go to the journal beside the shard (generation/journal.py) as they end, in any order; the Parquet file is made
from it, in order, when the last one is there. Prompts come from one file of token ids with a row group per shard, so
that a process reads those of its own shards only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from dice_py.generation.engines.base import Request, Sample, SampleId
from dice_py.generation.journal import Journal
from dice_py.storage.files import atomic
from dice_py.storage.keys import seed_for
from dice_py.storage.parquet import ParquetStream
from dice_py.storage.schemas import GENERATIONS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Prompt = tuple[int, list[int]]
"""prompt_id and token ids."""

_PART = 4096
"""Rows that are in memory at one time while a shard's file is written."""


def write_prompts(path: Path, shards: Sequence[Sequence[Prompt]]) -> None:
    """Token ids of the prompts of all shards, a row group for each."""
    schema = pa.schema({"prompt_id": pa.uint32(), "token_ids": pa.list_(pa.int32())})
    with atomic(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for shard in shards:
            ids, tokens = zip(*shard, strict=True)
            writer.write_table(pa.table({"prompt_id": ids, "token_ids": tokens}, schema), row_group_size=len(shard))


def read_prompts(path: Path, number: int) -> list[Prompt]:
    """The prompts of one shard, as `write_prompts` wrote them."""
    with pq.ParquetFile(path) as file:
        table = file.read_row_group(number)
    columns: list[list[Any]] = [table[name].to_pylist() for name in ("prompt_id", "token_ids")]
    return list(zip(*columns, strict=True))


@dataclass
class _Made:
    """What this process sampled for the shard."""

    sequences: int = 0
    tokens: int = 0
    prompts: set[int] = field(default_factory=set)


class ShardWriter:
    """One shard, `samples` responses for each of its prompts: row = prompt · samples + sample.

    Args:
        number: of the shard, and of its row group in the file of prompts.
        file: the shard's file; the journal lies beside it.
        key: the shard's key, which a journal must have for its responses to count.
    """

    def __init__(self, number: int, file: Path, key: str, prompts: list[Prompt], samples: int) -> None:
        self.number = number
        self.file = file
        self.key = key
        self.prompts = prompts
        self.samples = samples
        self.journal = Journal(journal_of(file), key)
        self.made = _Made()

    @property
    def rows(self) -> int:
        """Responses that it has when it is whole."""
        return len(self.prompts) * self.samples

    @property
    def is_complete(self) -> bool:
        """True when every response is in the journal."""
        return len(self.journal) == self.rows

    def requests(self, *seed: int) -> list[list[tuple[SampleId, Request]]]:
        """What is missing, by prompt. `seed` is (run seed, round): prompt_id and sample_id make it a response's."""
        there, missing = self.journal.rows, []
        for at, (prompt_id, token_ids) in enumerate(self.prompts):
            first = at * self.samples
            requests = [
                ((self.number, first + sample), Request(token_ids, seed_for(*seed, prompt_id, sample)))
                for sample in range(self.samples)
                if first + sample not in there
            ]
            if requests:
                missing.append(requests)
        return missing

    def add(self, row: int, sample: Sample) -> None:
        """Notes a response that ended; `journal.flush` makes it safe."""
        self.journal.append(row, sample)
        self.made.sequences += 1
        self.made.tokens += len(sample.token_ids)
        self.made.prompts.add(row // self.samples)

    def write(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Makes the shard's file from the journal, atomically, and removes the journal."""
        meta = {"cut_off": 0, "response_tokens": 0}
        with atomic(self.file) as temporary, ParquetStream(temporary) as stream:
            for first in range(0, self.rows, _PART):
                frame = self._frame(range(first, min(first + _PART, self.rows)), tokenizer)
                meta["cut_off"] += int((frame["finish_reason"] == "length").sum())
                meta["response_tokens"] += int(frame["response_tokens"].sum())
                stream.write(frame)
            stream.describe(self.key, meta)
        self.journal.remove()

    def throughput(self, since: float) -> dict[str, Any]:
        """Fields of the `throughput` event: what this process made, over the seconds since `since` (monotonic)."""
        seconds = time.monotonic() - since
        return {
            "file": self.file.name,
            "sequences": self.made.sequences,
            "tokens": self.made.tokens,
            # Each prompt once, however many responses it has: that is what is computed.
            "prompt_tokens": sum(len(self.prompts[at][1]) for at in self.made.prompts),
            "seconds": seconds,
            "tokens_per_second": self.made.tokens / seconds if seconds > 0 else 0.0,
        }

    def _frame(self, rows: range, tokenizer: PreTrainedTokenizerBase) -> pl.DataFrame:
        samples = [self.journal.read(row) for row in rows]
        prompts = [self.prompts[row // self.samples] for row in rows]
        token_ids = [sample.token_ids for sample in samples]
        texts = tokenizer.batch_decode(token_ids, skip_special_tokens=True)
        return pl.DataFrame(
            {
                "prompt_id": [prompt_id for prompt_id, _ in prompts],
                "sample_id": [row % self.samples for row in rows],
                "prompt_token_ids": [ids for _, ids in prompts],
                "token_ids": token_ids,
                "response": texts,
                "response_tokens": [len(ids) for ids in token_ids],
                "response_chars": [len(text) for text in texts],
                "finish_reason": [sample.finish_reason for sample in samples],
                "sampled_logp": [sample.logp for sample in samples],
            },
            schema=GENERATIONS,
        )


def journal_of(file: Path) -> Path:
    """Where the journal of a shard's file lies."""
    return file.with_suffix(".journal")
