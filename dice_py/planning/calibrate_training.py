"""The second and third process of `dice plan`: measure scoring, the tokenization of offline pairs, and training."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
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
from dice_py.models.tokenization import encode_pairs, load_tokenizer, stop_token_ids
from dice_py.runs.measured_costs import ScoreCosts, TrainCosts
from dice_py.storage.parquet import read_parquet, write_parquet
from dice_py.storage.schemas import TRAINING_SET
from dice_py.timing import timed_seconds

TRAINING_PAIRS = "training_set.parquet"
"""The file of the pairs that `measure_score` wrote, to train on."""
_STEPS = 6  # of the training
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
    out: Path,
    report: Report = no_report,
) -> ScoreCosts:
    """Costs of scoring, and of tokenizing and scoring offline pairs; writes `out/training_set.parquet`.

    Args:
        generations: the responses that `probe` sampled.
        prompts: their prompts, Parquet with `prompt_id` and `messages`.
        offline: offline pairs; None: there are none.
        gpus: the GPUs to use, as CUDA_VISIBLE_DEVICES names them.
        threads: threads to use; None: torch's default.
    """
    import torch

    from dice_py.compute.memory import peak_memory

    models = device_in_group(config.model)
    both = config.score.model_copy(update={"policy_logps": "recompute"})
    with only_these_gpus(Group(1, gpus)):
        if threads is not None:
            torch.set_num_threads(threads)
        shard = read_parquet(generations)
        half = write_parquet(out / "half.parquet", shard.head(max(1, shard.height // 2)), key="half")

        def score(name: str, file: Path, settings: ScoreConfig) -> _ScoringRun:
            return _timed_scoring(config, settings, models, policy, reference, file, out / name)

        report("note", text=f"calibrating: scoring {shard.height} responses")
        cold, small, large = (
            score("cold", generations, config.score), score("small", half, both), score("large", generations, both),
        )  # fmt: skip
        per_token = large.forward / max(1, large.tokens)
        beyond, beyond_small = large.seconds - large.forward, small.seconds - small.forward
        per_response = max(0.0, (beyond - beyond_small) / max(1, shard.height - shard.height // 2))
        fixed = max(0.0, beyond - per_response * shard.height)
        peak = peak_memory()
        pairs = _tokenized_pairs(models, policy, shard, prompts, offline)
        training_set = _training_set(both, models, policy, pairs.frame)
        file = write_parquet(out / "set.parquet", training_set, key="set", schema=TRAINING_SET)
        _write_training_pairs(training_set, config.train.batch_size * _STEPS, out / TRAINING_PAIRS)
    return ScoreCosts(
        load=cold.load / 2,
        warm_up=max(0.0, cold.seconds - fixed - per_token * cold.tokens - per_response * shard.height),
        fixed=fixed,
        per_token=per_token,
        per_response=per_response,
        token_ratio=large.tokens / 2 / _shared_tokens(shard),
        gate_passed=cold.gate_passed,
        bytes_per_response=cold.bytes / shard.height,
        bytes_per_pair=file.stat().st_size / training_set.height,
        per_pair=pairs.per_pair,
        pair_tokens=pairs.tokens,
        peak_bytes=peak,
    )


@dataclass(frozen=True)
class _ScoringRun:
    """A score stage over one shard of generations."""

    seconds: float
    """Without `load`."""
    load: float
    forward: float
    """Seconds of the forward passes."""
    tokens: int
    """Tokens of the forward passes."""
    bytes: int
    """Of the scores' file."""
    gate_passed: bool | None


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
    return _ScoringRun(
        seconds=seconds - load,
        load=load,
        forward=sum(shard["seconds"] for shard in shards),
        tokens=sum(shard["tokens"] for shard in shards),
        bytes=scored.files[0][0].stat().st_size,
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
    encode_pairs(stored.head(1), tokenizer, stops)  # warms up
    began = time.monotonic()
    encoded = encode_pairs(stored, tokenizer, stops).with_columns(source=pl.lit("replay"))
    per_pair = (time.monotonic() - began) / stored.height
    prompt, chosen, rejected = map(float, encoded.select(pl.col(_PAIR_COLUMNS[3:]).list.len()).mean().row(0))
    frame = pl.concat([part.select(*_PAIR_COLUMNS, "source") for part in (mined, encoded)])
    return _Pairs(frame, per_pair, (prompt, chosen, rejected))


def _training_set(settings: ScoreConfig, models: ModelConfig, policy: Path, pairs: pl.DataFrame) -> pl.DataFrame:
    """The pairs with the policy's log-probabilities."""
    from dice_py.scoring.pairs import score_pairs

    logps = score_pairs(settings, models, policy=policy, pairs=pairs)
    return pairs.hstack(logps).rename({"chosen_logp": "ref_chosen_logps", "rejected_logp": "ref_rejected_logps"})


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


def measure_train(
    *, config: RunConfig, policy: Path, training_set: Path, out: Path, report: Report = no_report
) -> TrainCosts:
    """Costs of training, from six optimizer steps.

    Args:
        training_set: the pairs that `measure_score` wrote.
    """
    from dice_py.compute.memory import peak_memory
    from dice_py.stages.train import TrainJob

    saves = config.train.save_steps is not None
    settings = config.train.model_copy(
        update={"max_steps": _STEPS, "save_steps": _STEPS // 2 if saves else None, "max_length": None, "report_to": []}
    )
    report("note", text=f"calibrating: training {_STEPS} steps of {settings.batch_size} pairs")
    step_ends: list[float] = []
    checkpoint_bytes = 0

    def on_event(event: str, **fields: Any) -> None:
        nonlocal checkpoint_bytes
        if event == "progress" and fields.get("unit") == "steps":
            step_ends.append(time.monotonic())
            checkpoint = out / "checkpoints" / f"checkpoint-{_STEPS // 2}"
            if checkpoint.exists():
                checkpoint_bytes = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())

    job = TrainJob(
        config=settings, models=config.model, policy=policy, training_set=training_set, training_set_key="calibration",
        out=out, beta=config.beta, seed=config.seed, devices=config.devices,
    )  # fmt: skip
    loaded, began = timed_seconds().get("load", 0.0), time.monotonic()
    job.run(on_event)
    total = time.monotonic() - began
    load = timed_seconds().get("load", 0.0) - loaded
    gaps = [after - before for before, after in itertools.pairwise(step_ends)]
    without_save = sorted(gap for at, gap in enumerate(gaps) if not (saves and at == _STEPS // 2 - 1))
    step = without_save[len(without_save) // 2]
    save = max(0.0, gaps[_STEPS // 2 - 1] - step) if saves else 0.0
    return TrainCosts(
        load=load,
        fixed=max(0.0, total - load - _STEPS * step - 2 * save),  # the last step writes a checkpoint too
        per_step=step,
        step_tokens=_step_tokens(training_set, settings.batch_size),
        save=save,
        checkpoint_bytes=checkpoint_bytes,
        peak_bytes=peak_memory(),
    )


def _step_tokens(training_set: Path, batch_size: int) -> float:
    """Mean tokens of a step's sequences."""
    frame = read_parquet(training_set, ["prompt_ids", "chosen_ids", "rejected_ids"])
    tokens: Sequence[float] = frame.select(pl.all().list.len().mean()).row(0)
    return batch_size * (2 * tokens[0] + tokens[1] + tokens[2])
