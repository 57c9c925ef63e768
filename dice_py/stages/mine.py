"""Stage 3, mine: the preference pairs of a round's scored shards, or of those of several rounds in one pool.

The mining itself is `dice_py.mine_pairs` (mining/pairs.py); here are the files that it reads and writes in a run. It
needs no model, so it runs in the process of the run. Rows that would take more than MEMORY_GIB are streamed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from dice_py.config.mining import LENGTH_COLUMNS, MineConfig, MiningOptions
from dice_py.errors import DataError
from dice_py.events import Report, no_report
from dice_py.mining.columns import CHARACTERS, arrow_frame
from dice_py.mining.files import ROW_BYTES
from dice_py.mining.labels import alpha_per_token
from dice_py.mining.no_pairs import explain_no_pairs
from dice_py.mining.pairs import mine_pairs
from dice_py.mining.parquet_input import ScoredFiles, columns_to_read
from dice_py.mining.segments import SEGMENT_BYTES
from dice_py.mining.streaming import StreamMiner
from dice_py.models.thinking import AnswerLength
from dice_py.stages.job import Job, StageResult
from dice_py.storage.files import TEMPORARY, atomic, make_folder, write_sealed
from dice_py.storage.integrity import check_intact
from dice_py.storage.keys import versions
from dice_py.storage.lookup import check_row_aligned
from dice_py.storage.parquet import ParquetStream, parquet_meta, parquet_rows, read_parquet, write_parquet
from dice_py.storage.schemas import MINED, MINED_LABELS, fit

MEMORY_GIB = 1.0
"""Memory of the rows that are mined in memory, and of the segments of a stream: some 22 million rows."""
_PART_ROWS = 1 << 18
"""Rows whose shards are opened together: token ids of so many responses may be in memory, where duplicates are."""
_PAIRS_AT_ONCE = 1 << 20
_SHORT = 64  # characters of a response that may be white space alone
_RULE = "equal rewards are no pair; no text is no response"
"""Of the key: pairs that an earlier version mined by another rule are mined again."""


@dataclass(frozen=True)
class MineJob(Job):
    """Mines the pairs of shards into `out/mined.parquet`; row numbers count through the shards.

    Beside it, `mining.json` has the summary, and the curve of mean length gap against alpha: `alpha`,
    `mean_length_gap` and `exact` (False: of a sample of the prompts), three lists of one length. The counts are
    those of `mining.json`, without the curve.

    Raises, when run:
        DataError: generations and scores do not belong together, or no pair is left (with the counts of dropped rows).
    """

    config: MineConfig
    generations: list[Path]
    scores: list[Path]
    """Row-aligned with the generations."""
    score_keys: list[str]
    """The key of each file of scores."""
    rounds: list[int]
    """The round that sampled each shard; in a pool of rounds the greatest is the newest policy's."""
    out: Path
    seed: int
    """Of `pairing="max_random"`, and of the choice among responses of equal reward."""
    policy: Path | None = None
    """The folder of the tokenizer, for `length=answer_tokens`."""
    thinking: list[str] | None = None
    """The delimiters of the thinking part (generate.thinking), for the same."""
    memory_gib: float = MEMORY_GIB
    """For the rows. More of them are streamed, with the same result."""

    def key_fields(self) -> dict[str, Any]:
        """The scores, the options, the rule of ties and the seed."""
        return {
            "scores": self.score_keys,
            "mine": self.config.model_dump(),
            "rule": _RULE,
            "seed": self.seed,
            "versions": versions("polars"),
            **({"thinking": self.thinking} if self.config.length == "answer_tokens" else {}),
        }

    def run(self, report: Report = no_report) -> StageResult:
        """Mines in this process; it takes seconds."""
        check_intact([*self.generations, *self.scores])
        check_row_aligned(self.generations, self.scores)
        options, key, file = self.config.options(self.seed), self.key(), self.out / "mined.parquet"
        if sum(map(parquet_rows, self.generations)) * ROW_BYTES <= self.memory_gib * 2**30:
            mined, curve = self._mine(options, file, key)
        else:
            mined, curve = self._stream(options, file, key, report)
        if not mined["pairs"]:
            raise DataError(explain_no_pairs(mined))
        config = self.config
        counts: dict[str, Any] = {
            "length": config.length,
            "debias": config.debias,
            "pairing": config.pairing,
            **({} if config.pool_rounds == 1 else {"pooled_rounds": sorted(set(self.rounds))}),
            **mined,
        }
        summary = self.out / "mining.json"
        write_sealed(summary, {**counts, "curve": curve.to_dict(as_series=False)}, key)
        return StageResult([(file, key), (summary, key)], counts)

    def frame(self, options: MiningOptions) -> pl.DataFrame:
        """The columns that the options name, of generations and scores side by side: what is mined.

        Its row numbers are those of the pairs.
        """
        check_row_aligned(self.generations, self.scores)
        return pl.concat(self._parts(options), rechunk=True)

    def _parts(self, options: MiningOptions) -> Iterator[pl.DataFrame]:
        """`frame`, some shards at a time."""
        answer = None
        if options.length_column == LENGTH_COLUMNS["answer_tokens"]:
            assert self.policy is not None
            answer = AnswerLength.of_folder(self.policy, self.thinking)
        shards: list[tuple[Path, Path, int, int]] = []
        count = 0
        for sampled, scored, number in zip(self.generations, self.scores, self.rounds, strict=True):
            rows = parquet_rows(sampled)
            if shards and count + rows > _PART_ROWS:
                yield _part(shards, options, answer)
                shards, count = [], 0
            shards.append((sampled, scored, number, rows))
            count += rows
        yield _part(shards, options, answer)

    def _mine(self, options: MiningOptions, file: Path, key: str) -> tuple[dict[str, Any], pl.DataFrame]:
        """Mines all rows at once into `file`; returns the summary and the curve."""
        mined = mine_pairs(self.frame(options), options)
        if mined.pairs.height:
            meta = alpha_per_token(options, mined.alpha)
            write_parquet(file, mined.pairs, key=key, schema=_schema(mined.pairs), meta=meta)
        return mined.summary(), mined.curve

    def _stream(
        self, options: MiningOptions, file: Path, key: str, report: Report
    ) -> tuple[dict[str, Any], pl.DataFrame]:
        """As `_mine`, in the memory of one segment: the columns are first gathered into a file beside `file`."""
        make_folder(file.parent)
        total = sum(map(parquet_rows, self.generations))
        folder = Path(tempfile.mkdtemp(prefix=f".mine.{os.getpid()}.", suffix=TEMPORARY, dir=file.parent))
        try:
            with ParquetStream(folder / "rows.parquet") as writer:
                done = 0
                for rows in self._parts(options):
                    writer.write(rows)
                    done += rows.height
                    report("progress", stage="mine", step="gather", done=done, total=total)
            files = ScoredFiles([str(folder / "rows.parquet")])
            segment_rows = max(1, int(self.memory_gib * 2**30 / SEGMENT_BYTES))
            miner = StreamMiner(files, columns_to_read(files, options), options, segment_rows, report)
            summary = miner.mine(folder / "pairs.parquet", key)
            if summary["pairs"]:
                _write_pairs(folder / "pairs.parquet", file, key)
            return summary, miner.curve
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _part(
    shards: list[tuple[Path, Path, int, int]], options: MiningOptions, answer: AnswerLength | None
) -> pl.DataFrame:
    """The rows of some shards: of each its generations, scores, round, and number of rows."""
    responses = _responses([shard[0] for shard in shards], options, answer)
    rows = responses.hstack(_rewards([shard[1] for shard in shards], options))
    if options.policy_column is None:
        return rows
    rounds = [pl.repeat(number, count, dtype=pl.UInt32, eager=True) for _, _, number, count in shards]
    return rows.with_columns(pl.concat(rounds).alias(options.policy_column))


def _responses(sampled: list[Path], options: MiningOptions, answer: AnswerLength | None) -> pl.DataFrame:
    """What is mined of shards of generations. `answer`: measures the lengths, where these are no column."""
    wanted = [pl.col("prompt_id", "finish_reason", *([] if answer is not None else [options.length_column]))]
    if options.duplicate_column is not None:
        # As 64-bit hashes, which is all that the miner compares: token ids are the bulk of a shard.
        wanted.append(pl.col(options.duplicate_column).hash())
    generations = pl.scan_parquet(sampled, glob=False)
    responses = generations.select(wanted).collect()
    if answer is not None:
        columns = ["prompt_id", "prompt_token_ids", "token_ids"]  # the bulk of a shard: one at a time
        lengths = [answer.of_shard(read_parquet(file, columns)) for file in sampled]
        responses = responses.with_columns(pl.concat(lengths))
    return responses.with_columns(_characters(generations)) if options.min_length else responses


def _rewards(scored: list[Path], options: MiningOptions) -> pl.DataFrame:
    """What is mined of shards of scores."""
    rewards = dict.fromkeys([options.reward_column, options.second_reward_column or options.reward_column])
    return pl.scan_parquet(scored, glob=False).select(list(rewards)).collect()


def _characters(generations: pl.LazyFrame) -> pl.Series:
    """`response_chars`, with 0 for responses of white space alone, which are as empty as those of no character.

    Text is read of short responses only.
    """
    counts = generations.select(CHARACTERS).collect()[CHARACTERS]
    short = generations.with_row_index("row").filter(pl.col(CHARACTERS) <= _SHORT)
    blank = short.filter(pl.col("response").str.strip_chars() == "").select("row").collect()["row"]
    return counts.scatter(blank, 0)


def _schema(pairs: pl.DataFrame) -> pl.Schema:
    known = MINED | MINED_LABELS
    return pl.Schema({name: known[name] for name in pairs.columns})


def _write_pairs(streamed: Path, file: Path, key: str) -> None:
    """Writes the pairs of the streaming miner as those of the stage: types and metadata of `MineJob`."""
    meta = {"alpha_per_token": parquet_meta(streamed)["alpha_per_token"]}
    with atomic(file) as temporary, ParquetStream(temporary) as writer:
        for batch in pq.ParquetFile(streamed.absolute()).iter_batches(_PAIRS_AT_ONCE):
            pairs = arrow_frame(pa.Table.from_batches([batch]))
            writer.write(fit(pairs, _schema(pairs)))
        writer.describe(key, meta)
