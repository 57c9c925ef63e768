"""Every row that is looked up is found, or the error names it: files that do not belong together, and damaged ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from tiny_round import make_round

from dice_py.errors import DataError
from dice_py.models.token_ids import check_token_ids
from dice_py.replay.mined import gather_mined
from dice_py.storage.lookup import check_row_aligned, look_up
from dice_py.storage.parquet import read_parquet, write_parquet


def gather(round_files: dict[str, Any], **changed: Any) -> pl.DataFrame:
    files = round_files | changed
    mined, prompts = (
        files[name] if isinstance(files[name], pl.DataFrame) else read_parquet(files[name])
        for name in ("mined", "prompts")
    )
    return gather_mined(mined, files["generations"], files["scores"], prompts)


def rewrite(path: Path, change: Callable[[pl.DataFrame], pl.DataFrame], key: str = "other") -> None:
    write_parquet(path, change(read_parquet(path)), key=key)


def test_a_whole_round_has_no_nulls(tmp_path: Path) -> None:
    gathered = gather(make_round(tmp_path))
    assert gathered["ref_chosen_logps"].to_list() == [-1.0, -11.0]
    assert gathered["rejected_ids"].to_list() == [[12, 4], [40, 4]]
    assert not any(column.null_count() for column in gathered)


def test_one_of_several_shards_is_not_enough(tmp_path: Path) -> None:
    files = make_round(tmp_path)
    one = {name: files[name][:1] for name in ("generations", "scores")}
    with pytest.raises(DataError, match=r"the mined pairs' chosen_row name row 11, which .*generations-00000.parquet"):
        gather(files, **one)
    with pytest.raises(
        DataError, match=r"has 12 responses, but .* has 6 scores.*\(2 files of generations, 1 of scores"
    ):
        gather(files, scores=files["scores"][:1])


def test_shards_in_another_order_are_refused(tmp_path: Path) -> None:
    files = make_round(tmp_path)
    swapped = {name: files[name][::-1] for name in ("generations", "scores")}
    with pytest.raises(DataError, match=r"row 0 of the mined pairs is of prompt 0, but its chosen_row 1 .*of prompt 2"):
        gather(files, **swapped)


def test_scores_of_other_generations_are_refused(tmp_path: Path) -> None:
    files = make_round(tmp_path)
    rewrite(files["scores"][0], lambda scores: scores[:-1])
    with pytest.raises(DataError, match=r"generations-00000.* has 6 responses, but .*scores-00000.* has 5 scores"):
        gather(files)
    # The same number of rows, but made from another file: the scores say from which.
    sampled, scored = tmp_path / "g.parquet", tmp_path / "s.parquet"
    write_parquet(sampled, pl.DataFrame({"a": [1]}), key="first")
    for made_from, fits in (("first", True), (None, True), ("second", False)):
        write_parquet(scored, pl.DataFrame({"logp": [1.0]}), key="s", meta={"generations_key": made_from})
        if fits:
            check_row_aligned([sampled], [scored])
        else:
            with pytest.raises(DataError, match="has the scores of another file than"):
                check_row_aligned([sampled], [scored])


def test_prompts_that_are_missing_or_there_twice(tmp_path: Path) -> None:
    files = make_round(tmp_path)
    prompts = read_parquet(files["prompts"])
    with pytest.raises(DataError, match="the mined pairs name prompt_id 3, which the file of prompts does not have"):
        gather(files, prompts=prompts.filter(pl.col("prompt_id") != 3))
    with pytest.raises(DataError, match="has prompt_id 3 more than once"):
        gather(files, prompts=pl.concat([prompts, prompts[3:]]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda mined: mined.drop("chosen_row"), "no column 'chosen_row'.*the file that dice mine wrote"),
        (lambda mined: mined.cast({"chosen_row": pl.Float64}), "'chosen_row' has dtype Float64"),
        (lambda mined: mined.with_columns(rejected_row=pl.lit("x")), "'rejected_row' has dtype String"),
        (lambda mined: mined.with_columns(rejected_row=pl.lit(-1)), "'rejected_row' is -1 in row 0"),
        (lambda mined: mined.with_columns(chosen_row=pl.lit(None, pl.UInt64)), "'chosen_row' is None in row 0"),
        (lambda mined: mined.with_columns(chosen_row=pl.lit(2**64 - 1, pl.UInt64)), "row 18446744073709551615"),
        (lambda mined: mined.with_columns(prompt_id=3 - mined["prompt_id"]), "row 0 of the mined pairs is of prompt 3"),
    ],
)
def test_a_wrong_file_of_mined_pairs(tmp_path: Path, change: Any, said: str) -> None:
    files = make_round(tmp_path)
    with pytest.raises(DataError, match=said):
        gather(files, mined=change(read_parquet(files["mined"])))


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("scores", {"logp": pl.lit(None, pl.Float32)}, r"scores-00000.*'logp' is None in row 1"),
        ("scores", {"logp": pl.lit(float("nan"))}, r"scores-00000.*'logp' is nan in row 1"),
        (
            "scores",
            {"logp": pl.lit(7.5)},
            r"'logp' is 7.5 in row 1, but the logarithm .* never above zero",
        ),
        ("scores", {"logp": pl.lit("text")}, r"scores-00000.*'logp' has dtype String"),
        ("generations", {"token_ids": pl.lit("text")}, r"generations-00000.*'token_ids' is String, not a list"),
        ("generations", {"token_ids": pl.lit([2**63], pl.List(pl.UInt64))}, r"token id 9223372036854775808 in row 0"),
        ("generations", {"token_ids": pl.lit([1, -1], pl.List(pl.Int64))}, r"'token_ids' has the token id -1 in row 0"),
        (
            "generations",
            {"token_ids": pl.lit([1, None], pl.List(pl.Int32))},
            r"'token_ids' holds nulls among the token ids of row 0",
        ),
        ("generations", {"token_ids": pl.lit(None, pl.List(pl.Int32))}, r"'token_ids' holds nulls, the first in row 0"),
        ("generations", {"response": pl.lit(None, pl.String)}, r"'response' must hold text"),
    ],
)
def test_values_that_cannot_be_trained_on(tmp_path: Path, kind: str, change: dict[str, Any], said: str) -> None:
    files = make_round(tmp_path)
    rewrite(files[kind][0], lambda frame: frame.with_columns(**change))
    with pytest.raises(DataError, match=said):
        gather(files)


def test_token_ids_are_named_by_row() -> None:
    frame = pl.DataFrame({"ids": [[], [3, 4], [], [0, 9, 2], [1]]})
    check_token_ids(frame, "ids", "here", 10)
    with pytest.raises(DataError, match=r"here: column 'ids' has the token id 9 in row 3.*vocabulary of 9"):
        check_token_ids(frame, "ids", "here", 9)
    with pytest.raises(DataError, match="no column 'other'"):
        check_token_ids(frame, "other", "here")


def test_looking_up_keeps_the_order_and_every_row() -> None:
    table = pl.DataFrame({"k": [5, 1, 3, 7], "v": ["e", "a", "c", "g"]})
    found = look_up(pl.DataFrame({"k": [3, 5, 3]}), table, "k", who="keys", where="table")
    assert found["v"].to_list() == ["c", "e", "c"]
    with pytest.raises(DataError, match=r"keys name k 4, which table does not have \(nor 1 others\)"):
        look_up(pl.DataFrame({"k": [3, 9, 4]}), table, "k", who="keys", where="table")
    with pytest.raises(DataError, match="keys: k is null in row 1"):
        look_up(pl.DataFrame({"k": [3, None]}), table, "k", who="keys", where="table")


def test_no_left_join_remains() -> None:
    """A left join gives nulls where nothing is found: `look_up` is the one place that has one, and checks before."""
    import dice_py

    package = Path(dice_py.__file__).parent
    left = [str(file.relative_to(package)) for file in package.rglob("*.py") if 'how="left"' in file.read_text()]
    assert sorted(left) == ["mining/gather.py", "storage/lookup.py"]


def test_pairs_mined_from_other_responses_are_refused(tmp_path: Path) -> None:
    """As those of another round, of which every row number fits."""
    files = make_round(tmp_path)
    other = read_parquet(files["mined"]).with_columns(pl.col("chosen_length") + 1)
    with pytest.raises(DataError, match=r"are of other responses than .*neither their rewards nor their lengths"):
        gather(files, mined=other)
    # Mined by another reward, or by lengths of the user's own; or by both, and then without what can be compared.
    gather(files, mined=other.with_columns(chosen_reward=pl.lit(0.1), rejected_reward=pl.lit(0.1)))
    gather(files, mined=other.select("prompt_id", "chosen_row", "rejected_row"))


def test_a_pair_of_one_response_is_refused(tmp_path: Path) -> None:
    files = make_round(tmp_path)
    same = read_parquet(files["mined"]).with_columns(rejected_row=pl.col("chosen_row"))
    with pytest.raises(DataError, match="row 0 names response 1 as chosen and as rejected"):
        gather(files, mined=same)
