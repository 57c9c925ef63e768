"""Top-p sampling without a sort of the whole vocabulary (nucleus sampling, Holtzman et al., arXiv 1904.09751)."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor

_FIRST, _FACTOR = 64, 8


class TopP(LogitsProcessor):  # type: ignore[misc]
    """Keeps the smallest set of most likely tokens whose probability reaches `top_p`, and all that tie with its last.

    transformers' TopPLogitsWarper sorts every row: with 49,152 tokens on a CPU that takes several times as long as a
    step of a model of 135 million parameters. Few tokens hold `top_p`, so the largest 64 are looked at first, then
    eight times as many. On a GPU, where a sort is fast and a look at a value waits for it, all are sorted.
    """

    def __init__(self, top_p: float) -> None:
        self.top_p = top_p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(rows, vocabulary) float32 logits → the same, −inf where a token is left out; a new tensor."""
        size = scores.shape[1]
        normalizer = torch.logsumexp(scores, dim=-1, keepdim=True)
        count = min(_FIRST, size) if scores.device.type == "cpu" else size
        while True:
            largest = scores.topk(count, dim=1).values
            probabilities = (largest - normalizer).exp_().double()  # sums in float32 are off by whole tokens
            before = probabilities.cumsum(dim=1) - probabilities
            kept = (before < self.top_p).sum(dim=1, keepdim=True)
            if count == size or bool((kept < count).all()):
                break
            count = min(count * _FACTOR, size)
        # Nothing is before the first, so that it is kept, unless all probabilities are NaN.
        return scores.masked_fill(scores < largest.gather(1, (kept - 1).clamp_(min=0)), -torch.inf)
