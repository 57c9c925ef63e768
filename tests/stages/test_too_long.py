"""Prompts and pairs that are longer than a model has positions: a sentence before the work, never an IndexError."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from notes import Notes
from tiny_models import make_llama, make_tokenizer
from tiny_sets import CPU, IDS, token_pairs

from dice_py.config.loading import resolve
from dice_py.config.stages import ScoreConfig
from dice_py.config.training import TrainConfig
from dice_py.data import read_pairs, read_prompts
from dice_py.errors import DataError, UsageError
from dice_py.models.limits import check_positions
from dice_py.scoring.pairs import score_pairs
from dice_py.scoring.shards import Columns, check_lengths
from dice_py.stages.preflight_data import check_data
from dice_py.stages.train import TrainJob
from dice_py.storage.parquet import write_parquet
from dice_py.storage.schemas import TRAINING_SET, fit

PROMPT = "What is two?"  # 32 tokens as tiny_models' ChatML renders it


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 64 positions."""
    return make_llama(tmp_path_factory.mktemp("short") / "model", max_position_embeddings=64)


def folder(path: Path, positions: int) -> Path:
    """A model of which only the config and the tokenizer are read."""
    path.mkdir()
    (path / "config.json").write_text(
        json.dumps({"model_type": "llama", "vocab_size": 262, "max_position_embeddings": positions})
    )
    make_tokenizer().save_pretrained(path)
    return path


def test_the_first_of_those_that_are_too_long_is_named() -> None:
    check_positions([1, 64], 64, where="f", model="m", remedy="r")
    check_positions([1, 64], None, where="f", model="m", remedy="r")
    with pytest.raises(DataError, match=r"^f, row 1: prompt and response have 65 tokens, but m has 64 positions; r$"):
        check_positions([1, 65, 2], 64, where="f", model="m", remedy="r")
    with pytest.raises(DataError, match=r"positions \(2 are too long\); r"):
        check_positions([1, 65, 66], 64, where="f", model="m", remedy="r")


def test_generations_of_the_users_own(tmp_path: Path) -> None:
    file = tmp_path / "own.parquet"
    rows = {"p": [[1, 2], [1] * 40], "r": [[3], [2] * 30]}
    pl.DataFrame(rows, schema={"p": IDS, "r": IDS}).write_parquet(file)
    model = folder(tmp_path / "model", 64)
    with pytest.raises(DataError, match=r"own\.parquet, row 1: prompt and response have 70 tokens, but .* has 64 pos"):
        check_lengths(file, Columns("p", "r"), model, CPU)
    check_lengths(file, Columns("p", "r"), folder(tmp_path / "longer", 70), CPU)


def test_pairs_that_reach_the_scorer(short: Path) -> None:
    pairs = token_pairs(2).with_columns(prompt_ids=pl.Series([[7] * 100] * 2, dtype=IDS))
    with pytest.raises(DataError, match=r"the responses to score, row 0: .* 64 positions \(4 are too long\)"):
        score_pairs(ScoreConfig(), CPU, policy=short, pairs=pairs)


def test_a_training_set(short: Path, tmp_path: Path) -> None:
    pairs = token_pairs(3).with_columns(
        pl.lit(0.0).alias("ref_chosen_logps"), pl.lit(0.0).alias("ref_rejected_logps"), source=pl.lit("mined")
    )
    pairs = pairs.with_columns(prompt_ids=pl.Series([[7, 8], [7] * 100, [7, 8]], dtype=IDS))
    turns = pl.lit(None, dtype=TRAINING_SET["prompt"])
    pairs = fit(pairs.with_columns(prompt=turns, chosen=turns, rejected=turns), TRAINING_SET)
    job = TrainJob(
        config=TrainConfig(), models=CPU, policy=short, training_set_key="k", out=tmp_path / "out", beta=0.1, seed=0,
        training_set=write_parquet(tmp_path / "set.parquet", pairs, key="k", schema=TRAINING_SET),
    )  # fmt: skip
    with pytest.raises(DataError, match=r"set\.parquet, pair 1: .*leave longer pairs out with train\.max_length=64"):
        job.run()


class TestCheckOfARun:
    """What `check_data` says of prompts and pairs before the first round."""

    def check(self, tmp_path: Path, positions: int = 256, *assign: str, **answers: str) -> list[str]:
        model = folder(tmp_path / "model", positions)
        (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": PROMPT}))
        rows = [{"prompt": PROMPT, "chosen": text, "rejected": "x"} for text in answers.values()]
        (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
        prompts = write_parquet(tmp_path / "p.parquet", read_prompts(tmp_path / "p.jsonl"), key="k")
        pairs = [write_parquet(tmp_path / "q.parquet", read_pairs(tmp_path / "q.jsonl"), key="k")] if rows else []
        notes = Notes()
        config = resolve([], ["generate.max_new_tokens=16", *assign], {}, one_stage=True)
        check_data(config, policy=model, reference=model, prompts=[prompts], pairs=pairs, report=notes)
        return notes.texts

    def test_pairs_are_left_out_and_counted(self, tmp_path: Path) -> None:
        notes = self.check(tmp_path, 128, a="y", b="word " * 60)
        assert "1 of 2 offline pairs left out: longer than the model's 128 positions" in notes

    def test_a_file_without_a_pair_that_fits(self, tmp_path: Path) -> None:
        with pytest.raises(
            DataError, match=r"none of the 1 offline pairs in q\.parquet can be used: they are too long"
        ):
            self.check(tmp_path, 128, b="word " * 60)

    def test_prompts_and_new_tokens(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"48 together, but the model in .* has 40 positions"):
            self.check(tmp_path, 40)

    @pytest.mark.parametrize("limit", [8, 32])
    def test_max_length_below_every_prompt(self, tmp_path: Path, limit: int) -> None:
        with pytest.raises(UsageError, match=rf"train\.max_length is {limit}, but the shortest prompt alone has 32"):
            self.check(tmp_path, 256, f"train.max_length={limit}")

    def test_max_length_above_a_prompt(self, tmp_path: Path) -> None:
        assert self.check(tmp_path, 256, "train.max_length=33", a="y")

    def test_what_max_length_leaves_out_is_told(self, tmp_path: Path) -> None:
        """The offline answer y and its end are 34 tokens with the prompt, the other 61."""
        notes = self.check(tmp_path, 256, "train.max_length=60", a="y", b="w" * 28)
        (said,) = [text for text in notes if "train.max_length" in text]
        assert said.startswith("warning: train.max_length=60 leaves 1 of 2 offline pairs out of the training")
        assert "the longest has 61 tokens" in said

    def test_no_prompt_is_short_enough(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"none of the 1 prompts of p\.parquet has at most 5 tokens"):
            self.check(tmp_path, 256, "data.max_prompt_tokens=5")
