"""`dice reinforce`: stage 2 of MPO alone, reinforcement learning on the hard prompts of a training set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import Config, Json, Out, Set, StageSeed, stage_config
from cli.output import model_folder, print_result, run_job
from cli.paths import check_table
from dice_py.errors import UsageError

if TYPE_CHECKING:
    from dice_py.config.run import RunConfig
    from dice_py.reinforcement.rewards import RewardSource


def reinforce(
    policy: Annotated[str, typer.Option(help="The policy of stage 1: a model folder, a GGUF file or a hub id.")],
    training_set: Annotated[Path, typer.Option(help="The training set that `dice replay` wrote, with `difficulty`.")],
    out: Out,
    reward_policy: Annotated[str | None, typer.Option(help="π of the implicit reward.")] = None,
    reward_reference: Annotated[str | None, typer.Option(help="π_ref of the implicit reward.")] = None,
    alpha: Annotated[float, typer.Option(min=0.0, help="The length penalty that mining found; 0: none.")] = 0.0,
    beta: Annotated[float | None, typer.Option(help="β of the implicit reward.")] = None,
    seed: StageSeed = 0,
    config: Config = None,
    assign: Set = None,
    as_json: Json = False,
) -> None:
    """Stage 2 of MPO: reinforcement learning on the hard prompts.

    By TRL's GRPO or RLOO trainer (train.mpo), from the policy of stage 1, which is also the reference of the KL
    divergence. The reward is the implicit one, corrected for length as mine.debias and mine.length say, or that of a
    judge (train.mpo.reward). The new policy goes to OUT/model.
    """
    from dice_py.reporting.tracking.session import places_alone
    from dice_py.stages.reinforce import ReinforceJob
    from dice_py.storage.keys import file_digest

    resolved = stage_config(config, assign, beta=beta, train__method="mpo")
    check_table(training_set, "--training-set", ("prompt", "prompt_ids", "source", "difficulty"), "dice replay")
    job = ReinforceJob(
        config=resolved.train,
        generate=resolved.generate,
        models=resolved.model,
        policy=model_folder(policy, resolved.model.policy_revision, "--policy"),
        training_set=training_set,
        training_set_key=file_digest(training_set),
        rewards=_rewards(resolved, reward_policy, reward_reference, alpha),
        out=out,
        seed=seed,
        devices=resolved.devices,
    )
    with places_alone(out):
        result = run_job(job, out, resolved.warnings)
    print_result({"model": str(job.target), **result.counts}, as_json)


def _rewards(config: RunConfig, policy: str | None, reference: str | None, alpha: float) -> RewardSource:
    from dice_py.evaluation.judges.registry import build_judges
    from dice_py.reinforcement.rewards import ImplicitRewards, JudgeRewards, LengthPenalty

    reward = config.train.mpo.reward
    given = [
        name for name, value in (("--reward-policy", policy), ("--reward-reference", reference)) if value is not None
    ]
    if reward == "implicit":
        if policy is None or reference is None:
            raise UsageError(
                "the implicit reward needs --reward-policy and --reward-reference: those that the pairs were scored "
                "with; or name a judge in train.mpo.reward"
            )
        pi, pi_ref = (
            model_folder(name, None, option)
            for name, option in ((policy, "--reward-policy"), (reference, "--reward-reference"))
        )
        penalty = LengthPenalty.of(config.mine, alpha, pi, config.generate.thinking)
        return ImplicitRewards(pi, pi_ref, config.score, config.model, config.beta, penalty)
    if given:
        raise UsageError(f"{given[0]} is for the implicit reward, but train.mpo.reward is {reward}: leave it out")
    judges = build_judges(config.evaluate.judges, config.model, is_world=reward == "oracle")
    return JudgeRewards(next(judge for judge in judges if judge.name == reward))
