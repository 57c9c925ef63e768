"""The files of a synthetic world, and where it is cached."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dice_py.config.stages import WorldConfig
from dice_py.config.training import TrainConfig
from dice_py.storage.cache import cache_folder
from dice_py.storage.files import read_json
from dice_py.storage.keys import digest, versions
from dice_py.synthetic.task import CONFUSED, FILLERS, FREE_FILLERS, LETTERS, OPERATIONS, WORD
from dice_py.synthetic.tokenizer import TEMPLATE


@dataclass(frozen=True)
class World:
    """A made world's files."""

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
        """Prompts for the rounds (schema PROMPTS)."""
        return self.folder / "prompts.parquet"

    @property
    def offline_pairs(self) -> Path:
        """The annotator's pairs as messages."""
        return self.folder / "offline_pairs.parquet"

    @property
    def eval_prompts(self) -> Path:
        """Held-out prompts."""
        return self.folder / "eval_prompts.parquet"

    @property
    def eval_pairs(self) -> Path:
        """Held-out pairs labelled by the oracle."""
        return self.folder / "eval_pairs.parquet"

    def info(self) -> dict[str, Any]:
        """What was made and measured: `world.json`."""
        return dict(read_json(self.folder / "world.json"))


def world_key(config: WorldConfig) -> str:
    """The key of a world: its config, the recipe, and what trains it."""
    recipe = [
        LETTERS,
        WORD,
        FILLERS,
        FREE_FILLERS,
        OPERATIONS,
        CONFUSED,
        TEMPLATE,
        SFT,
        DPO.model_dump(),
        LLAMA,
        RECIPE,
    ]
    return digest("world", config.model_dump(), recipe, versions("torch", "transformers", "trl"))


RECIPE = 2  # counts up when the code above makes another world from the same config

LLAMA: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
SFT: dict[str, Any] = {"batch": 128, "learning_rate": 2e-3, "adam_beta2": 0.98}
DPO = TrainConfig(
    learning_rate=3e-4,
    lr_scheduler_type="cosine",
    num_train_epochs=2.0,
    warmup_steps=0,
    batch_size=32,
    per_device_train_batch_size=32,
    sft_weight=1.0,
    save_steps=None,
)
BETA = 1.0


def find_world(config: WorldConfig) -> World | None:
    """The world of this config if it is in the cache, whole."""
    world = World(cache_folder() / "world" / world_key(config))
    return world if (world.folder / "world.json").is_file() else None
