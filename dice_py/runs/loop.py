"""The loop: rounds of generate, score, mine, replay, train and evaluate, in a run folder that survives a kill.

A stage runs when its key is not the manifest's, or its files are not whole; so `resume` is `run` on a folder
that is there already. Model-holding stages run in a process of their own (compute/stage_process.py); this one
imports neither torch nor transformers.

The reference moves: in round 1 π_ref is the model that the policy's DPO training started from; in round t>1
it is the policy that round t−1 started from (`reward_reference: previous`), or stays the first one
(`initial`). Chen et al., arXiv 2406.09760, algorithm 1.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.compute.gpu_monitor import GpuMonitor, usable_gpus
from dice_py.config.loading import dump, load_resolved
from dice_py.config.run import RunConfig
from dice_py.errors import InterruptedRunError, UsageError
from dice_py.events import Report, no_report
from dice_py.models.loading import model_identity
from dice_py.replay.buffer import ReplayBuffer
from dice_py.replay.mined import append_mined
from dice_py.reporting.html import write_report
from dice_py.runs.candidates import candidates
from dice_py.runs.folder import Run, end_torn_line, locked
from dice_py.runs.inputs import Inputs, prepare, round_prompts
from dice_py.runs.profile import write_profile
from dice_py.runs.throughput import remember_run
from dice_py.stages.mine import mine
from dice_py.storage.files import Manifest, read_json, remove_temporaries, write_text
from dice_py.storage.keys import digest, file_digest, seed_for, versions
from dice_py.storage.parquet import parquet_key
from dice_py.training.checkpoints import is_trained


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM (a scheduler's) ends the run as Ctrl-C does: whole shards stay, exit code 5."""

    def handler(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def run(config: RunConfig, folder: Path, report: Report = no_report) -> dict[str, Any]:
    """Runs `config` in `folder`, going on from what is whole there; returns the metrics of each round.

    Raises:
        UsageError: the folder holds a run of another config, or another process works in it.
        InterruptedRunError: Ctrl-C or SIGTERM; `dice resume` goes on.
        DiceError: what a stage raised.
    """
    stored = folder / "config.yaml"
    if stored.exists():
        # A run that failed before its first stage has nothing to lose: it may be given another config.
        begun = Manifest(folder / "manifest.json").data["stages"] or any(folder.glob("round-*"))
        if begun and load_resolved(stored) != config:
            raise UsageError(
                f"{folder} holds a run of another config (see {stored}); give another --run-dir, or continue that "
                f"run as it is with: dice resume {folder}"
            )
    elif folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UsageError(f"{folder} is not empty and holds no run; give another --run-dir")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder), terminate_as_interrupt(), GpuMonitor(usable_gpus(config.devices, config.model)) as watch:
        remove_temporaries(folder)
        write_text(stored, dump(config))
        this = Run(folder, config, report, watch)
        try:
            end_torn_line(folder / "events.jsonl")
            this.report("started", pid=os.getpid())
            return _rounds(this)
        except KeyboardInterrupt:
            this.report("interrupted")
            _write_profile_of_a_stopped(folder)
            raise InterruptedRunError(f"interrupted; whole shards are kept. Go on with: dice resume {folder}") from None
        except BaseException as error:
            with contextlib.suppress(OSError):
                this.report("failed", text=f"{type(error).__name__}: {error}"[:2000])
            _write_profile_of_a_stopped(folder)
            raise
        finally:
            this.close()


def _write_profile_of_a_stopped(folder: Path) -> None:
    with contextlib.suppress(Exception):  # what stopped the run is what the user must hear of
        write_profile(folder)


def resume(folder: Path, report: Report = no_report) -> dict[str, Any]:
    """Goes on with the run in `folder`: redoes nothing that is whole, reuses nothing whose key differs.

    Raises:
        UsageError: no run is there.
    """
    if not (folder / "config.yaml").is_file():
        raise UsageError(f"{folder} holds no run (no config.yaml); `dice status` lists runs, `dice run` starts one")
    return run(load_resolved(folder / "config.yaml"), folder, report)


def _rounds(this: Run) -> dict[str, Any]:
    config = this.config
    inputs = prepare(this)
    # What the run stands on, for whoever reads the folder.
    this.manifest.data["policy"] = {"folder": str(inputs.policy), "identity": model_identity(inputs.policy)}
    this.manifest.data["reference"] = {
        "folder": str(inputs.reference),
        "identity": model_identity(inputs.reference),
    }
    this.manifest.data["versions"] = versions("torch", "transformers", "trl", "vllm", "polars", "pyarrow")
    this.manifest.save()
    policy, reference = inputs.policy, inputs.reference
    metrics: dict[str, Any] = {}
    for number in range(1, config.rounds + 1):
        this.tell_gpus(None)
        this.report("round", number=number, rounds=config.rounds)
        next_policy = _round(this, inputs, number, policy, reference)
        next_reference = policy if config.reward_reference == "previous" else inputs.reference
        metrics[f"round-{number:02d}"] = _evaluate(this, inputs, number, next_policy, next_reference)
        policy, reference = next_policy, next_reference
        write_report(this.folder)
        this.tell_gpus(None)
        write_profile(this.folder)
        try:
            remember_run(this.folder)  # for the next `dice plan`
        except Exception as error:  # a run of hours does not end because a plan would have to measure anew
            this.report(
                "note", text=f"the round's figures are not kept for `dice plan`: {type(error).__name__}: {error}"
            )
    this.report("finished", policy=str(policy), report=str(this.folder / "report.html"))
    write_profile(this.folder)  # the end of the last round is known now
    return metrics


def _round(this: Run, inputs: Inputs, number: int, policy: Path, reference: Path) -> Path:
    """Generate, score, mine, replay, train: the new policy's folder."""
    config = this.config
    name = f"round-{number:02d}"
    base = this.folder / name
    held = config.model.model_dump(include={"dtype", "device", "attn_implementation"})
    identity, ref_identity = model_identity(policy), model_identity(reference)
    prompts, prompts_key = round_prompts(this, inputs, number, base / "generate")
    libraries = versions("torch", "transformers", "vllm")

    def shards_whole(entry: dict[str, Any]) -> bool:
        return all(parquet_key(this.path(f["file"])) == f["key"] for f in entry["files"])

    def generate_stage() -> dict[str, Any]:
        made = this.spawn(
            "generate",
            "dice_py.stages.generate:generate",
            base / "generate",
            config=config.generate,
            models=config.model,
            policy=policy,
            prompts=prompts,
            out=base / "generate",
            seed=config.seed,
            round_number=number,
            max_prompt_tokens=config.data.max_prompt_tokens,
            devices=config.devices,
        )
        files = [{"file": this.relative(file), "key": key} for file, key in zip(made.files, made.keys, strict=True)]
        return {"files": files, "counts": made.counts()}

    this.stage(
        f"{name}/generate",
        digest(
            prompts_key, config.generate.model_dump(), held, identity, config.seed, number, libraries,
            config.data.max_prompt_tokens,
        ),
        shards_whole,
        generate_stage,
    )  # fmt: skip
    # In a pool of rounds, those of the earlier ones too: their responses are scored anew.
    pool = candidates(this.folder, this.manifest, number, config.mine.pool_rounds)
    generations = pool.generations

    score_keys = [
        digest("score", key, config.score.model_dump(), held, identity, ref_identity, config.beta, libraries)
        for key in pool.keys
    ]

    def score_stage() -> dict[str, Any]:
        made = this.spawn(
            "score",
            "dice_py.stages.score:score",
            base / "score",
            config=config.score,
            models=config.model,
            policy=policy,
            reference=reference,
            generations=generations,
            out=base / "score",
            keys=score_keys,
            beta=config.beta,
            # Those of earlier rounds were sampled by other policies.
            sampled=[shard_round == number for shard_round in pool.rounds],
            devices=config.devices,
        )
        rewards = pl.scan_parquet(made.files, glob=False).select(pl.col("reward")).collect()["reward"]
        finite = rewards.filter(rewards.is_finite())
        return {
            "files": [{"file": this.relative(f), "key": key} for f, key in zip(made.files, score_keys, strict=True)],
            "counts": {
                "responses": len(rewards),
                "mean_reward": finite.mean(),
                "reward_std": finite.std(),
                "policy_logps_gate": made.gate,
            },
        }

    scored = this.stage(f"{name}/score", digest(score_keys), shards_whole, score_stage)
    scores = [this.path(f["file"]) for f in scored["files"]]

    mine_seed = seed_for(config.seed, number, "mine")
    mined_key = digest("mine", score_keys, config.mine.model_dump(), mine_seed, versions("polars"))
    mined_file = base / "mine" / "mined.parquet"

    def mine_stage() -> dict[str, Any]:
        counts = mine(
            config.mine,
            generations=generations,
            scores=scores,
            rounds=pool.rounds,
            out=mined_file.parent,
            seed=mine_seed,
            key=mined_key,
        )
        return {"files": [{"file": this.relative(mined_file), "key": mined_key}], "counts": counts}

    this.stage(f"{name}/mine", mined_key, shards_whole, mine_stage)

    buffer = None
    if config.replay.buffer is not None:
        # Not a stage: appending what is there already does nothing.
        buffer = ReplayBuffer(this.folder / "buffer", config.replay.buffer.capacity, seed_for(config.seed, "buffer"))
        append_mined(
            buffer,
            number,
            mined=mined_file,
            generations=generations,
            scores=scores,
            prompts=pool.prompts,
            key=mined_key,
            report=this.report,
        )

    replay_seed = seed_for(config.seed, number, "replay")
    offline_key = parquet_key(inputs.offline) if inputs.offline else None
    replay_key = digest(
        "replay", mined_key, config.replay.model_dump(), offline_key, replay_seed, identity,
        config.score.model_dump(), held, libraries, {name: parquet_key(file) for name, file in inputs.buffers.items()},
        [] if buffer is None else buffer.keys(number), number,
    )  # fmt: skip
    training_set = base / "replay" / "training_set.parquet"

    def replay_stage() -> dict[str, Any]:
        counts = this.spawn(
            "replay",
            "dice_py.stages.replay:replay",
            base / "replay",
            config=config.replay,
            score_config=config.score,
            models=config.model,
            policy=policy,
            mined=mined_file,
            generations=generations,
            scores=scores,
            prompts=pool.prompts,
            offline=inputs.offline,
            out=base / "replay",
            seed=replay_seed,
            key=replay_key,
            buffers=inputs.buffers,
            rounds_buffer=buffer,
            round_number=number,
        )
        return {"files": [{"file": this.relative(training_set), "key": replay_key}], "counts": counts}

    this.stage(f"{name}/replay", replay_key, shards_whole, replay_stage)

    train_seed = seed_for(config.seed, number, "train")
    train_key = digest(
        "train", replay_key, config.train.key_fields(), held, identity, config.beta, train_seed,
        versions("torch", "transformers", "trl", "accelerate", "peft"),
    )  # fmt: skip
    model = base / "train" / "model"

    def train_stage() -> dict[str, Any]:
        counts = this.spawn(
            "train",
            "dice_py.stages.train:train",
            base / "train",
            config=config.train,
            models=config.model,
            policy=policy,
            training_set=training_set,
            out=base / "train",
            beta=config.beta,
            seed=train_seed,
            key=train_key,
            devices=config.devices,
        )
        return {"files": [{"file": this.relative(model), "key": train_key}], "counts": counts}

    this.stage(f"{name}/train", train_key, lambda _: is_trained(model, train_key), train_stage)
    return model


def _evaluate(this: Run, inputs: Inputs, number: int, policy: Path, reference: Path) -> dict[str, Any]:
    config = this.config
    out = this.folder / f"round-{number:02d}" / "evaluate"
    identities = [model_identity(m) for m in (policy, reference, inputs.policy, inputs.reference)]
    data = [parquet_key(f) if f else None for f in (inputs.eval_prompts, inputs.eval_pairs)]
    key = digest(
        "evaluate", identities, data, config.evaluate.model_dump(), config.generate.model_dump(),
        config.score.model_dump(), config.model.model_dump(include={"dtype", "device"}), config.seed,
        versions("torch", "transformers", "vllm"),
    )  # fmt: skip
    file = out / "metrics.json"

    def evaluate_stage() -> dict[str, Any]:
        metrics = this.spawn(
            "evaluate",
            "dice_py.stages.evaluate:evaluate",
            out,
            following="generate" if number < config.rounds else None,
            config=config.evaluate,
            generate_config=config.generate,
            score_config=config.score,
            models=config.model,
            policy=policy,
            start=inputs.policy,
            reference=reference,
            initial_reference=inputs.reference,
            prompts=inputs.eval_prompts,
            pairs=inputs.eval_pairs,
            out=out,
            shared=this.folder / "evaluate",
            seed=seed_for(config.seed, "evaluate"),
            max_prompt_tokens=config.data.max_prompt_tokens,
            devices=config.devices,
            with_oracle=config.is_world,
        )
        return {"files": [{"file": this.relative(file), "key": file_digest(file)}], "counts": metrics}

    def whole(entry: dict[str, Any]) -> bool:
        return file.is_file() and file_digest(file) == entry["files"][0]["key"]

    this.stage(f"round-{number:02d}/evaluate", key, whole, evaluate_stage)
    return dict(read_json(file))
