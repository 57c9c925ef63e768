"""The extrapolation at the end of a round, where `extrapolate.alphas` asks for one: which policy it ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from dice_py.errors import UsageError
from dice_py.runs.folder import Run, round_name
from dice_py.runs.inputs import Inputs
from dice_py.stages.choose_alpha import ChooseAlphaJob
from dice_py.stages.evaluate import EvaluateJob


class ChosenPolicy(NamedTuple):
    """The new policy of a round."""

    policy: Path
    metrics: dict[str, Any]
    """`extrapolation_alpha`, for the round's metrics; empty where nothing was extrapolated."""


def check_held_out(run: Run, inputs: Inputs) -> None:
    """Checks, before the first round, that the run has the held-out data by which α is picked.

    Raises:
        UsageError: it has none of the pairs or of the prompts.
    """
    config = run.config.extrapolate
    if not config.tried:
        return
    needs_prompts = config.metric == "win_rate" or config.max_length_growth is not None
    lacking = [
        name
        for name, file, is_needed in (
            ("data.eval_pairs", inputs.eval_pairs, config.metric == "accuracy"),
            ("data.eval_prompts", inputs.eval_prompts, needs_prompts),
        )
        if is_needed and file is None
    ]
    if lacking:
        raise UsageError(
            f"extrapolate.alphas is set, but the run has no held-out data to pick one by: name a file in {lacking[0]} "
            "(the run's own data is too small to hold some of it out), or leave out extrapolate.alphas"
        )


def choose_policy(run: Run, number: int, start: Path, evaluation: EvaluateJob) -> ChosenPolicy:
    """The trained policy of round `number`, or the extrapolation of its training that is best on held-out data.

    Args:
        start: the policy that the round started from.
        evaluation: of the trained policy.
    """
    config = run.config.extrapolate
    if not config.tried:
        return ChosenPolicy(evaluation.policy, {})
    job = ChooseAlphaJob(config, start, evaluation, run.folder / round_name(number) / "extrapolate")
    result = run.run_stage(number, job)
    models = [file for file, _ in result.files if file.suffix != ".json"]
    policy = models[0] if models else evaluation.policy
    return ChosenPolicy(policy, {"extrapolation_alpha": result.counts["alpha"]})
