"""The mine stage with lengths of answers alone, without the thinking part of a response."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from dice_py.config.mining import MineConfig
from dice_py.errors import DataError
from dice_py.stages.mine import MineJob
from dice_py.storage.parquet import read_parquet, write_parquet
from dice_py.storage.schemas import GENERATIONS, SCORES


def test_thinking_is_no_part_of_the_answers_length(tmp_path: Path) -> None:
    names = ["[UNK]", "<think>", "</think>", "</s>", *"abcdefgh"]
    inner = Tokenizer(WordLevel({name: at for at, name in enumerate(names)}, unk_token="[UNK]"))
    inner.save(str(tmp_path / "tokenizer.json"))
    think, close, end, a = 1, 2, 3, 4
    answers = [
        [think, a, a, a, a, close, a, a, end],  # 3 tokens of an answer, of 9
        [a, a, a, a, end],  # 5
        [think, a, a, a, a, a],  # 0: not closed, so that it is dropped as too short
        [a, close, a, end],  # 2: begun inside of the thinking
    ]
    rows = [(p, s, [a], ids, "text", len(ids), 4, "stop", -1.0) for p in (0, 1) for s, ids in enumerate(answers)]
    generations = tmp_path / "generations.parquet"
    write_parquet(generations, pl.DataFrame(rows, schema=GENERATIONS, orient="row"), key="g")
    rewards = [(-1.0, -1.0, reward) for reward in (0.3, 0.1, 9.0, 0.2) * 2]
    scores = write_parquet(tmp_path / "scores.parquet", pl.DataFrame(rewards, schema=SCORES, orient="row"), key="s")
    job = MineJob(
        config=MineConfig(length="answer_tokens", debias="none"), generations=[generations], scores=[scores],
        score_keys=["s"], rounds=[1], out=tmp_path / "out", seed=0, policy=tmp_path,
    )  # fmt: skip
    counts = job.run().counts
    mined = read_parquet(tmp_path / "out/mined.parquet")
    assert mined["chosen_row"].to_list() == [0, 4]  # not the response of the highest reward, which never answers
    assert mined["chosen_length"].to_list() == [3, 3]
    assert mined["rejected_length"].to_list() == [5, 5]
    assert (counts["length"], counts["dropped"]["too_short"]) == ("answer_tokens", 2)
    other = replace(job, thinking=["a", "b"])
    assert other.key() != job.key()
    assert replace(other, config=MineConfig()).key() == replace(job, config=MineConfig()).key()
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"mine\.length=answer_tokens needs .*tokenizer\.json"):
        job.run()
