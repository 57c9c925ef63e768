"""What `dice plan` measures of scoring, replaying and training."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.compute.devices import Group, device_in_group, only_these_gpus
from dice_py.compute.memory import peak_memory
from dice_py.config.run import RunConfig
from dice_py.errors import DataError
from dice_py.events import Report, no_report
from dice_py.models.tokenization import encode_pairs, load_tokenizer, stop_token_ids
from dice_py.planning.calibrate_generation import beside_import, on_gpu
from dice_py.storage.parquet import read_parquet, write_parquet
from dice_py.storage.schemas import TRAINING_SET
from dice_py.timing import timed_seconds

_STEPS = 6  # of the training
_MOST_PAIRS = 512


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
) -> dict[str, Any]:
    """Figures of scoring, and of tokenising and scoring offline pairs; leaves `out/training_set.parquet`."""
    import torch

    from dice_py.scoring.pairs import score_pairs
    from dice_py.stages.score import ScoreJob

    models = device_in_group(config.model)
    with only_these_gpus(Group(1, gpus)):
        if threads is not None:
            torch.set_num_threads(threads)
        shard = read_parquet(generations)
        half = write_parquet(out / "half.parquet", shard.head(max(1, shard.height // 2)), key="half")
        told: list[dict[str, Any]] = []

        def on_event(event: str, **fields: Any) -> None:
            if event == "throughput":
                told.append(fields)

        def run(name: str, file: Path, settings: Any) -> tuple[float, Any]:
            """Seconds without loading."""
            loaded, began = timed_seconds().get("load", 0.0), time.monotonic()
            job = ScoreJob(
                config=settings, models=models, policy=policy, reference=reference, generations=[file],
                generation_keys=[name], out=out / name, beta=config.beta, sampled=(True,),
            )  # fmt: skip
            made = job.run(on_event)
            return time.monotonic() - began - (timed_seconds().get("load", 0.0) - loaded), made

        report("note", text=f"calibrating: scoring {shard.height} responses")
        before = timed_seconds().get("load", 0.0)
        cold, made = run("cold", generations, config.score)
        loads = timed_seconds().get("load", 0.0) - before
        cold_tokens = sum(one["tokens"] for one in told)
        both = config.score.model_copy(update={"policy_logps": "recompute"})
        told.clear()
        small, _ = run("small", half, both)
        small_forward = sum(one["seconds"] for one in told)
        told.clear()
        large, _ = run("large", generations, both)
        forward, tokens = sum(one["seconds"] for one in told), sum(one["tokens"] for one in told)
        per_token = forward / max(1, tokens)
        beyond, beyond_small = large - forward, small - small_forward
        per_response = max(0.0, (beyond - beyond_small) / max(1, shard.height - shard.height // 2))
        fixed = max(0.0, beyond - per_response * shard.height)
        peak = peak_memory()
        shared = shard["response_tokens"].sum() + _prompt_tokens(shard)
        figures = {
            "load": loads / 2,
            "first": max(0.0, cold - fixed - per_token * cold_tokens - per_response * shard.height),
            "fixed": fixed,
            "per_token": per_token,
            "per_response": per_response,
            "token_ratio": tokens / 2 / shared,
            "gate_passed": None if (gate := made.counts["policy_logps_gate"]) is None else bool(gate["passed"]),
            "bytes_per_response": made.files[0][0].stat().st_size / shard.height,
            "peak": peak,
            "beside": None,
        }
        if not on_gpu(config):
            again = itertools.count()
            figures["beside"] = beside_import(lambda: run(f"beside {next(again)}", generations, both)[0], large)
        tokenizer = load_tokenizer(policy, models)
        training = _mined(shard, read_parquet(prompts, ["prompt_id", "messages"]))
        figures["per_pair"], figures["pair_tokens"] = 0.0, None
        if offline is not None:
            taken = read_parquet(offline).head(_MOST_PAIRS)
            stops = stop_token_ids(policy, tokenizer)
            encode_pairs(taken.head(1), tokenizer, stops)
            began = time.monotonic()
            pairs = encode_pairs(taken, tokenizer, stops).with_columns(source=pl.lit("replay"))
            figures["per_pair"] = (time.monotonic() - began) / taken.height
            sizes = pairs.select(pl.col("prompt_ids", "chosen_ids", "rejected_ids").list.len()).mean().row(0)
            figures["pair_tokens"] = list(map(float, sizes))
            training = pl.concat([part.select(*_PAIR_COLUMNS, "source") for part in (training, pairs)])
        logps = score_pairs(both, models, policy=policy, pairs=training)
        training = training.hstack(logps).rename(
            {"chosen_logp": "ref_chosen_logps", "rejected_logp": "ref_rejected_logps"}
        )
        file = write_parquet(out / "set.parquet", training, key="set", schema=TRAINING_SET)
        figures["bytes_per_pair"] = file.stat().st_size / training.height
        wanted = config.train.batch_size * _STEPS
        whole = pl.concat([training] * -(-wanted // training.height)).sample(fraction=1.0, shuffle=True, seed=0)
        write_parquet(out / "training_set.parquet", whole.head(wanted), key="set", schema=TRAINING_SET)
    return figures


_PAIR_COLUMNS = ("prompt", "chosen", "rejected", "prompt_ids", "chosen_ids", "rejected_ids")


def _prompt_tokens(shard: pl.DataFrame) -> int:
    """Tokens of the prompts, each counted once."""
    once = shard.unique("prompt_id")["prompt_token_ids"].list.len().sum()
    return int(once)


def _mined(shard: pl.DataFrame, prompts: pl.DataFrame) -> pl.DataFrame:
    """Pairs of the first and the last response of each prompt: as long as mined ones are, about."""
    sides = shard.filter(pl.col("response_tokens") > 0).group_by("prompt_id", maintain_order=True)
    picked = sides.agg(
        pl.col("prompt_token_ids").first().alias("prompt_ids"),
        pl.col("token_ids").first().alias("chosen_ids"),
        pl.col("token_ids").last().alias("rejected_ids"),
        pl.col("response").first().alias("chosen"),
        pl.col("response").last().alias("rejected"),
    ).join(prompts, on="prompt_id")
    if picked.is_empty():
        raise DataError("every sampled response is empty, so that no pair could be mined; is the policy whole?")

    def answers(name: str) -> pl.Expr:
        return pl.concat_list(pl.struct(role=pl.lit("assistant"), content=pl.col(name))).alias(name)

    return picked.select(
        pl.col("messages").alias("prompt"), answers("chosen"), answers("rejected"), "prompt_ids", "chosen_ids",
        "rejected_ids", source=pl.lit("mined"),
    )  # fmt: skip


def measure_train(
    *, config: RunConfig, policy: Path, training_set: Path, out: Path, report: Report = no_report
) -> dict[str, Any]:
    """Figures of training: what is paid once, a step's seconds and tokens, and a checkpoint's seconds and bytes."""
    from dice_py.stages.train import TrainJob

    saves = config.train.save_steps is not None
    settings = config.train.model_copy(
        update={"max_steps": _STEPS, "save_steps": _STEPS // 2 if saves else None, "max_length": None, "report_to": []}
    )
    report("note", text=f"calibrating: training {_STEPS} steps of {settings.batch_size} pairs")
    steps: list[float] = []
    saved = 0

    def on_event(event: str, **fields: Any) -> None:
        nonlocal saved
        if event == "progress" and fields.get("unit") == "steps":
            steps.append(time.monotonic())
            checkpoint = out / "checkpoints" / f"checkpoint-{_STEPS // 2}"
            if checkpoint.exists():
                saved = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())

    loaded, began = timed_seconds().get("load", 0.0), time.monotonic()
    job = TrainJob(
        config=settings, models=config.model, policy=policy, training_set=training_set, training_set_key="calibration",
        out=out, beta=config.beta, seed=config.seed, devices=config.devices,
    )  # fmt: skip
    job.run(on_event)
    total = time.monotonic() - began
    load = timed_seconds().get("load", 0.0) - loaded
    gaps = [after - before for before, after in itertools.pairwise(steps)]
    plain = sorted(gap for at, gap in enumerate(gaps) if not (saves and at == _STEPS // 2 - 1))
    step = plain[len(plain) // 2]
    save = max(0.0, gaps[_STEPS // 2 - 1] - step) if saves else 0.0
    # The last step's checkpoint too.
    fixed = max(0.0, total - load - _STEPS * step - 2 * save)
    return {
        "load": load,
        "fixed": fixed,
        "per_step": step,
        "step_tokens": _step_tokens(training_set, settings.batch_size),
        "save": save,
        "checkpoint_bytes": saved,
        "peak": peak_memory(),
    }


def _step_tokens(training_set: Path, batch_size: int) -> float:
    """Tokens of a step's sequences, on average."""
    frame = read_parquet(training_set, ["prompt_ids", "chosen_ids", "rejected_ids"])
    tokens: Sequence[float] = frame.select(pl.all().list.len().mean()).row(0)
    return batch_size * (2 * tokens[0] + tokens[1] + tokens[2])
