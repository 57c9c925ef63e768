"""Columns as other tools write them: lengths as floats, ids with NaN, reasons in structs: read, or refused."""

from __future__ import annotations

import itertools
import math
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from mine_data import small

from dice_py import mine_pairs
from dice_py.errors import DataError
from dice_py.mining.files import mine_files

PLAIN = mine_pairs(small(), debias="none").pairs


@pytest.mark.parametrize("dtype", [pl.Float64, pl.Float32, pl.Decimal(20, 2), pl.Int128, pl.UInt64])
def test_whole_numbers_of_any_type_are_lengths(dtype: Any) -> None:
    frame = small().cast({"response_tokens": dtype})
    assert mine_pairs(frame, debias="none").pairs.equals(PLAIN)


def test_a_missing_length_is_null_or_nan() -> None:
    for missing in (None, math.nan):
        frame = small(response_tokens=[30.0, missing, 10.0, 7.0, 8.0, 9.0])
        assert mine_pairs(frame).dropped["null"] == 1


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(3.5, pl.Float64), (math.inf, pl.Float64), (-3.0, pl.Float64), (1e30, pl.Float64), (2.0**32, pl.Float64),
     (Decimal("3.5"), pl.Decimal(10, 1)), (2**100, pl.Int128), (-1, pl.Int128)],
)  # fmt: skip
def test_what_is_no_length_is_refused_with_its_row(value: Any, dtype: Any) -> None:
    lengths = pl.Series([30, 20, 10, 7, value, 9], dtype=dtype, strict=False)
    with pytest.raises(DataError, match=r"row 4: the length is .*whole numbers between 0.*'response_tokens'"):
        mine_pairs(small(response_tokens=lengths))


def test_row_numbers_count_through_files_and_segments(tmp_path: Path) -> None:
    good = small().cast({"response_tokens": pl.Float64})
    bad = good.with_columns(response_tokens=pl.Series([30.0, 20.0, 10.0, 7.0, 3.5, 9.0]))
    for name, frame in (("a", good), ("b", bad)):
        frame.write_parquet(tmp_path / f"{name}.parquet")
    for memory in (1.0, 1e-7):
        with pytest.raises(DataError, match=r"row 10: the length is 3\.5"):
            mine_files([str(tmp_path)], tmp_path / "out", memory_gib=memory)
    (tmp_path / "b.parquet").unlink()
    summary = mine_files([str(tmp_path)], tmp_path / "out", memory_gib=1e-7)
    assert summary["pairs"] == 2


def test_nan_is_no_prompt_and_no_policy() -> None:
    ids = [0.0, 0.0, math.nan, math.nan, math.nan, 2.0]
    with pytest.raises(DataError, match=r"row 2: the prompt is NaN .*in 3 rows of column 'prompt_id'"):
        mine_pairs(small(prompt_id=ids))
    with pytest.raises(DataError, match="row 2: the policy is NaN"):
        mine_pairs(small(round=ids), policy_column="round")
    with pytest.raises(DataError, match="row 2: the prompt is null"):
        mine_pairs(small(prompt_id=[0, 0, None, None, None, 2]))


@pytest.mark.parametrize("missing", [math.nan, None])
def test_a_missing_reward_is_dropped_and_counted(missing: float | None) -> None:
    mined = mine_pairs(small(reward=[3.0, missing, 1.0, 0.0, 5.0, 1.0]))
    assert mined.dropped["null" if missing is None else "not_finite"] == 1


def test_decimal_and_huge_rewards() -> None:
    decimals = pl.Series([Decimal("3.25"), Decimal(2), Decimal(1), Decimal(0), Decimal(5), Decimal(1)])
    assert mine_pairs(small(reward=decimals), debias="none").pairs["chosen_reward"].to_list() == [3.25, 5.0]
    huge = pl.Series([10**38, 2, 1, 0, 5, 1], dtype=pl.Int128)
    assert mine_pairs(small(reward=huge), debias="none").pairs["chosen_row"].to_list() == [0, 4]
    with pytest.raises(DataError, match="reward column 'reward' has dtype Boolean"):
        mine_pairs(small(reward=[True, False, True, True, False, False]))


@pytest.mark.parametrize(
    "reason",
    [
        {"type": "length", "length": 512},  # SGLang
        {"type": "length", "matched": "x"},
        {"reason": "length"},
    ],
)
def test_a_reason_inside_a_struct_is_read(reason: dict[str, Any]) -> None:
    other = reason | {next(iter(reason)): "stop"}
    mined = mine_pairs(small(finish_reason=[reason, other, other, other, other, other]), debias="none")
    assert mined.dropped["truncated"] == 1
    assert mined.pairs["chosen_row"].to_list() == [1, 4]


@pytest.mark.parametrize(
    "reasons",
    [[["stop", "length"]] * 6, [{"a": "stop", "b": "length"}] * 6, [{"code": 1}] * 6, [1] * 6, [True] * 6, [b"x"] * 6],
)
def test_a_reason_of_another_type_is_refused(reasons: list[Any]) -> None:
    with pytest.raises(DataError, match=r"column 'finish_reason' has dtype .*--truncated-column"):
        mine_pairs(small(finish_reason=reasons))
    assert mine_pairs(small(finish_reason=reasons), truncated_column=None).rows == 6


def test_empty_answers_are_used_only_on_request() -> None:
    frame = small(reward=[3.0, 2.0, 1.0, 9.0, 5.0, 1.0], response_tokens=[30, 20, 10, 0, 8, 9])
    mined = mine_pairs(frame, debias="none")
    assert (mined.dropped["too_short"], mined.pairs["chosen_row"].to_list()) == (1, [0, 4])
    assert mine_pairs(frame, debias="none", min_length=0).pairs["chosen_row"].to_list() == [0, 3]


@pytest.mark.parametrize(
    ("options", "names"),
    [(["--min-margin", "1000"], "below_min_margin 2 pairs. lower min_margin"), (["--min-length", "99"], "too_short 6"),
     (["--min-responses", "9"], "too_few_responses 2 prompts")],
)  # fmt: skip
@pytest.mark.parametrize("memory", ["1", "1e-7"])
def test_no_pair_is_a_warning(dice: Any, options: list[str], names: str, memory: str, tmp_path: Path) -> None:
    small().write_parquet(tmp_path / "scored.parquet")
    code, _, said = dice(
        "mine", tmp_path / "scored.parquet", "-o", tmp_path / "pairs.parquet", "--memory", memory, *options
    )
    assert code == 0
    assert "warning: no pair is left of 6 responses to 2 prompts" in said
    assert names in said
    assert pl.read_parquet(tmp_path / "pairs.parquet").is_empty()


@pytest.mark.parametrize("order", ["in order", "shuffled"])
@pytest.mark.parametrize(
    "options", [{"debias": "none"}, {}, {"pairing": "all_pairs"}, {"pairing": "max_random", "seed": 7}]
)
def test_ties_do_not_depend_on_files_and_segments(tmp_path: Path, order: str, options: dict[str, Any]) -> None:
    """Integer scores of a judge, of which many are equal: in memory, in one file, and streamed from several."""
    n = 3000
    frame = pl.DataFrame(
        {
            "prompt_id": [row // 6 for row in range(n)],
            "reward": [random.Random(row).randrange(2) for row in range(n)],
            "response_tokens": [1 + (row * 104729) % 50 for row in range(n)],
        }
    )
    if order == "shuffled":
        frame = frame.sample(fraction=1, shuffle=True, seed=1)
    expected = mine_pairs(frame, **options)
    assert expected.dropped_prompts["tied"] > 0
    for cuts, memory in (([], 1.0), ([], 1e-5), ([700, 701, 2000], 1e-5)):
        folder = tmp_path / f"{len(cuts)}-{memory}"
        folder.mkdir()
        edges = [0, *cuts, n]
        for part, (start, end) in enumerate(itertools.pairwise(edges)):
            frame[start:end].write_parquet(folder / f"{part}.parquet", row_group_size=500)
        summary = mine_files([str(folder)], tmp_path / "pairs.parquet", memory_gib=memory, **options)
        assert pl.read_parquet(tmp_path / "pairs.parquet").equals(expected.pairs)
        assert summary["dropped_prompts"] == expected.dropped_prompts
        assert summary["dropped_pairs"] == expected.dropped_pairs


CUT = ["length", "LENGTH", "max_tokens", "FinishReason.MAX_TOKENS", "model_length", '{"type": "length", "length": 9}']
WHOLE = ["stop", "STOP", "eos_token", "end_turn", "tool_calls", "", '{"type": "stop", "matched": "length"}']


@pytest.mark.parametrize("reason", [*CUT, *WHOLE])
def test_the_words_of_other_servers_for_a_response_that_was_cut_off(reason: str) -> None:
    reasons = [reason, "stop", "stop", "stop", "stop", None]
    assert mine_pairs(small(finish_reason=reasons)).dropped["truncated"] == (reason in CUT)
    structs = [{"reason": text, "matched": "length"} for text in reasons]
    assert mine_pairs(small(finish_reason=structs)).dropped["truncated"] == (reason in CUT)


@pytest.mark.parametrize("dtype", [pl.String, pl.Categorical])
def test_an_empty_text_is_no_prompt(dtype: Any) -> None:
    ids = pl.Series(["a", "a", "a", " ", "", ""]).cast(dtype)
    with pytest.raises(DataError, match="row 3: the prompt is an empty text, in 3 rows of column 'prompt_id'; fill"):
        mine_pairs(small(prompt_id=ids))


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
@pytest.mark.parametrize("memory", [1.0, 1e-7])
def test_a_column_without_a_value_in_one_file_has_no_type_there(
    tmp_path: Path, order: tuple[str, str], memory: float
) -> None:
    none = small().with_columns(finish_reason=pl.lit(None), reward=pl.lit(None))
    none.write_parquet(tmp_path / "a.parquet")
    small().with_columns(finish_reason=pl.lit("stop")).write_parquet(tmp_path / "b.parquet")
    files = [str(tmp_path / f"{name}.parquet") for name in order]
    summary = mine_files(files, tmp_path / "out", memory_gib=memory)
    assert (summary["pairs"], summary["dropped"]["null"]) == (2, 6)


@pytest.mark.parametrize("memory", [1.0, 1e-7])
def test_a_stop_token_alone_is_an_empty_response(tmp_path: Path, memory: float) -> None:
    frame = small(response_chars=[0, 5, 5, 5, 0, 5])
    frame.write_parquet(tmp_path / "a.parquet")
    summary = mine_files([str(tmp_path)], tmp_path / "out", memory_gib=memory)
    assert summary["dropped"]["too_short"] == mine_pairs(frame).dropped["too_short"] == 2
    assert mine_pairs(frame, min_length=0).dropped["too_short"] == 0
    # Another file without the column says nothing of it.
    small().write_parquet(tmp_path / "b.parquet")
    assert mine_files([str(tmp_path)], tmp_path / "out", memory_gib=memory)["dropped"]["too_short"] == 0
