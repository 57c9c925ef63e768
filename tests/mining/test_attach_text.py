"""`attach_text`: the texts of the pairs, gathered from the generations by row number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

import dice_py
from dice_py.errors import DataError

ROWS = 12
GENERATIONS = pl.DataFrame(
    {
        "prompt_id": [1] * 4 + [2] * 4 + [3] * 4,
        "messages": [[{"role": "user", "content": f"question {i // 4}"}] for i in range(ROWS)],
        "response": [f"answer {i}" for i in range(ROWS)],
        "token_ids": [[i, i + 1] for i in range(ROWS)],
        "reward": [float(i * 7 % 12) for i in range(ROWS)],
        "response_tokens": [5, 3, 8, 2] * 3,
    }
)
# Not in the order of rows, and one row twice.
PAIRS = pl.DataFrame(
    {"prompt_id": [3, 1, 2, 3], "chosen_row": [11, 0, 5, 9], "rejected_row": [8, 3, 4, 8]},
    schema={"prompt_id": pl.Int64, "chosen_row": pl.UInt64, "rejected_row": pl.UInt64},
)


def attach(pairs: pl.DataFrame, generations: Any, **options: Any) -> pl.DataFrame:
    attached: pl.DataFrame = pairs.pipe(dice_py.attach_text, generations, **options)
    return attached


def test_texts_of_the_rows_in_the_order_of_the_pairs() -> None:
    attached = attach(PAIRS, GENERATIONS)
    assert attached.columns == [*PAIRS.columns, "chosen", "rejected"]
    assert attached.select(PAIRS.columns).equals(PAIRS)
    assert attached["chosen"].to_list() == ["answer 11", "answer 0", "answer 5", "answer 9"]
    assert attached["rejected"].to_list() == ["answer 8", "answer 3", "answer 4", "answer 8"]


def test_of_mined_pairs() -> None:
    mined = dice_py.mine_pairs(GENERATIONS)
    attached = mined.pairs.pipe(dice_py.attach_text, GENERATIONS)
    assert attached.height == 3
    assert attached["chosen"].equals(GENERATIONS["response"].gather(mined.pairs["chosen_row"]).alias("chosen"))


def test_every_kind_of_generations(tmp_path: Path) -> None:
    single, parts = tmp_path / "single.parquet", [tmp_path / f"part-{i}.parquet" for i in range(3)]
    GENERATIONS.write_parquet(single, row_group_size=5)
    # Cut within a prompt, and one part is empty: row numbers count through.
    for path, (start, stop) in zip(parts, [(0, 7), (7, 7), (7, 12)], strict=True):
        GENERATIONS[start:stop].write_parquet(path)
    expected = attach(PAIRS, GENERATIONS)
    chunks = pl.concat([GENERATIONS[:5], GENERATIONS[5:]], rechunk=False)
    for kind in (
        chunks,
        GENERATIONS.lazy(),
        pl.scan_parquet(single),
        single,
        str(single),
        parts,
        tuple(map(str, parts)),
    ):
        assert attach(PAIRS, kind).equals(expected), type(kind)


def test_a_path_is_no_pattern(tmp_path: Path) -> None:
    path = tmp_path / "run [1]*.parquet"
    GENERATIONS.write_parquet(path)
    assert attach(PAIRS, path).equals(attach(PAIRS, GENERATIONS))


def test_other_columns() -> None:
    attached = attach(PAIRS, GENERATIONS, text_columns=("token_ids", "response"), prompt_columns=("messages",))
    assert set(attached.columns) == {
        *PAIRS.columns, "chosen_token_ids", "rejected_token_ids", "chosen", "rejected", "messages",
    }  # fmt: skip
    assert attached["chosen_token_ids"].to_list() == [[11, 12], [0, 1], [5, 6], [9, 10]]
    assert attached["rejected_token_ids"].to_list() == [[8, 9], [3, 4], [4, 5], [8, 9]]
    assert [messages[0]["content"][-1] for messages in attached["messages"]] == ["2", "0", "1", "2"]
    assert attached["messages"].dtype == GENERATIONS["messages"].dtype
    prompts = attach(PAIRS, GENERATIONS.lazy(), text_columns=(), prompt_columns=["messages"])
    assert prompts.columns == [*PAIRS.columns, "messages"]


def test_nulls_stay_and_no_pairs_are_fine() -> None:
    holes = GENERATIONS.with_columns(response=pl.when(pl.int_range(pl.len()) != 5).then("response"))
    assert attach(PAIRS, holes)["chosen"].to_list() == ["answer 11", "answer 0", None, "answer 9"]
    empty = attach(PAIRS.clear(), GENERATIONS, prompt_columns=("messages",))
    assert empty.height == 0
    assert empty.schema["chosen"] == pl.String
    assert empty.schema["messages"] == GENERATIONS.schema["messages"]


@pytest.mark.parametrize("lazy", [False, True])
def test_errors(lazy: bool, tmp_path: Path) -> None:
    generations: Any = GENERATIONS.lazy() if lazy else GENERATIONS
    with pytest.raises(DataError, match="'answer'"):
        attach(PAIRS, generations, text_columns=("answer",))
    with pytest.raises(DataError, match="'question'"):
        attach(PAIRS, generations, prompt_columns=("question",))
    for side in ("chosen_row", "rejected_row"):
        with pytest.raises(DataError, match=side):
            attach(PAIRS.drop(side), generations)
        beyond = PAIRS.with_columns(pl.when(pl.int_range(pl.len()) == 2).then(12).otherwise(side).alias(side))
        with pytest.raises(DataError, match=r"\b12\b"):
            attach(beyond.cast({side: pl.UInt64}), generations)
    with pytest.raises(DataError, match="row"):
        attach(PAIRS, generations.head(0))
    with pytest.raises(DataError, match="absent"):
        attach(PAIRS, tmp_path / "absent.parquet")
    (tmp_path / "bad.parquet").write_text("not Parquet")
    with pytest.raises(DataError, match="bad"):
        attach(PAIRS, tmp_path / "bad.parquet")
