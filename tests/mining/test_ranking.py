"""The scores that candidates are ranked by, against the miner's own margins and a second implementation."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from mine_data import DEBIAS, random_frame
from mine_oracle import scored, usable_rows, with_defaults

from dice_py import mine_pairs
from dice_py.config.mining import MiningOptions
from dice_py.mining.ranking import ranking_scores, usable_responses

SETTINGS: list[dict[str, Any]] = [
    *DEBIAS,
    {"debias": "matched", "length_tolerance": 3},
    {"debias": "bucket", "buckets": 3, "bucket_scale": True, "min_length": 4, "max_length": 30},
    {"debias": "bucket", "buckets": 200, "duplicate_column": "text"},
    {"debias": "none", "duplicate_column": "hash", "min_length": None, "truncated_column": None},
    {"debias": "per_token", "duplicate_column": "tokens", "max_length": 20},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_scores_are_those_of_the_miner(settings: dict[str, Any]) -> None:
    frame = random_frame(200, seed=3)
    options = MiningOptions(**settings)
    mined = mine_pairs(frame, options)
    found = ranking_scores(frame, options, mined.alpha)
    sides = [found.gather(mined.pairs[f"{side}_row"]) for side in ("chosen", "rejected")]
    assert mined.pairs.height > 20
    assert (sides[0] - sides[1] - mined.pairs["margin"].cast(pl.Float64)).abs().max() < 1e-5  # type: ignore[operator]
    # All responses that could have been picked, and no others, have a score.
    o = with_defaults(settings) | {"alpha": mined.alpha or 0.0}
    _, kept, dropped = usable_rows(frame, o)
    want = scored(kept, kept, o)
    assert sum(dropped.values()) > 0
    assert usable_responses(frame, options)["usable"].arg_true().to_list() == sorted(want["row"].to_list())
    assert found.is_not_null().arg_true().to_list() == sorted(want["row"].to_list())
    assert (found.gather(want["row"]) - want["s"]).abs().max() < 1e-9  # type: ignore[operator]


def test_no_response_is_usable() -> None:
    frame = pl.DataFrame({"prompt_id": [1, 1], "reward": [None, 1.0], "response_tokens": [3, None]})
    for settings in SETTINGS[:7]:
        options = MiningOptions(**{name: value for name, value in settings.items() if name != "duplicate_column"})
        assert ranking_scores(frame, options, 0.5).to_list() == [None, None]
