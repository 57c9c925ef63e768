"""A transformers engine on a tiny model, and requests for it."""

from __future__ import annotations

from pathlib import Path

from dice_py.config.shared import ModelConfig
from dice_py.config.stages import GenerateConfig
from dice_py.generation.engines.base import Request, Sample, sample_all
from dice_py.generation.engines.transformers import TransformersEngine
from dice_py.models.tokenization import encode_prompt, load_tokenizer, stop_token_ids
from dice_py.storage.keys import seed_for

CPU = ModelConfig(device="cpu")
QUESTIONS = ["hello there", "hi", "what is the tallest mountain on this planet, and who climbed it first?"]


class Rig:
    """An engine on a tiny model, and the prompts' token ids."""

    def __init__(self, folder: Path, config: GenerateConfig, models: ModelConfig = CPU) -> None:
        tokenizer = load_tokenizer(folder, CPU)
        self.stops = stop_token_ids(folder, tokenizer)
        self.prompts = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in QUESTIONS]
        self.engine = TransformersEngine(
            folder,
            config,
            models,
            stops=self.stops,
            pad=tokenizer.pad_token_id,
            longest_prompt=max(map(len, self.prompts)),
        )

    def requests(self, count: int) -> list[Request]:
        return [Request(self.prompts[n % len(self.prompts)], seed_for(7, n)) for n in range(count)]

    def sample(self, requests: list[Request]) -> list[Sample]:
        return sample_all(self.engine, requests)


def of_prompt(rig: Rig, count: int, samples: int) -> list[Request]:
    """`samples` requests for each of `count` prompts, next to each other, no two prompts the same."""
    prompts = [[*rig.prompts[n % 3], *rig.prompts[1][: 1 + n // 3]] for n in range(count)]
    return [Request(prompts[n // samples], seed_for(7, n)) for n in range(count * samples)]
