"""Measures scoring and the tokenization of offline pairs, and makes pairs.

A first pass over a few responses shows how many can be scored in the time there is.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.compute.devices import Group, device_in_group, only_these_gpus
from dice_py.config.run import RunConfig
from dice_py.config.shared import ModelConfig
from dice_py.config.stages import ScoreConfig
from dice_py.errors import DataError
from dice_py.events import Report, no_report
from dice_py.models.limits import model_positions
from dice_py.models.loading import placement
from dice_py.models.tokenization import encode_pairs, load_tokenizer, stop_token_ids
from dice_py.planning.calibration_sizes import Training, scored_responses, training_size
from dice_py.rows.bad_rows import BadRowRule
from dice_py.runs.measured_costs import ScoreCosts
from dice_py.storage.parquet import read_parquet, write_parquet
from dice_py.storage.schemas import TRAINING_SET
from dice_py.timing import timed_seconds
from dice_py.training.parallelism import ProcessLayout

TRAINING_PAIRS = "training_set.parquet"
"""The file of the pairs that `measure_score` wrote, to train on."""
_FIRST_TOKENS = 512  # of the responses that are scored first
_SEPARABLE = 128  # responses from which their own seconds are separated from the fixed ones
_MAX_PAIRS = 512  # offline pairs that are tokenized
_PAIR_COLUMNS = ("prompt", "chosen", "rejected", "prompt_ids", "chosen_ids", "rejected_ids")


def measure_score(
    *,
    config: RunConfig,
    policy: Path,
    reference: Path,
    generations: Path,
    prompts: Path,
    offline: Path | None,
    gpus: tuple[str, ...],
    threads: int | None,
    layout: ProcessLayout,
    out: Path,
    report: Report = no_report,
) -> tuple[ScoreCosts, Training]:
    """Costs of scoring, and of tokenizing offline pairs; writes `out/training_set.parquet`, to train on as returned.

    Args:
        generations: the responses that `probe` sampled.
        prompts: their prompts, Parquet with `prompt_id` and `messages`.
        offline: offline pairs; None: there are none.
        gpus: the GPUs to use, as CUDA_VISIBLE_DEVICES names them.
        threads: threads to use; None: torch's default.
        layout: the processes of the training.
    """
    import torch

    from dice_py.compute.memory import peak_memory

    models = device_in_group(config.model)
    both = config.score.model_copy(update={"policy_logps": "recompute"})
    with only_these_gpus(Group(1, gpus)):
        if threads is not None:
            torch.set_num_threads(threads)
        measured = _measure_scoring(config, models, policy, reference, read_parquet(generations), out, report)
        peak = peak_memory()
        pairs = _tokenized_pairs(models, policy, measured.shard, prompts, offline)
        size = _training_size(config, layout, models, pairs.frame, measured.per_token)
        # Of smaller steps, all have the same pairs: each further one would have to be scored.
        reduced = size.batch < config.train.batch_size
        used = _training_pairs(pairs.frame, size.batch * (1 if reduced else size.steps))
        training_set = _training_set(both, models, policy, used)
        file = write_parquet(out / "set.parquet", training_set, key="set", schema=TRAINING_SET)
        _write_training_pairs(training_set, size.batch * size.steps, out / TRAINING_PAIRS)
    large, cold = measured.large, measured.cold
    fixed, per_response = measured.fixed, measured.per_response
    expected = fixed + measured.per_token * (cold.tokens + cold.gate_tokens) + per_response * cold.responses
    costs = ScoreCosts(
        load=cold.load / 2,
        warm_up=max(0.0, cold.seconds - expected),
        fixed=fixed,
        per_token=measured.per_token,
        per_response=per_response,
        token_ratio=large.tokens / large.passes / _shared_tokens(measured.shard.head(large.responses)),
        gate_passed=measured.gate_passed,
        bytes_per_response=large.bytes / large.responses,
        bytes_per_pair=file.stat().st_size / training_set.height,
        per_pair=pairs.per_pair,
        pair_tokens=pairs.tokens,
        peak_bytes=peak,
    )
    return costs, size


@dataclass(frozen=True)
class _ScoringRun:
    """A score stage over one shard of generations."""

    seconds: float
    """Without `load`."""
    load: float
    forward: float
    """Seconds of the forward passes, without the gate's."""
    tokens: int
    """Tokens of the forward passes."""
    passes: int
    """Passes over all responses."""
    gate_tokens: int
    """Tokens of the gate's pass."""
    bytes: int
    """Of the scores' file."""
    responses: int
    gate_passed: bool | None

    @property
    def beyond(self) -> float:
        """Seconds beside the forward passes, and beside the gate's, which takes as long for a token."""
        return self.seconds - self.forward * (1 + self.gate_tokens / max(1, self.tokens))


@dataclass(frozen=True)
class _Scoring:
    """The scoring runs of a calibration."""

    shard: pl.DataFrame
    """All sampled responses; the runs score the first ones."""
    cold: _ScoringRun
    small: _ScoringRun | None
    """None: too few for a response's own seconds to show beside the fixed ones."""
    large: _ScoringRun
    gate_passed: bool | None

    @property
    def per_token(self) -> float:
        return self.large.forward / max(1, self.large.tokens)

    @property
    def per_response(self) -> float:
        if self.small is None:
            return 0.0
        beyond = self.large.beyond - self.small.beyond
        return max(0.0, beyond / max(1, self.large.responses - self.small.responses))

    @property
    def fixed(self) -> float:
        return max(0.0, self.large.beyond - self.per_response * self.large.responses)


def _measure_scoring(
    config: RunConfig,
    models: ModelConfig,
    policy: Path,
    reference: Path,
    shard: pl.DataFrame,
    out: Path,
    report: Report,
) -> _Scoring:
    """Scores a few responses cold; then as the seconds allow, at most all, and half as many.

    Where not many more could be scored than the first ones, these are the measurement.
    """
    both = config.score.model_copy(update={"policy_logps": "recompute"})

    def score(name: str, responses: int, settings: ScoreConfig) -> _ScoringRun:
        file = write_parquet(out / f"{name}.parquet", shard.head(responses), key=name)
        return _timed_scoring(config, settings, models, policy, reference, file, out / name)

    samples = max(1, shard.height // shard["prompt_id"].n_unique())
    tokens = shard["response_tokens"].cast(pl.Float64) + shard["prompt_token_ids"].list.len() / samples
    first = min(shard.height, max(samples, int((tokens.cum_sum() <= _FIRST_TOKENS).sum())))
    report("note", text=f"calibrating: scoring {first} responses")
    cold = score("cold", first, config.score)
    each = cold.forward / max(1, cold.tokens) * _shared_tokens(shard) / shard.height
    # All under both models, half of them too, and up to two passes for the gate.
    if scored_responses(shard.height, each, 5) == shard.height >= _SEPARABLE:
        report("note", text=f"calibrating: scoring {shard.height} responses")
        gate_passed = score("gate", shard.height, config.score).gate_passed
        small = score("small", shard.height // 2, both)
        return _Scoring(shard, cold, small, score("large", shard.height, both), gate_passed)
    count = scored_responses(shard.height, each, 2)
    if count < 4 * first:
        return _Scoring(shard, cold, None, cold, cold.gate_passed)
    report("note", text=f"calibrating: scoring {count} responses")
    return _Scoring(shard, cold, None, score("large", count, both), cold.gate_passed)


def _timed_scoring(
    config: RunConfig,
    settings: ScoreConfig,
    models: ModelConfig,
    policy: Path,
    reference: Path,
    generations: Path,
    out: Path,
) -> _ScoringRun:
    from dice_py.stages.score import ScoreJob

    shards: list[dict[str, Any]] = []

    def on_event(event: str, **fields: Any) -> None:
        if event == "throughput":
            shards.append(fields)

    job = ScoreJob(
        config=settings, models=models, policy=policy, reference=reference, generations=[generations],
        generation_keys=[out.name], out=out, beta=config.beta, sampled=(True,),
    )  # fmt: skip
    loaded, began = timed_seconds().get("load", 0.0), time.monotonic()
    scored = job.run(on_event)
    seconds = time.monotonic() - began
    load = timed_seconds().get("load", 0.0) - loaded
    gate = scored.counts["policy_logps_gate"]
    gate_tokens = 0 if gate is None else _shared_tokens(read_parquet(generations).head(gate["responses"]))
    return _ScoringRun(
        seconds=seconds - load,
        load=load,
        forward=sum(shard["seconds"] for shard in shards),
        tokens=sum(shard["tokens"] for shard in shards),
        passes=len(shards),
        gate_tokens=gate_tokens,
        bytes=scored.files[0][0].stat().st_size,
        responses=scored.counts["responses"],
        gate_passed=None if gate is None else bool(gate["passed"]),
    )


def _shared_tokens(shard: pl.DataFrame) -> int:
    """Tokens of prompts and responses, each prompt counted once."""
    prompts = int(shard.unique("prompt_id")["prompt_token_ids"].list.len().sum())
    return int(shard["response_tokens"].sum()) + prompts


@dataclass(frozen=True)
class _Pairs:
    """Pairs to train on, and the costs and lengths of offline ones."""

    frame: pl.DataFrame
    """`_PAIR_COLUMNS` and `source`."""
    per_pair: float = 0.0
    """Seconds for one offline pair."""
    tokens: tuple[float, float, float] | None = None
    """Mean tokens of an offline pair's prompt, chosen and rejected."""


def _tokenized_pairs(
    models: ModelConfig, policy: Path, shard: pl.DataFrame, prompts: Path, offline: Path | None
) -> _Pairs:
    """Pairs of sampled responses and, where there are any, of offline ones."""
    tokenizer = load_tokenizer(policy, models)
    mined = _mined(shard, read_parquet(prompts, ["prompt_id", "messages"]))
    if offline is None:
        return _Pairs(mined)
    stored = read_parquet(offline).head(_MAX_PAIRS)
    stops = stop_token_ids(policy, tokenizer)
    # The check has refused or counted the pairs that cannot be used.
    options: dict[str, Any] = {"positions": model_positions(policy, models), "rule": BadRowRule("skip", 1.0)}
    encode_pairs(stored.head(1), tokenizer, stops, **options)  # warms up
    began = time.monotonic()
    encoded = encode_pairs(stored, tokenizer, stops, **options).with_columns(source=pl.lit("replay"))
    if encoded.is_empty():
        return _Pairs(mined)
    per_pair = (time.monotonic() - began) / stored.height
    prompt, chosen, rejected = map(float, encoded.select(pl.col(_PAIR_COLUMNS[3:]).list.len()).mean().row(0))
    frame = pl.concat([part.select(*_PAIR_COLUMNS, "source") for part in (mined, encoded)])
    return _Pairs(frame, per_pair, (prompt, chosen, rejected))


def _training_set(settings: ScoreConfig, models: ModelConfig, policy: Path, pairs: pl.DataFrame) -> pl.DataFrame:
    """The pairs with the policy's log-probabilities."""
    from dice_py.scoring.pairs import score_pairs

    logps = score_pairs(settings, models, policy=policy, pairs=pairs)
    return pairs.hstack(logps).rename({"chosen_logp": "ref_chosen_logps", "rejected_logp": "ref_rejected_logps"})


def _pair_tokens(pairs: pl.DataFrame, config: RunConfig) -> pl.Series:
    """Tokens of each pair in a forward: packed rows have the prompt once."""
    prompts = 2 if config.train.packed is False else 1
    prompt, chosen, rejected = (pairs[name].list.len().cast(pl.Int64) for name in _PAIR_COLUMNS[3:])
    return prompts * prompt + chosen + rejected


def _training_size(
    config: RunConfig, layout: ProcessLayout, models: ModelConfig, pairs: pl.DataFrame, per_token: float
) -> Training:
    cuda = placement(models).device != "cpu"
    return training_size(
        config.train.batch_size, layout.processes,
        pair_tokens=float(_pair_tokens(pairs, config).mean()),  # type: ignore[arg-type]
        per_token=per_token, row_tokens=config.train.row_tokens(cuda=cuda),
    )  # fmt: skip


def _training_pairs(pairs: pl.DataFrame, count: int) -> pl.DataFrame:
    """At most `count` of the pairs, of about the mean length, so that few steps are as long as many on average."""
    if pairs.height <= count:
        return pairs
    tokens = pairs.select(pl.sum_horizontal(pl.col(_PAIR_COLUMNS[3:]).list.len().cast(pl.Int64))).to_series()
    nearest = (tokens - tokens.mean()).abs().arg_sort()[:count]
    return pairs[nearest.sort().to_list()]


def _write_training_pairs(training_set: pl.DataFrame, count: int, file: Path) -> None:
    """Writes `count` pairs, repeated where there are fewer."""
    repeated = pl.concat([training_set] * -(-count // training_set.height))
    shuffled = repeated.sample(fraction=1.0, shuffle=True, seed=0)
    write_parquet(file, shuffled.head(count), key="set", schema=TRAINING_SET)


def _mined(shard: pl.DataFrame, prompts: pl.DataFrame) -> pl.DataFrame:
    """Pairs of the first and the last response of each prompt: about as long as mined ones."""
    sides = shard.filter(pl.col("response_tokens") > 0).group_by("prompt_id", maintain_order=True)
    picked = sides.agg(
        pl.col("prompt_token_ids").first().alias("prompt_ids"),
        pl.col("token_ids").first().alias("chosen_ids"),
        pl.col("token_ids").last().alias("rejected_ids"),
        pl.col("response").first().alias("chosen"),
        pl.col("response").last().alias("rejected"),
    ).join(prompts, on="prompt_id")
    if picked.is_empty():
        raise DataError(
            "every sampled response is empty, so that no pair could be mined; check that the policy answers the prompts"
        )

    def message(name: str) -> pl.Expr:
        return pl.concat_list(pl.struct(role=pl.lit("assistant"), content=pl.col(name))).alias(name)

    return picked.select(
        pl.col("messages").alias("prompt"), message("chosen"), message("rejected"), "prompt_ids", "chosen_ids",
        "rejected_ids", source=pl.lit("mined"),
    )  # fmt: skip
