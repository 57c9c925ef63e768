"""In which dtype a trained policy is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from broken_models import WEIGHTS, in_shards
from safetensors.torch import load_file, save_file
from tiny_models import make_llama, make_qwen2
from tiny_sets import CPU
from transformers import AutoModelForCausalLM

from dice_py.config.training import TrainConfig
from dice_py.errors import UsageError
from dice_py.models.rounding import Change
from dice_py.models.sizes import model_size
from dice_py.training.update import check_update, start_weights


@pytest.mark.parametrize(
    ("save_dtype", "kept", "want"),
    [
        ("auto", 1.0, torch.bfloat16),
        ("auto", 0.6, torch.bfloat16),
        ("auto", 0.4, torch.float32),
        ("auto", 0.0, torch.float32),
        ("stored", 0.4, torch.bfloat16),
        ("stored", 0.9, torch.bfloat16),
        ("float32", 1.0, torch.float32),
    ],
)
def test_the_dtype_of_the_saved_policy(save_dtype: str, kept: float, want: torch.dtype) -> None:
    config = TrainConfig(save_dtype=save_dtype)  # type: ignore[arg-type]
    dtype, note = check_update(Change(1e-6, 2e-6, kept), config, torch.bfloat16, 20)
    assert dtype == want
    assert (note is not None) == (kept < 0.5 and save_dtype != "float32")
    if note is not None:
        assert f"leaves {kept:.0%} of the update" in note
        assert "train.save_dtype=" in note


def test_an_update_that_rounding_takes_away_is_an_error_where_rounding_is_asked_for() -> None:
    with pytest.raises(UsageError, match=r"bfloat16.*leaves 0%.*train\.save_dtype=float32"):
        check_update(Change(1e-6, 2e-6, 0.0), TrainConfig(save_dtype="stored"), torch.bfloat16, 20)


def test_a_policy_that_did_not_change_names_learning_rate_steps_and_warm_up() -> None:
    with pytest.raises(UsageError) as raised:
        check_update(Change(0.0, 0.0, 1.0), TrainConfig(warmup_steps=50), torch.float32, 1)
    for part in ("changed no weight", "train.learning_rate is 5e-07", "1 step,", "train.warmup_steps=50"):
        assert part in str(raised.value)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_policy_that_hardly_changed_is_warned_of(stored: torch.dtype) -> None:
    dtype, note = check_update(Change(1e-13, 2e-12, 0.0 if stored == torch.bfloat16 else 0.9), TrainConfig(), stored, 9)
    assert dtype == torch.float32
    assert note is not None
    assert "no weight of the policy changed by more than 2.0e-12" in note
    assert "train.learning_rate is 5e-07" in note
    assert "train.max_grad_norm is 1" in note


@pytest.mark.parametrize("make", [make_llama, make_qwen2])
@pytest.mark.parametrize("pickled", [False, True])
def test_start_weights_are_those_of_the_loaded_model(make: object, pickled: bool, tmp_path: Path) -> None:
    folder = make(tmp_path / "model")  # type: ignore[operator]
    model = AutoModelForCausalLM.from_pretrained(folder)
    if pickled:  # another format of the same weights: read by loading the model
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    values = dict(model.named_parameters())
    start = start_weights(folder, values, CPU)
    assert values
    assert all(torch.equal(start(name), value) for name, value in values.items())


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_of_another_save_beside_the_start_are_not_taken_for_it(sharded: bool, tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model")
    other = load_file(make_llama(tmp_path / "other", seed=3) / WEIGHTS)
    model = AutoModelForCausalLM.from_pretrained(folder)
    size = model_size(folder).parameters
    if sharded:
        in_shards(folder)
    for name in ("model-00003-of-00004.safetensors", "model.zero.safetensors", "zz.safetensors"):
        save_file(other, folder / name)
    values = dict(model.named_parameters())
    start = start_weights(folder, values, CPU)
    assert all(torch.equal(start(name), value) for name, value in values.items())
    assert model_size(folder).parameters == size
