"""Sequences to score, and the reference that the scorer must match: one sequence at a time, no padding, all logits."""

from __future__ import annotations

import random
from typing import Any

import torch
from tiny_sets import draw_ids
from transformers import PreTrainedModel

from dice_py.config.stages import ScoreConfig
from dice_py.scoring.scorer import Scorer

SAME = 1e-4
"""Nats; bounds the difference of two float32 sums of some hundred nats over some ten tokens."""


def mixed(count: int = 12, longest: int = 30) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses of one token and more, in random order; no prompt twice."""
    rng = random.Random(0)
    lengths = [(1, 1), (longest, 1), (1, longest)]
    lengths += [(rng.randint(1, longest), rng.randint(1, longest)) for _ in range(count - len(lengths))]
    return [draw_ids(rng, n) for n, _ in lengths], [draw_ids(rng, n) for _, n in lengths]


def shared(longest: int = 40) -> tuple[list[list[int]], list[list[int]]]:
    """Four prompts with three responses each, all of one token and more; the rows are shuffled."""
    rng = random.Random(1)
    prompts = [draw_ids(rng, length) for length in (1, 5, 12, longest // 2)]
    rows = [(prompt, draw_ids(rng, length)) for prompt in prompts for length in (1, longest // 4, longest)]
    rng.shuffle(rows)
    return [prompt for prompt, _ in rows], [response for _, response in rows]


@torch.no_grad()
def plain_tokens(model: PreTrainedModel, prompts: list[list[int]], responses: list[list[int]]) -> list[torch.Tensor]:
    """Log-probabilities in nats by token; the forward in the model's type, the log-softmax in float32."""
    found = []
    for prompt, response in zip(prompts, responses, strict=True):
        logits = model(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits[0].float()
        logps = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
        found.append(logps.gather(1, torch.tensor(response)[:, None])[:, 0])
    return found


def plain(model: PreTrainedModel, prompts: list[list[int]], responses: list[list[int]]) -> list[float]:
    """Sums of log-probabilities in nats."""
    return [logps.double().sum().item() for logps in plain_tokens(model, prompts, responses)]


def max_abs_diff(left: list[float], right: list[float]) -> float:
    """Largest absolute difference."""
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


def scorer(model: PreTrainedModel, notes: list[str] | None = None, **config: Any) -> Scorer:
    """A scorer with these config entries; its notes are appended to `notes`."""

    def on_event(event: str, **fields: Any) -> None:
        assert event == "note"
        if notes is not None:
            notes.append(fields["text"])

    return Scorer(model, ScoreConfig(**config), on_event)
