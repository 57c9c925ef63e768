"""A run from an SFT model: round 0 trains π_1 on the offline pairs, and the rounds go on from it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from own_run import PAIRS, SAMPLES, SMALL, STAGE_NAMES, Events, frames, only_preflight
from plan_data import COSTS
from report_page import Page, text
from tiny_gguf import make_gguf, make_llama_for_gguf

from dice_py.config.loading import resolve
from dice_py.config.run import RunConfig
from dice_py.config.shared import ModelConfig
from dice_py.config.stages import ScoreConfig
from dice_py.errors import InterruptedRunError
from dice_py.models.gguf import find_converted
from dice_py.planning.plan import plan
from dice_py.reporting.html import write_report
from dice_py.runs import folder as run_folder
from dice_py.runs import loop
from dice_py.runs.measured_costs import ResponseLengths, remember_costs, remember_lengths
from dice_py.runs.measured_lengths import lengths_key
from dice_py.runs.status import run_status
from dice_py.runs.throughput import costs_key
from dice_py.scoring.pairs import score_pairs
from dice_py.storage.files import read_json

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("inline_stages")]

ZERO = ["round-00/replay", "round-00/train"]
ALL = [*ZERO, *STAGE_NAMES]
STOP = {"tokenizer.ggml.eot_token_id": 2}  # a second stop token, so that enough responses end
CPU = ModelConfig(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """What `dice run --sft FILE.gguf --replay pairs.jsonl` resolves to, with small sizes."""
    folder = tmp_path_factory.mktemp("sft")
    own = {"tests.round_zero": 1}  # no other file of this content is in the session's cache
    sft = make_gguf(folder / "sft.gguf", make_llama_for_gguf(folder / "sft", seed=2), metadata=STOP | own)
    pairs = [{"prompt": f"question {n}", "chosen": f"good {n}", "rejected": f"a bad answer {n}"} for n in range(PAIRS)]
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    named = [f"model.sft={sft}", f"data.replay={folder / 'pairs.jsonl'}", "data.prompts_per_round=12"]
    return resolve([], [*named, "round0.max_steps=8", "round0.learning_rate=1e-4"], SMALL)


@pytest.fixture(scope="module")
def complete_run(config: RunConfig, inline_stages: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "complete"
    events = Events()
    metrics = loop.run(config, folder, events, after_round=write_report)
    assert list(metrics) == ["round-01"]
    assert events.stages() == [(name, status) for name in ALL for status in ("running", "done")]
    rounds = [fields["number"] for event, fields in events.events if event == "round"]
    assert rounds == [0, 1]
    notes = [fields["text"] for event, fields in events.events if event == "note"]
    assert notes[1].startswith("converting sft.gguf (llama, ")
    return folder


@pytest.fixture
def copy(complete_run: Path, tmp_path: Path) -> Path:
    """A copy of `complete_run`, to change."""
    return shutil.copytree(complete_run, tmp_path / "copy")


def sft_folder(config: RunConfig) -> Path:
    assert config.model.sft is not None
    folder = find_converted(Path(config.model.sft))
    assert folder is not None
    return folder


def test_round_zero_trains_on_all_offline_pairs_with_the_sft_model_as_the_reference(
    config: RunConfig, complete_run: Path
) -> None:
    offline = pl.read_parquet(complete_run / "inputs/offline.parquet")
    training = pl.read_parquet(complete_run / "round-00/replay/training_set.parquet")
    asked = [sorted(messages[0]["content"] for messages in frame["prompt"].to_list()) for frame in (offline, training)]
    assert asked[0] == asked[1]
    assert training.height == PAIRS - 3 - 2  # without the held-out pairs and prompts
    logps = score_pairs(ScoreConfig(), CPU, policy=sft_folder(config), pairs=training)
    for ours, theirs in zip(logps, training.select("ref_chosen_logps", "ref_rejected_logps"), strict=True):
        assert (ours - theirs).abs().max() < 1e-3  # type: ignore[operator]
    counts = read_json(complete_run / "manifest.json")["stages"]["round-00/train"]["counts"]
    assert (counts["pairs"], counts["steps"]) == (training.height, 8)
    assert abs(counts["step0_loss"] - math.log(2)) < 1e-3
    assert counts["final_loss"] < counts["step0_loss"]


def test_the_rounds_go_on_from_its_policy(config: RunConfig, complete_run: Path) -> None:
    manifest = read_json(complete_run / "manifest.json")
    assert manifest["policy"]["folder"] == str(complete_run / "round-00/train/model")
    assert manifest["reference"]["folder"] == str(sft_folder(config))
    generations, scores = frames(complete_run, "generate/*-*.parquet"), frames(complete_run, "score/scores-*.parquet")
    assert generations.height == 12 * SAMPLES  # of the pairs' prompts
    first = generations.unique("prompt_id", keep="first", maintain_order=True).with_row_index()
    pairs = first.select(prompt_ids="prompt_token_ids", chosen_ids="token_ids", rejected_ids="token_ids")
    rows = generations.with_row_index("row").unique("prompt_id", keep="first", maintain_order=True)["row"]
    for column, model in (("logp", complete_run / "round-00/train/model"), ("ref_logp", sft_folder(config))):
        logps = score_pairs(ScoreConfig(), CPU, policy=model, pairs=pairs)["chosen_logp"]
        assert (logps - scores[column].gather(rows)).abs().max() < 1e-3  # type: ignore[operator]
    assert scores["reward"].abs().max() > 0.01  # type: ignore[operator]


def test_what_shows_a_run_shows_round_zero(complete_run: Path) -> None:
    status = run_status(complete_run)
    assert (status["state"], status["done"], status["stages"]) == ("finished", 9, 9)
    assert [entry["stage"] for entry in status["entries"]] == ALL
    profiled = read_json(complete_run / "profile.json")["rounds"]
    assert [entry["round"] for entry in profiled] == ["round-00", "round-01"]
    assert [stage["stage"] for stage in profiled[0]["stages"]] == ZERO
    page = Page(complete_run / "report.html")
    assert [text(each.find("strong")) for each in page.all("p", "round-name")] == ["round-00", "round-01"]


def test_a_resume_keeps_round_zero(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Another share of replayed pairs in the rounds changes nothing of it.
    monkeypatch.setattr(run_folder, "run_in_subprocess", only_preflight)
    events = Events()
    with pytest.raises(AssertionError, match="replay:ReplayJob"):
        loop.resume(copy, events, assignments=["replay.gamma=0.25"])
    assert events.stages()[:5] == [(name, "kept") for name in ALL[:5]]


def test_a_lost_policy_is_trained_again_alone(copy: Path) -> None:
    shutil.rmtree(copy / "round-00/train/model")
    events = Events()

    def until_generate(event: str, **fields: Any) -> None:
        events(event, **fields)
        if fields.get("stage") == "round-01/generate":
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError):
        loop.resume(copy, until_generate)
    redone = [("round-00/train", "running"), ("round-00/train", "done")]
    assert events.stages()[:3] == [("round-00/replay", "kept"), *redone]


def test_the_plan_counts_round_zero(config: RunConfig, complete_run: Path, tmp_path: Path) -> None:
    # With costs that are kept, nothing is calibrated.
    sft = sft_folder(config)
    remember_costs(costs_key(config, sft, "transformers"), COSTS)
    lengths = ResponseLengths(lengths=[5], usable=1.0, cut_off=0.0)
    remember_lengths(lengths_key(config, sft, complete_run / "inputs/prompts.parquet"), lengths)
    planned = plan(config, tmp_path / "run")
    assert planned["calibration"]["source"] == "stored"
    assert list(planned["stages"]) == ALL
    train = planned["stages"]["round-00/train"]
    assert (train["pairs"], train["steps"]) == (PAIRS - 3 - 2, 8)
    assert planned["fits"]
