"""`dice plan`: what a run would cost, before it is started: counts, seconds, GPU hours, disk and memory of each stage.

Counts come from the data, which is read as the run reads it. Seconds come from costs measured for the same model shape,
dtype, device and versions: cached by an earlier plan or run, else measured now. For each stage

    seconds = wait for its process + loading weights + fixed costs + cost per unit × units

where the wait depends on which process is started ahead of which (planning/timeline.py). The policies of all rounds are
assumed to answer as the first one does, and every prompt with enough usable responses to yield its pairs: counts of
pairs are estimates, and where a filter of `mine` drops more, upper bounds. Only the measured costs and lengths of
responses are kept, in the cache.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from dice_py.compute.worker import work_name
from dice_py.config.run import RunConfig
from dice_py.data import prompt_key
from dice_py.evaluation.metrics import bootstrap_ci95
from dice_py.events import Report, no_report
from dice_py.generation.engines.vllm_on_cpu import Workload
from dice_py.mining.pairs import mine_pairs
from dice_py.models.sizes import ModelSize, model_size
from dice_py.planning.calibrate_generation import Probe
from dice_py.planning.calibration import SubprocessRunner, calibrate, note_load, run_probe, sampled_file
from dice_py.planning.cluster import find_cluster, local_config, on_cluster, summary
from dice_py.planning.costs import Estimator
from dice_py.planning.counts import Data, count_rounds
from dice_py.planning.decoding import draw_lengths
from dice_py.planning.feasibility import Room, first_failure, peak_disk
from dice_py.planning.freed import add_freed
from dice_py.planning.machine import Cluster, Machine
from dice_py.planning.pair_costs import mining_labels
from dice_py.planning.response_lengths import calibrated_lengths
from dice_py.runs.event_log import read_events
from dice_py.runs.folder import Run
from dice_py.runs.inputs import Inputs, prepare, round_prompts
from dice_py.runs.measured_costs import (
    ResponseLengths,
    StageCosts,
    recall_costs,
    recall_lengths,
    remember_costs,
    remember_lengths,
)
from dice_py.runs.measured_lengths import lengths_key
from dice_py.runs.throughput import costs_key, run_engine
from dice_py.stages.preflight import PreflightJob
from dice_py.storage.parquet import parquet_rows, read_parquet

_MAX_MINED = 200_000  # responses that the mining is timed on


def plan(
    config: RunConfig,
    folder: Path,
    *,
    fresh: bool = False,
    own_start: float = 0.0,
    on_paper: Callable[[int], Cluster] | None = None,
    report: Report = no_report,
) -> dict[str, Any]:
    """The plan of the run of `config` in `folder`, ready for JSON; nothing is written there.

    Args:
        fresh: measure costs even where some are kept.
        on_paper: a cluster that the run is planned for, whether it is there or not, from the number of GPUs here.
        own_start: seconds that the command itself takes to start.

    Returns:
        `stages`: by stage ("round-01/generate", …) `seconds`, `startup_seconds` (waiting for its process, and loading),
        `work_seconds`, `gpu_hours`, `tokens`, `disk_bytes` (that stay), `transient_disk_bytes` (further ones while it
        works), `freed_disk_bytes` (of a round's last stage: by rounds.keep_models and rounds.keep_samples),
        `peak_memory_bytes` (of one GPU, or of the host), and its counts. For the run: `total_seconds`,
        `gpu_hours`, `cpu_hours` (without a GPU: its cores times its wall clock), `disk_bytes` and `peak_memory_bytes`
        at their peak, `fits`, and `first_failure` (planning/feasibility.py), the first in order of work; `method`, the
        training method, the `labels` that mining adds, and `not_estimated`, parts of an evaluation that take time too.

    Raises:
        DiceError: the same errors that would stop the run before its first stage.
    """
    with tempfile.TemporaryDirectory(prefix="dice-plan-") as temporary:
        measured = _measure(local_config(config), Path(temporary), fresh, report)
    data, probed, costs = measured.data, measured.probe, measured.costs
    machine = _machine(config, probed, data)
    cluster = find_cluster(config, None if on_paper is None else on_paper(probed.gpus), cuda=probed.cuda)
    if cluster is not None:
        machine = on_cluster(machine, config, cluster)
    counts = count_rounds(config, data, machine.processes)
    estimator = Estimator(config, costs, machine, measured.policy, measured.reference, data)
    stages = estimator.estimate(counts, measured.check_seconds)
    add_freed(stages, config)
    room = _room(folder, probed)
    failure = first_failure(stages, room)
    for stage in stages.values():
        for name in ("lacking", "remedy"):
            stage.pop(name, None)
    total = own_start + sum(stage["seconds"] for stage in stages.values())
    return {
        "total_seconds": total,
        "gpu_hours": sum(stage["gpu_hours"] for stage in stages.values()),
        "cpu_hours": 0.0 if machine.cuda else machine.cores * total / 3600,
        "disk_bytes": peak_disk(stages),
        "peak_memory_bytes": max(stage["peak_memory_bytes"] for stage in stages.values()),
        "free_disk_bytes": room.disk,
        "free_memory_bytes": room.memory,
        "fits": failure is None,
        "first_failure": failure,
        "calibration": {
            "source": measured.source,
            "of": costs.source,
            "device": probed.device,
            "dtype": probed.dtype,
            "engine": probed.engine,
            "responses": len(data.lengths),
            "extrapolated_responses": measured.lengths.extrapolated,
            "cut_at_tokens": measured.lengths.cut_at,
            "mean_response_tokens": sum(data.lengths) / max(1, len(data.lengths)),
            "usable_prompt_share": data.usable,
        },
        "start_seconds": own_start,
        "rounds": config.rounds.count,
        "may_end_early": config.rounds.stop_when == "worse",
        "method": config.train.method,
        "labels": mining_labels(config),
        "not_estimated": not_estimated(config),
        "cluster": None if cluster is None else summary(cluster, stages, total),
        "stages": stages,
    }


def not_estimated(config: RunConfig) -> list[str]:
    """The settings of parts of an evaluation whose time, memory and cost are not known before they run."""
    judges = config.evaluate.judges
    names = [f"evaluate.judges.{name}" for name in type(judges).model_fields if getattr(judges, name) is not None]
    return [*names, *(["evaluate.command"] if config.evaluate.command is not None else [])]


@dataclass(frozen=True)
class _Measured:
    """Everything that the estimates are computed from."""

    probe: Probe
    costs: StageCosts
    source: Literal["measured", "stored"]
    """Of `costs`."""
    data: Data
    lengths: ResponseLengths
    policy: ModelSize
    reference: ModelSize
    check_seconds: float | None
    """Of the process that checks the user's models and data; None where there is none."""


def _measure(config: RunConfig, base: Path, fresh: bool, report: Report) -> _Measured:
    """Prepares the run in `base` as the run itself does, and measures the costs and lengths that the cache lacks."""
    run = Run(base / "run", config, report)
    run.folder.mkdir()
    try:
        inputs = prepare(run)
        prompts = [
            round_prompts(run, inputs, number, run.folder / f"round-{number:02d}" / "generate")[0]
            for number in range(1, config.rounds.count + 1)
        ]
    finally:
        run.close()
    runner = SubprocessRunner(base, report)
    workload = Workload.of(inputs.policy, read_parquet(prompts[0], ["messages"]))
    key = costs_key(config, inputs.policy, run_engine(config, workload))
    key_of_lengths = lengths_key(config, inputs.policy, inputs.prompts)
    costs = None if fresh else recall_costs(key)
    lengths = None if fresh else recall_lengths(key_of_lengths)
    source: Literal["measured", "stored"] = "measured" if costs is None else "stored"
    if costs is None:
        note_load(report)
    measure: Literal["costs", "lengths", "nothing"]
    measure = "costs" if costs is None else "lengths" if lengths is None else "nothing"
    probed = run_probe(config, inputs, runner, measure, workload)
    if measure != "nothing":
        lengths = calibrated_lengths(config, read_parquet(sampled_file(runner)), probed.cut_at)
        remember_lengths(key_of_lengths, lengths)
    assert lengths is not None  # kept, or measured now
    if costs is None:
        costs = calibrate(config, inputs, probed, runner)
        remember_costs(key, costs)
    return _Measured(
        probe=probed,
        costs=costs,
        source=source,
        data=_data(config, inputs, prompts, probed, costs, lengths),
        lengths=lengths,
        policy=model_size(inputs.policy),
        reference=model_size(inputs.reference),
        check_seconds=_check_seconds(run.folder / "events.jsonl"),
    )


def _check_seconds(events: Path) -> float | None:
    processes = [event for event in read_events(events) if event["event"] == "process"]
    checks = [event for event in processes if event["work"] == work_name(PreflightJob)]
    return sum(event["seconds"]["total"] for event in checks) or None


def _data(
    config: RunConfig,
    inputs: Inputs,
    rounds: list[Path],
    probed: Probe,
    costs: StageCosts,
    lengths: ResponseLengths,
) -> Data:
    """`rounds`: the prompts of each round."""
    prompts = [read_parquet(file, ["prompt_id", "messages"]) for file in rounds]
    pools = [file for file in (inputs.offline, *inputs.buffers.values()) if file is not None]
    offline_keys = [key for file in pools for key in read_parquet(file, ["key"])["key"].to_list()]
    offline = []
    for frame in prompts:
        sampled = {prompt_key(messages) for messages in frame["messages"].to_list()}
        offline.append(sum(key not in sampled for key in offline_keys))
    known = probed.prompt_tokens
    mean = round(sum(known.values()) / max(1, len(known)))  # of the prompts of given responses, which are not tokenized
    tokens = {number: known.get(number, mean) for frame in prompts for number in frame["prompt_id"].to_list()}
    return Data(
        rounds=[frame["prompt_id"].to_list() for frame in prompts],
        tokens=tokens,
        offline=offline,
        round_zero_pairs=parquet_rows(inputs.offline) if config.has_round_zero and inputs.offline is not None else 0,
        lengths=lengths.lengths,
        usable=lengths.usable,
        pair_tokens=costs.score.pair_tokens,
        eval_prompts=tuple(probed.eval_prompt_tokens),
        eval_pairs=0 if inputs.eval_pairs is None else parquet_rows(inputs.eval_pairs),
        given=None if inputs.given is None else parquet_rows(inputs.given[0]),
    )


def _machine(config: RunConfig, probed: Probe, data: Data) -> Machine:
    layout = probed.layout
    return Machine(
        engine=probed.engine,
        dtype=probed.dtype,
        cuda=probed.cuda,
        cores=len(os.sched_getaffinity(0)),
        groups=probed.groups,
        gpus=probed.gpus,
        processes=layout.processes,
        shards=layout.shards,
        gpu_bytes=probed.gpu_bytes,
        base_memory=probed.base_memory_bytes,
        encode_seconds=probed.encode_seconds,
        tokenizer_seconds=probed.tokenizer_seconds,
        mine_seconds=_mine_seconds(config, data),
        bootstrap_seconds=_bootstrap_seconds(min(config.evaluate.prompts, len(data.eval_prompts))),
    )


def _bootstrap_seconds(prompts: int) -> float:
    """Seconds of one confidence interval over `prompts` held-out prompts."""
    began = time.monotonic()
    if prompts:
        bootstrap_ci95([0.5] * prompts, 0)
    return time.monotonic() - began


def _mine_seconds(config: RunConfig, data: Data) -> float:
    """Seconds for mining one response, timed on made-up rewards."""
    samples = config.generate.samples
    prompts = max(1, min(_MAX_MINED // samples, max(map(len, data.rounds))))
    count = prompts * samples
    rng = np.random.default_rng(0)
    lengths = draw_lengths(data.lengths, count)
    options = config.mine.options(0)
    frame = pl.DataFrame(
        {
            "prompt_id": np.repeat(np.arange(prompts, dtype=np.uint32), samples),
            options.length_column: pl.Series(lengths, dtype=pl.UInt32),
            "finish_reason": ["stop"] * count,
            "reward": rng.normal(size=count).astype(np.float32),
            "logp": rng.normal(size=count).astype(np.float32),
            "ref_logp": rng.normal(size=count).astype(np.float32),
            "previous_reward": rng.normal(size=count).astype(np.float32),
            "token_ids": rng.integers(0, 2**63, count, dtype=np.uint64),
            "round": np.ones(count, dtype=np.uint32),
        }
    )
    began = time.monotonic()
    mine_pairs(frame, options)
    return (time.monotonic() - began) / count


def _room(folder: Path, probed: Probe) -> Room:
    """Free disk at `folder` or the nearest folder above it that exists, and free memory."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    disk = shutil.disk_usage(existing).free
    if probed.gpu_free_bytes is not None:
        return Room(disk, probed.gpu_free_bytes, "GPU memory")
    return Room(disk, probed.host_free_bytes, "memory")
