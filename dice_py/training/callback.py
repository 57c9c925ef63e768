"""What a stage does beside its trainer: progress, the log, stamps of complete checkpoints, and a stop when asked to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dice_py.errors import StoppedTrainingError
from dice_py.events import Report
from dice_py.storage.files import write_json
from dice_py.training.checkpoints import PACKING_FILE, stamp_checkpoint
from dice_py.training.log import TrainingLog
from dice_py.training.stopping import StopVote


@dataclass(frozen=True)
class StageFiles:
    """What a training writes beside its model.

    Attributes:
        out: the stage's folder, for the log.
        stamp: of its checkpoints (`checkpoint_stamp`).
        stage: its name in events.
        packing: what a checkpoint keeps of the packed rows so far; None: nothing.
    """

    out: Path
    stamp: dict[str, Any]
    stage: str
    packing: Callable[[], Any] | None = None


def stage_callback(
    trainer: Any, files: StageFiles, report: Report, *, at_start: Callable[[], None] = lambda: None
) -> Any:
    """A callback of transformers' Trainer.

    Args:
        trainer: a trainer of TRL's.
        at_start: is called before the first step, also of a resumed training.
    """
    from transformers import TrainerCallback

    class StageCallback(TrainerCallback):  # type: ignore[misc]
        is_asked_to_stop = StopVote()
        log = TrainingLog(files.out, files.stamp["key"], report)

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                self.log.begin(state.log_history)
            if self.is_asked_to_stop():
                raise StoppedTrainingError(f"interrupted before step {state.global_step + 1} of the training")
            at_start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            report("progress", stage=files.stage, done=state.global_step, total=state.max_steps, unit="steps")
            if state.global_step < state.max_steps and self.is_asked_to_stop():
                control.should_save = control.should_training_stop = True
            # The loss is logged as the mean since the last entry. With one at each checkpoint and at the end, a resumed
            # training logs the same means as one that was not stopped, and every training has a final loss.
            control.should_log |= control.should_save or state.global_step >= state.max_steps

        def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                self.log.add(state.log_history[-1])

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            trainer.accelerator.wait_for_everyone()  # Every rank has written its shard.
            if state.is_world_process_zero:
                checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                if files.packing is not None:
                    write_json(checkpoint / PACKING_FILE, files.packing())
                stamp_checkpoint(checkpoint, files.stamp)

    return StageCallback()


def check_complete(trainer: Any) -> None:
    """Raises StoppedTrainingError, on every rank, after a training that was asked to stop."""
    done, steps = trainer.state.global_step, trainer.state.max_steps
    if done < steps:
        trainer.accelerator.wait_for_everyone()  # The first rank that ends ends the others: the stamp is written now.
        raise StoppedTrainingError(f"interrupted; the training has written its checkpoint of step {done} of {steps}")
