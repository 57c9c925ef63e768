"""The mine stage of a run: which shards a round mines, in a pool of rounds too, and what it leaves behind.

Shards are made by hand: nothing here imports torch.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from dice_py import mine_pairs
from dice_py.config.mining import MineConfig
from dice_py.errors import DataError
from dice_py.mining.segments import SEGMENT_BYTES
from dice_py.replay.appended import append_mined
from dice_py.replay.buffer import ReplayBuffer
from dice_py.replay.mined import gather_mined
from dice_py.runs.candidates import Candidates, candidates
from dice_py.stages.mine import MineJob
from dice_py.storage.files import Manifest, read_json
from dice_py.storage.parquet import parquet_key, parquet_meta, read_parquet, write_parquet
from dice_py.storage.schemas import GENERATIONS, MINED, PROMPTS, SCORES

SAMPLES, SHARDS = 3, 2
ROUNDS = {1: range(4), 2: range(2, 6)}
"""Of each round its prompts: 2 and 3 are in both."""


def messages(prompt: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"question {prompt}"}]


def make_generations(folder: Path, number: int, tokens: Any = lambda prompt: [100 + prompt]) -> list[dict[str, str]]:
    """A round's prompts and shards of generations, as a run leaves them; what the manifest says of the shards."""
    base = folder / f"round-{number:02d}/generate"
    asked = ROUNDS[number]
    prompts = pl.DataFrame({"prompt_id": asked, "messages": [messages(p) for p in asked]}, schema=PROMPTS)
    write_parquet(base / "prompts.parquet", prompts, key=f"prompts {number}", schema=PROMPTS)
    made = []
    for shard in range(SHARDS):
        rows = [
            # In both rounds the first sample of a prompt is the same; the others are not.
            (p, s, tokens(p), [p, s, number if s else 0, 4], f"round {number} {p} {s}", 4 + s, 20 + s, "stop", -1.0)
            for p in asked[shard * 2 : shard * 2 + 2]
            for s in range(SAMPLES)
        ]
        file = base / f"generations-{shard:05d}.parquet"
        frame = pl.DataFrame(rows, schema=GENERATIONS, orient="row")
        write_parquet(file, frame, key=f"key {number}", meta={"samples": str(shard)})
        made.append({"file": str(file.relative_to(folder)), "key": f"key {number}"})
    Manifest(folder / "manifest.json").record(f"round-{number:02d}/generate", files=made)
    return made


def make_scores(folder: Path, pool: Candidates) -> list[Path]:
    """Scores of every shard, row-aligned: rewards by the row's number in the pool, without ties."""
    files, row = [], 0
    for n, shard in enumerate(pool.generations):
        rows = []
        for _ in range(read_parquet(shard).height):
            rows.append((-float(row), -1.0 - row % 3, math.sin(5.0 * row)))
            row += 1
        file = folder / f"scores-{n:05d}.parquet"
        files.append(write_parquet(file, pl.DataFrame(rows, schema=SCORES, orient="row"), key=f"scores {n}"))
    return files


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with two rounds of generations."""
    for number in ROUNDS:
        make_generations(tmp_path, number)
    return tmp_path


def pool_of(run: Path, number: int = 2, pool_rounds: int = 2) -> Candidates:
    return candidates(run, Manifest(run / "manifest.json"), number, pool_rounds)


def mine_job(
    run: Path, config: MineConfig, pool: Candidates, scores: list[Path], seed: int = 5, **further: Any
) -> MineJob:
    return MineJob(
        **further,
        config=config,
        generations=pool.generations,
        scores=scores,
        score_keys=[f"scores {n}" for n in range(len(scores))],
        rounds=pool.rounds,
        out=run / "out",
        seed=seed,
    )


def mined_pool(
    run: Path, config: MineConfig, number: int = 2
) -> tuple[dict[str, Any], pl.DataFrame, Candidates, list[Path]]:
    """The stage's counts, its pairs, the pool and its scores."""
    pool = pool_of(run, number, config.pool_rounds)
    scores = make_scores(run / "scores", pool)
    result = mine_job(run, config, pool, scores).run()
    return result.counts, read_parquet(run / "out/mined.parquet"), pool, scores


def whole(pool: Candidates, scores: list[Path]) -> pl.DataFrame:
    """All rows of a pool with the round that sampled them, put together without the stage."""
    shards = zip(pool.generations, scores, pool.rounds, strict=True)
    parts = [
        pl.read_parquet(g).hstack(pl.read_parquet(s)).with_columns(round=pl.lit(r, pl.UInt32)) for g, s, r in shards
    ]
    return pl.concat(parts)


# Which shards


def test_one_round_is_its_own_pool(run: Path) -> None:
    pool = pool_of(run, pool_rounds=1)
    assert [str(file.relative_to(run)) for file in pool.generations] == [
        "round-02/generate/generations-00000.parquet",
        "round-02/generate/generations-00001.parquet",
    ]
    assert (pool.keys, pool.rounds) == (["key 2 0", "key 2 1"], [2, 2])
    assert pool.prompts == run / "round-02/generate/prompts.parquet"
    assert not (run / "round-02/mine").exists()


def test_a_pool_is_of_the_last_rounds_the_oldest_first(run: Path) -> None:
    assert pool_of(run, number=1) == pool_of(run, number=1, pool_rounds=1)
    pool = pool_of(run)
    assert pool.keys == ["key 1 0", "key 1 1", "key 2 0", "key 2 1"]
    assert pool.rounds == [1, 1, 2, 2]
    assert pool == pool_of(run, pool_rounds=9)
    prompts = read_parquet(pool.prompts)
    assert prompts["prompt_id"].to_list() == [0, 1, 2, 3, 4, 5]
    assert prompts["messages"].to_list() == [messages(p) for p in range(6)]
    assert dict(prompts.schema) == dict(PROMPTS)
    assert pool.prompts == run / "round-02/mine/prompts.parquet"


def test_the_prompts_of_a_pool_are_written_once(run: Path) -> None:
    before = pool_of(run).prompts.stat().st_mtime_ns
    key = parquet_key(pool_of(run).prompts)
    assert pool_of(run).prompts.stat().st_mtime_ns == before
    manifest = Manifest(run / "manifest.json")
    made = manifest.data["stages"]["round-01/generate"]["files"]
    manifest.record("round-01/generate", files=[made[0], {**made[1], "key": "another"}])
    assert parquet_key(pool_of(run).prompts) != key


def test_equal_ids_of_unequal_prompts_are_refused(run: Path) -> None:
    file = run / "round-02/generate/prompts.parquet"
    prompts = read_parquet(file).with_columns(prompt_id=pl.col("prompt_id") - 1)
    write_parquet(file, prompts, key="others", schema=PROMPTS)
    with pytest.raises(DataError, match=r"prompt_id [123] belongs to two different prompts in the pooled rounds"):
        pool_of(run)
    assert not (run / "round-02/mine").exists()


def test_a_prompt_of_other_tokens_is_refused(run: Path) -> None:
    make_generations(run, 2, tokens=lambda prompt: [100 + prompt + (prompt == 3)])
    with pytest.raises(DataError, match=r"prompt_id 3 has different token ids in two of the pooled rounds"):
        pool_of(run)
    assert pool_of(run, pool_rounds=1).rounds == [2, 2]


# What is mined


def test_by_default_the_pairs_have_no_further_column(run: Path) -> None:
    found, pairs, pool, scores = mined_pool(run, MineConfig())
    expected = mine_pairs(whole(pool, scores), min_length=1)
    assert dict(pairs.schema) == dict(MINED)
    assert_frame_equal(pairs, expected.pairs, check_exact=True)
    stored = read_json(run / "out/mining.json")
    curve = stored.pop("curve")
    assert stored == found
    assert stored == {"length": "tokens", "debias": "linear", "pairing": "max_min"} | expected.summary()
    assert curve == expected.curve.to_dict(as_series=False)
    assert list(curve) == ["alpha", "mean_length_gap", "exact"]
    assert parquet_key(run / "out/mined.parquet") == mine_job(run, MineConfig(), pool, scores).key()


@pytest.mark.parametrize(
    "options",
    [
        {"pool_rounds": 2},
        {"pool_rounds": 2, "chosen_from": "newest", "rejected_from": "oldest"},
        {"pool_rounds": 2, "drop_duplicates": True, "min_responses": 5},
        {"pairing": "max_random", "length": "chars", "second_reward": "logp"},
        {
            "pool_rounds": 2, "pairing": "top_bottom", "pairs_per_prompt": 3, "win_rates": True, "soft_labels": True,
            "difficulty_quantile": 0.5, "second_reward": "ref_logp", "min_margin": 0.1,
        },
    ],
)  # fmt: skip
def test_the_stage_mines_as_the_miner_does(run: Path, options: dict[str, Any]) -> None:
    config = MineConfig(**options)
    found, pairs, pool, scores = mined_pool(run, config)
    expected = mine_pairs(whole(pool, scores), config.options(5))
    assert expected.pairs.height > 0
    stored = expected.pairs
    if "difficulty" in stored.columns:  # text in a file, so that every reader gets it
        stored = stored.with_columns(pl.col("difficulty").cast(pl.String))
    assert_frame_equal(pairs, stored, check_exact=True)
    assert found["pairs"] == pairs.height
    assert found.get("pooled_rounds") == ([1, 2] if "pool_rounds" in options else None)


@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"debias": "none", "pairing": "max_random"},
        {"debias": "per_token", "pairing": "max_sweet_spot", "drop_duplicates": True},
        {"debias": "bucket", "length": "chars"},
        {"debias": "matched", "length_tolerance": 1, "pool_rounds": 2},
        {"pool_rounds": 2, "chosen_from": "newest", "rejected_from": "oldest", "drop_duplicates": True},
        {
            "pool_rounds": 2, "pairing": "top_bottom", "pairs_per_prompt": 3, "win_rates": True, "soft_labels": True,
            "difficulty_quantile": 0.5, "second_reward": "ref_logp", "min_margin": 0.1,
        },
        {"pairing": "all_pairs", "min_margin_quantile": 0.3},
    ],
)  # fmt: skip
def test_a_stream_of_shards_is_mined_as_their_frame(run: Path, options: dict[str, Any], rows: int) -> None:
    """Segments of few rows cut shards, and prompts of the pool are in two shards."""
    config = MineConfig(**options)
    pool = pool_of(run, 2, config.pool_rounds)
    scores = make_scores(run / "scores", pool)
    made = []
    for out, memory_gib in ((run / "whole", 1.0), (run / "streamed", rows * SEGMENT_BYTES / 2**30)):
        job = replace(mine_job(run, config, pool, scores, memory_gib=memory_gib), out=out)
        counts = job.run().counts
        mined = out / "mined.parquet"
        summary = read_json(out / "mining.json")
        assert [file.name for file in sorted(out.iterdir())] == ["mined.parquet", "mining.json"]
        made.append((counts, summary, read_parquet(mined), parquet_key(mined), parquet_meta(mined)))
    whole_run, streamed = made
    assert_frame_equal(streamed[2], whole_run[2], check_exact=True)
    assert streamed[:2] == whole_run[:2]
    assert streamed[3:] == whole_run[3:]


def test_a_prompt_may_straddle_shards_of_a_stream(run: Path) -> None:
    pool = pool_of(run, pool_rounds=1)
    first, second = pool.generations
    rows = pl.concat([read_parquet(first), read_parquet(second)])
    for file, part in ((first, rows[:4]), (second, rows[4:])):  # the second prompt's rows are 3, 4 and 5
        write_parquet(file, part, key=str(parquet_key(file)), schema=GENERATIONS)
    scores = make_scores(run / "scores", pool)
    pairs = []
    for memory_gib in (1.0, SEGMENT_BYTES / 2**30):
        mine_job(run, MineConfig(), pool, scores, memory_gib=memory_gib).run()
        pairs.append(read_parquet(run / "out/mined.parquet"))
    assert {3, 4, 5} > {pairs[0]["chosen_row"][1], pairs[0]["rejected_row"][1]}
    assert_frame_equal(*pairs, check_exact=True)


def test_a_stream_without_a_pair_says_why(run: Path) -> None:
    pool = pool_of(run)
    job = mine_job(run, MineConfig(min_margin=1e6), pool, make_scores(run / "scores", pool), memory_gib=1e-9)
    with pytest.raises(DataError, match=r"no pair is left of 24 responses"):
        job.run()
    assert list((run / "out").iterdir()) == []


def test_the_seed_of_the_run_is_the_draws(run: Path) -> None:
    config = MineConfig(pairing="max_random", pool_rounds=2)
    pool = pool_of(run)
    scores = make_scores(run / "scores", pool)
    drawn = []
    for seed in (1, 1, 2, 3):
        mine_job(run, config, pool, scores, seed).run()
        drawn.append(read_parquet(run / "out/mined.parquet")["rejected_row"].to_list())
    assert drawn[0] == drawn[1]
    assert len({tuple(rows) for rows in drawn}) > 1


def test_newest_and_oldest_are_rounds(run: Path) -> None:
    config = MineConfig(pool_rounds=2, chosen_from="newest", rejected_from="oldest", debias="none")
    _, pairs, pool, scores = mined_pool(run, config)
    rows = whole(pool, scores)
    for side in ("chosen", "rejected"):
        assert pairs[f"{side}_policy"].to_list() == rows["round"].gather(pairs[f"{side}_row"]).to_list()
        assert rows["prompt_id"].gather(pairs[f"{side}_row"]).to_list() == pairs["prompt_id"].to_list()
    # Prompts 0 and 1 are of the first round alone, 4 and 5 of the second; the others have a choice.
    policies = {row[0]: row[1:] for row in pairs.select("prompt_id", "chosen_policy", "rejected_policy").iter_rows()}
    assert {p: policies[p] for p in (0, 1, 4, 5)} == {0: (1, 1), 1: (1, 1), 4: (2, 2), 5: (2, 2)}
    shared = [policies[p] for p in (2, 3) if p in policies]
    assert shared
    assert set(shared) == {(2, 1)}


def test_equal_tokens_of_two_rounds_count_once(run: Path) -> None:
    found = mined_pool(run, MineConfig(pool_rounds=2, drop_duplicates=True))[0]
    assert found["dropped"]["duplicate"] == 2  # the first sample of prompts 2 and 3
    assert mined_pool(run, MineConfig(pool_rounds=2))[0]["dropped"]["duplicate"] == 0


def test_no_pair_is_left(run: Path) -> None:
    with pytest.raises(
        DataError, match=r"no pair is left of 12 responses to 4 prompts.*below_min_margin 4 pairs.*lower min_margin"
    ):
        mined_pool(run, MineConfig(min_margin=1e6))
    with pytest.raises(DataError, match="no pair is left of 12 responses") as caught:
        mined_pool(run, MineConfig(min_length=100))
    assert "below_min_margin" not in str(caught.value)
    assert not (run / "out").exists()


def test_scores_of_another_round_are_refused(run: Path) -> None:
    pool = pool_of(run)
    scores = make_scores(run / "scores", pool)
    with pytest.raises(DataError, match=r"has 24 responses, but .* has 18 scores: they are not of one round"):
        mine_job(run, MineConfig(pool_rounds=2), pool, scores[:-1]).run()


# What comes after


@pytest.mark.parametrize("pairing", ["max_min", "all_pairs"])
def test_the_training_set_is_gathered_from_the_pool(run: Path, pairing: Any) -> None:
    _, pairs, pool, scores = mined_pool(run, MineConfig(pool_rounds=2, pairing=pairing))
    rows = whole(pool, scores)
    files = {"generations": pool.generations, "scores": scores}
    found = gather_mined(pairs, **files, prompts=read_parquet(pool.prompts))
    assert found.height == pairs.height
    assert found["prompt"].to_list() == [messages(p) for p in pairs["prompt_id"]]
    assert found["prompt_ids"].to_list() == [[100 + p] for p in pairs["prompt_id"]]
    for side in ("chosen", "rejected"):
        at = pairs[f"{side}_row"]
        assert found[f"{side}_ids"].to_list() == rows["token_ids"].gather(at).to_list()
        assert [turns[0]["content"] for turns in found[side]] == rows["response"].gather(at).to_list()
        assert found[f"ref_{side}_logps"].to_list() == rows["logp"].gather(at).to_list()
    buffer = ReplayBuffer(run / "buffer", 100, 0)
    append_mined(buffer, 2, mined=run / "out/mined.parquet", **files, prompts=pool.prompts, key="mined")
    kept, differ = buffer.read(), found["chosen_ids"] != found["rejected_ids"]
    assert (pairing == "max_min") == differ.all()  # the same sample of two rounds is no pair
    assert kept["chosen_ids"].to_list() == found.filter(differ)["chosen_ids"].to_list()
    assert kept["margin"].to_list() == pairs.filter(differ)["margin"].to_list()


@pytest.mark.parametrize("length", ["tokens", "chars"])
@pytest.mark.parametrize("text", ["", " \n\t "])
def test_a_response_without_text_is_not_mined(run: Path, text: str, length: Any) -> None:
    """Its stop token is one token, which has a log-probability and so a reward."""
    pool = pool_of(run, pool_rounds=1)
    scores = make_scores(run, pool)
    for file in pool.generations:
        first = pl.col("sample_id") == 0
        shard = read_parquet(file).with_columns(
            response=pl.when(first).then(pl.lit(text)).otherwise("response"),
            response_tokens=pl.when(first).then(1).otherwise("response_tokens"),
            response_chars=pl.when(first).then(len(text)).otherwise("response_chars"),
        )
        write_parquet(file, shard, key=str(parquet_key(file)), schema=GENERATIONS)
    named = {"debias": "none", "length": length}
    result = mine_job(run, MineConfig.model_validate(named), pool, scores).run()
    assert result.counts["dropped"]["too_short"] == 4
    rows = {row for side in ("chosen_row", "rejected_row") for row in read_parquet(result.files[0][0])[side].to_list()}
    assert not any(row % SAMPLES == 0 for row in rows)
    # Asked for by name, they are as others.
    kept = mine_job(run, MineConfig.model_validate({**named, "min_length": 0}), pool, scores).run()
    assert kept.counts["dropped"]["too_short"] == 0
