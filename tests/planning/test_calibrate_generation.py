"""What a calibration samples, with an engine whose clock is its own: nothing is timed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from plan_data import own

from dice_py.generation.engines.base import Request, Sample, SampleId
from dice_py.planning import calibrate_generation as module
from dice_py.planning.calibrate_generation import Sampler
from dice_py.planning.calibration_sizes import SAMPLING_SECONDS
from dice_py.planning.decoding import fit_decoding

PREFILL, STEP, TOKEN = 0.002, 0.05, 0.001  # seconds


class ClockedEngine:
    """Responses as long as the limit, or of `length` tokens; its clock moves by the costs above, times `slowness`."""

    max_rows, drops_finished_rows, has_room = 1000, True, True

    def __init__(self, length: int, slowness: float, limit: int) -> None:
        self.length, self.slowness, self.max_new_tokens = length, slowness, limit
        self.now = 0.0
        self.waiting: list[tuple[SampleId, Request]] = []

    @property
    def unfinished(self) -> int:
        return len(self.waiting)

    def add(self, requests: Sequence[tuple[SampleId, Request]]) -> None:
        self.waiting += requests

    def step(self) -> list[tuple[SampleId, Sample]]:
        length = min(self.length, self.max_new_tokens)
        prompts = {tuple(request.prompt_token_ids) for _, request in self.waiting}
        seconds = PREFILL * sum(map(len, prompts)) + (length - 1) * (STEP + TOKEN * len(self.waiting))
        self.now += self.slowness * seconds
        reason = "stop" if self.length <= self.max_new_tokens else "length"
        done = [(sample_id, Sample([1] * length, reason, 0.0)) for sample_id, _ in self.waiting]
        self.waiting = []
        return done

    def close(self) -> None:
        """Nothing is held."""


def sampled(monkeypatch: pytest.MonkeyPatch, slowness: float, limit: int = 100, length: int = 60) -> tuple[Any, Any]:
    engine = ClockedEngine(length, slowness, limit)
    monkeypatch.setattr(module.time, "monotonic", lambda: engine.now)
    config = own("generate.samples=8", f"generate.max_new_tokens={limit}")
    prompts = [(number, [number] * 10) for number in range(100)]
    return Sampler(engine, config, prompts, lambda event, **fields: None).measure(), engine


def test_cheap_responses_are_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = sampled(monkeypatch, slowness=0.01)
    small, large = found.runs
    assert (found.first, found.cut_at) == (None, None)
    assert [len(run.samples) // len(run.prompts) for run in found.runs] == [8, 8]
    assert len(large.prompts) >= 2 * len(small.prompts) == 16
    assert {len(sample.token_ids) for sample in large.samples} == {60}


@pytest.mark.parametrize(("slowness", "cut"), [(1.0, None), (3.0, 28)])
def test_expensive_responses_are_fewer_or_cut(
    monkeypatch: pytest.MonkeyPatch, slowness: float, cut: int | None
) -> None:
    found, engine = sampled(monkeypatch, slowness)
    assert found.cut_at == cut
    assert {len(sample.token_ids) for sample in found.kept.samples} == {60 if cut is None else cut}
    assert len(found.kept.samples) == len(found.kept.prompts)  # one each
    assert engine.now <= 1.05 * SAMPLING_SECONDS
    # The costs are those of the engine, whatever was sampled.
    assert found.per_prompt_token == pytest.approx(slowness * PREFILL)
    assert fit_decoding(found.decoding(1000, True)) == pytest.approx((slowness * STEP, slowness * TOKEN))
