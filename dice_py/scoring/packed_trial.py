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
            if not abs(ours - plain) <= _tolerance(model.dtype, plain, len(responses[row])):
                return (
                    f"with the packed attention {name} scores a response of {len(responses[row])} tokens at "
                    f"{ours:.4f}, not {plain:.4f}"
                )
        return None

    def _due(self, length: int) -> bool:
        window = getattr(self._head.model.config.get_text_config(), "sliding_window", None) or 0
        crosses_window = self.longest <= window < length
        return crosses_window or 2 * length > 3 * self.longest


def _tolerance(dtype: torch.dtype, plain: float, tokens: int) -> float:
    """Nats by which rounding may move a sum over `tokens` tokens; a wrong mask moves it further."""
    if dtype == torch.float32:
        return 1e-5 * (abs(plain) + tokens)
    # Each token is off by some hundredths, with either sign.
    return 0.1 * (1 + math.sqrt(tokens))
