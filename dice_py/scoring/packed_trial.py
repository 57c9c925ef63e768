"""The trial that decides whether a model can be scored with packed attention.

A model's layers may ignore the attention interface, or mix neighboring tokens of a row outside attention. Neither is
visible in its config, so the packed forward is compared with the plain one on a few sequences.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch

from dice_py.compute.failures import is_out_of_memory
from dice_py.models.packing import Batch, Group, Tokens
from dice_py.scoring import forwards
from dice_py.scoring.lm_head import LogitHead

_TRIAL_ROWS = 3  # responses on which the packed forward is compared with the plain one
_ROUNDING_TOKENS = 2048  # of a response, for the measure of rounding: its attention needs memory for their square
_SPREADS = 4.0  # the packed forward may be off by this many times the difference of two plain ones


class PackedTrial:
    """Compares the packed forward of one model with its plain forward, on the longest sequences seen so far."""

    def __init__(self, head: LogitHead) -> None:
        self._head = head
        self.longest = 0
        """Tokens of the longest sequence tried."""

    def failure(self, prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> str | None:
        """Tries the longest sequence, and others of its prompt, where it is due.

        It is due for sequences longer by half than those tried, or when they first exceed the model's sliding window:
        an attention implementation that ignores the window fails only there.

        Returns:
            Why the model cannot be scored with packed attention; None when it can, or when no trial was due.
        """
        lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        if not self._due(lengths[longest]):
            return None
        self.longest = lengths[longest]
        model = self._head.model
        name = type(model).__name__
        if not getattr(model, "_supports_attention_backend", False):
            return f"{name} does not support other attention implementations than its own"
        prompt = np.asarray(prompts[longest])
        others = (row for row in range(len(lengths)) if row != longest and np.array_equal(prompts[row], prompt))
        rows = [longest, *itertools.islice(others, _TRIAL_ROWS - 1)]
        if len(rows) == 1:
            rows *= 2  # packed alone, a sequence would not show a model that mixes the sequences of a batch
        try:
            packed = forwards.packed_sums(self._head, Batch([Group(prompt, rows)], responses))
        except Exception as error:
            if is_out_of_memory(error):
                return f"out of memory while the packed attention of {name} was tried"
            first_line = next(iter(str(error).splitlines()), "")
            return f"{name} does not run with the packed attention ({type(error).__name__}: {first_line})"
        for row, ours in zip(rows, packed, strict=True):
            plain = forwards.padded_sums(self._head, [row], prompts, responses)[0]
            if not abs(ours - plain) <= sum_tolerance(model.dtype, plain, len(responses[row])) and not (
                model.dtype != torch.float32 and self._is_rounding(prompt, np.asarray(responses[row]))
            ):
                return (
                    f"with the packed attention {name} scores a response of {len(responses[row])} tokens at "
                    f"{ours:.4f}, not {plain:.4f}"
                )
        return None

    def _is_rounding(self, prompt: np.ndarray, response: np.ndarray) -> bool:
        """True if rounding to 16 bits explains how far the packed forward is from the plain one, token by token.

        The measure is the plain forward with another attention kernel, which rounds in another order: the root mean
        square over the tokens may be `_SPREADS` times as large. Random weights, or weights with large logits, round
        more than `sum_tolerance` assumes.
        """
        prompts, responses = [prompt] * 2, [response[:_ROUNDING_TOKENS]] * 2
        # Of two copies the second is read: the first stands right after the prompt, as in a row of its own.
        packed = forwards.packed_logps(self._head, Batch([Group(prompt, [0, 1])], responses))[len(responses[0]) :]
        plain = forwards.padded_logps(self._head, [0], prompts, responses)
        model = self._head.model
        before = model.config._attn_implementation
        model.set_attn_implementation("sdpa" if before == "eager" else "eager")
        try:
            again = forwards.padded_logps(self._head, [0], prompts, responses)
        finally:
            model.set_attn_implementation(before)
        difference, spread = ((other - plain).square().mean().sqrt().item() for other in (packed, again))
        return bool(difference <= _SPREADS * spread)

    def _due(self, length: int) -> bool:
        window = getattr(self._head.model.config.get_text_config(), "sliding_window", None) or 0
        crosses_window = self.longest <= window < length
        return crosses_window or 2 * length > 3 * self.longest


def sum_tolerance(dtype: torch.dtype, plain: float, tokens: int) -> float:
    """Nats by which rounding may move a sum over `tokens` tokens; a wrong mask moves it further."""
    if dtype == torch.float32:
        return 1e-5 * (abs(plain) + tokens)
    # Each token is off by some hundredths, with either sign.
    return 0.1 * (1 + math.sqrt(tokens))
