"""A round on base models without a chat template, with what the settings say of every prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from own_run import frames, own_config
from tiny_models import make_llama, make_tokenizer
from transformers import AutoTokenizer

from dice_py.config.run import RunConfig
from dice_py.models.own_template import PLAIN
from dice_py.runs import loop
from dice_py.storage.files import read_json

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("inline_stages")]


def make_base(folder: Path, **changes: Any) -> Path:
    """A model whose tokenizer has no chat template."""
    make_llama(folder, **changes)
    (folder / "chat_template.jinja").unlink()
    make_tokenizer("plain").save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return own_config(
        tmp_path, make_base, "generate.max_new_tokens=16", "train.max_steps=1", "evaluate.prompts=0", "report.pairs=0",
        "model.chat_template=none", "data.system_prompt=Be brief.",
    )  # fmt: skip


def test_a_base_model_is_prompted_in_plain_text(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    loop.run(config, folder)
    base = make_tokenizer("plain")
    sampled, training = frames(folder, "generate/*-0*.parquet"), frames(folder, "replay/training_set.parquet")
    asked = set(base.batch_decode(sampled["prompt_token_ids"].to_list()))
    assert all(text.startswith("<s>Be brief.\n\nquestion number ") for text in asked)
    replayed = training.filter(pl.col("source") == "replay")
    for row in replayed.iter_rows(named=True):
        assert base.decode(row["prompt_ids"]).startswith("<s>Be brief.\n\noffline question ")
        assert base.decode(row["chosen_ids"]) == row["chosen"][0]["content"] + "</s>"
    # Whoever serves the new model renders prompts as they were trained.
    trained = AutoTokenizer.from_pretrained(folder / "round-01/train/model")
    assert trained.chat_template == "{{ bos_token }}" + PLAIN
    before = read_json(folder / "manifest.json")["stages"]
    loop.resume(folder, assignments=["data.system_prompt=Be long."])
    after = read_json(folder / "manifest.json")["stages"]
    assert all(before[name]["key"] != after[name]["key"] for name in before)
