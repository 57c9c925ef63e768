"""A synthetic world: the default models and data of the loop, where its files are, and the recipe behind its key.

A world is made from nothing but a seed and cached: a tokenizer, a tiny Llama trained from scratch (SFT), offline
preference pairs of the biased annotator, DPO on them (the policy that a run starts from), prompts for the rounds, and
held-out prompts and pairs. stages/world.py makes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dice_py.config.stages import WorldConfig
from dice_py.config.training import TrainConfig
from dice_py.storage.cache import cache_folder
from dice_py.storage.files import read_json
from dice_py.storage.integrity import damaged_in, read_stamp
from dice_py.storage.keys import digest, versions
from dice_py.synthetic.task import (
    CONFUSED,
    FILLERS,
    FREE_FILLERS,
    LETTERS,
    OPERATIONS,
    RANDOM,
    RIGHT,
    WORD_LENGTH,
    WRONG,
)
from dice_py.synthetic.tokenizer import TEMPLATE

RECIPE = 3  # to be increased when a change of code makes another world from the same config

LLAMA: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
"""Its width, and with it that of its feed-forward layers, is the config's."""
SFT: dict[str, Any] = {"batch": 128, "learning_rate": 2e-3, "adam_beta2": 0.98}
DPO = TrainConfig(
    lr_scheduler_type="cosine",
    warmup_steps=0,
    batch_size=32,
    per_device_train_batch_size=32,
    sft_weight=1.0,
    save_steps=None,
)
BETA = 1.0
WORLD_STAMP = "world.json"
"""Written last: it has the key, statistics and digests of all files."""


@dataclass(frozen=True)
class World:
    """The files of a world."""

    folder: Path

    @property
    def policy(self) -> Path:
        """π_1: the SFT model after DPO on the offline pairs."""
        return self.folder / "policy" / "model"

    @property
    def reference(self) -> Path:
        """π_ref of round 1: the SFT model."""
        return self.folder / "sft"

    @property
    def prompts(self) -> Path:
        """The prompts of the rounds (schema PROMPTS)."""
        return self.folder / "prompts.parquet"

    @property
    def offline_pairs(self) -> Path:
        """Offline pairs labeled by the annotator, as messages."""
        return self.folder / "offline_pairs.parquet"

    @property
    def eval_prompts(self) -> Path:
        """Held-out prompts (schema PROMPTS)."""
        return self.folder / "eval_prompts.parquet"

    @property
    def eval_pairs(self) -> Path:
        """Held-out pairs labeled by the oracle, as messages."""
        return self.folder / "eval_pairs.parquet"

    def info(self) -> dict[str, Any]:
        """Its counts and statistics: the contents of `world.json`, without the files."""
        return {name: value for name, value in read_json(self.folder / WORLD_STAMP).items() if name != "files"}

    def is_intact(self, key: str) -> bool:
        """Whether it is complete under its key, every file as it was written. It reads all files."""
        stamp = read_stamp(self.folder, WORLD_STAMP)
        return stamp is not None and stamp.get("key") == key and not damaged_in(self.folder, WORLD_STAMP)


def world_key(config: WorldConfig) -> str:
    """The key of a world: a hash of its config, the recipe, and the versions of the libraries that train it."""
    recipe = [
        LETTERS,
        WORD_LENGTH,
        FILLERS,
        FREE_FILLERS,
        OPERATIONS,
        CONFUSED,
        [RIGHT, RANDOM, *WRONG],
        TEMPLATE,
        SFT,
        DPO.model_dump(),
        LLAMA,
        RECIPE,
        "with digests",
    ]
    return digest("world", config.model_dump(), recipe, versions("torch", "transformers", "trl"))


def llama(config: WorldConfig) -> dict[str, Any]:
    """The settings of transformers' LlamaConfig that are not the tokenizer's."""
    return LLAMA | {"hidden_size": config.width, "intermediate_size": config.width * 11 // 4}


def dpo(config: WorldConfig) -> TrainConfig:
    """The settings of the policy's DPO training."""
    update = {"learning_rate": config.dpo_learning_rate, "num_train_epochs": config.dpo_epochs}
    return DPO.model_copy(update=update)


def find_world(config: WorldConfig) -> World | None:
    """The world of this config if the cache has it complete, every file as it was written, else None."""
    key = world_key(config)
    world = World(cache_folder() / "world" / key)
    return world if world.is_intact(key) else None
