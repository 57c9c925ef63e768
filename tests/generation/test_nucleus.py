"""Top-p: the tokens that a sort of the vocabulary keeps, whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch
from transformers import TopPLogitsWarper

from dice_py.generation.engines.nucleus import TopP

VOCABULARY = 3000
NONE = torch.zeros((1, 0), dtype=torch.long)


def logits(sharpness: float, rows: int = 16) -> torch.Tensor:
    return sharpness * torch.randn((rows, VOCABULARY), generator=torch.Generator().manual_seed(3))


def kept_by_sorting(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """(rows, vocabulary) bool, in float64."""
    probabilities, order = torch.softmax(scores.double(), dim=1).sort(dim=1, descending=True)
    inside = probabilities.cumsum(dim=1) - probabilities < top_p
    return torch.zeros_like(inside).scatter(1, order, inside)


@pytest.mark.parametrize("sharpness", [0.3, 2.0, 8.0, 50.0])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.95, 0.99])
def test_the_tokens_of_a_sort(sharpness: float, top_p: float) -> None:
    scores = logits(sharpness)
    kept = TopP(top_p)(NONE, scores)
    # Probabilities in float32: of 16 rows, a token at the very edge of few may be in one and not in the other.
    assert int((kept.isfinite() != kept_by_sorting(scores, top_p)).sum()) <= 2
    theirs = TopPLogitsWarper(top_p)(NONE, scores)
    # transformers sums in float32, which moves the edge: by a token, and where tokens are less likely by more of them.
    assert top_p > 0.98 or int((kept.isfinite() != theirs.isfinite()).sum(dim=1).max()) <= 1
    assert torch.equal(kept[kept.isfinite()], scores[kept.isfinite()])


def test_all_that_tie_are_kept() -> None:
    scores = logits(0.0)
    assert torch.equal(TopP(0.5)(NONE, scores), scores)


@pytest.mark.parametrize("sharpness", [0.3, 8.0])
def test_a_row_alone_keeps_the_same_tokens(sharpness: float) -> None:
    # Beside a flat row, more tokens are looked at.
    scores = torch.cat([logits(sharpness, rows=4), torch.zeros((1, VOCABULARY))])
    together = TopP(0.9)(NONE, scores)
    for row in range(4):
        assert torch.equal(TopP(0.9)(NONE, scores[row : row + 1])[0], together[row])


def test_by_hand() -> None:
    scores = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
    inf = -torch.inf
    for top_p, kept in ((0.3, [0]), (0.6, [0, 1, 2]), (0.95, [0, 1, 2, 3])):
        expected = torch.full_like(scores, inf)
        expected[0, kept] = scores[0, kept]
        assert torch.equal(TopP(top_p)(NONE, scores), expected)
    assert torch.equal(TopP(0.2)(NONE, torch.tensor([[0.0, inf, inf, inf]])), torch.tensor([[0.0, inf, inf, inf]]))
