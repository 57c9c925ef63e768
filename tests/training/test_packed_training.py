"""A step on packed rows against TRL's on padded ones: the same loss and gradients, for every loss type of TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from tiny_sets import CPU, scored_pairs, token_pairs
from tiny_training import step_of
from trl import DPOTrainer

from dice_py.config.training import LoraConfig, TrainConfig
from dice_py.errors import UsageError
from dice_py.storage.files import read_json
from dice_py.training import packing_trial, trainer
from dice_py.training.pair_trainer import PairTrainer
from dice_py.training.trainer import build_trainer

pytestmark = pytest.mark.slow

COUNT, ROW = 9, 60
CONFIG = TrainConfig(batch_size=COUNT, per_device_train_batch_size=COUNT, save_steps=None, packed_tokens=ROW)
LOSSES = [
    (["sigmoid"], [1.0]),
    (["sigmoid", "sft"], [1.0, 0.5]),
    (["aot"], [1.0]),
    (["aot_unpaired", "sft"], [0.7, 0.3]),
    *(([name], [1.0]) for name in ("hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard")),
    *(([name], [1.0]) for name in ("apo_zero", "apo_down", "discopop", "sigmoid_norm")),
]


@pytest.fixture(scope="module")
def shifted(llama: Path) -> pl.DataFrame:
    """Pairs whose log-ratios differ, and in another order for chosen and rejected: what sorts a batch sees it."""
    place = pl.int_range(COUNT)
    return scored_pairs(llama, COUNT).with_columns(
        ref_chosen_logps=pl.col("ref_chosen_logps") + 0.3 * place,
        ref_rejected_logps=pl.col("ref_rejected_logps") - 0.7 * (place * 5 % COUNT),
    )


def build(policy: Path, pairs: pl.DataFrame, folder: Path, **changed: Any) -> PairTrainer:
    notes = changed.pop("notes", [])

    def report(event: str, **fields: Any) -> None:
        notes.append(fields["text"])

    config = CONFIG.model_copy(update=changed)
    return build_trainer(config, CPU, policy=policy, pairs=pairs, folder=folder, beta=0.1, seed=0, report=report)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], within: float = 2e-5) -> None:
    assert one.keys() == other.keys()
    assert one
    for name, gradient in one.items():
        assert (gradient - other[name]).abs().max() <= within * gradient.abs().max(), name


@pytest.mark.parametrize(("losses", "weights"), LOSSES, ids=lambda value: "+".join(map(str, value)))
def test_loss_and_gradients_are_those_of_trl(
    llama: Path,
    shifted: pl.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    losses: list[str],
    weights: list[float],
) -> None:
    smoothing = 0.1 if losses[0] in ("robust", "exo_pair") else 0.0
    arguments = {"loss_type": losses, "loss_weights": weights, "label_smoothing": smoothing}
    monkeypatch.setattr(trainer, "loss_arguments", lambda config, beta: {"beta": beta, **arguments})
    packed = build(llama, shifted, tmp_path)
    loss, gradients = step_of(packed)
    assert len(packed.packing[0]["pairs"]) > 2
    padded = build(llama, shifted, tmp_path, packed=False)
    # TRL's own loss, with its metrics, and TRL's own head.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PairTrainer, "_compute_loss", lambda self, *args: DPOTrainer._compute_loss(self, *args))
        patch.setattr("dice_py.training.pair_trainer.add_packed_forward", trl_head)
        padded = build(llama, shifted, tmp_path, packed=False)
        expected, wanted = step_of(padded)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_same(wanted, gradients)


def trl_head(model: Any, outputs: tuple[str, ...]) -> None:
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=outputs)


@pytest.mark.parametrize("changed", [{"lora": LoraConfig(r=2)}, {"gradient_checkpointing": True}], ids=str)
def test_adapters_and_checkpointing(
    llama: Path, shifted: pl.DataFrame, tmp_path: Path, changed: dict[str, Any]
) -> None:
    made = []
    for packed in ("auto", False):
        one = build(llama, shifted, tmp_path, packed=packed, **changed)
        if changed.get("gradient_checkpointing"):
            one.model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        for name, value in one.model.named_parameters():
            if "lora_B" in name:  # zero at first, and so would the gradient of lora_A be
                torch.nn.init.normal_(value, std=0.1)
        made.append(step_of(one))
    assert made[0][0] == pytest.approx(made[1][0], rel=1e-5)
    assert_same(made[1][1], made[0][1])


def test_long_sequences(llama: Path, tmp_path: Path) -> None:
    """One sequence at a time in attention, where short ones are padded to blocks."""
    pairs = token_pairs(COUNT).with_columns(
        pl.col(name).list.eval(pl.element().repeat_by(9).explode()) for name in ("chosen_ids", "rejected_ids")
    )
    pairs = pairs.with_columns(ref_chosen_logps=pl.lit(-300.0), ref_rejected_logps=pl.lit(-310.0))
    made = [step_of(build(llama, pairs, tmp_path, packed=packed, packed_tokens=400)) for packed in ("auto", False)]
    assert made[0][0] == pytest.approx(made[1][0], rel=1e-4)
    assert_same(made[1][1], made[0][1], within=2e-4)


class OutOfMemory:
    """Packed forwards fail on more than `holds` tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, holds: int) -> None:
        from dice_py.training import packed_forward

        self.sizes: list[int] = []
        real = packed_forward.packed_output

        def limited(model: Any, row: Any, *rest: Any) -> Any:
            self.sizes.append(len(row.tokens))
            if len(row.tokens) > holds:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return real(model, row, *rest)

        monkeypatch.setattr(packed_forward, "packed_output", limited)


def test_out_of_memory_splits_the_rows_of_the_step(
    llama: Path, shifted: pl.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, wanted = step_of(build(llama, shifted, tmp_path, packed_tokens=1000))
    OutOfMemory(monkeypatch, holds=100)
    notes: list[str] = []
    made = build(llama, shifted, tmp_path, packed_tokens=1000, notes=notes)
    halved, gradients = step_of(made)
    assert halved == pytest.approx(loss, rel=1e-5)
    assert_same(wanted, gradients)  # nothing is left of the forwards that failed
    (tokens,) = [sum(step["tokens"]) for step in made.packing]
    assert notes[0].startswith("out of memory with ")
    assert made.packed_tokens is not None
    assert made.packed_tokens <= 100
    assert max(made.packing[0]["tokens"]) <= 100
    assert tokens >= 100
    assert made._metrics["train"]["rewards/chosen"][0].shape[0] < COUNT  # of a row; all rows together have every pair
    assert sum(len(part) for part in made._metrics["train"]["rewards/chosen"]) == COUNT


def test_pair_that_does_not_fit_is_an_error(
    llama: Path, shifted: pl.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OutOfMemory(monkeypatch, holds=5)
    with pytest.raises(torch.OutOfMemoryError):
        step_of(build(llama, shifted, tmp_path))


def test_model_that_cannot_be_packed(llama: Path, shifted: pl.DataFrame, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(packing_trial, "packed_output", lambda *_: pytest.fail("not tried"))
    monkeypatch.setattr("transformers.LlamaForCausalLM._supports_attention_backend", False)
    notes: list[str] = []
    made = build(llama, shifted, tmp_path, notes=notes)
    assert made.packed_tokens is None
    assert notes == [
        "LlamaForCausalLM does not support other attention implementations than its own: trained on padded rows, each "
        "with its own prompt (slower)"
    ]
    with pytest.raises(UsageError, match=r"train\.packed is true, but LlamaForCausalLM .*; set train\.packed=auto"):
        build(llama, shifted, tmp_path, packed=True)


def test_model_that_mixes_the_sequences_of_a_row_is_detected(
    llama: Path, shifted: pl.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = trainer.load_model

    def leaky(*args: Any, **named: Any) -> Any:
        model = real(*args, **named)

        def mix(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            hidden, *rest = inputs
            return (hidden + 0.5 * torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1], *rest)

        model.model.layers[1].register_forward_pre_hook(mix)
        return model

    monkeypatch.setattr(trainer, "load_model", leaky)
    notes: list[str] = []
    assert build(llama, shifted, tmp_path, notes=notes).packed_tokens is None
    assert "gives tokens other log-probabilities (root mean square" in notes[0]


def test_metrics_are_means_over_the_pairs(llama: Path, shifted: pl.DataFrame, tmp_path: Path) -> None:
    made = build(llama, shifted, tmp_path, packed_tokens=ROW, max_steps=1, logging_steps=1, warmup_steps=0)
    made.train()
    (entry,) = [entry for entry in made.state.log_history if "loss" in entry]
    own = scored_pairs(llama, COUNT)
    chosen = 0.1 * (own["ref_chosen_logps"] - shifted["ref_chosen_logps"])
    rejected = 0.1 * (own["ref_rejected_logps"] - shifted["ref_rejected_logps"])
    assert entry["rewards/chosen"] == pytest.approx(chosen.mean(), abs=1e-4)
    assert entry["rewards/margins"] == pytest.approx((chosen - rejected).mean(), abs=1e-4)
    assert entry["rewards/accuracies"] == pytest.approx((chosen > rejected).mean(), abs=0.12)  # the first pair ties
    assert entry["logps/chosen"] == pytest.approx(own["ref_chosen_logps"].mean(), abs=1e-3)
    tokens = pl.sum_horizontal(2 * pl.col("prompt_ids").list.len(), pl.col("chosen_ids", "rejected_ids").list.len())
    assert entry["num_tokens"] == shifted.select(tokens.sum()).item()
    assert "entropy" not in entry


def test_packing_does_not_depend_on_memory_and_is_stored(llama: Path, pairs: pl.DataFrame, tmp_path: Path) -> None:
    from tiny_training import Stage

    stage = Stage(llama, pairs, tmp_path)
    counts = stage(packed_tokens=40)
    stored = read_json(stage.model / "packing.json")
    assert [step["step"] for step in stored] == list(range(1, counts["steps"] + 1))
    assert [sum(step["pairs"]) for step in stored] == [4] * counts["steps"]
    assert counts["forwards"] == sum(len(step["pairs"]) for step in stored)
    assert counts["forwards"] > counts["steps"]
    again = Stage(llama, pairs, tmp_path / "again")
    again.folder.mkdir()
    again.interrupt(at=5, save_steps=2, packed_tokens=40)
    again(save_steps=2, packed_tokens=40)
    assert read_json(again.model / "packing.json") == stored
