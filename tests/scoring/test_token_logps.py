"""Log-probabilities by token: against a plain forward, and as the addends of the scorer's sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from logp_oracle import mixed, plain_tokens, scorer, shared
from tiny_families import build

from dice_py.scoring import forwards


@pytest.mark.parametrize("token_budget", [1, 90, "auto"])
@pytest.mark.parametrize("name", ["Llama", "Bloom"])  # packed, and padded
def test_tokens_are_those_of_a_plain_forward(name: str, token_budget: Any) -> None:
    model = build(name)
    rows = [[*some, *others] for some, others in zip(shared(), mixed(), strict=True)]
    notes: list[str] = []
    ours = scorer(model, notes, token_budget=token_budget)
    found = ours.token_logps(*rows)
    assert ours.packs == (name == "Llama")
    assert [len(logps) for logps in found] == [len(response) for response in rows[1]]
    assert {logps.dtype for logps in found} == {np.dtype(np.float32)}
    for logps, want in zip(found, plain_tokens(model, *rows), strict=True):
        np.testing.assert_allclose(logps, want.numpy(), atol=1e-5)
    # The same forwards: in the same batches the sums are those of the tokens, to the rounding of float64.
    sums = scorer(model, notes, token_budget=token_budget).sums(*rows)
    assert [logps.sum(dtype=np.float64) for logps in found] == pytest.approx(sums, rel=1e-12)


def test_a_batch_that_runs_out_of_memory_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, responses = mixed(40)
    want = scorer(build("Llama"), token_budget=2000).token_logps(prompts, responses)
    sizes: list[int] = []
    real = forwards.packed_token_logps

    def packed(head: Any, batch: Any) -> list[np.ndarray]:
        sizes.append(len(batch.tokens))
        if len(batch.tokens) > 600:
            raise MemoryError
        return real(head, batch)

    monkeypatch.setattr(forwards, "packed_token_logps", packed)
    notes: list[str] = []
    found = scorer(build("Llama"), notes, token_budget=2000).token_logps(prompts, responses)
    assert max(sizes) > 600 > min(sizes)
    for ours, theirs in zip(found, want, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_nothing_to_score() -> None:
    assert scorer(build("Llama")).token_logps([], []) == []
