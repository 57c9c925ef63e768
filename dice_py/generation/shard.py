"""A shard of the generate stage while it is sampled: its missing requests, its finished responses, and its file.

Responses go to the journal beside the shard's file (generation/journal.py) in the order in which they end. When all are
there, the Parquet file is written from the journal, by row. Prompts are in one file of token ids with a row group for
each shard, so that a process reads only the prompts of its own shards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from dice_py.errors import DataError
from dice_py.generation.engines.base import Request, Sample, SampleId
from dice_py.generation.journal import Journal
from dice_py.models.thinking import decode_responses
from dice_py.storage.files import atomic
from dice_py.storage.keys import digest, seed_for
from dice_py.storage.parquet import ParquetStream
from dice_py.storage.schemas import GENERATIONS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = tuple[int, list[int]]
"""prompt_id and token ids."""

ROWS_IN_MEMORY = 4096
"""Rows that are in memory at one time while a shard's file is written."""


def write_prompts(path: Path, shards: Sequence[Sequence[Prompt]]) -> None:
    """Writes the prompts of all shards to one Parquet file (`prompt_id` u32, `token_ids` list[i32]).

    Shard n is row group n. The file is written atomically.
    """
    schema = pa.schema({"prompt_id": pa.uint32(), "token_ids": pa.list_(pa.int32())})
    with atomic(path) as temporary, pq.ParquetWriter(temporary.absolute(), schema) as writer:
        for shard in shards:
            ids, tokens = zip(*shard, strict=True)
            writer.write_table(pa.table({"prompt_id": ids, "token_ids": tokens}, schema), row_group_size=len(shard))


def read_prompts(path: Path, number: int) -> list[Prompt]:
    """Reads the prompts of shard `number` from the file of `write_prompts`."""
    with pq.ParquetFile(path.absolute()) as file:
        table = file.read_row_group(number)
    columns: list[list[Any]] = [table[name].to_pylist() for name in ("prompt_id", "token_ids")]
    return list(zip(*columns, strict=True))


@dataclass
class SampledHere:
    """What this process sampled for a shard, beyond what its journal had already."""

    sequences: int = 0
    tokens: int = 0
    prompts: set[int] = field(default_factory=set)  # by position in the shard


class ShardWriter:
    """Collects the responses of one shard in its journal, and writes its file.

    The shard has `samples` responses for each prompt: row = position of the prompt · samples + sample_id.

    Args:
        number: the shard's position in the stage.
        file: the shard's file; the journal is beside it.
        key: the shard's key. The responses of a journal with another key are dropped.
        prompts: of the shard, in order.
        thinking: the delimiters of thinking, which the texts of responses keep; None: those of the tokenizer.

    Raises:
        DiskFullError: from the constructor too, since it opens the journal.
    """

    def __init__(
        self,
        number: int,
        file: Path,
        key: str,
        prompts: list[Prompt],
        samples: int,
        thinking: Sequence[str] | None = None,
    ) -> None:
        self.number = number
        self.file = file
        self.key = key
        self.prompts = prompts
        self.samples = samples
        self.thinking = thinking
        self.journal = Journal(journal_of(file), key)
        self.sampled_here = SampledHere()

    @property
    def rows(self) -> int:
        """Responses of the complete shard."""
        return len(self.prompts) * self.samples

    @property
    def is_complete(self) -> bool:
        """True when every response is in the journal."""
        return len(self.journal) == self.rows

    def requests(self, *seed: int) -> list[list[tuple[SampleId, Request]]]:
        """The missing responses, one list for each prompt.

        Args:
            seed: (run seed, round). Together with prompt_id and sample_id it gives each response's seed.
        """
        finished, missing = self.journal.rows, []
        for position, (prompt_id, token_ids) in enumerate(self.prompts):
            first = position * self.samples
            requests = [
                ((self.number, first + sample), Request(token_ids, seed_for(*seed, prompt_id, sample)))
                for sample in range(self.samples)
                if first + sample not in finished
            ]
            if requests:
                missing.append(requests)
        return missing

    def add(self, row: int, sample: Sample) -> None:
        """Appends a finished response to the journal. It survives this process only after `journal.flush`.

        Raises:
            DataError: its log-probability is NaN, so that its tokens mean nothing.
        """
        if math.isnan(sample.logp):
            raise DataError(
                f"prompt {self.prompts[row // self.samples][0]}: the policy's log-probabilities are NaN, so that what "
                "it samples means nothing; set model.dtype to float32 or bfloat16 if it is float16, whose range is "
                "small, else config.json does not fit the weights (norms, positions)"
            )
        self.journal.append(row, sample)
        self.sampled_here.sequences += 1
        self.sampled_here.tokens += len(sample.token_ids)
        self.sampled_here.prompts.add(row // self.samples)

    def write(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes the shard's file from the journal, atomically, and removes the journal.

        The file has the columns of `GENERATIONS` (storage/schemas.py), the shard's key, the sums `cut_off` and
        `response_tokens`, and `samples`, a digest of the responses' tokens and finish reasons: a GPU may sample others
        under the same key.

        Raises:
            DiskFullError: the journal is kept.
            InterruptedRunError: another process goes on with this shard.
        """
        meta: dict[str, Any] = {"cut_off": 0, "response_tokens": 0}
        lengths, token_ids, reasons = (xxhash.xxh3_128() for _ in range(3))
        with atomic(self.file) as temporary, ParquetStream(temporary) as stream:
            for first in range(0, self.rows, ROWS_IN_MEMORY):
                frame = self._frame(range(first, min(first + ROWS_IN_MEMORY, self.rows)), tokenizer)
                meta["cut_off"] += int((frame["finish_reason"] == "length").sum())
                meta["response_tokens"] += int(frame["response_tokens"].sum())
                lengths.update(frame["response_tokens"].to_numpy().tobytes())
                token_ids.update(frame["token_ids"].explode().drop_nulls().to_numpy().tobytes())
                reasons.update("".join(f"{reason} " for reason in frame["finish_reason"]).encode())
                stream.write(frame)
            self.journal.check_ours()
            meta["samples"] = digest(*(part.hexdigest() for part in (lengths, token_ids, reasons)))
            stream.describe(self.key, meta)
        self.journal.remove()

    def throughput(self, since: float) -> dict[str, Any]:
        """Fields of the `throughput` event: what this process sampled since `since`, in `time.monotonic()` seconds."""
        sampled = self.sampled_here
        seconds = time.monotonic() - since
        return {
            "file": self.file.name,
            "sequences": sampled.sequences,
            "tokens": sampled.tokens,
            # Each prompt once, since its responses share its prefill.
            "prompt_tokens": sum(len(self.prompts[position][1]) for position in sampled.prompts),
            "seconds": seconds,
            "tokens_per_second": sampled.tokens / seconds if seconds > 0 else 0.0,
        }

    def _frame(self, rows: range, tokenizer: PreTrainedTokenizerBase) -> pl.DataFrame:
        samples = [self.journal.read(row) for row in rows]
        prompts = [self.prompts[row // self.samples] for row in rows]
        token_ids = [sample.token_ids for sample in samples]
        texts = decode_responses(tokenizer, token_ids, self.thinking)
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
    """Path of the journal for a shard's file."""
    return file.with_suffix(".journal")
