"""One round of a run: the job of each stage, in order, each with what the stages before it made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dice_py.config.run import RunConfig
from dice_py.config.stages import ReplayConfig
from dice_py.config.training import TRACKED, TrainConfig
from dice_py.evaluation.judges.registry import build_judges
from dice_py.reinforcement.rewards import ImplicitRewards, JudgeRewards, LengthPenalty, RewardSource
from dice_py.replay.appended import append_mined
from dice_py.replay.buffer import ReplayBuffer
from dice_py.runs.candidates import Candidates, candidates
from dice_py.runs.folder import Run
from dice_py.runs.inputs import Inputs, round_prompts
from dice_py.scoring.shards import PreviousModel
from dice_py.stages.benchmark import BenchmarkJob, benchmark_metrics
from dice_py.stages.evaluate import EvaluateJob
from dice_py.stages.generate import GenerateJob
from dice_py.stages.given_generations import GivenGenerationsJob
from dice_py.stages.inspect import InspectJob
from dice_py.stages.job import SKIPPED, StageFile, StageResult
from dice_py.stages.mine import MineJob
from dice_py.stages.reinforce import ReinforceJob
from dice_py.stages.replay import ReplayJob
from dice_py.stages.score import ScoreJob
from dice_py.stages.train import TrainJob
from dice_py.storage.keys import seed_for
from dice_py.storage.parquet import parquet_key


def run_round_zero(run: Run, inputs: Inputs) -> Path:
    """Trains π_1 by DPO from the SFT model on all offline pairs; returns its folder."""
    config, base, sft = run.config, run.round_folder(0), inputs.reference
    assert inputs.offline is not None
    run.report_gpus(None)
    run.report("round", number=0, rounds=config.rounds.count)
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
        bad_rows=config.data.bad_rows,
        input_keys=[parquet_key(inputs.offline)],
        out=base / "replay",
        seed=seed_for(config.seed, 0, "replay"),
    )
    training_set, training_set_key = run.run_stage(0, replay_job, following="train").files[0]
    train_job = TrainJob(
        config=_told_by_trl(config.round0.training(config.train)),
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


def _told_by_trl(train: TrainConfig) -> TrainConfig:
    """The settings with those trackers alone that TRL tells: others are told of the whole run, by who follows it."""
    return train.model_copy(update={"report_to": [name for name in train.report_to if name not in TRACKED]})


def previous_model(config: RunConfig, policy: Path, reference: Path) -> PreviousModel | None:
    """The model that the next round scores for the reward of this one, besides its own policy and reference.

    The next round's reference is this one's policy, or again this one's reference: the other of the two is left.

    Args:
        policy, reference: of this round's reward.
    """
    if config.mine.second_reward != "previous":
        return None
    return (reference, "reference") if config.reward_reference == "previous" else (policy, "policy")


def run_round(
    run: Run,
    inputs: Inputs,
    number: int,
    policy: Path,
    reference: Path,
    previous: PreviousModel | None = None,
    *,
    before_training: Callable[[], object] = lambda: None,
) -> Path:
    """Generate, score, mine, replay, inspect, train: the new policy's folder.

    Args:
        before_training: is called when a training is about to begin.
    """
    config, base = run.config, run.round_folder(number)
    prompts, prompts_key = round_prompts(run, inputs, number, base / "generate")
    run.list_files(prompts)
    run.run_stage(number, _generate_job(run, inputs, number, policy, prompts, prompts_key))
    # In a pool of rounds, those of the earlier ones too: their responses are scored again.
    pool = candidates(run.folder, run.manifest, number, config.mine.pool_rounds, run.report)
    score_job = _score_job(run, pool, number, policy, reference, previous)
    scored = _shards(run.run_stage(number, score_job, stays=True))
    mine_job = MineJob(
        config=config.mine.in_round(number),
        generations=pool.generations,
        scores=[file for file, _ in scored],
        score_keys=[key for _, key in scored],
        rounds=pool.rounds,
        out=base / "mine",
        seed=seed_for(config.seed, number, "mine"),
        policy=policy,
        thinking=config.generate.thinking,
    )
    mined = run.run_stage(number, mine_job)
    replay_job = _replay_job(run, inputs, number, pool, scored, mined.files[0], policy, reference)
    has_credit = bool(config.report.pairs) and config.report.token_credit
    replayed = run.run_stage(number, replay_job, stays=has_credit)
    inspect_job = _inspect_job(run, number, pool, mine_job, mined.files[0], replayed.files[0], policy, reference)
    run.run_stage(number, inspect_job)
    train_job = _train_job(run, number, policy, replayed.files[0])
    if not run.is_recorded(number, train_job):
        before_training()
    if config.train.method != "mpo":
        run.run_stage(number, train_job)
        return train_job.target
    trained = run.run_stage(number, train_job, following="reinforce")
    start = policy if SKIPPED in trained.counts else train_job.target
    reinforce_job = _reinforce_job(run, number, start, replayed.files[0], mined, policy, reference)
    reinforced = run.run_stage(number, reinforce_job)
    return start if SKIPPED in reinforced.counts else reinforce_job.target


def _generate_job(run: Run, inputs: Inputs, number: int, policy: Path, prompts: Path, prompts_key: str) -> GenerateJob:
    """The sampling of a round; in round 1, the given responses if there are any."""
    config = run.config
    fields: dict[str, Any] = {
        "config": config.generate,
        "models": config.model,
        "policy": policy,
        "prompts": prompts,
        "prompts_key": prompts_key,
        "out": run.round_folder(number) / "generate",
        "seed": config.seed,
        "round_number": number,
        "max_prompt_tokens": config.data.max_prompt_tokens,
        "devices": config.devices,
        "bad_rows": config.data.bad_rows,
    }
    if number == 1 and inputs.given is not None:
        return GivenGenerationsJob(**fields, given=inputs.given[0])
    return GenerateJob(**fields)


def _train_job(run: Run, number: int, policy: Path, training_set: StageFile) -> TrainJob:
    config = run.config
    return TrainJob(
        config=_told_by_trl(config.train),
        models=config.model,
        policy=policy,
        training_set=training_set[0],
        training_set_key=training_set[1],
        out=run.round_folder(number) / "train",
        beta=config.beta,
        seed=seed_for(config.seed, number, "train"),
        devices=config.devices,
        may_skip=config.train.method == "mpo",
    )


def _reinforce_job(
    run: Run,
    number: int,
    start: Path,
    training_set: StageFile,
    mined: StageResult,
    policy: Path,
    reference: Path,
) -> ReinforceJob:
    """Stage 2 of MPO.

    Args:
        start: the policy of stage 1.
        mined: the result of mining, for the penalty that it found.
        policy, reference: of the round's reward.
    """
    config = run.config
    rewards: RewardSource
    if config.train.mpo.reward == "implicit":
        penalty = LengthPenalty.of(config.mine, mined.counts["alpha"], policy, config.generate.thinking)
        rewards = ImplicitRewards(policy, reference, config.score, config.model, config.beta, penalty)
    else:
        judges = build_judges(config.evaluate.judges, config.model, config.is_world)
        rewards = JudgeRewards(next(judge for judge in judges if judge.name == config.train.mpo.reward))
    return ReinforceJob(
        config=_told_by_trl(config.train),
        generate=config.generate,
        models=config.model,
        policy=start,
        training_set=training_set[0],
        training_set_key=training_set[1],
        rewards=rewards,
        out=run.round_folder(number) / "reinforce",
        seed=seed_for(config.seed, number, "reinforce"),
        devices=config.devices,
        may_skip=True,
    )


def _shards(result: StageResult) -> list[StageFile]:
    """The shards of a stage, without what it wrote beside them (the gate)."""
    return [(file, key) for file, key in result.files if file.suffix == ".parquet"]


def _score_job(
    run: Run, pool: Candidates, number: int, policy: Path, reference: Path, previous: PreviousModel | None
) -> ScoreJob:
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
        sampled=tuple(
            sampled_in == number and has_logps
            for sampled_in, has_logps in zip(pool.rounds, pool.has_logps, strict=True)
        ),
        devices=config.devices,
        previous=previous,
    )


def _replay_job(
    run: Run,
    inputs: Inputs,
    number: int,
    pool: Candidates,
    scored: list[StageFile],
    mined: StageFile,
    policy: Path,
    reference: Path,
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
        bad_rows=config.data.bad_rows,
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
        shared_logps=config.train.ld_alpha is not None,
        **_reference_of_loss(config, inputs, reference),
    )


def _inspect_job(
    run: Run,
    number: int,
    pool: Candidates,
    mine: MineJob,
    mined: StageFile,
    training_set: StageFile,
    policy: Path,
    reference: Path,
) -> InspectJob:
    config = run.config
    return InspectJob(
        config=config.report,
        score_config=config.score,
        models=config.model,
        policy=policy,
        reference=reference,
        beta=config.beta,
        mine=mine,
        mined=mined,
        training_set=training_set,
        prompts=pool.prompts,
        out=run.round_folder(number) / "inspect",
        seed=seed_for(config.seed, number, "inspect"),
        round_number=number,
    )


def _reference_of_loss(config: RunConfig, inputs: Inputs, reference: Path) -> dict[str, Any]:
    """The reference of the loss, and where the scores have it; nothing where it is the policy.

    Args:
        reference: of the round's reward.
    """
    if config.train.reference == "policy":
        return {}
    return {"reference": inputs.reference, "reference_scores": "ref_logp" if reference == inputs.reference else None}


def evaluation_of(run: Run, inputs: Inputs, number: int, policy: Path, reference: Path, previous: Path) -> EvaluateJob:
    """The evaluation of a new policy of round `number` on held-out data.

    Args:
        reference: of the next round's reward.
        previous: the policy that the round started from.
    """
    config = run.config
    metric = config.round_metric
    return EvaluateJob(
        config=config.evaluate,
        generate_config=config.generate,
        score_config=config.score,
        models=config.model,
        policy=policy,
        start=inputs.policy,
        previous=previous,
        previous_samples=run.round_folder(number - 1) / "evaluate" / "samples",
        reference=reference,
        initial_reference=inputs.reference,
        prompts=inputs.eval_prompts,
        pairs=inputs.eval_pairs,
        input_keys=[parquet_key(file) if file else None for file in (inputs.eval_prompts, inputs.eval_pairs)],
        out=run.round_folder(number) / "evaluate",
        shared=run.folder / "evaluate",
        seed=seed_for(config.seed, "evaluate"),
        max_prompt_tokens=config.data.max_prompt_tokens,
        judges=build_judges(config.evaluate.judges, config.model, config.is_world),
        devices=config.devices,
        bad_rows=config.data.bad_rows,
        needed_judge=_needed_judge(metric),
    )


def _needed_judge(metric: str | None) -> str | None:
    """The judge that the metric of the rounds is of; None where it is no judge's."""
    suffix = next((end for end in ("_win_rate", "_score") if metric and metric.endswith(end)), None)
    return None if metric is None or suffix is None else metric.removesuffix(suffix)


def evaluate_round(
    run: Run, inputs: Inputs, number: int, policy: Path, reference: Path, previous: Path
) -> dict[str, Any]:
    """The metrics of round `number`'s new policy on held-out data, and of the user's own benchmark."""
    config = run.config.evaluate
    is_last = number == run.config.rounds.count
    job = evaluation_of(run, inputs, number, policy, reference, previous)
    metrics = dict(run.run_stage(number, job, is_last=is_last).counts)
    if config.command is not None:
        benchmark = BenchmarkJob(
            policy=policy,
            command=tuple(config.command),
            folder=Path(config.command_folder or "."),
            timeout=config.command_timeout,
            out=run.round_folder(number) / "benchmark",
        )
        metrics |= benchmark_metrics(run.run_stage(number, benchmark).counts)
    return metrics
