"""What the miner refuses: options, columns, values, and which row it names."""

from __future__ import annotations

import math
from typing import Any

import polars as pl
import pytest
from mine_data import frame, small

from dice_py import mine_pairs
from dice_py.errors import DataError, UsageError


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"debias": "quadratic"}, "must be one of none, linear, per_token, bucket, matched"),
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"alpha": math.inf}, "alpha is inf"),
        ({"alpha": "best"}, "alpha is 'best'"),
        ({"alpha": True}, "alpha is True"),
        ({"min_responses": 1}, "min_responses is 1"),
        ({"min_length": -1}, "min_length is -1"),
        ({"max_length": -2}, "max_length is -2"),
        ({"min_length": 5, "max_length": 4}, "no length can be both"),
        ({"min_length": 2**40}, "no length is above"),
        ({"buckets": 0, "debias": "bucket"}, "buckets is 0"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        mine_pairs(small(), **options)


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        (small(), {"reward_column": "score"}, r"'score' not found .* prompt_id, reward.*--reward-column"),
        (small(), {"prompt_column": "id"}, r"'id' not found .*--prompt-column"),
        (small(), {"length_column": "n"}, r"'n' not found .*--length-column"),
        (small(), {"truncated_column": "cut"}, r"'cut' not found .* truncated_column="),
        (small(), {"truncated_column": "reward"}, "must name a boolean column"),
        (small().clear(), {}, "no rows"),
        (small(prompt_id=[1, 1, None, 2, 2, 2]), {}, "row 2: the prompt is null"),
        (small(prompt_id=["a", "a", "a", None, "b", "b"]), {}, "row 3: the prompt is null"),
        (small(response_tokens=[1, 2, 3, 4, -5, 6]), {}, "row 4: the length is -5.*'response_tokens'"),
        (small(response_tokens=[1, 2, 3, 4, 5, 2**32]), {}, "row 5: the length is 4294967296"),
        (small(response_tokens=["1"] * 6), {}, "dtype String, but must hold integers"),
        (small(response_tokens=[True] * 6), {}, "dtype Boolean, but must hold integers"),
        (small(reward=["x"] * 6), {}, "dtype String, but must be numeric"),
        (small(prompt_id=[[1]] * 6), {}, "has no order"),
    ],
)
def test_bad_data(data: pl.DataFrame, options: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        mine_pairs(data, **options)


def test_a_bad_length_is_refused_in_any_chunk_and_any_order() -> None:
    rows = frame().with_columns(pl.col("response_tokens").cast(pl.Int64))
    bad = rows.with_columns(
        response_tokens=pl.when(pl.int_range(pl.len()).is_in([200, 300])).then(-1).otherwise("response_tokens"),
        reward=pl.when(pl.int_range(pl.len()) != 200).then("reward"),
    )
    chunked = pl.concat([bad[:150], bad[150:]], rechunk=False)
    for debias in ("linear", "bucket"):
        with pytest.raises(DataError, match="row 200: the length is -1"):
            mine_pairs(chunked, debias=debias)
    with pytest.raises(DataError, match="row 19: the length is -1"):
        mine_pairs(bad.reverse())


def test_not_a_frame() -> None:
    with pytest.raises(UsageError, match="cannot mine a list"):
        mine_pairs([1, 2])  # type: ignore[arg-type]
