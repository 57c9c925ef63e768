"""The check at step 0: before the first step, the policy is the reference, so the DPO loss is ln 2.

If the loss is something else, trainer and scorer do not compute the same log-probabilities: tokens, masks, model or
dtype differ. Training would then start from a wrong reference, so it does not start.

The check is of the log-probabilities of complete responses, and of DPO's loss on their differences, whatever the
method: what a method adds to them is no reason for another tolerance. Where the reference is another model
(train.reference=initial), the training set has the policy's log-probabilities at the start, and they are compared.

In float32 the loss must be ln 2 within 1e-3, and each log-probability the reference's within 0.1 nats. In a 16-bit
dtype rounding moves a response's log-probability by more: by 0.1 nats over 30 tokens of a tiny model, by 0.8 nats over
96 tokens of a real one with 135M weights. How much depends on the model, its layers and the responses, so it is
measured, on the same pairs: the trainer's forward is made a second time, with the output of every linear layer moved at
random by up to half a unit in its last place, as another order of summation would move it. Another batching of the
same rows would not do: where the kernels sum in the same order, it changes no bit.

From the measured spread follow two limits. The log-probabilities may differ from the references by three times the
spread, as a root of the mean square over responses; a completion mask that is shifted by one token exceeds it. And the
loss may differ from ln 2 by what differences of that size, of either sign, make of the mean over the pairs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from dice_py.config.training import TrainConfig
from dice_py.errors import DataError
from dice_py.storage.schemas import SHARED_LOGPS, START_LOGPS

if TYPE_CHECKING:
    import torch

    from dice_py.training.pair_trainer import PairTrainer

_STORED = tuple((name, name.replace("start", "ref")) for name in START_LOGPS)
"""Where the reference is another model, the policy's own log-probabilities are stored too."""
_FLOAT32_TOLERANCE = 0.1
"""Nats. Two float32 sums over thousands of tokens differ by much less; an error in one token exceeds it."""
_LOSS_TOLERANCE = 1e-3
"""Of the loss in float32. In a 16-bit dtype, the spread comes on top."""
_SPREADS = 3.0
"""Allowed differences in spreads. Trainer and scorer were seen to differ by 1.0 to 1.4 spreads."""
_DEVIATIONS = 4.0
"""Standard errors of the mean loss that are allowed."""


class Step0(NamedTuple):
    """The measurement before the first step, the same on every rank.

    Attributes:
        loss: mean DPO loss on the differences from what is stored, without the terms of methods and the SFT term.
        max_abs_difference: largest |log π − stored reference| of a response, in nats.
        rms_difference: root mean square of log π − stored reference over the responses, in nats.
        spread: root mean square over the responses of the difference between two ways of rounding, in nats; 0 in
            float32, where it is not measured.
        pairs: that were measured.
        beta: of the loss.
    """

    loss: float
    max_abs_difference: float
    rms_difference: float = 0.0
    spread: float = 0.0
    pairs: int = 1
    beta: float = 0.0

    def difference_limit(self) -> float:
        """Nats: the largest `rms_difference` that rounding explains. The fewer responses, the less is known of it."""
        return rounding_limit(self.spread, 2 * self.pairs)

    def loss_limit(self) -> float:
        """The largest |loss − ln 2| that rounding explains.

        For margins m = β·(difference of chosen − difference of rejected) of standard deviation s, the loss of a pair is
        ln 2 − m/2 + m²/8 + O(m⁴). The mean of m over n pairs has the standard error s/√n.
        """
        deviation = self.beta * math.sqrt(2) * self.spread * _SPREADS / 2
        return _LOSS_TOLERANCE + _DEVIATIONS * deviation / (2 * math.sqrt(self.pairs)) + deviation**2 / 4


def rounding_limit(spread: float, responses: int) -> float:
    """Nats: the largest root mean square of differences of log-probabilities that rounding explains.

    Args:
        spread: as in `Step0`, of so many responses; the fewer there are, the less is known of it.
    """
    return _FLOAT32_TOLERANCE + _SPREADS * spread * (1 + 2 / math.sqrt(responses))


@contextlib.contextmanager
def rounded_otherwise(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within the block, the outputs of linear layers are moved at random by up to half a unit in the last place.

    Args:
        model: with or without a wrapper of several processes.
        dtype: that the model computes in.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    generators: dict[torch.device, torch.Generator] = {}
    half_unit = torch.finfo(dtype).eps / 2

    def move(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        del module, inputs
        if output.dtype != dtype:  # A head that computes in float32 does not round to `dtype`.
            return output
        device = output.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(0)
        moves = torch.rand(output.shape, generator=generators[device], device=device) * 2 - 1
        return (output.float() * (1 + half_unit * moves)).to(output.dtype)

    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    hooks = [layer.register_forward_hook(move) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def computing_dtype(trainer: Any) -> torch.dtype:
    """The dtype that a trainer of TRL's computes in."""
    import torch

    return torch.bfloat16 if trainer.args.bf16 else torch.float16 if trainer.args.fp16 else torch.float32


def measure_step0(trainer: PairTrainer, pairs: int) -> Step0:
    """Measures on the first `pairs` rows of the training set, without gradients.

    It uses the trainer's own rows, packed or padded, and its device, autocast, wrapped model and head. The pairs are
    distributed over the ranks. Every rank makes the same number of forwards, since with sharded weights each forward is
    collective. In a 16-bit dtype each batch is run twice (`rounded_otherwise`).
    """
    import torch

    accelerator, dtype = trainer.accelerator, computing_dtype(trainer)
    count = min(pairs, len(trainer.train_dataset))
    own = [trainer.train_dataset[row] for row in range(accelerator.process_index, count, accelerator.num_processes)]
    forwards = trainer.split(own)
    loss = squares = spread_squares = max_abs_diff = 0.0
    for number in range(trainer.count_on_all_ranks(len(forwards))):
        # A rank without further pairs makes its forward on the first row, and ignores the result.
        batch = trainer.inputs_of(forwards[number] if number < len(forwards) else [trainer.train_dataset[0]])
        with torch.no_grad():
            token_logps = trainer.token_logps(trainer.model_wrapped, batch).double()
            logps = token_logps.sum(dim=1)
            otherwise = logps
            if dtype != torch.float32:
                with rounded_otherwise(trainer.model_wrapped, dtype):
                    otherwise = trainer.token_logps(trainer.model_wrapped, batch).double().sum(dim=1)
        if number < len(forwards):
            differences = logps - torch.cat([batch.get(name, batch[other]) for name, other in _STORED]).double()
            of_shared = _shared_differences(token_logps, batch)
            of_chosen, of_rejected = differences.chunk(2)
            loss += torch.nn.functional.softplus(-trainer.beta * (of_chosen - of_rejected)).sum().item()
            squares += differences.square().sum().item()
            spread_squares += (logps - otherwise).square().sum().item()
            max_abs_diff = max(max_abs_diff, differences.abs().max().item(), of_shared.abs().max().item())
    own_sums = torch.tensor(
        [[loss, squares, spread_squares, len(own), max_abs_diff]], dtype=torch.float64, device=accelerator.device
    )
    all_sums = accelerator.gather(own_sums)
    loss, squares, spread_squares, number, _ = all_sums.sum(dim=0).tolist()
    return Step0(
        loss=loss / number,
        max_abs_difference=all_sums[:, 4].max().item(),
        rms_difference=math.sqrt(squares / (2 * number)),
        spread=math.sqrt(spread_squares / (2 * number)),
        pairs=int(number),
        beta=trainer.beta,
    )


def _shared_differences(token_logps: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(2 × pairs,) differences in nats of the sums over the shared length from the stored ones; zeros if none are.

    Those of another reference than the policy cannot be compared.
    """
    import torch

    if SHARED_LOGPS[0] not in batch or START_LOGPS[0] in batch:
        return token_logps.new_zeros(len(token_logps))
    of_response = batch["completion_mask"][:, 1:]
    number = of_response.cumsum(dim=1)
    chosen, rejected = of_response.sum(dim=1).chunk(2)
    shared = chosen.minimum(rejected).repeat(2)
    sums = token_logps.where((of_response == 1) & (number <= shared[:, None]), 0.0).sum(dim=1)
    return torch.cat([chunk - batch[name] for chunk, name in zip(sums.chunk(2), SHARED_LOGPS, strict=True)])


def check_step0(measured: Step0, config: TrainConfig, *, float32: bool) -> None:
    """Checks the measurement against `train.step0_tolerance`.

    Args:
        float32: the forward computes in float32. Then each log-probability is checked too. In a 16-bit dtype with the
            tolerance "auto", their root mean square is.

    Raises:
        DataError: the policy is not the reference.
    """
    loss, difference = measured.loss, measured.max_abs_difference
    auto = config.step0_tolerance == "auto"
    tolerance = measured.loss_limit() if config.step0_tolerance == "auto" else config.step0_tolerance
    if not abs(loss - math.log(2)) <= tolerance:
        raise DataError(
            f"the DPO loss at step 0 is {loss:.5f}, not ln 2 = {math.log(2):.5f} (allowed ±{tolerance:.3g}; "
            f"a response's log-probability differs by up to {difference:.4g}). Trainer and scorer do not compute the "
            "same log-probabilities: tokens, masks, model or dtype differ. Score the training set with this policy "
            "(dice score). If only the rounding of a 16-bit dtype is the cause, raise train.step0_pairs or set "
            "train.step0_tolerance to a number"
        )
    # An offset that chosen and rejected share leaves the loss at ln 2. Rounding does not explain it.
    if float32 and not difference <= _FLOAT32_TOLERANCE:
        raise DataError(
            f"at step 0 a response's log-probability differs by {difference:.4g} from the reference in the training "
            f"set (allowed in float32: {_FLOAT32_TOLERANCE:g}), though the loss is ln 2. Trainer and scorer do not "
            "compute the same log-probabilities: tokens, masks or model differ. Score the training set with this "
            "policy (dice score)"
        )
    if not float32 and auto and not measured.rms_difference <= measured.difference_limit():
        raise DataError(
            f"at step 0 the log-probabilities of responses differ by {measured.rms_difference:.4g} nats (root mean "
            f"square) from the references in the training set, more than rounding explains (allowed: "
            f"{measured.difference_limit():.4g}; two ways of rounding differ by {measured.spread:.4g}). Trainer and "
            "scorer do not compute the same log-probabilities: tokens, masks or model differ. Score the training set "
            "with this policy (dice score). To check only the loss, set train.step0_tolerance to a number"
        )
