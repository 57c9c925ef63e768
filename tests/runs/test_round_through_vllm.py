"""A round whose responses vLLM samples on the CPU."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import polars as pl
import pytest
import torch
from own_run import MAX_NEW, PROMPTS, SAMPLES, frames, own_config
from tiny_models import make_llama

from dice_py.runs import loop
from dice_py.runs.status import run_status
from dice_py.storage.files import read_json

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="measured with vLLM's CPU build, and a GPU is here")
def test_a_round_through_vllm(tmp_path: Path) -> None:
    settings = ("generate.engine=vllm", "generate.vllm.kv_cache_gib=0.25", "evaluate.prompts=0")
    folder = tmp_path / "run"
    loop.run(own_config(tmp_path, make_llama, *settings), folder)
    assert run_status(folder)["state"] == "finished"
    counts = {name: entry["counts"] for name, entry in read_json(folder / "manifest.json")["stages"].items()}
    assert counts["round-01/generate"]["engine"] == "vllm"
    generations = frames(folder, "generate/generations-*.parquet")
    assert generations.height == PROMPTS * SAMPLES
    cut = generations.filter(pl.col("finish_reason") == "length")
    assert set(generations["finish_reason"]) == {"stop", "length"}
    assert set(cut["response_tokens"]) == {MAX_NEW}
    dropped = counts["round-01/mine"]["dropped"]
    assert dropped["truncated"] == cut.height == counts["round-01/generate"]["cut_off"]
    mined = frames(folder, "mine/*.parquet")
    for side in ("chosen_row", "rejected_row"):
        assert set(generations["finish_reason"].gather(mined[side])) == {"stop"}
    scores = frames(folder, "score/*.parquet")
    assert (scores["logp"] - generations["sampled_logp"]).abs().max() < 1e-3
    assert abs(counts["round-01/train"]["step0_loss"] - math.log(2)) < 1e-3
