"""Times what an optimizer step costs beside its forward and backward passes: clipping and the update of the weights.

These seconds do not depend on the step's tokens, so that `dice plan` can measure smaller steps than a run's.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from dice_py.events import Report

if TYPE_CHECKING:
    from dice_py.training.pair_trainer import PairTrainer


def update_timer(trainer: PairTrainer, report: Report) -> Any:
    """A callback that reports `update` with the `seconds` from a step's last backward pass to the step's end.

    It also reports `checkpoint` with the `seconds` from there until a checkpoint is complete. It waits for the device
    each time, which a training that is not measured should not do.
    """
    from transformers import TrainerCallback

    began = ended = 0.0
    original = trainer.training_step

    def now() -> float:
        if trainer.accelerator.device.type == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.monotonic()

    def training_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal began
        loss = original(*args, **kwargs)
        began = now()
        return loss

    class UpdateTimer(TrainerCallback):  # type: ignore[misc]
        """Reports at the end of each optimizer step, and of each checkpoint."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            nonlocal ended
            ended = now()
            report("update", stage="train", seconds=ended - began)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            report("checkpoint", stage="train", seconds=now() - ended)

    trainer.training_step = training_step  # type: ignore[method-assign]
    return UpdateTimer()
