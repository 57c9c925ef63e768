"""A run on responses that were sampled elsewhere: by the ids of an earlier run's shards, and by text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from own_run import Events, frames, own_config
from polars.testing import assert_frame_equal
from tiny_models import make_mistral

from dice_py.config.loading import reassigned
from dice_py.config.run import RunConfig
from dice_py.runs import loop
from dice_py.runs.status import run_status
from dice_py.storage.files import read_json

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("inline_stages")]
STOP = 2  # </s>


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("given")
    return own_config(
        folder, make_mistral, "generate.max_new_tokens=16", "train.max_steps=1", "evaluate.prompts=2", "report.pairs=0"
    )


@pytest.fixture(scope="module")
def sampled(small: RunConfig, inline_stages: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that sampled. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "sampled"
    loop.run(small, folder)
    return folder


def test_the_ids_of_an_earlier_run_give_its_pairs(small: RunConfig, sampled: Path, tmp_path: Path) -> None:
    shards = f"{sampled}/round-01/generate/generations-*.parquet"
    events = Events()
    loop.run(reassigned(small, [f"generate.from_files=[{shards}]"]), tmp_path / "run", events)
    for pattern in ("generate/generations-*.parquet", "score/scores-*.parquet", "mine/mined.parquet"):
        ours, theirs = (frames(run, pattern) for run in (tmp_path / "run", sampled))
        assert_frame_equal(ours, theirs, check_exact=True)
    training = "round-01/replay/training_set.parquet"
    assert_frame_equal(*(pl.read_parquet(run / training) for run in (tmp_path / "run", sampled)), check_exact=True)
    counts = [
        read_json(run / "manifest.json")["stages"]["round-01/generate"]["counts"] for run in (tmp_path / "run", sampled)
    ]
    assert counts[0] == counts[1] | {"engine": "given"}


def without_prompts(config: RunConfig, *files: Path) -> RunConfig:
    names = ",".join(map(str, files))
    return reassigned(config, ["data.prompts=null", f"generate.from_files=[{names}]"])


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def texts(count: int) -> list[dict[str, Any]]:
    """One row a prompt, with three texts; and further ones to the first prompt."""
    rows: list[dict[str, Any]] = [
        {"prompt": f"why {n}?", "response": [f"because {n}", f"I do not know, {n}", "…" * n or "no"],
         "finish_reason": ["stop", "eos", "max_tokens"]}
        for n in range(count)
    ]  # fmt: skip
    more = {"prompt": [{"role": "user", "content": "why 0?"}], "response": "That has a </s> in it.", "logp": -9.5}
    return [*rows, more]


def test_text_alone_makes_a_round_and_its_prompts_are_the_runs(small: RunConfig, tmp_path: Path) -> None:
    source = write(tmp_path / "texts.jsonl", texts(20))
    folder, events = tmp_path / "run", Events()
    config = without_prompts(small, source)
    metrics = loop.run(config, folder, events)
    assert list(metrics) == ["round-01"]
    made = frames(folder, "generate/generations-*.parquet")
    asked_of = pl.read_parquet(folder / "round-01/generate/prompts.parquet")
    of = {number: messages[0]["content"] for number, messages in asked_of["prompt_id", "messages"].iter_rows()}
    held_out = pl.read_parquet(folder / "inputs/eval_prompts.parquet")["messages"].to_list()
    assert len(held_out) == 2
    assert {*of.values()} | {messages[0]["content"] for messages in held_out} == {f"why {n}?" for n in range(20)}
    notes = [fields["text"] for event, fields in events.events if event == "note"]
    left_out = sum(4 if messages[0]["content"] == "why 0?" else 3 for messages in held_out)
    assert f"{left_out} of the given responses are to held-out prompts: left out" in notes
    for row in made.iter_rows(named=True):
        asked = of[row["prompt_id"]]
        n = int(asked.strip("why ?"))
        expected = [f"because {n}", f"I do not know, {n}", "…" * n or "no", "That has a </s> in it."][row["sample_id"]]
        assert row["response"] == expected
        # A byte-level tokenizer: bytes of the text, after the ids of six special tokens; the template has the prompt.
        assert row["finish_reason"] == ("length" if row["sample_id"] == 2 else "stop")
        assert (row["token_ids"][-1] == STOP) == (row["sample_id"] != 2)
        assert len(row["token_ids"]) == len(expected.encode()) + (row["sample_id"] != 2)
        assert STOP not in row["token_ids"][:-1]
    scores = frames(folder, "score/scores-*.parquet")
    assert scores["logp"].is_finite().all()  # made by the policy: the texts came without
    assert scores.height == made.height
    # Nothing is done again, and the run does not need its source.
    source.unlink()
    again = Events()
    loop.resume(folder, again)
    assert {status for _, status in again.stages()} == {"kept"}
    assert run_status(folder)["state"] == "finished"


@pytest.mark.long
def test_the_second_round_samples(small: RunConfig, tmp_path: Path) -> None:
    source = write(tmp_path / "texts.jsonl", texts(8))
    config = reassigned(without_prompts(small, source), ["rounds.count=2", "evaluate.pairs=0", "evaluate.prompts=0"])
    loop.run(config, tmp_path / "run")
    stages = read_json(tmp_path / "run/manifest.json")["stages"]
    engines = [stages[f"round-0{number}/generate"]["counts"]["engine"] for number in (1, 2)]
    assert engines == ["given", "transformers"]
    assert stages["round-02/generate"]["counts"]["responses"] == 8 * config.generate.samples


@pytest.mark.long
def test_changed_responses_are_taken_again(small: RunConfig, tmp_path: Path) -> None:
    source = write(tmp_path / "texts.jsonl", texts(6))
    config = reassigned(without_prompts(small, source), ["evaluate.pairs=0", "evaluate.prompts=0"])
    loop.run(config, tmp_path / "run")
    rows = texts(6)
    rows[3]["response"][0] = "another answer"
    write(source, rows)
    events = Events()
    loop.resume(tmp_path / "run", events)
    assert ("round-01/generate", "running") in events.stages()
    assert "another answer" in frames(tmp_path / "run", "generate/generations-*.parquet")["response"].to_list()
