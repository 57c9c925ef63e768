"""Stage 4, replay: mix a share of offline preference pairs into the mined ones, on prompts that were not mined.

The share is gamma = replayed / (mined + replayed), as in DICE (arXiv 2406.09760, section 4.3). replay/mix.py chooses
the rows; here the chosen pairs become a training set, with token ids and reference log-probabilities.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.config.shared import ModelConfig
from dice_py.config.stages import BufferConfig, ReplayConfig, RoundsBufferConfig, ScoreConfig
from dice_py.errors import DataError, UsageError
from dice_py.events import Report, no_report
from dice_py.models.checkpoint import check_checkpoint
from dice_py.models.identity import model_identity
from dice_py.models.limits import model_positions
from dice_py.models.sizes import model_size
from dice_py.models.token_ids import check_token_ids
from dice_py.models.tokenization import encode_pairs, load_tokenizer, stop_token_ids
from dice_py.replay.buffer import ReplayBuffer
from dice_py.replay.gathered import GatheredPairs, Prompts
from dice_py.replay.mined import Shards, check_mined, mined_alpha
from dice_py.replay.mix import OFFLINE_BUFFER, ROUNDS_BUFFER, BufferMix, OfflineBuffer, mix_buffers
from dice_py.rows.bad_rows import BadRowRule
from dice_py.stages.job import Job, StageResult, model_key_fields
from dice_py.stages.pair_logps import PairLogps, ReferenceScores
from dice_py.storage.files import atomic
from dice_py.storage.integrity import check_intact, is_kept
from dice_py.storage.keys import versions
from dice_py.storage.parquet import ParquetStream, parquet_meta, read_parquet
from dice_py.storage.schemas import PAIRS, TRAINING_LABELS, fit, training_schema


@dataclass(frozen=True)
class ReplayJob(Job):
    """Mixes the share gamma of offline pairs into the mined ones: `out/training_set.parquet`.

    The replayed pairs of files are tokenized once, here; those of the rounds' buffer keep the tokens that were
    sampled. All of them are scored in one pass of `policy`; the mined ones have their token ids and
    log-probabilities already. The rows are in order of the mix: mined first, then replayed, buffer by buffer (the
    trainer shuffles). `source` is "mined", "replay" (from `offline`), or "replay:NAME".

    The counts are the summary of the mix: counts, requested and reached share, shortfall, of each buffer if there are
    several; and `mined_alpha`, the penalty per token that mining found, if it found one.

    Raises, when run:
        DataError: too few pairs with `config.on_shortfall="error"`, or none at all; a column or value that the
            weights or strata cannot use.
    """

    config: ReplayConfig
    score_config: ScoreConfig
    models: ModelConfig
    policy: Path
    mined: Path | None
    """The mined pairs. None: the training set is of offline pairs alone, and the next three are empty."""
    generations: list[Path]
    """The shards that the row numbers of the mined pairs count through."""
    scores: list[Path]
    prompts: Path | None
    """The prompts that were sampled on."""
    offline: Path | None
    """Parquet with `prompt`, `chosen`, `rejected` (messages), `key` and what the weights and strata need of `weight`,
    `margin`, `round`, `source` (data.read_pairs); None where there is none."""
    input_keys: Any
    """Keys of the files' content (JSON values)."""
    out: Path
    seed: int
    buffers: dict[str, Path] = field(default_factory=dict)
    """As `offline`, for the names of `config.buffers`."""
    rounds_buffer: ReplayBuffer | None = None
    """Pairs mined in earlier rounds (the buffer "rounds"); not used while it is empty."""
    round_number: int | None = None
    """The current round, from which ages are counted."""
    bad_rows: BadRowRule = field(default_factory=BadRowRule)
    """What happens to a pair that the chat template refuses."""
    reference: Path | None = None
    """The reference of the loss (train.reference); None: the policy."""
    reference_scores: ReferenceScores | None = "logp"
    """The column of the scores that has the reference's log-probabilities; None: none has."""
    shared_logps: bool = False
    """Whether the reference's sums over the shared length are stored too (train.ld_alpha)."""

    def key_fields(self) -> dict[str, Any]:
        """The inputs, the config, the models that score the pairs, the seed and versions."""
        further: dict[str, Any] = {"shared log-probabilities": True} if self.shared_logps else {}
        if self.reference is not None:
            further["reference"] = [model_identity(self.reference), self.reference_scores]
        return further | {
            "pairs": self.input_keys,
            # A buffer is known by its content; where its file was makes no difference.
            "replay": self.config.model_dump(exclude={"buffers": {"__all__": {"path"}}}),
            "score": self.score_config.model_dump(),
            "model": model_key_fields(self.models),
            "policy": model_identity(self.policy),
            "rounds buffer": [] if self.rounds_buffer is None else self.rounds_buffer.keys(self.round_number),
            "round": self.round_number,
            "seed": self.seed,
            "versions": versions("torch", "transformers", "vllm"),
        }

    def run(self, report: Report = no_report) -> StageResult:
        """Draws, tokenizes and scores the replayed pairs, and writes the training set, unless it is there."""
        file, key = self.out / "training_set.parquet", self.key()
        if is_kept(file, key, report):
            return StageResult([(file, key)], dict(parquet_meta(file)))
        models = [self.policy, self.reference or self.policy]
        inputs = [*models, self.mined, self.prompts, *self.generations, *self.scores, self.offline]
        check_intact([*inputs, *self.buffers.values(), *self._buffer_files()])
        check_checkpoint(self.policy, "policy", self.models)
        logps = self._logps(report)
        tokens = _PairTokens(self, report)
        pools = _pools(self.config, self.offline, self.buffers, self.rounds_buffer, self.round_number, tokens)
        with GatheredPairs(self.out) as gathered:
            return self._write(file, key, pools, tokens, logps, gathered, report)

    def _write(
        self,
        file: Path,
        key: str,
        pools: list[OfflineBuffer],
        tokens: _PairTokens,
        logps: PairLogps,
        gathered: GatheredPairs,
        report: Report,
    ) -> StageResult:
        """Gathers the mined pairs, draws, and writes the training set part by part: mined pairs, then replayed ones."""
        keys = self._gather(gathered, pools, report)
        gamma, total = self._share(pools, report)
        mix = mix_buffers(
            keys,
            pools,
            gamma=gamma,
            seed=self.seed,
            key_column="key",
            current_round=self.round_number,
            stratify_by=self.config.stratify_by,
            allocation=self.config.allocation,
            length_buckets=self.config.length_buckets,
            total=total,
            on_shortfall=self.config.on_shortfall,
        )
        drawn = _with_tokens(pools, mix, tokens)
        replayed = sum(part.height for part in drawn)
        if not (mix.mined or replayed):
            raise DataError(
                "the training set is empty: no pair was mined and none replayed; lower replay.gamma, or give offline "
                "pairs on prompts that are not mined"
            )
        if any(mix.shortfall.values()):
            report("note", text=_shortfall_note(mix, gamma))
        summary = mix.summary() | (
            {"replay": replayed, "left_out": mix.replay - replayed} if replayed < mix.replay else {}
        )
        alpha = None if self.mined is None else mined_alpha(self.mined)
        summary |= {} if alpha is None else {"mined_alpha": alpha}
        mined = (logps.of_mined(part) for part in gathered.take(mix.mined_rows))
        last = [logps.of_replayed(pl.concat(drawn, rechunk=True, how="diagonal_relaxed"))] if replayed else []
        vocabulary = model_size(self.policy).vocabulary or None
        with atomic(file) as temporary, ParquetStream(temporary) as stream:
            for part in _alike(mined, last):
                for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
                    check_token_ids(part, column, "the training set", vocabulary)
                stream.write(part)
            stream.describe(key, summary)
        return StageResult([(file, key)], summary)

    def _buffer_files(self) -> list[Path]:
        buffer = self.rounds_buffer
        return [] if buffer is None else [buffer.path(number) for number in buffer.rounds(self.round_number)]

    def _gather(self, gathered: GatheredPairs, pools: list[OfflineBuffer], report: Report) -> pl.DataFrame:
        """Gathers the mined pairs, without those of equal answers; returns the prompts' keys, in the column `key`.

        The key is that of a pair's prompt where a buffer has it, else "": it only has to tell what must not be drawn.
        """
        none = pl.DataFrame(schema={"key": pl.String})
        if self.mined is None or self.prompts is None:
            return none
        mined = read_parquet(self.mined)
        check_mined(mined, self.mined)
        prompts = Prompts(self.prompts)
        if mined.is_empty():
            return none
        shards = Shards.of(self.generations, self.scores)
        equal = gathered.gather(mined, shards, prompts, reference=self.reference_scores == "ref_logp")
        if equal.any():
            report(
                "note",
                text=f"{equal.sum()} of {mined.height} mined pairs left out: chosen and rejected are the same answer "
                "(mine.drop_duplicates counts such responses once)",
            )
        keys = prompts.keys({key for pool in pools for key in pool.pairs["key"]})
        numbers = mined["prompt_id"].filter(~equal)
        known = numbers.replace_strict(list(keys), list(keys.values()), default="", return_dtype=pl.String)
        return known.alias("key").to_frame()

    def _share(self, pools: list[OfflineBuffer], report: Report) -> tuple[float, int | None]:
        """gamma and the total of the mix."""
        gamma, total = self.config.gamma, self.config.total
        if self.mined is not None and self.prompts is not None:
            if gamma > 0.0 and not pools and self.rounds_buffer is not None:
                report("note", text="no earlier round to replay from: this round trains on mined pairs alone")
                gamma = 0.0
            return gamma, total
        if total is None:
            if len(pools) > 1:
                raise UsageError(
                    f"a training set without mined pairs takes all of one buffer, but there are {len(pools)}: set how "
                    "many pairs with replay.total"
                )
            total = sum(pool.pairs.height for pool in pools)
        return 1.0, total

    def _logps(self, report: Report) -> PairLogps:
        if self.reference is not None:
            check_checkpoint(self.reference, "reference", self.models)
        return PairLogps(
            config=self.score_config,
            models=self.models,
            policy=self.policy,
            reference=self.reference or self.policy,
            reference_scores=self.reference_scores,
            shared=self.shared_logps,
            report=report,
        )


def _alike(mined: Iterator[pl.DataFrame], others: list[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """The parts of a training set with the same columns, in their order: null where a part has none."""
    first = next(mined, None)
    parts = itertools.chain([] if first is None else [first], mined, others)
    kinds = pl.concat([part.clear() for part in (first, *others) if part is not None], how="diagonal_relaxed")
    schema = training_schema(kinds)
    for part in parts:
        yield fit(pl.concat([kinds, part], how="diagonal_relaxed"), schema)


def _pools(
    config: ReplayConfig,
    offline: Path | None,
    buffers: dict[str, Path],
    rounds_buffer: ReplayBuffer | None,
    round_number: int | None,
    tokens: _PairTokens,
) -> list[OfflineBuffer]:
    """The buffers to replay from: data.replay, then the named ones, then the rounds' own."""
    # Pairs of a file are tokenized only after the draw.
    characters = pl.col("chosen").list.get(0).struct.field("content").str.len_chars()

    def pool(
        name: str, pairs: pl.DataFrame, settings: ReplayConfig | BufferConfig | RoundsBufferConfig, length: pl.Expr
    ) -> OfflineBuffer:
        return OfflineBuffer(
            name,
            pairs.with_columns(length=length) if config.stratify_by == "length" else pairs,
            share=settings.share,
            weight_column="weight" if "weight" in pairs.columns else None,
            margin_power=settings.margin_power,
            half_life=settings.half_life,
        )

    def read(path: Path) -> pl.DataFrame:
        return tokens.without_equal(read_parquet(path))

    pools = [] if offline is None else [pool(OFFLINE_BUFFER, read(offline), config, characters)]
    pools += [pool(name, read(path), config.buffers[name], characters) for name, path in buffers.items()]
    if rounds_buffer is not None and config.buffer is not None and rounds_buffer.rounds(round_number):
        earlier = rounds_buffer.read(round_number)
        pools.append(pool(ROUNDS_BUFFER, earlier, config.buffer, pl.col("chosen_ids").list.len()))
    return pools


class _PairTokens:
    """Token ids of offline pairs, with the policy's tokenizer, which is loaded once it is needed."""

    def __init__(self, job: ReplayJob, report: Report) -> None:
        self.job, self.report = job, report

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.job.policy, self.job.models)

    def encode(self, pairs: pl.DataFrame) -> pl.DataFrame:
        """The pairs that the policy can be trained on, with their token ids."""
        job = self.job
        return encode_pairs(
            pairs,
            self._tokenizer,
            stop_token_ids(job.policy, self._tokenizer),
            positions=model_positions(job.policy, job.models),
            rule=job.bad_rows,
            report=self.report,
        )

    def without_equal(self, pairs: pl.DataFrame) -> pl.DataFrame:
        """The pairs without those whose responses have the same tokens, which must not be drawn.

        Only pairs that differ in white space, case or forms of characters are tokenized for it.
        """

        def letters(side: str) -> pl.Expr:
            content = pl.col(side).list.get(0).struct.field("content")
            return content.str.normalize("NFKC").str.to_lowercase().str.replace_all(r"\s+", "")

        alike = pairs.with_row_index("\0row").filter(letters("chosen") == letters("rejected"))
        if alike.is_empty():
            return pairs
        different = self.encode(alike)["\0row"].to_list()
        dropped = set(alike["\0row"].to_list()) - set(different)
        return pairs[[row for row in range(pairs.height) if row not in dropped]]


def _with_tokens(pools: list[OfflineBuffer], mix: BufferMix, tokens: _PairTokens) -> list[pl.DataFrame]:
    """The pairs that were drawn, as `PAIRS` and `source`. Stored tokens are kept; other pairs are tokenized."""
    drawn = []
    for pool in pools:
        pairs = pool.pairs[mix.draws[pool.name].rows]
        if pool.name != ROUNDS_BUFFER and pairs.height:
            pairs = tokens.encode(pairs)
        if pairs.height:
            label = OFFLINE_BUFFER if pool.name == OFFLINE_BUFFER else f"{OFFLINE_BUFFER}:{pool.name}"
            labels = [name for name in TRAINING_LABELS if name in pairs.columns] if pool.name == ROUNDS_BUFFER else []
            drawn.append(pairs.select(*PAIRS.names(), *labels, source=pl.lit(label)))
    return drawn


def _shortfall_note(mix: BufferMix, gamma: float) -> str:
    lacking = [
        f"{name} {mix.requested[name] - len(draw.rows)}"
        for name, draw in mix.draws.items()
        if len(draw.rows) < mix.requested[name]
    ]
    of = f" ({', '.join(lacking)})" if len(mix.draws) > 1 else ""
    hint = ""
    if ROUNDS_BUFFER in mix.draws and len(mix.draws[ROUNDS_BUFFER].rows) < mix.requested[ROUNDS_BUFFER]:
        hint = (
            "; pairs of earlier rounds on prompts that were mined again are left out: with data.prompts_per_round the "
            "rounds' prompts differ"
        )
    return (
        f"too few pairs for a share of {gamma}: short of {mix.shortfall['replay']} offline{of} and "
        f"{mix.shortfall['mined']} mined ones; the share reached is {mix.reached_share:.3f}{hint}"
    )
