"""The table of stages: the job of each, its process, and the remedy when memory runs out."""

from __future__ import annotations

from dataclasses import dataclass

from dice_py.stages.audit import AuditJob
from dice_py.stages.benchmark import BenchmarkJob
from dice_py.stages.choose_alpha import ChooseAlphaJob
from dice_py.stages.convert import ConvertJob
from dice_py.stages.evaluate import EvaluateJob
from dice_py.stages.extrapolate import ExtrapolateJob
from dice_py.stages.generate import GenerateJob
from dice_py.stages.inspect import InspectJob
from dice_py.stages.inspect_file import InspectFileJob
from dice_py.stages.job import Job
from dice_py.stages.judge import JudgeJob
from dice_py.stages.mine import MineJob
from dice_py.stages.preflight import PreflightJob
from dice_py.stages.reinforce import ReinforceJob
from dice_py.stages.replay import ReplayJob
from dice_py.stages.score import ScoreJob
from dice_py.stages.train import TrainJob
from dice_py.stages.world import WorldJob


@dataclass(frozen=True)
class Stage:
    """One stage."""

    name: str
    job: type[Job]
    imports: tuple[str, ...]
    """Modules that its process imports while it waits for the job. Empty: its process is not started ahead."""
    remedy: str
    """End of the error sentence when memory runs out. Empty: the stage runs in the process of the run."""
    following: str | None
    """The stage whose process is started while this one works; None: no process is started."""
    may_fail: bool = False
    """Whether a run goes on when the stage fails: no other stage reads what it makes."""
    stops_when_asked: bool = False
    """Whether it stops by itself, at a place from which it goes on, when it is asked to (compute/stopping.py)."""

    @property
    def has_process(self) -> bool:
        """True if the stage runs in a process of its own."""
        return bool(self.remedy)


# The same for the three, which one process does in turn: it has the libraries, and often the model that comes next.
_SCORING = ("dice_py.stages.score", "dice_py.stages.replay", "dice_py.stages.inspect", "dice_py.scoring.scorer")
_EVALUATION = ("dice_py.stages.evaluate", "dice_py.generation.engines.transformers", "dice_py.scoring.scorer")

_TABLE = (
    Stage("world", WorldJob, (), "close other programs", None),
    Stage("extrapolation", ExtrapolateJob, (), "close other programs", None),
    Stage("convert", ConvertJob, (), "close other programs", None),
    Stage("preflight", PreflightJob, (), "close other programs", "generate"),
    Stage(
        "generate",
        GenerateJob,
        ("dice_py.stages.generate", "dice_py.generation.engines.transformers"),
        "lower generate.token_budget or generate.vllm.gpu_memory_utilization",
        "score",
    ),
    Stage("score", ScoreJob, _SCORING, "lower score.token_budget", None),
    Stage("mine", MineJob, (), "", None),
    Stage("replay", ReplayJob, _SCORING, "lower score.token_budget", "train"),
    Stage(
        "inspect",
        InspectJob,
        _SCORING,
        "lower score.token_budget, or set report.token_credit=false",
        "train",
        may_fail=True,
    ),
    Stage(
        "train",
        TrainJob,
        ("dice_py.stages.train", "datasets", "trl.trainer.dpo_trainer"),
        "lower train.packed_tokens (on padded rows: train.per_device_train_batch_size), set "
        "train.gradient_checkpointing=true or train.lora.r=16, or add GPUs",
        "evaluate",
        stops_when_asked=True,
    ),
    Stage(
        "reinforce",
        ReinforceJob,
        ("dice_py.stages.reinforce", "dice_py.reinforcement.trainer", "dice_py.scoring.scorer", "datasets"),
        "lower train.mpo.per_device_train_batch_size, generate.token_budget or score.token_budget, set "
        "train.gradient_checkpointing=true or train.lora.r=16, or add GPUs",
        "evaluate",
        stops_when_asked=True,
    ),
    Stage("extrapolate", ChooseAlphaJob, _EVALUATION, "lower generate.token_budget and score.token_budget", "evaluate"),
    Stage(
        "judge",
        JudgeJob,
        (),
        "lower evaluate.judges.implicit.token_budget or evaluate.judges.reward_model.token_budget",
        None,
    ),
    Stage("evaluate", EvaluateJob, _EVALUATION, "lower generate.token_budget and score.token_budget", "generate"),
    Stage("benchmark", BenchmarkJob, (), "", None),
    Stage("audit", AuditJob, (), "lower score.token_budget", None),
    Stage("inspect file", InspectFileJob, (), "lower score.token_budget, or give fewer --pairs", None),
)
REGISTRY = {stage.name: stage for stage in _TABLE}

ROUND_STAGES = ("generate", "score", "mine", "replay", "inspect", "train", "evaluate")
"""The stages of a round, in order of work.

With train.method=mpo, "reinforce" comes after "train". Where a run extrapolates, "extrapolate" comes before "evaluate";
with evaluate.command, "benchmark" comes last.
"""

ROUND_ZERO_STAGES = ("replay", "train")
"""The stages of round 0, which makes π_1 from the SFT model."""


def stage_of(job: Job) -> Stage:
    """The stage that a job is of."""
    return next(stage for stage in _TABLE if isinstance(job, stage.job))
