"""The check at step 0: before the first step, the policy is the reference, so the DPO loss is ln 2.

If the loss is something else, trainer and scorer do not compute the same log-probabilities: tokens, masks, model or
dtype differ. Training would then start from a wrong reference, so it does not start.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from dice_py.config.training import TrainConfig
from dice_py.errors import DataError

if TYPE_CHECKING:
    from dice_py.training.pair_trainer import PairTrainer

_FLOAT32_TOLERANCE = 0.1
"""Nats. Two float32 sums over thousands of tokens differ by much less; an error in one token exceeds it."""


class Step0(NamedTuple):
    """The measurement before the first step, the same on every rank.

    Attributes:
        loss: mean DPO loss, without the SFT term.
        max_abs_difference: largest |log π − stored reference| of a response, in nats.
    """

    loss: float
    max_abs_difference: float


def measure_step0(trainer: PairTrainer, pairs: int) -> Step0:
    """Measures on the first `pairs` rows of the training set, without gradients.

    It uses the trainer's own rows, packed or padded, and its device, autocast, wrapped model and head. The pairs are
    distributed over the ranks. Every rank makes the same number of forwards, since with sharded weights each forward is
    collective.
    """
    import torch

    accelerator = trainer.accelerator
    count = min(pairs, len(trainer.train_dataset))
    own = [trainer.train_dataset[row] for row in range(accelerator.process_index, count, accelerator.num_processes)]
    forwards = trainer.split(own)
    losses: list[float] = []
    max_abs_diff = 0.0
    for number in range(trainer.count_on_all_ranks(len(forwards))):
        # A rank without further pairs makes its forward on the first row, and ignores the result.
        batch = trainer.inputs_of(forwards[number] if number < len(forwards) else [trainer.train_dataset[0]])
        reference = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
        with torch.no_grad():
            logps = trainer.token_logps(trainer.model_wrapped, batch).sum(dim=1)
        if number < len(forwards):
            ratio_chosen, ratio_rejected = (logps - reference).float().chunk(2)
            losses += torch.nn.functional.softplus(-trainer.beta * (ratio_chosen - ratio_rejected)).tolist()
            max_abs_diff = max(max_abs_diff, (logps - reference).abs().max().item())
    own_sums = torch.tensor([[sum(losses), len(losses), max_abs_diff]], dtype=torch.float64, device=accelerator.device)
    all_sums = accelerator.gather(own_sums)
    total, number, _ = all_sums.sum(dim=0).tolist()
    return Step0(total / number, all_sums[:, 2].max().item())


def check_step0(measured: Step0, config: TrainConfig, *, float32: bool) -> None:
    """Checks the measurement against `train.step0_tolerance`.

    Args:
        float32: the forward computes in float32. Then the log-probabilities themselves are checked too.

    Raises:
        DataError: the policy is not the reference.
    """
    loss, difference = measured
    if not abs(loss - math.log(2)) <= config.step0_tolerance:
        raise DataError(
            f"the DPO loss at step 0 is {loss:.5f}, not ln 2 = {math.log(2):.5f} (allowed ±{config.step0_tolerance:g}; "
            f"a response's log-probability differs by up to {difference:.4g}). Trainer and scorer do not compute the "
            "same log-probabilities: tokens, masks, model or dtype differ. Score the training set with this policy "
            "(dice score). If only the rounding of a 16-bit dtype is the cause, raise train.step0_pairs or "
            "train.step0_tolerance"
        )
    # An offset that chosen and rejected share leaves the loss at ln 2. In float32, rounding does not explain it.
    if float32 and not difference <= _FLOAT32_TOLERANCE:
        raise DataError(
            f"at step 0 a response's log-probability differs by {difference:.4g} from the reference in the training "
            f"set (allowed in float32: {_FLOAT32_TOLERANCE:g}), though the loss is ln 2. Trainer and scorer do not "
            "compute the same log-probabilities: tokens, masks or model differ. Score the training set with this "
            "policy (dice score)"
        )
