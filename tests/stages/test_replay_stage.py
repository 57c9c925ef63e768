"""The replay stage on a tiny model: the source of the token ids and log-probabilities of each pair, and its label."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
from polars.testing import assert_frame_equal
from tiny_round import make_round
from tiny_sets import CPU

from dice_py.config.stages import ReplayConfig, ScoreConfig
from dice_py.data import Pair, pairs_frame
from dice_py.errors import DataError, UsageError
from dice_py.models.tokenization import encode_pairs, load_tokenizer, stop_token_ids
from dice_py.replay import gathered
from dice_py.replay.appended import append_mined
from dice_py.replay.buffer import ReplayBuffer
from dice_py.scoring.pairs import score_pairs
from dice_py.stages.replay import ReplayJob
from dice_py.storage.parquet import parquet_meta, read_parquet, write_parquet
from dice_py.storage.schemas import PAIRS, TRAINING_SET


def offline_pairs(path: Path, name: str, rows: int, **columns: Any) -> Path:
    pairs: list[Pair] = [
        {
            "prompt": [{"role": "user", "content": f"{name} {n}"}],
            "chosen": [{"role": "assistant", "content": "good" * (1 + n % 4)}],
            "rejected": [{"role": "assistant", "content": f"bad {n}"}],
        }
        for n in range(rows)
    ]
    return write_parquet(path / f"{name}.parquet", pairs_frame(pairs).with_columns(**columns), key=name)


def run(config: ReplayConfig, policy: Path, out: Path, **inputs: Any) -> tuple[pl.DataFrame, dict[str, Any], list[str]]:
    """The training set, the summary and the notes."""
    notes: list[str] = []

    def report(event: str, **fields: Any) -> None:
        if event == "note":
            notes.append(fields["text"])

    inputs = {"mined": None, "generations": [], "scores": [], "prompts": None, "offline": None} | inputs
    key = inputs.pop("key", "k")
    job = ReplayJob(config, ScoreConfig(), CPU, policy=policy, out=out, seed=0, input_keys=key, **inputs)
    result = job.run(report)
    assert result.files == [(out / "training_set.parquet", job.key())]
    assert job.incomplete(result.files) == []
    return pl.read_parquet(out / "training_set.parquet"), result.counts, notes


def test_token_ids_and_logps_of_every_source(llama: Path, tmp_path: Path) -> None:
    earlier, this_round = make_round(tmp_path / "1", first=50), make_round(tmp_path / "2")
    buffer = ReplayBuffer(tmp_path / "buffer", 10, 0)
    append_mined(buffer, 1, **earlier)
    config = ReplayConfig.model_validate(
        {
            "gamma": 0.8,
            "on_shortfall": "error",
            "margin_power": 1.0,
            "half_life": 1.0,
            "buffers": {"uf": {"path": "unused", "share": 1.0}},
            "buffer": {"share": 1.0, "half_life": 2.0},
            "share": 2.0,
        }
    )
    weight_columns = {"margin": pl.Series([0.0] * 10 + [1.0] * 10), "round": pl.Series([2] * 20)}
    training_set, summary, notes = run(
        config,
        llama,
        tmp_path / "out",
        **this_round,
        offline=offline_pairs(tmp_path, "offline", 20, **weight_columns),
        buffers={"uf": offline_pairs(tmp_path, "uf", 20)},
        rounds_buffer=buffer,
        round_number=2,
    )
    assert training_set.schema == TRAINING_SET | {"margin": pl.Float32()}
    assert training_set["source"].to_list() == [
        *["mined"] * 2, *["replay"] * 4, *["replay:uf"] * 2, *["replay:rounds"] * 2
    ]  # fmt: skip
    assert (summary["mined"], summary["replay"], summary["reached_share"], notes) == (2, 8, 0.8, [])
    assert summary["buffers"]["rounds"] == {"drawn": 2, "requested": 2, "candidates": 2, "shortfall": 0}
    assert summary["buffers"]["replay"]["candidates"] == 10  # the margin of the others is zero
    assert parquet_meta(tmp_path / "out/training_set.parquet") == summary
    by_source = training_set.partition_by("source", as_dict=True)
    # Mined in this round: the log-probabilities of the score stage; rows 1 and 11, 2 and 9 of both shards.
    assert by_source[("mined",)]["ref_chosen_logps"].to_list() == [-1.0, -11.0]
    assert by_source[("mined",)]["ref_rejected_logps"].to_list() == [-2.0, -9.0]
    # Mined earlier: the sampled token ids, which the tokenizer does not produce for this text.
    earlier_pairs = by_source[("replay:rounds",)]
    assert earlier_pairs["chosen_ids"].to_list() == [[11, 4], [42, 4]]
    assert [messages[0]["content"] for messages in earlier_pairs["prompt"].to_list()] == ["q50", "q53"]
    tokenizer = load_tokenizer(llama, CPU)
    messages = earlier_pairs.select("prompt", "chosen", "rejected")
    encoded = encode_pairs(messages, tokenizer, stop_token_ids(llama, tokenizer))
    assert encoded["chosen_ids"].to_list() != earlier_pairs["chosen_ids"].to_list()
    # From files: tokenized by the policy's tokenizer.
    for source in ("replay", "replay:uf"):
        part = by_source[(source,)].select(PAIRS.names())
        messages = part.select("prompt", "chosen", "rejected")
        assert_frame_equal(encode_pairs(messages, tokenizer, stop_token_ids(llama, tokenizer)), part)
    replayed = training_set.filter(pl.col("source") != "mined")
    logps = score_pairs(ScoreConfig(), CPU, policy=llama, pairs=replayed)
    assert (logps["chosen_logp"] - replayed["ref_chosen_logps"]).abs().max() < 1e-4
    assert (logps["rejected_logp"] - replayed["ref_rejected_logps"]).abs().max() < 1e-4


def test_strata_by_length_in_characters_and_in_tokens(llama: Path, tmp_path: Path) -> None:
    buffer = ReplayBuffer(tmp_path / "buffer", 10, 0)
    append_mined(buffer, 1, **make_round(tmp_path / "1", first=50))
    config = ReplayConfig.model_validate(
        {
            "total": 12,
            "stratify_by": "length",
            "allocation": "equal",
            "buffer": {"share": 0.5},
            "on_shortfall": "record",
        }
    )
    training_set, summary, notes = run(
        config,
        llama,
        tmp_path / "out",
        offline=offline_pairs(tmp_path, "offline", 40),
        rounds_buffer=buffer,
        round_number=2,
    )
    # Without mined pairs all 12 are replayed, 8 and 4. Answers have 4, 8, 12 and 16 characters, or 2 tokens.
    assert summary["buffers"]["replay"]["strata"] == {"4-4": 2, "8-8": 2, "12-12": 2, "16-16": 2}
    assert summary["buffers"]["rounds"]["strata"] == {"2-2": 2}
    assert training_set["source"].value_counts(sort=True).rows() == [("replay", 8), ("replay:rounds", 2)]
    assert summary["shortfall"] == {"mined": 0, "replay": 2}
    assert [note for note in notes if "short of 2 offline (rounds 2) and 0 mined ones" in note]
    assert "data.prompts_per_round" in notes[0]


def test_prompts_mined_in_this_round_are_not_replayed(llama: Path, tmp_path: Path) -> None:
    round_files = make_round(tmp_path / "1")
    buffer = ReplayBuffer(tmp_path / "buffer", 10, 0)
    append_mined(buffer, 1, **round_files)
    config = ReplayConfig.model_validate({"buffer": {}})
    training_set, summary, _ = run(config, llama, tmp_path / "out", **round_files, rounds_buffer=buffer, round_number=2)
    assert set(training_set["source"]) == {"mined"}
    assert summary["buffers"]["rounds"] == {"drawn": 0, "requested": 2, "candidates": 0, "shortfall": 2}
    strict = config.model_copy(update={"on_shortfall": "error"})
    with pytest.raises(DataError, match="takes 2 mined and 2 offline pairs"):
        run(strict, llama, tmp_path / "out", **round_files, rounds_buffer=buffer, round_number=2)


@pytest.mark.parametrize("column", ["token_ids", "response"])
def test_mined_pairs_of_equal_answers_are_left_out_and_counted(llama: Path, tmp_path: Path, column: str) -> None:
    """Two samples of one text, whose rewards differ in their last digits."""
    files = make_round(tmp_path / "1")
    shard = pl.read_parquet(files["generations"][0])
    same = shard.with_columns(
        pl.when(pl.col("prompt_id") == 0).then(pl.col(column).first()).otherwise(column).alias(column)
    )
    write_parquet(files["generations"][0], same, key="g")
    training_set, summary, notes = run(ReplayConfig(gamma=0.0), llama, tmp_path / "out", **files)
    assert training_set.height == summary["mined"] == 1
    assert "1 of 2 mined pairs left out: chosen and rejected are the same answer" in notes[0]
    buffer = ReplayBuffer(tmp_path / "buffer", 10, 0)
    append_mined(buffer, 1, **files)
    assert buffer.read(2).height == 1


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_first_round_has_no_earlier_round_to_replay(llama: Path, tmp_path: Path, gamma: float) -> None:
    round_files = make_round(tmp_path / "1")
    buffer = ReplayBuffer(tmp_path / "buffer", 10, 0)
    append_mined(buffer, 1, **round_files)
    config = ReplayConfig.model_validate({"gamma": gamma, "buffer": {}, "on_shortfall": "error"})
    training_set, summary, notes = run(
        config, llama, tmp_path / "out", **round_files, rounds_buffer=buffer, round_number=1
    )
    assert training_set["source"].to_list() == ["mined", "mined"]
    assert (summary["mined"], summary["replay"], summary["requested_share"]) == (2, 0, 0.0)
    assert notes == ["no earlier round to replay from: this round trains on mined pairs alone"]
    # With offline pairs, they get the share of the rounds' buffer.
    offline = offline_pairs(tmp_path, "offline", 20)
    training_set, summary, _ = run(
        config,
        llama,
        tmp_path / "out",
        **{**round_files, "key": "with offline pairs"},
        offline=offline,
        rounds_buffer=buffer,
        round_number=1,
    )
    assert training_set["source"].value_counts(sort=True).filter(pl.col("source") == "replay")["count"].to_list() == [2]
    assert "buffers" not in summary


def test_several_buffers_without_mined_pairs_need_a_total(llama: Path, tmp_path: Path) -> None:
    config = ReplayConfig.model_validate({"buffers": {"a": {"path": "unused"}, "b": {"path": "unused"}}})
    buffers = {name: offline_pairs(tmp_path, name, 3) for name in ("a", "b")}
    with pytest.raises(UsageError, match=r"there are 2: set how many pairs with replay\.total"):
        run(config, llama, tmp_path / "out", buffers=buffers)
    training_set, _, _ = run(config.model_copy(update={"total": 4}), llama, tmp_path / "out", buffers=buffers)
    assert training_set["source"].to_list() == ["replay:a", "replay:a", "replay:b", "replay:b"]


def test_dice_replay_with_several_buffers(
    dice: Callable[..., tuple[int, str, str]], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, share in (("own", 0), ("uf", 100)):
        rows = [
            {"prompt": f"{name} {n}", "chosen": "a" * (1 + n % 4), "rejected": "b", "margin": n % 2, "round": n % 3}
            for n in range(share, share + 40)
        ]
        Path(f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options = "--replay own.jsonl --buffer uf=uf.jsonl:3 --margin-power 1 --half-life 1 --round 2"
    options += " --stratify-by length --allocation equal --set replay.length_buckets=2 --set replay.total=16"
    options += f" --set model.device=cpu --policy {llama} -o out --json"
    code, out, err = dice("replay", *options.split())
    assert code == 0, err
    result = json.loads(out)
    # Shares 1 and 3 of 16; every other row of the first has a margin above zero; lengths 1, 2 and 3, 4.
    assert result["buffers"]["replay"] == {
        "drawn": 4, "requested": 4, "candidates": 20, "shortfall": 0, "strata": {"1-2": 2, "3-4": 2},
    }  # fmt: skip
    assert result["buffers"]["uf"]["strata"] == {"1-2": 6, "3-4": 6}
    training_set = pl.read_parquet(result["training_set"])
    assert training_set["source"].to_list() == ["replay"] * 4 + ["replay:uf"] * 12
    numbers = [int(messages[0]["content"].split()[1]) for messages in training_set["prompt"].to_list()]
    assert all(n % 2 for n in numbers[:4])


def test_pairs_that_are_gathered_one_at_a_time_are_the_same(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    this_round = make_round(tmp_path / "1")
    # One offline pair is on a prompt that was mined, which must not be drawn.
    offline = offline_pairs(tmp_path, "q", 6, weight=pl.Series([1.0] * 6))
    inputs = {**this_round, "offline": offline}
    config = ReplayConfig(gamma=0.5)
    expected, counts, _ = run(config, llama, tmp_path / "whole", **inputs)
    monkeypatch.setattr(gathered, "AT_ONCE", 1)
    prompts = read_parquet(this_round["prompts"])
    with pq.ParquetWriter(this_round["prompts"], prompts.to_arrow(compat_level=pl.CompatLevel.oldest()).schema) as file:
        for row in prompts.iter_slices(1):  # a row group for each prompt
            file.write_table(row.to_arrow(compat_level=pl.CompatLevel.oldest()))
    found, again, _ = run(config, llama, tmp_path / "parts", **inputs)
    assert_frame_equal(found, expected)
    assert again == counts
    assert expected["source"].to_list() == ["mined"] * 2 + ["replay"] * 2
    assert sorted(file.name for file in (tmp_path / "parts").iterdir()) == ["training_set.parquet"]


def test_a_prompt_that_is_not_there_when_pairs_are_gathered_one_at_a_time(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathered, "AT_ONCE", 1)
    this_round = make_round(tmp_path / "1")
    prompts = read_parquet(this_round["prompts"])
    write_parquet(this_round["prompts"], prompts[:3], key="p")
    with pytest.raises(DataError, match="the mined pairs name prompt_id 3, which the file of prompts does not have"):
        run(ReplayConfig(gamma=0.0), llama, tmp_path / "out", **this_round)
    assert not list((tmp_path / "out").iterdir())
