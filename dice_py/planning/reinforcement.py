"""The estimate of stage 2 of train.method=mpo: its sampling, rewards and updates, from the costs of other stages.

None of its own is measured: a step samples as the generate stage does, scores as the score stage does, and updates as
the train stage does, on rows that are padded and do not share their prompts. What padding adds is not known.
"""

from __future__ import annotations

from typing import Any, Protocol

from dice_py.config.run import RunConfig
from dice_py.config.training import TrainConfig
from dice_py.models.memory import checkpoint_bytes, score_memory
from dice_py.models.sizes import ModelSize
from dice_py.planning.counts import Data, RoundCounts
from dice_py.planning.decoding import draw_lengths
from dice_py.planning.estimate import Estimate
from dice_py.planning.machine import Machine
from dice_py.runs.measured_costs import StageCosts


class Costing(Protocol):
    """What is known of the other stages (planning/costs.py)."""

    config: RunConfig
    costs: StageCosts
    machine: Machine
    data: Data
    policy: ModelSize
    reference: ModelSize

    def decoding(self, lengths: list[int], prompt_tokens: float) -> float:
        """Seconds to sample responses."""
        ...

    def scoring(self, tokens: float, responses: float) -> float:
        """Seconds of a forward of one model."""
        ...

    def training_memory(self, train: TrainConfig) -> dict[str, Any]:
        """The fields of an estimate that are about the memory of training."""
        ...


def reinforce(estimator: Costing, counts: RoundCounts) -> Estimate:
    """Stage 2 of a round; nothing where no prompt is hard, or train.mpo.steps is 0."""
    config, costs, machine, policy = estimator.config, estimator.costs, estimator.machine, estimator.policy
    mpo = config.train.mpo
    hard_pairs = counts.hard_prompts * config.most_pairs_per_prompt()
    steps = mpo.steps_for(hard_pairs, config.train.num_train_epochs) if counts.hard_prompts else 0
    train = config.train.of_reinforcement(steps)
    if not steps:
        return Estimate(memory=machine.base_memory, counts={"steps": 0, "hard_prompts": counts.hard_prompts})
    lengths = draw_lengths(estimator.data.lengths, mpo.batch_size)
    mean_prompt = counts.prompt_tokens / max(1, counts.prompts)
    asked, answered = mean_prompt * mpo.prompts_per_step, sum(lengths)
    shared = asked + answered  # the tokens of a step where a prompt is computed once
    unshared = mean_prompt * mpo.batch_size + answered
    implicit = mpo.reward == "implicit"
    step = estimator.decoding(lengths, asked)
    step += 2 * estimator.scoring(shared, mpo.batch_size) * implicit
    step += estimator.scoring(unshared, mpo.batch_size) * (mpo.kl_beta > 0)
    step += costs.train.per_token * unshared + costs.train.per_update
    saves = 0 if train.save_steps is None else steps // train.save_steps + (steps % train.save_steps > 0)
    memory = estimator.training_memory(train)
    further = score_memory([policy, estimator.reference], config, machine.dtype, machine.cuda) * implicit
    further += policy.stored_bytes * (1 + (mpo.kl_beta > 0 and train.lora is None))  # the sampler, and π_ref of the KL
    memory["memory"] += further
    memory["least_memory"] += further
    return Estimate(
        work=costs.train.fixed
        + costs.generate.warm_up
        + costs.score.warm_up * implicit
        + step * steps
        + costs.train.save * saves,
        load=costs.train.load + costs.generate.load + 2 * costs.score.load * implicit,
        tokens=round((shared + unshared) * steps),
        disk=policy.stored_bytes,
        transient=(costs.train.checkpoint_bytes or checkpoint_bytes(policy, train)) * min(saves, 3),
        **memory,
        devices=machine.processes if machine.cuda else 0,
        counts={"steps": steps, "hard_prompts": counts.hard_prompts, "responses": mpo.batch_size * steps},
    )
