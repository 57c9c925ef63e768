"""Real data: results of the DICE authors' published mining code on the responses of AlpacaEval 2.

The files are not part of the repository (their license is CC BY-NC 4.0); ../shared/README.md says what
they are.
"""

from __future__ import annotations

import json
from typing import Any

import polars as pl
import pytest
from places import ROOT

from dice_py import mine_pairs

SHARED = ROOT.parent / "shared"
SCORED = SHARED / "data" / "alpaca_eval_scored.parquet"
REFERENCE = SHARED / "golden" / "dice_reference.json"
PAIRS = SHARED / "golden" / "dice_reference_pairs.parquet"

pytestmark = pytest.mark.skipif(
    not all(path.is_file() for path in (SCORED, REFERENCE, PAIRS)),
    reason="the AlpacaEval data and the reference results are not beside the checkout (../shared)",
)

OPTIONS: dict[str, Any] = {
    "prompt_column": "prompt_id",
    "reward_column": "score",
    "length_column": "response_chars",
    "min_length": 4,
    "max_length": 6699,
    "min_responses": 8,
}


@pytest.fixture(scope="module")
def scored() -> pl.DataFrame:
    return pl.read_parquet(SCORED)


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(REFERENCE.read_text())
    return found


def test_exact_penalty(scored: pl.DataFrame, reference: dict[str, Any]) -> None:
    exact = reference["exact"]
    for frame in (scored, scored.sample(fraction=1, shuffle=True, seed=0)):
        mined = mine_pairs(frame, **OPTIONS)
        assert mined.alpha_low == pytest.approx(exact["alpha_lo"], rel=1e-12)
        assert mined.alpha_high == pytest.approx(exact["alpha_hi"], rel=1e-12)
        assert mined.alpha is not None
        assert exact["alpha_lo"] < mined.alpha < exact["alpha_hi"]
        assert mined.mean_length_gap_after == pytest.approx(exact["mean_len_diff"], rel=1e-12)
        assert mined.mean_length_gap_before == pytest.approx(exact["mean_len_diff_alpha0"], rel=1e-12)
        assert mined.pairs.height == exact["prompts"]


def test_pairs_of_the_reference(scored: pl.DataFrame, reference: dict[str, Any]) -> None:
    alpha = reference["alpha"]
    mined = mine_pairs(scored, alpha=alpha, **OPTIONS)
    golden = pl.read_parquet(PAIRS).sort("prompt_id")
    assert mined.pairs["prompt_id"].to_list() == golden["prompt_id"].to_list()
    for side in ("chosen", "rejected"):
        rows = scored[mined.pairs[f"{side}_row"]]
        penalized = rows["score"] - alpha * rows["response_chars"]
        worst = (penalized - golden[f"{side}_score"]).abs().max()
        assert isinstance(worst, float)
        assert worst < 1e-6
        # Several models gave the same text, or texts that tie: the reference names them all.
        pairs = zip(rows["model"], golden[f"{side}_models"], strict=True)
        assert all(model in models for model, models in pairs)


def test_gap_along_the_references_grid(scored: pl.DataFrame, reference: dict[str, Any]) -> None:
    gaps = [(alpha, gap, mine_pairs(scored, alpha=alpha, **OPTIONS)) for alpha, gap in reference["sweep"]]
    for alpha, gap, mined in gaps[1:]:
        # The reference breaks ties by position, which may shift the mean by a few characters.
        assert mined.mean_length_gap_after == pytest.approx(gap, abs=0.5), alpha
