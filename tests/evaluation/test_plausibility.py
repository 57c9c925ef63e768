"""When an accuracy or a loss on offline pairs is called impossible."""

from __future__ import annotations

import polars as pl
import pytest

from dice_py.evaluation.plausibility import mean_loss, random_warning, swap_warning


@pytest.mark.parametrize(
    ("accuracy", "pairs", "warned"),
    [
        (0.0, 20, True),
        (0.0, 8, True),
        (0.0, 7, False),  # 1 in 128 by chance
        (0.25, 64, True),
        (0.35, 64, False),
        (0.39, 512, True),
        (0.41, 512, False),  # surely below one half, but not far
        (0.3, 5000, True),
        (0.5, 64, False),
        (1.0, 64, False),
        (0.0, 1, False),
    ],
)
def test_swapped_models(accuracy: float, pairs: int, warned: bool) -> None:
    said = swap_warning(accuracy, pairs)
    assert (said is not None) is warned
    if said is not None:
        assert f"only {accuracy:.2f} of {pairs} offline pairs right" in said
        assert "probably swapped" in said


@pytest.mark.parametrize(
    ("loss", "vocabulary", "warned"),
    [(10.4, 32000, True), (9.0, 32000, True), (5.0, 32000, False), (12.0, 128256, True), (2.0, 0, False)],
)
def test_random_weights(loss: float, vocabulary: int, warned: bool) -> None:
    said = random_warning("reference", loss, vocabulary)
    assert (said is not None) is warned
    if said is not None:
        assert said.startswith(f"warning: the reference's mean loss on chosen answers is {loss:.2f} nats a token")


def test_mean_loss() -> None:
    ids = pl.Series([[1, 2, 3], [4]], dtype=pl.List(pl.Int32))
    assert mean_loss(pl.Series([-6.0, -2.0]), ids) == 2.0
    assert mean_loss(pl.Series([], dtype=pl.Float32), ids.clear()) == 0.0
