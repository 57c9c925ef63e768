"""Changes of the logits before a token is drawn: the options of config/sampling_options.py, as vLLM applies them.

Log-probabilities are taken of the logits before any change (decoding.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import LogitsProcessor

from dice_py.config.sampling_options import SamplingOptions


class MinP(LogitsProcessor):  # type: ignore[misc]
    """Leaves out tokens of a probability below `min_p` × that of the most likely token (arXiv 2407.01082).

    transformers' MinPLogitsWarper sorts the vocabulary, and comes after top-p. In vLLM it comes before top-k and top-p.
    """

    def __init__(self, min_p: float) -> None:
        self.log_share = math.log(min_p)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(rows, vocabulary) float32 logits → the same, −inf where a token is left out; a new tensor."""
        return scores.masked_fill(scores < scores.amax(dim=1, keepdim=True) + self.log_share, -torch.inf)


class LogitChanges:
    """Masks, biases and penalties for the rows of a batch.

    Args:
        options: at least one of them changes logits.
        stops: token ids that end a row.
        prompts: token ids of each row's prompt.
        device: of the logits.

    Attributes:
        seen: (rows, vocabulary) bool, tokens of the prompt and the response; None without a repetition penalty.
        counts: (rows, vocabulary) int32, how often the response has a token; None without the two other penalties.
    """

    def __init__(
        self, options: SamplingOptions, stops: Sequence[int], prompts: Sequence[Sequence[int]], device: torch.device
    ) -> None:
        self.options = options
        self.stops = torch.tensor(stops, dtype=torch.long, device=device)
        self.prompts: Sequence[Sequence[int]] | None = prompts  # until the vocabulary's size is seen
        self.seen: torch.Tensor | None = None
        self.counts: torch.Tensor | None = None
        self._allowed: torch.Tensor | None = None
        bias = options.logit_bias
        self._biased = torch.tensor(list(bias), dtype=torch.long, device=device)
        self._bias = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)

    def _start(self, logits: torch.Tensor) -> None:
        """Makes what has the size of the vocabulary."""
        assert self.prompts is not None
        options, prompts, self.prompts = self.options, self.prompts, None
        if options.repetition_penalty != 1.0:
            self.seen = torch.zeros_like(logits, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                self.seen[row, torch.tensor(prompt, dtype=torch.long, device=logits.device)] = True
        if options.frequency_penalty or options.presence_penalty:
            self.counts = torch.zeros_like(logits, dtype=torch.int32)
        if options.allowed_token_ids is not None:
            self._allowed = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
            self._allowed[options.allowed_token_ids] = True

    def apply(self, logits: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """(rows, vocabulary) float32 logits and the (rows,) tokens drawn so far → changed logits; a new tensor."""
        if self.prompts is not None:
            self._start(logits)
        options, changed = self.options, logits.clone()
        if self._allowed is not None:
            changed.masked_fill_(~self._allowed, -torch.inf)
        if options.min_tokens:
            early = (steps < options.min_tokens)[:, None]
            changed[:, self.stops] = changed[:, self.stops].masked_fill(early, -torch.inf)
        if options.logit_bias:
            changed[:, self._biased] += self._bias
        if self.seen is not None:
            penalty = options.repetition_penalty
            changed = torch.where(self.seen, torch.where(changed > 0, changed / penalty, changed * penalty), changed)
        if self.counts is not None:
            changed -= options.frequency_penalty * self.counts
            changed -= options.presence_penalty * (self.counts > 0)
        return changed

    def add(self, token: torch.Tensor) -> None:
        """Counts the (rows, 1) int64 tokens that were drawn."""
        if self.seen is not None:
            self.seen.scatter_(1, token, True)
        if self.counts is not None:
            self.counts.scatter_add_(1, token, torch.ones_like(token, dtype=torch.int32))

    def select(self, rows: torch.Tensor) -> None:
        """Keeps the given rows. `rows` is int64, without duplicates."""
        self.seen = None if self.seen is None else self.seen[rows]
        self.counts = None if self.counts is None else self.counts[rows]

    def join(self, other: LogitChanges) -> None:
        """Appends the rows of `other`. Both have changed logits before."""
        if self.seen is not None and other.seen is not None:
            self.seen = torch.cat([self.seen, other.seen])
        if self.counts is not None and other.counts is not None:
            self.counts = torch.cat([self.counts, other.counts])
