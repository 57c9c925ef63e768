"""How much of a change of weights rounding leaves."""

from __future__ import annotations

import torch

from dice_py.models.rounding import Change, measure_change


def change_of(step: float) -> Change:
    start, ids = torch.linspace(0.5, 0.98, 64).bfloat16(), torch.arange(3)
    return measure_change([(start, start.float() + step), (ids, ids)], torch.bfloat16)


def test_the_change_of_a_start_on_the_grid() -> None:
    # The numbers of bfloat16 between 0.5 and 1 are 2^-8 apart.
    change = change_of(2**-8)
    assert (change.rms, change.largest, change.kept) == (2**-8, 2**-8, 1.0)
    lost = change_of(2**-10)
    assert (lost.largest, lost.kept) == (2**-10, 0.0)
    assert change_of(0.0) == (0.0, 0.0, 1.0)


def test_nothing_is_lost_in_float32() -> None:
    start = torch.randn(32, generator=torch.Generator().manual_seed(0))
    change = measure_change([(start, start * 1.001)], torch.float32)
    assert change.kept == 1.0
    assert change.rms > 0
