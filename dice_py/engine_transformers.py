"""The embedded engine: transformers' batched `generate`, with a seed of its own for each response.

`generate` draws from one global generator, so a row's sample would depend on the rows beside it. Here the
draw is made by a logits processor instead: it warps the logits (temperature, top-k, top-p, by transformers'
own warpers), inverts their cumulative distribution at the row's next uniform number, and leaves one token
for the greedy search to find. The uniforms of a row come from its seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dice_py.config import GenerateConfig, ModelConfig
from dice_py.generate import Request, Sample
from dice_py.models import load_model, release
from dice_py.score import batches_by_budget


class SeededSampling(LogitsProcessor):  # type: ignore[misc]
    """Draws each row's next token with the row's own uniform numbers, and sums its raw log-probability.

    Args:
        uniforms: (rows, steps) float64 in [0, 1).
        stops: token ids that end a row.
    """

    def __init__(self, uniforms: torch.Tensor, config: GenerateConfig, stops: list[int]) -> None:
        self.uniforms = uniforms
        self.stops = torch.tensor(stops, device=uniforms.device)
        self.step = 0
        self.alive = torch.ones(len(uniforms), dtype=torch.bool, device=uniforms.device)
        self.logp = torch.zeros(len(uniforms), dtype=torch.float32, device=uniforms.device)
        self.warpers = LogitsProcessorList()
        if config.temperature != 1.0:
            self.warpers.append(TemperatureLogitsWarper(config.temperature))
        if config.top_k:
            self.warpers.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(config.top_p))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        """(rows, tokens so far), (rows, vocabulary) → scores with one finite entry per row."""
        raw = scores.float()
        # A clone, since warpers may write into what they are given.
        cumulative = torch.softmax(self.warpers(input_ids, raw.clone()), dim=-1).double().cumsum(dim=-1)
        target = self.uniforms[:, self.step, None] * cumulative[:, -1:]
        # right=True: a token of probability zero has its left neighbour's cumulative sum and is never met.
        token = torch.searchsorted(cumulative, target, right=True).clamp_(max=raw.shape[-1] - 1)
        gained = raw.gather(1, token).squeeze(1) - torch.logsumexp(raw, dim=-1)
        self.logp += torch.where(self.alive, gained, torch.zeros_like(gained))
        self.alive &= ~torch.isin(token.squeeze(1), self.stops)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


class TransformersEngine:
    """Batched `generate`, prompts of like length together, batches by token budget."""

    def __init__(
        self, policy: Path, config: GenerateConfig, models: ModelConfig, *, stops: list[int], pad: int
    ) -> None:
        self.config = config
        self.stops = stops
        self.pad = pad
        self.model = load_model(policy, models)
        # Explicit: what the model's own file says of sampling is not used, only what the run's config says.
        self.generation = GenerationConfig(
            do_sample=False,
            max_new_tokens=config.max_new_tokens,
            eos_token_id=stops,
            pad_token_id=pad,
            use_cache=True,
        )
        self.model.generation_config = self.generation

    def sample(self, requests: Sequence[Request], on_done: Callable[[int], None]) -> list[Sample]:
        """One sample for each request, in order."""
        samples: dict[int, Sample] = {}
        lengths = [len(request.prompt_token_ids) + self.config.max_new_tokens for request in requests]
        for rows in batches_by_budget(lengths, self.config.token_budget):
            for row, sample in zip(rows, self._batch([requests[row] for row in rows]), strict=True):
                samples[row] = sample
            on_done(len(rows))
        return [samples[row] for row in range(len(requests))]

    def close(self) -> None:
        """Gives the memory of the model back; nothing is sampled afterwards."""
        device = self.model.device
        del self.model
        release(device)

    def _batch(self, requests: list[Request]) -> list[Sample]:
        device = self.model.device
        longest = max(len(request.prompt_token_ids) for request in requests)
        # Padded on the left, so that every row's next token stands in the last column.
        ids = torch.full((len(requests), longest), self.pad)
        mask = torch.zeros((len(requests), longest), dtype=torch.long)
        for row, request in enumerate(requests):
            ids[row, longest - len(request.prompt_token_ids) :] = torch.tensor(request.prompt_token_ids)
            mask[row, longest - len(request.prompt_token_ids) :] = 1
        draws = [np.random.Generator(np.random.Philox(key=request.seed)) for request in requests]
        uniforms = np.stack([draw.random(self.config.max_new_tokens) for draw in draws])
        sampling = SeededSampling(torch.from_numpy(uniforms).to(device), self.config, self.stops)
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=self.generation,
                logits_processor=LogitsProcessorList([sampling]),
            )
        samples = []
        for tokens, logp in zip(output[:, longest:].tolist(), sampling.logp.tolist(), strict=True):
            end = next((at for at, token in enumerate(tokens) if token in self.stops), None)
            if end is None:
                samples.append(Sample(tokens, "length", logp))
            else:
                samples.append(Sample(tokens[: end + 1], "stop", logp))
        return samples
