"""`generate.sampling_params` in plain Python, as vLLM documents them: what tests compare both engines with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dice_py.config.sampling_options import SamplingOptions

OPTIONS: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.7},
    "penalties": {"presence_penalty": 0.8, "frequency_penalty": -0.6, "repetition_penalty": 0.8},
    "bias": {"logit_bias": {"7": 2.5, "9": -100, "11": 0.5}},
    "allowed": {"allowed_token_ids": [*range(40)]},
    "min_tokens": {"min_tokens": 2},
    "all": {
        "allowed_token_ids": [*range(30)], "min_tokens": 2, "logit_bias": {"3": 5.0, "8": 1.0},
        "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2,
    },
}  # fmt: skip


def changed_logits(
    options: SamplingOptions, stops: Sequence[int], prompt: list[int], response: list[int], logits: list[float]
) -> list[float]:
    """The logits of one row before the temperature."""
    changed = []
    for token, logit in enumerate(logits):
        if options.allowed_token_ids is not None and token not in options.allowed_token_ids:
            logit = -math.inf
        if len(response) < options.min_tokens and token in {*stops, *options.stop_token_ids}:
            logit = -math.inf
        logit += options.logit_bias.get(token, 0.0)
        if token in {*prompt, *response}:
            logit = logit / options.repetition_penalty if logit > 0 else logit * options.repetition_penalty
        logit -= options.frequency_penalty * response.count(token)
        logit -= options.presence_penalty * (token in response)
        changed.append(logit)
    return changed


def kept_tokens(logits: list[float], *, min_p: float, top_p: float) -> list[float]:
    """The probabilities after min_p, and then top_p."""
    most = max(logits)
    masses = [math.exp(logit - most) for logit in logits]
    masses = [mass if mass >= min_p else 0.0 for mass in masses]
    total, before, kept = sum(masses), 0.0, [0.0] * len(masses)
    for token in sorted(range(len(masses)), key=lambda token: -masses[token]):
        if before < top_p * total:
            kept[token] = masses[token]
        before += masses[token]
    return [mass / sum(kept) for mass in kept]
