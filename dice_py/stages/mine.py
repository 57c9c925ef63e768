"""Stage 3, mine: the preference pairs of a round's scored shards, or of those of several rounds in one pool.

The mining itself is `dice_py.mine_pairs` (mining/pairs.py); here are the files that it reads and writes in a run. It
needs no model, so it runs in the process of the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.config.mining import LENGTH_COLUMNS, MineConfig, MiningOptions
from dice_py.errors import DataError
from dice_py.events import Report, no_report
from dice_py.mining.columns import CHARACTERS
from dice_py.mining.labels import alpha_per_token
from dice_py.mining.no_pairs import explain_no_pairs
from dice_py.mining.pairs import mine_pairs
from dice_py.models.thinking import AnswerLength
from dice_py.stages.job import Job, StageResult
from dice_py.storage.files import write_sealed
from dice_py.storage.integrity import check_intact
from dice_py.storage.keys import versions
from dice_py.storage.lookup import check_row_aligned
from dice_py.storage.parquet import parquet_rows, read_parquet, write_parquet
from dice_py.storage.schemas import MINED, MINED_LABELS

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
        del report
        check_intact([*self.generations, *self.scores])
        options = self.config.options(self.seed)
        mined = mine_pairs(self.frame(options), options)
        if mined.pairs.is_empty():
            raise DataError(explain_no_pairs(mined.summary()))
        config = self.config
        counts: dict[str, Any] = {
            "length": config.length,
            "debias": config.debias,
            "pairing": config.pairing,
            **({} if config.pool_rounds == 1 else {"pooled_rounds": sorted(set(self.rounds))}),
            **mined.summary(),
        }
        key, summary = self.key(), self.out / "mining.json"
        write_sealed(summary, {**counts, "curve": mined.curve.to_dict(as_series=False)}, key)
        known = MINED | MINED_LABELS
        schema = pl.Schema({name: known[name] for name in mined.pairs.columns})
        meta = alpha_per_token(options, mined.alpha)
        file = write_parquet(self.out / "mined.parquet", mined.pairs, key=key, schema=schema, meta=meta)
        return StageResult([(file, key), (summary, key)], counts)

    def frame(self, options: MiningOptions) -> pl.DataFrame:
        """The columns that the options name, of generations and scores side by side: what is mined.

        Its row numbers are those of the pairs.
        """
        is_answer = options.length_column == LENGTH_COLUMNS["answer_tokens"]
        wanted = [pl.col("prompt_id", "finish_reason", *([] if is_answer else [options.length_column]))]
        if options.duplicate_column is not None:
            # As 64-bit hashes, which is all that the miner compares: token ids are the bulk of a shard.
            wanted.append(pl.col(options.duplicate_column).hash())
        rewards = dict.fromkeys([options.reward_column, options.second_reward_column or options.reward_column])
        check_row_aligned(self.generations, self.scores)
        generations = pl.scan_parquet(self.generations, glob=False)
        responses = generations.select(wanted).collect()
        if is_answer:
            responses = responses.with_columns(self._answer_lengths())
        if options.min_length:
            responses = responses.with_columns(_characters(generations))
        scored = pl.scan_parquet(self.scores, glob=False).select(list(rewards)).collect()
        frame = responses.hstack(scored)
        if options.policy_column is None:
            return frame
        shards = zip(self.generations, self.rounds, strict=True)
        sampled_in = [pl.repeat(number, parquet_rows(file), dtype=pl.UInt32, eager=True) for file, number in shards]
        return frame.with_columns(pl.concat(sampled_in).alias(options.policy_column))

    def _answer_lengths(self) -> pl.Series:
        assert self.policy is not None
        lengths = AnswerLength.of_folder(self.policy, self.thinking)
        columns = ["prompt_id", "prompt_token_ids", "token_ids"]  # the bulk of a shard: one at a time
        return pl.concat([lengths.of_shard(read_parquet(file, columns)) for file in self.generations])


def _characters(generations: pl.LazyFrame) -> pl.Series:
    """`response_chars`, with 0 for responses of white space alone, which are as empty as those of no character.

    Text is read of short responses only.
    """
    counts = generations.select(CHARACTERS).collect()[CHARACTERS]
    short = generations.with_row_index("row").filter(pl.col(CHARACTERS) <= _SHORT)
    blank = short.filter(pl.col("response").str.strip_chars() == "").select("row").collect()["row"]
    return counts.scatter(blank, 0)
