"""The sizes and settings of the sentiment task on SmolLM2-135M-Instruct, and the config that all of its arms share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from dice_py.config.loading import resolve
from dice_py.config.run import RunConfig
from dice_py.errors import UsageError
from dice_py.evidence.annotator import Annotator
from dice_py.evidence.oracle import CALL

ARMS = ("neither", "length", "replay", "both")
SEED = 3
"""Of the prompts, the annotator and the runs. The settings were chosen on seeds below it."""
ANNOTATOR = Annotator()
SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0}
"""Of the policy's own distribution, so that KL is the policy's."""


@dataclass(frozen=True)
class Sizes:
    """How much is sampled."""

    offline_prompts: int = 200
    offline_samples: int = 4
    """Answers to each; two of them make a pair."""
    rounds: int = 2
    round_prompts: int = 100
    """Of each round, fresh ones."""
    round_samples: int = 6
    evaluation_prompts: int = 100
    evaluation_samples: int = 4
    max_new_tokens: int = 128

    def as_json(self) -> dict[str, int]:
        """The sizes, by name."""
        return asdict(self)


FULL = Sizes()
"""Hours on two cores."""
SMALL = Sizes(
    offline_prompts=20,
    offline_samples=2,
    rounds=1,
    round_prompts=8,
    round_samples=3,
    evaluation_prompts=10,
    evaluation_samples=1,
    max_new_tokens=64,
)
"""Minutes: whether everything works. Its figures mean nothing."""


_FIXED = (
    "seed",
    "rounds.count",
    "model.sft",
    "model.policy",
    "model.reference",
    "data.prompts",
    "data.replay",
    "data.eval_prompts",
    "data.prompts_per_round",
    "generate.samples",
    "generate.max_new_tokens",
    "evaluate.prompts",
    "evaluate.samples",
    "evaluate.judges.function",
)
"""What the data is made for, and what the results call by its size."""


@dataclass(frozen=True)
class DataFiles:
    """The files of a task's prompts and pairs."""

    rounds: Path
    pairs: Path
    evaluation: Path


def task_config(
    model: str, files: DataFiles, sizes: Sizes, seed: int = SEED, assignments: Sequence[str] = ()
) -> RunConfig:
    """The config that all arms share.

    Args:
        model: the SFT model: a GGUF file, a folder or a Hugging Face id.
        seed: of the runs, the prompts and the annotator.
        assignments: changed settings, "section.key=value".

    Raises:
        UsageError: a setting is unknown, or out of its range, or a part of the task.
    """
    settings: dict[str, Any] = {
        "rounds": sizes.rounds,
        "seed": seed,
        "model": {"sft": model},
        "devices": {"cpu_processes": 2},
        "data": {
            "prompts": str(files.rounds),
            "replay": str(files.pairs),
            "eval_prompts": str(files.evaluation),
            "prompts_per_round": sizes.round_prompts,
        },
        "generate": {
            "engine": "transformers",
            "samples": sizes.round_samples,
            "max_new_tokens": sizes.max_new_tokens,
            "shard_prompts": 20,
            **SAMPLING,
        },
        "round0": {"learning_rate": 5e-6},  # more would make π_1 write until it is cut off
        "train": {
            "learning_rate": 1e-5,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,
            "batch_size": 8,
            "per_device_train_batch_size": 4,
            "save_steps": None,  # a checkpoint is larger than three models, and a training takes minutes
            "logging_steps": 1,
        },
        "evaluate": {
            "prompts": sizes.evaluation_prompts,
            "samples": sizes.evaluation_samples,
            "pairs": 0,  # the oracle judges the rewards, on the policies' own answers
            "kl_to_reference": True,
            "judges": {"function": {"call": CALL}},
        },
        "report": {"pairs": 20},  # to read; the credit of their tokens takes a pass of two models
    }
    config = resolve(assignments=assignments, overrides=settings)
    task = resolve(overrides=settings)
    for name in _FIXED:
        if attrgetter(name)(config) != attrgetter(name)(task):
            raise UsageError(
                f"{name} is a part of the task, and its results name it: leave it out of --set; the model is --model, "
                "and the seed --seed"
            )
    return config
