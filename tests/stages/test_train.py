"""Stage 5: the check at step 0, the pairs that are trained on, the saved model, and resuming from checkpoints."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_llama, make_mistral
from tiny_sets import CPU, scored_pairs
from tiny_training import PAIRS, Stage
from transformers import AutoModelForCausalLM

from dice_py.config.training import LoraConfig
from dice_py.errors import DataError
from dice_py.models.identity import model_identity
from dice_py.models.loading import load_model
from dice_py.models.tokenization import load_tokenizer
from dice_py.storage.digests import content_digest
from dice_py.storage.files import read_json
from dice_py.training.checkpoints import is_trained
from dice_py.training.dataset import load_training_set

pytestmark = pytest.mark.slow


@pytest.fixture
def run(llama: Path, pairs: pl.DataFrame, tmp_path: Path) -> Stage:
    return Stage(llama, pairs, tmp_path)


@pytest.fixture(scope="module")
def trained(llama: Path, pairs: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> tuple[Stage, dict[str, Any]]:
    """One uninterrupted run, and what it returned."""
    stage = Stage(llama, pairs, tmp_path_factory.mktemp("trained"))
    return stage, stage()


def largest_change(before: Path, after: Path) -> dict[str, float]:
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert old.keys() == new.keys()
    return {name: (old[name] - new[name]).abs().max().item() for name in old}


def test_starts_at_ln_2_and_trains(trained: tuple[Stage, dict[str, Any]], llama: Path) -> None:
    run, counts = trained
    assert counts["pairs"] == PAIRS
    assert counts["pairs_too_long"] == 0
    assert counts["steps"] == 6
    assert counts["step0_loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert counts["step0_max_abs_difference"] < 1e-3
    assert counts["final_loss"] < 0.9 * math.log(2)
    assert run.steps() == [1, 2, 3, 4, 5, 6]
    assert all(fields["total"] == 6 for event, fields in run.events if event == "progress")
    assert min(largest_change(llama, run.model).values()) > 0  # every matrix moved


def test_first_logged_loss_is_ln_2(trained: tuple[Stage, dict[str, Any]]) -> None:
    log = read_json(trained[0].model / "train_log.json")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)


def test_model_folder_is_complete(trained: tuple[Stage, dict[str, Any]], llama: Path) -> None:
    run, counts = trained
    stamp = read_json(run.model / "dice.json")
    files = {file.name: content_digest(file) for file in run.model.iterdir() if file.name != "dice.json"}
    start = model_identity(llama)
    assert stamp == {"key": run.job().key(), "counts": counts, "start": start, "files": files}
    assert is_trained(run.model, run.job().key())
    assert not is_trained(run.model, run.job("another").key())
    assert not is_trained(run.out, run.job().key())
    for name in ("generation_config.json", "chat_template.jinja"):
        assert (run.model / name).read_text() == (llama / name).read_text()
    weights, config = (run.model / name for name in ("model.safetensors", "config.json"))
    assert weights.stat().st_mode == config.stat().st_mode  # as the umask has it
    model = load_model(run.model, CPU)
    assert type(model) is type(load_model(llama, CPU))
    tokenizer = load_tokenizer(run.model, CPU)
    assert tokenizer.get_vocab() == load_tokenizer(llama, CPU).get_vocab()
    assert sorted(file.name for file in run.out.iterdir()) == ["log.jsonl", "model"]  # no checkpoints, no temporaries


def test_the_counts_tell_where_the_chosen_log_probabilities_went(
    trained: tuple[Stage, dict[str, Any]], pairs: pl.DataFrame
) -> None:
    """Both are of the last step, so what they imply of the reference is the mean of that step's pairs."""
    _, counts = trained
    reference = counts["final_chosen_logps"] - counts["final_chosen_change"]
    steps = combinations(pairs["ref_chosen_logps"].to_list(), 4)
    assert min(abs(sum(step) / 4 - reference) for step in steps) < 1e-3
    assert abs(counts["final_chosen_change"]) > 0.1


def test_model_without_padding_token(tmp_path: Path) -> None:
    policy = make_mistral(tmp_path / "mistral")
    counts = Stage(policy, scored_pairs(policy, 4), tmp_path)(max_steps=1)
    assert counts["step0_loss"] == pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize("side", ["ref_chosen_logps", "ref_rejected_logps"])
def test_wrong_reference_stops_at_step_0(run: Stage, side: str) -> None:
    with pytest.raises(DataError, match=r"loss at step 0 is 0\.\d+, not ln 2 = 0\.69315.*dice score") as caught:
        run(run.pairs.with_columns(pl.col(side) + 0.5))
    assert "differs by up to 0.5" in str(caught.value)
    assert not run.model.exists()
    assert run.steps() == []
    assert run()["steps"] == 6  # It trains with the right set.


def test_offset_that_leaves_the_loss_at_ln_2_stops_at_step_0(run: Stage) -> None:
    with pytest.raises(
        DataError, match=r"at step 0 a response's log-probability differs by 3 .*though the loss is ln 2"
    ):
        run(run.pairs.with_columns(pl.col("ref_chosen_logps", "ref_rejected_logps") + 3))
    assert not run.model.exists()


def test_reference_of_another_model_stops_at_step_0(run: Stage, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="step 0"):
        run(scored_pairs(make_llama(tmp_path / "other", seed=1), PAIRS))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_reference_that_is_not_finite(run: Stage, bad: float) -> None:
    first = pl.int_range(pl.len()) == 0
    broken = run.pairs.with_columns(pl.when(first).then(bad).otherwise("ref_chosen_logps").alias("ref_chosen_logps"))
    with pytest.raises(DataError, match="1 pairs have a reference log-probability that is not finite"):
        run(broken)


def test_missing_column(run: Stage) -> None:
    with pytest.raises(DataError, match="ref_chosen_logps"):
        run(run.pairs.drop("ref_chosen_logps"))


def test_text_instead_of_tokens(run: Stage) -> None:
    with pytest.raises(DataError, match="column 'chosen_ids' is String, not a list of token ids"):
        run(run.pairs.with_columns(chosen_ids=pl.lit("well")))


def test_reference_that_is_null(run: Stage) -> None:
    first = pl.int_range(pl.len()) == 0
    broken = run.pairs.with_columns(pl.when(~first).then("ref_rejected_logps").alias("ref_rejected_logps"))
    with pytest.raises(DataError, match="1 pairs have a reference log-probability that is not finite"):
        run(broken)


def test_sft_weight_adds_the_nll_of_the_chosen(run: Stage) -> None:
    counts = run(sft_weight=0.5, batch_size=PAIRS, per_device_train_batch_size=PAIRS, max_steps=1)
    nll = -run.pairs["ref_chosen_logps"].sum() / run.pairs["chosen_ids"].list.len().sum()
    assert counts["step0_loss"] == pytest.approx(math.log(2), abs=1e-3)  # of the DPO term alone
    assert counts["final_loss"] == pytest.approx(math.log(2) + 0.5 * nll, abs=2e-3)


def test_lora_is_merged_into_a_plain_model(run: Stage, llama: Path) -> None:
    counts = run(lora=LoraConfig(r=2, alpha=4, target_modules=["q_proj", "v_proj"]))
    assert counts["step0_loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert counts["final_loss"] < math.log(2)
    assert not list(run.model.glob("adapter*"))
    changes = largest_change(llama, run.model)
    moved = {name for name, change in changes.items() if change > 0}
    assert moved == {name for name in changes if "q_proj" in name or "v_proj" in name}
    assert type(AutoModelForCausalLM.from_pretrained(run.model)).__name__ == "LlamaForCausalLM"


def test_longer_pairs_are_left_out_and_counted(run: Stage, tmp_path: Path) -> None:
    answers = pl.max_horizontal(pl.col("chosen_ids").list.len(), pl.col("rejected_ids").list.len())
    lengths = run.pairs.select(pl.col("prompt_ids").list.len() + answers).to_series()
    limit = int(lengths.sort()[PAIRS // 2])
    kept, left_out = (lengths <= limit).sum(), (lengths > limit).sum()  # inclusive
    assert left_out
    counts = run(max_length=limit, max_steps=1)
    assert (counts["pairs"], counts["pairs_too_long"]) == (kept, left_out)
    frame, _ = load_training_set(tmp_path / "training_set.parquet", limit)
    assert frame.equals(run.pairs.filter(lengths <= limit))  # No pair is truncated.
    with pytest.raises(DataError, match=r"none of its 8 pairs fits into train\.max_length \(2\); raise it"):
        run(max_length=2, key="another")


def test_empty_training_set(run: Stage) -> None:
    with pytest.raises(DataError, match="has no pairs"):
        run(run.pairs.clear())


def test_weights_that_are_not_finite_are_not_saved(run: Stage) -> None:
    with pytest.raises(DataError, match="weights that are not finite"):
        run(learning_rate=1e38, optim="sgd", max_grad_norm=1e30, max_steps=2)
    assert not run.model.exists()


def test_model_under_its_key_is_left_as_it_is(run: Stage) -> None:
    first = run(max_steps=1)
    time = (run.model / "model.safetensors").stat().st_mtime_ns
    assert run(max_steps=1) == first
    assert run.steps() == []
    assert (run.model / "model.safetensors").stat().st_mtime_ns == time
    run(max_steps=1, key="another")
    assert run.steps() == [1]
    assert is_trained(run.model, run.job("another", max_steps=1).key())


def test_same_call_gives_the_same_weights(run: Stage, trained: tuple[Stage, dict[str, Any]]) -> None:
    assert run() == trained[1]
    want, got = trained[0].weights(), run.weights()
    assert all(torch.equal(got[name], want[name]) for name in want)
    # Its log has other seconds, which are no part of what the model is.
    assert model_identity(run.model) == model_identity(trained[0].model)


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2)], ids=["full", "lora"])
def test_resume_from_a_checkpoint_gives_the_same_weights(
    run: Stage, trained: tuple[Stage, dict[str, Any]], tmp_path: Path, lora: LoraConfig | None
) -> None:
    uninterrupted = Stage(run.policy, run.pairs, tmp_path / "uninterrupted")
    uninterrupted.folder.mkdir()
    want = uninterrupted(lora=lora) if lora else trained[1]
    run.interrupt(at=5, save_steps=2, lora=lora)  # in the third epoch; the checkpoints are of steps 2 and 4
    checkpoints = run.out / "checkpoints"
    assert {file.name for file in checkpoints.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert all(is_trained(file, run.job(save_steps=2, lora=lora).key()) for file in checkpoints.glob("checkpoint-*"))
    assert not run.model.exists()
    counts = run(save_steps=2, lora=lora)
    assert run.steps() == [5, 6]
    assert ("note", {"text": "training resumes from checkpoint-4"}) in run.events
    assert counts == want
    weights = (uninterrupted if lora else trained[0]).weights()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in run.weights().items())
    assert not checkpoints.exists()
    (checkpoints / "checkpoint-2").mkdir(parents=True)  # of other settings, by which a training was begun meanwhile
    assert run(save_steps=2, lora=lora) == counts
    assert not checkpoints.exists()


def test_incomplete_and_foreign_checkpoints_are_not_resumed_from(run: Stage) -> None:
    run.interrupt(at=5, save_steps=2)
    (run.out / "checkpoints" / "checkpoint-4" / "dice.json").unlink()  # killed while it was written
    run.interrupt(at=3, save_steps=2)
    assert run.steps() == [3]
    run.interrupt(at=1, save_steps=2, key="another")
    assert run.steps() == [1]
    assert not list((run.out / "checkpoints").glob("checkpoint-*"))


def test_log_is_json(trained: tuple[Stage, dict[str, Any]]) -> None:
    log = json.loads((trained[0].model / "train_log.json").read_text(encoding="utf-8"))
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4, 5, 6]
