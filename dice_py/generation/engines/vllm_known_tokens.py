"""A logits processor of vLLM: ids that the tokenizer does not have are never sampled.

vLLM loads the class by its name, in each of its processes. The ids come with `additional_config`, the part of its
config that is free. A list of allowed ids in each request would do the same, but vLLM would build a mask for each.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor

from dice_py.models.vocabulary import KnownTokens

ADDITIONAL_KEY = "dice_known_tokens"


class KnownTokensOnly(LogitsProcessor):  # type: ignore[misc]
    """Sets the logits of unknown ids to −∞. `raw_logprobs` are computed before that."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        del is_pin_memory
        size, holes = vllm_config.additional_config[ADDITIONAL_KEY]
        self.known = KnownTokens(size, tuple(holes))
        self.device = device
        self.ids: torch.Tensor | None = None

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """(requests, vocabulary) → the same, changed in place."""
        if self.ids is None:
            self.ids = torch.tensor(self.known.unknown(logits.shape[1]), dtype=torch.long, device=logits.device)
        return logits.index_fill_(1, self.ids, -torch.inf)

    def is_argmax_invariant(self) -> bool:
        """False: an unknown id may have the largest logit."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """All requests are treated alike, so there is no state."""
