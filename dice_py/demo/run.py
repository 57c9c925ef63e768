"""The demo: the complete method on SmolLM2-135M-Instruct, with prompts and pairs that ship with the project.

SmolLM2 is the SFT model. Round 0 makes π_1 from it by DPO on the offline pairs, round 1 makes π_2 with π_1's own
reward. It is a run like any other, in a run folder: a second call keeps what is complete.
"""

from __future__ import annotations

from typing import Any

from dice_py.config.loading import resolve
from dice_py.config.run import RunConfig
from dice_py.demo.data import HELD_OUT_PAIRS, HELD_OUT_PROMPTS, PAIRS, ROUND_PROMPTS, SAMPLING

_SETTINGS: dict[str, Any] = {
    "rounds": 1,
    "generate": {"engine": "transformers", "samples": 8, "shard_prompts": 25, **SAMPLING},
    "replay": {"gamma": 0.3},
    "mine": {"debias": "bucket"},  # π_1 prefers short answers, which a penalty on length would not mend
    "round0": {"num_train_epochs": 2.0},
    "train": {
        "learning_rate": 1e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "batch_size": 16,
        "per_device_train_batch_size": 4,
        "save_steps": None,  # a checkpoint is larger than three models, and writing it takes longer than some steps
        "logging_steps": 1,
    },
    "evaluate": {"samples": 4},
}
"""Where the demo differs from the defaults."""


def demo_config(model: str) -> RunConfig:
    """The config of the demo's run.

    Args:
        model: a GGUF file or a model folder of SmolLM2-135M-Instruct.
    """
    data = {
        "prompts": str(ROUND_PROMPTS),
        "replay": str(PAIRS),
        "eval_prompts": str(HELD_OUT_PROMPTS),
        "eval_pairs": str(HELD_OUT_PAIRS),
    }
    return resolve(overrides={**_SETTINGS, "model": {"sft": model}, "data": data})
