"""The stages of a round: what each imports, what to do when memory runs out, what comes next."""

from __future__ import annotations

STAGES = ("generate", "score", "mine", "replay", "train", "evaluate")

REMEDIES = {
    "world": "close other programs",
    "check": "close other programs",
    "generate": "lower generate.token_budget or generate.vllm.gpu_memory_utilization",
    "score": "lower score.token_budget",
    "replay": "lower score.token_budget",
    "train": "lower train.per_device_train_batch_size, set train.gradient_checkpointing=true or train.lora.r=16, "
    "or add GPUs",
    "evaluate": "lower generate.token_budget and score.token_budget",
}


# What a stage's process imports, so that one started ahead has done it; and the stage that follows.
IMPORTS = {
    "generate": ("dice_py.stages.generate", "dice_py.generation.engines.transformers"),
    "score": ("dice_py.stages.score", "dice_py.scoring.scorer"),
    "replay": ("dice_py.stages.replay", "dice_py.scoring.scorer"),
    "train": ("dice_py.stages.train", "datasets", "trl.trainer.dpo_trainer"),
    "evaluate": ("dice_py.stages.evaluate", "dice_py.generation.engines.transformers", "dice_py.scoring.scorer"),
}
FOLLOWING = {"check": "generate", "generate": "score", "score": "replay", "replay": "train", "train": "evaluate"}
