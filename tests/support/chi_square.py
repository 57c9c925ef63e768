"""Whether draws follow a distribution."""

from __future__ import annotations

import torch


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's statistic in standard deviations above its mean: (χ² − df) / √(2·df).

    `counts` and `probabilities` are (vocabulary,); entries expected fewer than five times are pooled.
    """
    expected = probabilities.double() * counts.sum()
    rare = expected < 5
    observed = torch.cat([counts[~rare].double(), counts[rare].sum().double()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    kept = expected > 0
    assert observed[~kept].sum() == 0, "a token of probability zero was drawn"
    freedom = int(kept.sum()) - 1
    statistic = ((observed - expected)[kept] ** 2 / expected[kept]).sum().item()
    return (statistic - freedom) / (2 * freedom) ** 0.5
