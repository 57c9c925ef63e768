"""Two rounds: the second one replays what the first mined, and mines the candidates of both."""

from __future__ import annotations

import json
import math
from pathlib import Path

import polars as pl
import pytest
from own_run import Events, no_worker, own_config
from polars.testing import assert_frame_equal
from tiny_models import make_mistral

from dice_py.replay.buffer import ReplayBuffer
from dice_py.runs import folder as run_folder
from dice_py.runs import loop
from dice_py.runs import round as round_jobs
from dice_py.scoring.pairs import score_pairs
from dice_py.storage.files import read_json
from dice_py.storage.keys import seed_for

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("inline_stages")]


def test_a_second_round_replays_what_the_first_mined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = tmp_path / "second.jsonl"
    rows = [{"prompt": f"another question {n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(20)]
    second.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = own_config(
        tmp_path, make_mistral, "rounds=2", "data.prompts_per_round=10", "evaluate.prompts=2", "train.max_steps=2",
        "replay.buffer.capacity=8", "replay.buffer.half_life=1", "replay.buffer.share=2",
        f"replay.buffers.second.path={second}",
    )  # fmt: skip
    folder = tmp_path / "run"
    loop.run(config, folder)
    assert pl.read_parquet(folder / "inputs/buffer-second.parquet").height == 20

    mined = [pl.read_parquet(folder / f"round-{n:02d}/mine/mined.parquet") for n in (1, 2)]
    kept = [pl.read_parquet(folder / f"buffer/round-{n:02d}.parquet") for n in (1, 2)]
    assert kept[0].height == min(8, mined[0].height)
    assert mined[1].height > 0
    generations = pl.concat(pl.read_parquet(f) for f in sorted((folder / "round-01/generate").glob("gen*.parquet")))
    first = kept[0]
    for side in ("chosen", "rejected"):
        tokens = generations["token_ids"].gather(mined[0][f"{side}_row"].gather(first["index"]))
        assert first[f"{side}_ids"].to_list() == tokens.to_list()
    assert first["margin"].to_list() == mined[0]["margin"].gather(first["index"]).to_list()

    # A share of ½ is as many as were mined. Round 1 has two buffers; round 2 its own past as well, at half of it.
    sets = [pl.read_parquet(folder / f"round-{n:02d}/replay/training_set.parquet") for n in (1, 2)]
    sources = [dict(frame["source"].value_counts().iter_rows()) for frame in sets]
    assert set(sources[0]) == {"mined", "replay", "replay:second"}
    stages = read_json(folder / "manifest.json")["stages"]
    asked = stages["round-02/replay"]["counts"]["buffers"]
    assert list(asked) == ["replay", "second", "rounds"]
    assert sum(found["requested"] for found in asked.values()) == mined[1].height
    assert abs(asked["rounds"]["requested"] - mined[1].height / 2) < 1
    drawn = sets[1].filter(pl.col("source") == "replay:rounds")
    assert drawn.height == min(asked["rounds"]["requested"], first.height) > 0
    stored = {(tuple(p), tuple(c)) for p, c in first.select("prompt_ids", "chosen_ids").iter_rows()}
    assert {(tuple(p), tuple(c)) for p, c in drawn.select("prompt_ids", "chosen_ids").iter_rows()} <= stored
    # Scored again, by the policy that round 2 starts from; it is not the one that sampled them.
    policies = [Path(str(config.model.policy)), folder / "round-01/train/model"]
    for policy, near in zip(policies, (False, True), strict=True):
        logps = score_pairs(config.score, config.model, policy=policy, pairs=drawn)
        assert ((logps["chosen_logp"] - drawn["ref_chosen_logps"]).abs().max() < 1e-3) is near

    # A resume makes the lost set again, from the same buffer, and appends nothing.
    lost = folder / "round-02/replay/training_set.parquet"
    lost.unlink()
    before = {path: path.stat().st_mtime_ns for path in (folder / "buffer").iterdir()}
    events = Events()
    loop.resume(folder, events)
    assert [stage for stage, status in events.stages() if status == "done"] == ["round-02/replay"]
    assert_frame_equal(pl.read_parquet(lost), sets[1], check_exact=True)
    assert {path: path.stat().st_mtime_ns for path in (folder / "buffer").iterdir()} == before

    # What a round draws from is part of its key: with another past, its set is made again.
    monkeypatch.setattr(run_folder, "run_in_subprocess", no_worker)
    entry = ReplayBuffer(folder / "buffer", 8, seed_for(config.seed, "buffer"))
    entry.append(1, kept[0].drop("round", "index", "priority")[:3], "another past")
    monkeypatch.setattr(round_jobs, "append_mined", lambda *_, **__: None)
    events = Events()
    with pytest.raises(AssertionError, match="replay:ReplayJob"):
        loop.resume(folder, events)
    assert events.stages()[-1] == ("round-02/replay", "running")
    assert ("round-01/replay", "kept") in events.stages()


# Candidates of several rounds


@pytest.mark.long
def test_a_second_round_mines_the_candidates_of_both(tmp_path: Path) -> None:
    # Of 22 prompts each round takes 14, so that some are asked in both.
    config = own_config(
        tmp_path, make_mistral, "rounds=2", "data.prompts_per_round=14", "evaluate.prompts=2", "train.max_steps=2",
        "mine.pool_rounds=2", "mine.chosen_from=newest", "mine.rejected_from=oldest", "replay.buffer.capacity=50",
    )  # fmt: skip
    folder = tmp_path / "run"
    loop.run(config, folder)

    stages = read_json(folder / "manifest.json")["stages"]
    sampled = [[folder / f["file"] for f in stages[f"round-{n:02d}/generate"]["files"]] for n in (1, 2)]
    files = [[folder / f["file"] for f in stages[f"round-{n:02d}/score"]["files"]] for n in (1, 2)]
    assert [len(found) for found in files] == [2, 4]
    generations = pl.concat(pl.read_parquet(file) for found in sampled for file in found)
    first, second = (pl.concat(map(pl.read_parquet, found)) for found in files)
    old, new = second[: first.height], second[first.height :]
    assert second.height == generations.height == 2 * first.height == 2 * new.height
    # Round 2's reference is what round 1 started from; its policy is another model.
    assert (old["ref_logp"] - first["logp"]).abs().max() < 1e-3
    assert (old["logp"] - first["logp"]).abs().max() > 1e-2
    assert ((second["logp"] - second["ref_logp"]) * 0.1 - second["reward"]).abs().max() < 1e-4

    mined = pl.read_parquet(folder / "round-02/mine/mined.parquet")
    sampled_in = pl.Series([1 + (row >= first.height) for row in range(second.height)])
    for side in ("chosen", "rejected"):
        rows = mined[f"{side}_row"]
        assert generations["prompt_id"].gather(rows).to_list() == mined["prompt_id"].to_list()
        assert second["reward"].gather(rows).to_list() == mined[f"{side}_reward"].to_list()
        assert sampled_in.gather(rows).to_list() == mined[f"{side}_policy"].to_list()
    asked = [set(pl.read_parquet(folder / f"round-{n:02d}/generate/prompts.parquet")["prompt_id"]) for n in (1, 2)]
    assert len(asked[0] & asked[1]) == 6
    # The newest and the oldest round that left the prompt something to use.
    usable = generations.with_columns(round=sampled_in).filter(pl.col("finish_reason") != "length")
    known = usable.group_by("prompt_id").agg(newest=pl.col("round").max(), oldest=pl.col("round").min())
    expected = mined.select("prompt_id").join(known, on="prompt_id", how="left", maintain_order="left")
    assert mined["chosen_policy"].to_list() == expected["newest"].to_list()
    assert mined["rejected_policy"].to_list() == expected["oldest"].to_list()
    assert mined.filter(chosen_policy=2, rejected_policy=1).height > 0
    assert read_json(folder / "round-02/mine/mining.json")["pooled_rounds"] == [1, 2]

    # What is trained on is of the right prompts, and has the log-probabilities of round 2's policy.
    training = pl.read_parquet(folder / "round-02/replay/training_set.parquet").filter(pl.col("source") == "mined")
    prompts = pl.read_parquet(folder / "inputs/prompts.parquet")
    texts = dict(zip(prompts["prompt_id"], prompts["messages"].to_list(), strict=True))
    assert training["prompt"].to_list() == [texts[prompt] for prompt in mined["prompt_id"]]
    assert training["chosen_ids"].to_list() == generations["token_ids"].gather(mined["chosen_row"]).to_list()
    logps = score_pairs(config.score, config.model, policy=folder / "round-01/train/model", pairs=training)
    for side in ("chosen", "rejected"):
        assert (logps[f"{side}_logp"] - training[f"ref_{side}_logps"]).abs().max() < 1e-3
    assert abs(stages["round-02/train"]["counts"]["step0_loss"] - math.log(2)) < 1e-3
    buffer = pl.read_parquet(folder / "buffer/round-02.parquet")
    assert set(map(tuple, buffer["chosen_ids"])) <= set(map(tuple, training["chosen_ids"]))

    # A resume scores the lost shard of the first round again, and nothing else.
    lost = files[1][0]
    lost.unlink()
    events = Events()
    loop.resume(folder, events)
    assert [stage for stage, status in events.stages() if status == "done"] == ["round-02/score"]
    assert [fields["file"] for event, fields in events.events if event == "shard"] == [lost.name]
    assert_frame_equal(pl.concat(map(pl.read_parquet, files[1])), second, check_exact=True)
