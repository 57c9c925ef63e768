"""Policies and references that are the same model, or that have nothing to do with each other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from broken_models import as_bin, change_weights, copy_of, in_shards
from own_run import Events
from tiny_models import make_llama, make_mistral, make_qwen2

from dice_py.errors import UsageError
from dice_py.models.comparison import check_distinct, have_same_weights, warn_of_unrelated, weights_cosine
from dice_py.models.identity import model_identity
from dice_py.storage.integrity import write_stamp

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return copy_of(llama, tmp_path)


def to(dtype: torch.dtype) -> object:
    return lambda weights: {name: weight.to(dtype) for name, weight in weights.items()}


def test_a_folder_and_its_copies(llama: Path, copy: Path) -> None:
    for other in (llama, copy):
        with pytest.raises(UsageError, match=r"are the same model .* --set score\.allow_same_model=true"):
            check_distinct(llama, other, allowed=False)


def test_it_can_be_asked_for(llama: Path, copy: Path) -> None:
    events = Events()
    check_distinct(llama, copy, allowed=True, report=events)
    ((event, fields),) = events.events
    assert event == "note"
    assert fields["text"].startswith("warning: policy and reference are the same model")


def test_a_link_to_the_folder(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(llama)
    with pytest.raises(UsageError, match="are the same model"):
        check_distinct(llama, tmp_path / "link", allowed=False)


@pytest.mark.parametrize("reverse", [False, True])
def test_another_sharding(llama: Path, copy: Path, reverse: bool) -> None:
    in_shards(copy, reverse)
    assert have_same_weights(llama, copy)


def test_another_format(llama: Path, copy: Path) -> None:
    assert have_same_weights(llama, as_bin(copy))


@pytest.mark.parametrize("prefix", ["model.", "language_model."])
def test_another_prefix(llama: Path, copy: Path, prefix: str) -> None:
    change_weights(copy, lambda weights: {f"{prefix}{name}": weight for name, weight in weights.items()})
    assert have_same_weights(llama, copy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_weights_that_are_stored_twice(tmp_path: Path, dtype: torch.dtype) -> None:
    first = make_qwen2(tmp_path / "qwen")
    second = Path(shutil.copytree(first, tmp_path / "twice"))
    change_weights(second, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"] * 1}))
    change_weights(second, to(dtype))
    assert have_same_weights(first, second)
    assert have_same_weights(second, first)
    change_weights(second, lambda weights: weights["lm_head.weight"].mul_(2))
    assert not have_same_weights(first, second)


def test_buffers_of_older_versions(llama: Path, copy: Path) -> None:
    change_weights(
        copy, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})
    )
    assert have_same_weights(llama, copy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_with_a_padded_vocabulary(llama: Path, copy: Path, dtype: torch.dtype) -> None:
    def pad(weights: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = torch.cat([weights[name], torch.randn(58, 64)])

    change_weights(change_weights(copy, pad), to(dtype))
    assert have_same_weights(llama, copy)
    assert have_same_weights(copy, llama)
    change_weights(copy, lambda weights: weights["lm_head.weight"][261].mul_(2))
    assert not have_same_weights(llama, copy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("binary", [False, True])
def test_another_float_type(llama: Path, copy: Path, dtype: torch.dtype, binary: bool) -> None:
    """Weights that were rounded are the same model; those that were trained and rounded are not."""
    change_weights(copy, to(dtype))
    other = Path(shutil.copytree(copy, copy.with_name("trained")))
    change_weights(other, lambda weights: weights[UP][-1, -1].mul_(1.5))
    if binary:
        as_bin(copy), as_bin(other)
    assert have_same_weights(llama, copy)
    assert have_same_weights(copy, llama)
    assert not have_same_weights(llama, other)


def test_16_bit_types_of_each_other(llama: Path, copy: Path) -> None:
    change_weights(copy, to(torch.bfloat16))
    other = Path(shutil.copytree(copy, copy.with_name("half")))
    change_weights(other, to(torch.float16))
    assert have_same_weights(copy, other)


def test_a_trained_policy_that_rounds_to_its_start(llama: Path, copy: Path, other: Path) -> None:
    """Its training saved it in float32 since in bfloat16 it would have been the start again."""
    change_weights(copy, to(torch.bfloat16))
    policy = Path(shutil.copytree(copy, copy.with_name("policy")))
    change_weights(policy, to(torch.float32))
    write_stamp(policy, {"key": "k", "counts": {}, "start": model_identity(copy)})
    with pytest.raises(UsageError, match="are the same model"):  # no weight of it was changed
        check_distinct(policy, copy, allowed=False)
    change_weights(policy, lambda weights: weights[UP].mul_(1 + 1e-6))
    assert have_same_weights(policy, copy)
    check_distinct(policy, copy, allowed=False)
    write_stamp(policy, {"key": "k", "counts": {}, "start": model_identity(other)})
    with pytest.raises(UsageError, match="are the same model"):
        check_distinct(policy, copy, allowed=False)


@pytest.mark.parametrize("change", [1e-6, 1.0])
def test_one_weight_that_differs(llama: Path, copy: Path, change: float) -> None:
    change_weights(copy, lambda weights: weights[UP][0, 0].add_(change))
    assert not have_same_weights(llama, copy)
    check_distinct(llama, copy, allowed=False)


def test_other_models(llama: Path, other: Path, tmp_path: Path) -> None:
    assert not have_same_weights(llama, other)
    assert not have_same_weights(llama, make_llama(tmp_path / "wide", hidden_size=128))


# --- history


def warning(first: Path, second: Path) -> str | None:
    events = Events()
    warn_of_unrelated(first, second, events)
    return events.events[0][1]["text"] if events.events else None


@pytest.mark.parametrize("noise", [0.001, 0.5])
def test_a_model_and_its_start(llama: Path, copy: Path, noise: float) -> None:
    def train(weights: dict[str, torch.Tensor]) -> None:
        torch.manual_seed(1)
        for weight in weights.values():
            weight += noise * weight.std() * torch.randn_like(weight)

    change_weights(copy, train)
    cosine = weights_cosine(llama, copy)
    assert cosine is not None
    assert cosine == pytest.approx(1 / (1 + noise**2) ** 0.5, abs=0.01)
    assert warning(llama, copy) is None


def test_models_that_were_initialized_apart(llama: Path, other: Path) -> None:
    said = warning(llama, other)
    assert said is not None
    assert said.startswith("warning: policy and reference seem to share no history: the mean cosine of their weight")
    cosine = weights_cosine(llama, other)
    assert cosine is not None
    assert abs(cosine) < 0.05
    assert f" is {cosine:.2f}, " in said


def test_models_of_other_shapes(llama: Path, tmp_path: Path) -> None:
    assert weights_cosine(llama, make_llama(tmp_path / "wide", hidden_size=128)) is None
    said = warning(llama, tmp_path / "wide")
    assert said is not None
    assert "no matrix of the same name and shape" in said


def test_models_of_other_families(llama: Path, tmp_path: Path) -> None:
    assert warning(llama, make_mistral(tmp_path / "mistral", seed=5)) is not None


def test_a_folder_and_itself(llama: Path) -> None:
    assert warning(llama, llama) is None
