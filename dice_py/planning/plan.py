"""`dice plan`: what a run would cost, before it is started: counts, seconds, GPU hours, disk and memory of each stage.

Counts come from the run's own reading of its data. Seconds come from figures of the same model shape, type, device
and versions: remembered from an earlier plan or run, else measured now. Of each stage

    seconds = wait for its process + load of weights + what is paid once + rate × units

where the wait follows from which process is started ahead of which (planning/timeline.py). A round's policy is taken
to answer as the first one does, and every prompt with enough usable responses to give its pairs: counts of pairs are
estimates, and where a filter of `mine` drops more, upper bounds. Nothing is written but what is remembered.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dice_py.compute.stage_process import run_in_subprocess
from dice_py.compute.worker import Worker
from dice_py.config.run import RunConfig
from dice_py.data import prompt_key
from dice_py.evaluation.metrics import bootstrap_ci95
from dice_py.events import Report, no_report
from dice_py.mining.pairs import mine_pairs
from dice_py.models.sizes import model_size
from dice_py.planning.calibrate_generation import GENERATED
from dice_py.planning.costs import Estimator, Machine, make_record
from dice_py.planning.counts import Data, count_rounds
from dice_py.planning.feasibility import Room, first_failure, peak_disk
from dice_py.planning.timeline import draw_lengths
from dice_py.runs.folder import Run
from dice_py.runs.inputs import Inputs, prepare, round_prompts
from dice_py.runs.profile import read_events
from dice_py.runs.throughput import KIND, LENGTHS, lengths_key, lengths_of, record_key
from dice_py.stages.registry import REGISTRY
from dice_py.storage.cache import recall, remember
from dice_py.storage.parquet import parquet_rows, read_parquet

_MOST_MINED = 200_000  # responses on which mining is timed


def resolve(work: str) -> Callable[..., Any]:
    module, _, name = work.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


class SubprocessRunner:
    """Pieces of work in processes of their own, one after the other, and how long each took to start."""

    def __init__(self, folder: Path, report: Report) -> None:
        self.folder, self.report = folder, report
        self.starts: dict[str, float] = {}

    def run(self, stage: str, work: str, **arguments: Any) -> Any:
        """Calls `work` in a process that has imported what the stage's has."""

        def on_event(event: str, **fields: Any) -> None:
            if event == "process" and fields["work"] == work:
                # Of a process that was given its work at once, the imports are in it.
                self.starts[stage] = fields["seconds"]["spawn"] + fields["seconds"]["import"]
            elif event in ("note", "progress"):
                self.report(event, **fields)

        log = self.folder / f"{stage}.log"
        warm = Worker(REGISTRY[stage].imports, log)
        call = functools.partial(resolve(work), **arguments)
        remedy = REGISTRY[stage].remedy
        return run_in_subprocess(call, log=log, remedy=remedy, report=on_event, warm=warm, name=work)


def plan(
    config: RunConfig,
    folder: Path,
    *,
    fresh: bool = False,
    own_start: float = 0.0,
    report: Report = no_report,
) -> dict[str, Any]:
    """The plan of the run of `config` in `folder`, ready for JSON; nothing is written there.

    `total_seconds` and, per stage in `stages` ("round-01/generate", …), `seconds`, `startup_seconds` (waiting for its
    process, and loading), `work_seconds`, `gpu_hours`, `tokens`, `disk_bytes` (that stay), `transient_disk_bytes`
    (beside them, while it works), `peak_memory_bytes` (of one GPU, or of the host), and its counts. `gpu_hours` of the
    run; without a GPU it is 0, and `cpu_hours` are its cores times its wall clock. `disk_bytes` and `peak_memory_bytes`
    at their highest; `fits`, and `first_failure` (planning/feasibility.py), in the order of the work.

    Args:
        fresh: measure, even where figures are remembered.
        own_start: seconds that the command itself takes to start.

    Raises:
        DiceError: what the run would be refused for before its first stage.
    """
    with tempfile.TemporaryDirectory(prefix="dice-plan-") as temporary:
        base = Path(temporary)
        this = Run(base / "run", config, report)
        this.folder.mkdir()
        try:
            inputs = prepare(this)
            files = [
                round_prompts(this, inputs, number, this.folder / f"round-{number:02d}" / "generate")
                for number in range(1, config.rounds + 1)
            ]
        finally:
            this.close()
        apart = SubprocessRunner(base, report)
        key = record_key(config, inputs.policy)
        key_of_lengths = lengths_key(config, inputs.policy, inputs.prompts)
        record = None if fresh else recall(KIND, key)
        lengths = None if fresh else recall(LENGTHS, key_of_lengths)
        source = "measured" if record is None else "stored"
        if record is None:
            _tell_load(report)
        looked = apart.run(
            "generate",
            "dice_py.planning.calibrate_generation:probe",
            config=config,
            policy=inputs.policy,
            prompts=inputs.prompts,
            eval_prompts=inputs.eval_prompts,
            out=base / "generate",
            measure="all" if record is None else "lengths" if lengths is None else "nothing",
        )
        if looked["generate"] is not None:
            shard = read_parquet(base / "generate" / GENERATED)
            lengths = lengths_of(config, shard)
            remember(LENGTHS, key_of_lengths, lengths)
        assert lengths is not None  # remembered, or measured now
        if record is None:
            record = _measure(config, inputs, looked, base, apart)
            remember(KIND, key, record)
        data = _data(inputs, [file for file, _ in files], looked, record, lengths)
        checked = [event for event in read_events(this.folder / "events.jsonl") if event["event"] == "process"]
        check = (
            sum(e["seconds"]["total"] for e in checked if e["work"] == "dice_py.stages.preflight:PreflightJob") or None
        )
        machine = _machine(config, looked, data)
        sizes = model_size(inputs.policy), model_size(inputs.reference)
    counts = count_rounds(config, data, machine.processes)
    stages = Estimator(config, record, machine, *sizes, data).price(counts, check)
    room = _room(folder, looked)
    failure = first_failure(stages, room)
    for stage in stages.values():
        stage.pop("lacking", None)
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
            "source": source,
            "of": record["source"],
            "device": looked["device"],
            "dtype": looked["dtype"],
            "engine": looked["engine"],
            "responses": len(data.lengths),
            "mean_response_tokens": sum(data.lengths) / max(1, len(data.lengths)),
            "usable_prompt_share": data.usable,
        },
        "start_seconds": own_start,
        "rounds": config.rounds,
        "stages": stages,
    }


def _tell_load(report: Report) -> None:
    """Says so where other programs keep the cores busy: figures taken beside them are not those of a run alone."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > cores / 2:
        report(
            "note",
            text=f"other programs keep this machine busy (load {load:.1f} on {cores} cores): what is measured now may "
            "be far slower than a run alone; plan again with --fresh when they have ended",
        )


def _measure(
    config: RunConfig, inputs: Inputs, looked: dict[str, Any], base: Path, apart: SubprocessRunner
) -> dict[str, Any]:
    """The figures, from a calibration."""
    score = apart.run(
        "score",
        "dice_py.planning.calibrate_training:measure_score",
        config=config,
        policy=inputs.policy,
        reference=inputs.reference,
        generations=base / "generate" / GENERATED,
        prompts=inputs.prompts,
        offline=inputs.offline,
        gpus=looked["gpu_names"],
        threads=looked["threads"],
        out=base / "score",
    )
    train = apart.run(
        "train",
        "dice_py.planning.calibrate_training:measure_train",
        config=config,
        policy=inputs.policy,
        training_set=base / "score" / "training_set.parquet",
        out=base / "train",
    )
    return make_record(looked["generate"], score, train, apart.starts)


def _data(
    inputs: Inputs, rounds: list[Path], looked: dict[str, Any], record: dict[str, Any], lengths: dict[str, Any]
) -> Data:
    asked = [read_parquet(file, ["prompt_id", "messages"]) for file in rounds]
    pools = [file for file in (inputs.offline, *inputs.buffers.values()) if file is not None]
    keys = [_keys(file) for file in pools]
    offline = []
    for frame in asked:
        sampled = {prompt_key(messages) for messages in frame["messages"].to_list()}
        offline.append(sum(key not in sampled for pool in keys for key in pool))
    pair_tokens = record["score"].get("pair_tokens")
    return Data(
        rounds=[frame["prompt_id"].to_list() for frame in asked],
        tokens=dict(zip(looked["prompt_ids"], looked["prompt_tokens"], strict=True)),
        offline=offline,
        lengths=lengths["lengths"],
        usable=lengths["usable"],
        pair_tokens=None if pair_tokens is None else tuple(pair_tokens),
        eval_prompts=tuple(looked["eval_prompt_tokens"]),
        eval_pairs=0 if inputs.eval_pairs is None else parquet_rows(inputs.eval_pairs),
    )


def _keys(file: Path) -> list[str]:
    """The prompts of offline pairs, as the draw tells them apart."""
    return read_parquet(file, ["key"])["key"].to_list()


def _machine(config: RunConfig, looked: dict[str, Any], data: Data) -> Machine:
    layout = looked["layout"]
    evaluated = min(config.evaluate.prompts, len(data.eval_prompts))
    began = time.monotonic()
    if evaluated:
        bootstrap_ci95([0.5] * evaluated, 0)
    bootstrap = time.monotonic() - began
    return Machine(
        engine=looked["engine"],
        dtype=looked["dtype"],
        cuda=looked["cuda"],
        cores=len(os.sched_getaffinity(0)),
        groups=looked["groups"],
        gpus=looked["gpus"],
        processes=layout.processes,
        shards=layout.processes if layout.strategy in ("fsdp2", "zero3") else 1,
        gpu_bytes=looked["room"]["gpu_bytes"],
        base_memory=looked["base_memory_bytes"],
        encode_seconds=looked["encode_seconds"],
        tokenizer_seconds=looked["tokenizer_seconds"],
        mine_seconds=_mine_seconds(config, data),
        bootstrap_seconds=bootstrap,
    )


def _mine_seconds(config: RunConfig, data: Data) -> float:
    """Of a response: mining, timed on made-up rewards."""
    samples = config.generate.samples
    prompts = max(1, min(_MOST_MINED // samples, max(map(len, data.rounds))))
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
            "token_ids": rng.integers(0, 2**63, count, dtype=np.uint64),
            "round": np.ones(count, dtype=np.uint32),
        }
    )
    began = time.monotonic()
    mine_pairs(frame, **asdict(options))
    return (time.monotonic() - began) / count


def _room(folder: Path, looked: dict[str, Any]) -> Room:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    room = looked["room"]
    if looked["cuda"]:
        return Room(shutil.disk_usage(place).free, room["gpu_free_bytes"], "GPU memory")
    return Room(shutil.disk_usage(place).free, room["host_free_bytes"], "memory")
