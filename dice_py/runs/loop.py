"""The loop: rounds of generate, score, mine, replay, train and evaluate, in a run folder that survives a kill.

A stage runs when its key is not the manifest's, or its files are not complete; so `resume` is `run` on a folder that
is there already. Model-holding stages run in a process of their own (compute/stage_process.py); this one imports
neither torch nor transformers.

With an SFT model (`model.sft`) the run has a round 0 that makes the policy: DPO from that model on the offline pairs,
with the same trainer. Its stages are replay (the pairs, scored by the SFT model) and train.

The reference moves: in round 1 π_ref is the model that the policy's DPO training started from; in round t>1
it is the policy that round t−1 started from (`reward_reference: previous`), or stays the first one
(`initial`). Chen et al., arXiv 2406.09760, algorithm 1.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dice_py.compute.gpu_monitor import GpuMonitor, usable_gpus
from dice_py.compute.interrupts import terminate_as_interrupt
from dice_py.config.loading import reassigned
from dice_py.config.run import RunConfig
from dice_py.config.stages import ReplayConfig
from dice_py.errors import DamagedError, InterruptedRunError, UsageError
from dice_py.events import Report, no_report
from dice_py.models.identity import model_identity
from dice_py.replay.buffer import ReplayBuffer
from dice_py.replay.mined import append_mined
from dice_py.runs.candidates import Candidates, candidates
from dice_py.runs.folder import Run, end_torn_line, locked, round_name
from dice_py.runs.inputs import Inputs, prepare, round_prompts
from dice_py.runs.profile import write_profile
from dice_py.runs.stored_config import (
    CONFIG_FILE,
    check_folder,
    has_config,
    store_config,
    stored_config,
    with_absolute_paths,
)
from dice_py.runs.throughput import remember_run
from dice_py.stages.evaluate import EvaluateJob
from dice_py.stages.generate import GenerateJob
from dice_py.stages.job import StageFile, StageResult
from dice_py.stages.mine import MineJob
from dice_py.stages.replay import ReplayJob
from dice_py.stages.score import ScoreJob
from dice_py.stages.train import TrainJob
from dice_py.storage.files import make_folder, remove_temporaries
from dice_py.storage.keys import seed_for, versions
from dice_py.storage.parquet import parquet_key

AfterRound = Callable[[Path], object]
"""Called with the run folder after each round, to write a report, say."""


def run(
    config: RunConfig, folder: Path, report: Report = no_report, *, after_round: AfterRound | None = None
) -> dict[str, Any]:
    """Runs `config` in `folder`, keeping completed work; returns the metrics of each round.

    Args:
        after_round: the command line passes `dice_py.reporting.html.write_report`.

    Raises:
        UsageError: the folder holds a run of another config, or another process works in it.
        InterruptedRunError: Ctrl-C or SIGTERM; `dice resume` continues.
        DiceError: raised by a stage.
    """
    config = with_absolute_paths(config)
    check_folder(config, folder)
    make_folder(folder)
    return _run(config, folder, report, after_round)


def _run(config: RunConfig, folder: Path, report: Report, after_round: AfterRound | None) -> dict[str, Any]:
    with locked(folder), terminate_as_interrupt(), GpuMonitor(usable_gpus(config.devices, config.model)) as monitor:
        remove_temporaries(folder)
        end_torn_line(folder / "events.jsonl")
        run = Run(folder, config, report, monitor)
        try:
            run.report("started", pid=os.getpid())
            changed = store_config(run.folder, run.config, run.manifest, run.report)
            metrics = _checked_rounds(run, after_round)
            if changed and not run.remade:
                run.report("note", text="the changed settings touch no stage that was done before")
            return metrics
        except KeyboardInterrupt:
            run.report("interrupted")
            _write_profile_of_stopped(folder)
            raise InterruptedRunError(
                f"interrupted; completed shards are kept. Continue with: dice resume {folder}"
            ) from None
        except BaseException as error:
            with contextlib.suppress(OSError):
                run.report("failed", text=f"{type(error).__name__}: {error}"[:2000])
            _write_profile_of_stopped(folder)
            raise
        finally:
            run.close()


def _checked_rounds(run: Run, after_round: AfterRound | None) -> dict[str, Any]:
    """All rounds. When a stage meets a damaged artifact of the run, they begin again, so that its stage makes it."""
    met: set[str] = set()
    while True:
        try:
            return _rounds(run, after_round)
        except DamagedError as error:
            if str(error) in met:
                raise
            met.add(str(error))
            run.report("note", text=f"{error}. The files of the run are checked again")


def _write_profile_of_stopped(folder: Path) -> None:
    with contextlib.suppress(Exception):  # the error that stopped the run is the one to report
        write_profile(folder)


def resume(
    folder: Path, report: Report = no_report, *, assignments: Sequence[str] = (), after_round: AfterRound | None = None
) -> dict[str, Any]:
    """Resumes the run in `folder`: redoes nothing that is complete, reuses nothing whose key differs.

    Args:
        assignments: changed settings, "section.key=value". The run goes on from the first stage whose key has them;
            notes say which stages are made again, and because of what.
        after_round: as in `run`.

    Raises:
        UsageError: no run is there, or a setting is unknown or out of its range.
    """
    if not (folder / CONFIG_FILE).is_file() and not has_config(folder):
        raise UsageError(f"{folder} holds no run (no config.yaml); `dice status` lists runs, `dice run` starts one")
    config = with_absolute_paths(reassigned(stored_config(folder)[0], assignments))
    return _run(config, folder, report, after_round)


def _rounds(run: Run, after_round: AfterRound | None) -> dict[str, Any]:
    config = run.config
    inputs = prepare(run)
    files = [inputs.prompts, inputs.offline, inputs.eval_prompts, inputs.eval_pairs, *inputs.buffers.values()]
    run.list_files(*files)
    run.manifest.data["versions"] = versions("torch", "transformers", "trl", "vllm", "polars", "pyarrow")
    if config.has_round_zero:
        inputs = replace(inputs, policy=_round_zero(run, inputs))
    # The models of this run, for people who read the folder.
    for role, model in (("policy", inputs.policy), ("reference", inputs.reference)):
        run.manifest.data[role] = {"folder": str(model), "identity": model_identity(model)}
    run.manifest.save()
    policy, reference = inputs.policy, inputs.reference
    metrics: dict[str, Any] = {}
    for number in range(1, config.rounds + 1):
        run.report_gpus(None)
        run.report("round", number=number, rounds=config.rounds)
        next_policy = _round(run, inputs, number, policy, reference)
        next_reference = policy if config.reward_reference == "previous" else inputs.reference
        metrics[round_name(number)] = _evaluate(run, inputs, number, next_policy, next_reference)
        policy, reference = next_policy, next_reference
        if after_round is not None:
            after_round(run.folder)
        run.report_gpus(None)
        write_profile(run.folder)
        _remember(run)
    run.report("finished", policy=str(policy), report=str(run.folder / "report.html"))
    write_profile(run.folder)  # the end of the last round is known now
    return metrics


def _round_zero(run: Run, inputs: Inputs) -> Path:
    """Trains π_1 by DPO from the SFT model on all offline pairs; returns its folder."""
    config, base, sft = run.config, run.round_folder(0), inputs.reference
    assert inputs.offline is not None
    run.report_gpus(None)
    run.report("round", number=0, rounds=config.rounds)
    replay_job = ReplayJob(
        config=ReplayConfig(),  # all pairs, each once: the shares and weights of `replay` are those of the rounds
        score_config=config.score,
        models=config.model,
        policy=sft,
        mined=None,
        generations=[],
        scores=[],
        prompts=None,
        offline=inputs.offline,
        input_keys=[parquet_key(inputs.offline)],
        out=base / "replay",
        seed=seed_for(config.seed, 0, "replay"),
    )
    training_set, training_set_key = run.run_stage(0, replay_job).files[0]
    train_job = TrainJob(
        config=config.round0.training(config.train),
        models=config.model,
        policy=sft,
        training_set=training_set,
        training_set_key=training_set_key,
        out=base / "train",
        beta=config.beta,
        seed=seed_for(config.seed, 0, "train"),
        devices=config.devices,
    )
    run.run_stage(0, train_job, following="generate")
    return train_job.target


def _remember(run: Run) -> None:
    """Keeps the figures of the run for the next `dice plan`."""
    try:
        remember_run(run.folder)
    except Exception as error:  # a run of hours does not end because a plan would have to measure again
        text = f"the round's figures are not kept for `dice plan`: {type(error).__name__}: {error}"
        run.report("note", text=text)


def _round(run: Run, inputs: Inputs, number: int, policy: Path, reference: Path) -> Path:
    """Generate, score, mine, replay, train: the new policy's folder."""
    config, base = run.config, run.round_folder(number)
    prompts, prompts_key = round_prompts(run, inputs, number, base / "generate")
    run.list_files(prompts)
    run.run_stage(
        number,
        GenerateJob(
            config=config.generate,
            models=config.model,
            policy=policy,
            prompts=prompts,
            prompts_key=prompts_key,
            out=base / "generate",
            seed=config.seed,
            round_number=number,
            max_prompt_tokens=config.data.max_prompt_tokens,
            devices=config.devices,
        ),
    )
    # In a pool of rounds, those of the earlier ones too: their responses are scored again.
    pool = candidates(run.folder, run.manifest, number, config.mine.pool_rounds, run.report)
    scored = _shards(run.run_stage(number, _score_job(run, pool, number, policy, reference)))
    mine_job = MineJob(
        config=config.mine,
        generations=pool.generations,
        scores=[file for file, _ in scored],
        score_keys=[key for _, key in scored],
        rounds=pool.rounds,
        out=base / "mine",
        seed=seed_for(config.seed, number, "mine"),
    )
    mined = run.run_stage(number, mine_job)
    replayed = run.run_stage(number, _replay_job(run, inputs, number, pool, scored, mined.files[0], policy))
    training_set, training_set_key = replayed.files[0]
    train_job = TrainJob(
        config=config.train,
        models=config.model,
        policy=policy,
        training_set=training_set,
        training_set_key=training_set_key,
        out=base / "train",
        beta=config.beta,
        seed=seed_for(config.seed, number, "train"),
        devices=config.devices,
    )
    run.run_stage(number, train_job)
    return train_job.target


def _shards(result: StageResult) -> list[StageFile]:
    """The shards of a stage, without what it wrote beside them (the gate)."""
    return [(file, key) for file, key in result.files if file.suffix == ".parquet"]


def _score_job(run: Run, pool: Candidates, number: int, policy: Path, reference: Path) -> ScoreJob:
    config = run.config
    return ScoreJob(
        config=config.score,
        models=config.model,
        policy=policy,
        reference=reference,
        generations=pool.generations,
        generation_keys=pool.keys,
        out=run.round_folder(number) / "score",
        beta=config.beta,
        # Those of earlier rounds were sampled by other policies.
        sampled=tuple(sampled_in == number for sampled_in in pool.rounds),
        devices=config.devices,
    )


def _replay_job(
    run: Run, inputs: Inputs, number: int, pool: Candidates, scored: list[StageFile], mined: StageFile, policy: Path
) -> ReplayJob:
    """The replay of a round. Where a run keeps a buffer of its rounds, the mined pairs are appended to it first."""
    config = run.config
    mined_file, mined_key = mined
    scores = [file for file, _ in scored]
    buffer = None
    if config.replay.buffer is not None:
        # Not a stage: appending pairs that the buffer already has does nothing.
        buffer = ReplayBuffer(run.folder / "buffer", config.replay.buffer.capacity, seed_for(config.seed, "buffer"))
        append_mined(
            buffer,
            number,
            mined=mined_file,
            generations=pool.generations,
            scores=scores,
            prompts=pool.prompts,
            key=mined_key,
            report=run.report,
        )
        run.list_files(buffer.path(number))
    return ReplayJob(
        config=config.replay,
        score_config=config.score,
        models=config.model,
        policy=policy,
        mined=mined_file,
        generations=pool.generations,
        scores=scores,
        prompts=pool.prompts,
        offline=inputs.offline,
        input_keys=[
            mined_key,
            parquet_key(inputs.offline) if inputs.offline else None,
            {name: parquet_key(file) for name, file in inputs.buffers.items()},
        ],
        out=run.round_folder(number) / "replay",
        seed=seed_for(config.seed, number, "replay"),
        buffers=inputs.buffers,
        rounds_buffer=buffer,
        round_number=number,
    )


def _evaluate(run: Run, inputs: Inputs, number: int, policy: Path, reference: Path) -> dict[str, Any]:
    config = run.config
    job = EvaluateJob(
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
        input_keys=[parquet_key(file) if file else None for file in (inputs.eval_prompts, inputs.eval_pairs)],
        out=run.round_folder(number) / "evaluate",
        shared=run.folder / "evaluate",
        seed=seed_for(config.seed, "evaluate"),
        max_prompt_tokens=config.data.max_prompt_tokens,
        judges=("oracle",) if config.is_world else (),
        devices=config.devices,
    )
    return dict(run.run_stage(number, job, is_last=number == config.rounds).counts)
