"""The file that training reads: what it cannot use is refused with file, column and row, before any model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dice_py.errors import DataError
from dice_py.training.dataset import load_training_set

ROWS: dict[str, Any] = {
    "prompt_ids": [[1, 2], [3]],
    "chosen_ids": [[4, 5], [6]],
    "rejected_ids": [[7], [8, 9]],
    "ref_chosen_logps": [-1.0, -2.0],
    "ref_rejected_logps": [-3.0, -4.0],
}


def load(folder: Path, **changed: Any) -> tuple[pl.DataFrame, int]:
    file = folder / "training_set.parquet"
    pl.DataFrame(ROWS | changed).write_parquet(file)
    return load_training_set(file, None, vocabulary=10)


def test_what_fits_is_read(tmp_path: Path) -> None:
    frame, too_long = load(tmp_path)
    assert (frame.height, too_long) == (2, 0)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"chosen_ids": [[4, 5], [10]]}, "'chosen_ids' has the token id 10 in row 1.*vocabulary of 10"),
        ({"rejected_ids": [[7], [8, -1]]}, "'rejected_ids' has the token id -1 in row 1"),
        ({"prompt_ids": pl.Series([[1], [2**63]], dtype=pl.List(pl.UInt64))}, "token id 9223372036854775808 in row 1"),
        ({"prompt_ids": [[1], [None]]}, "'prompt_ids' holds nulls among the token ids of row 1"),
        ({"prompt_ids": [[1], None]}, "'prompt_ids' holds nulls, the first in row 1"),
        ({"prompt_ids": ["a", "b"]}, "'prompt_ids' is String, not a list of token ids"),
        ({"ref_chosen_logps": ["-1.0", "-2.0"]}, "'ref_chosen_logps' has dtype String"),
        ({"ref_chosen_logps": [None, -2.0]}, "1 pairs have a reference log-probability that is not finite"),
        ({"ref_rejected_logps": [float("nan"), -2.0]}, "1 pairs have a reference log-probability"),
    ],
)
def test_what_cannot_be_trained_on(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        load(tmp_path, **changed)
    assert str(tmp_path / "training_set.parquet") in str(caught.value)
