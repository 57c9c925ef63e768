"""Mined pairs beside generations and scores whose rows are in another order, where every row number fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dice_py.errors import DataError
from dice_py.mining.pairs import mine_pairs
from dice_py.replay.same_responses import check_same_responses

SHARDS, PROMPTS, SAMPLES = 2, 6, 5


def shards(seed: int = 0) -> list[pl.DataFrame]:
    """Both kinds of shard as one frame each: rewards are all distinct, as implicit rewards are."""
    rows = [
        {"prompt_id": shard * PROMPTS + prompt, "reward": ((7 * prompt + 13 * sample + 5 * shard) % 101) / 7 + shard,
         "response_tokens": 3 + (11 * sample + prompt) % 17, "response_chars": 9 + (7 * sample + 2 * prompt) % 41}
        for shard in range(SHARDS) for prompt in range(PROMPTS) for sample in range(SAMPLES)
    ]  # fmt: skip
    frame = pl.DataFrame(rows).with_columns(pl.col("reward") + pl.int_range(pl.len()) / 1000 + seed)
    size = PROMPTS * SAMPLES
    return [frame[start : start + size] for start in range(0, SHARDS * size, size)]


def check(folder: Path, mined: pl.DataFrame, generations: list[pl.DataFrame], scores: list[pl.DataFrame]) -> None:
    files: dict[str, list[Path]] = {"generations": [], "scores": []}
    for kind, frames in (("generations", generations), ("scores", scores)):
        for number, frame in enumerate(frames):
            path = folder / f"{kind}-{number:05d}.parquet"
            (frame.drop("reward") if kind == "generations" else frame.select("reward")).write_parquet(path)
            files[kind].append(path)
    sampled = pl.concat(generations).drop("reward")
    rows = sampled.hstack(pl.concat(scores).select("reward")).with_row_index("row").cast({"row": pl.UInt64})
    check_same_responses(mined, rows, **files)


def mined(frames: list[pl.DataFrame], **options: Any) -> pl.DataFrame:
    pairs = mine_pairs(pl.concat(frames), **options).pairs
    assert pairs.height > 5
    return pairs


@pytest.mark.parametrize(
    "options", [{}, {"pairing": "all_pairs"}, {"debias": "none"}, {"debias": "per_token"}], ids=str
)
def test_what_was_mined_passes(options: dict[str, Any], tmp_path: Path) -> None:
    frames = shards()
    check(tmp_path, mined(frames, **options), frames, frames)
    check(tmp_path, mined(frames, length_column="response_chars", **options), frames, frames)


def test_scores_in_another_order(tmp_path: Path) -> None:
    """The log-probabilities that training starts from would be those of other responses."""
    frames = shards()
    with pytest.raises(DataError, match=r"scores-00000\.parquet and 1 more: the rows are in another order"):
        check(tmp_path, mined(frames), frames, [frames[0].reverse(), frames[1]])
    with pytest.raises(DataError, match="the pairs' rewards are there"):
        check(tmp_path, mined(frames), frames, frames[::-1])


def test_responses_in_another_order_in_their_prompts(tmp_path: Path) -> None:
    frames = shards()
    order = frames[0].sort("prompt_id", "response_tokens", maintain_order=True)
    with pytest.raises(DataError, match=r"generations-00000\.parquet and 1 more: .*the pairs' lengths are there"):
        check(tmp_path, mined(frames), [order, frames[1]], frames)


def test_rewards_and_lengths_of_the_users_own_pass(tmp_path: Path) -> None:
    frames = shards()
    pairs = mined(frames)
    words = pl.col("chosen_length", "rejected_length") * 3
    check(tmp_path, pairs.with_columns(words), frames, frames)
    # Scored again: other last digits. By a judge, of whose marks many are equal: no sign of another order.
    check(tmp_path, pairs, frames, [frame.with_columns(pl.col("reward") + 1e-5) for frame in frames])
    judged = [frame.with_columns(reward=(pl.int_range(pl.len()) % 5).cast(pl.Float64)) for frame in frames]
    marks = {"chosen_reward": pl.lit(4.0, pl.Float32), "rejected_reward": pl.lit(1.0, pl.Float32)}
    check(tmp_path, pairs.with_columns(**marks), frames, judged)
