"""Mixtures of experts train on DPO's loss alone, unless their config.json asks for the loss that balances experts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from broken_models import change_config
from safetensors.torch import load_file
from tiny_families import build
from tiny_models import make_tokenizer
from tiny_sets import CPU, scored_pairs
from tiny_training import PAIRS, Stage

from dice_py.config.training import LoraConfig
from dice_py.models.checkpoint import check_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    build("Mixtral").save_pretrained(tmp_path / "policy")
    make_tokenizer().save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


@pytest.mark.parametrize("packed", ["auto", False])
@pytest.mark.parametrize("lora", [None, LoraConfig(r=2)], ids=["full", "lora"])
def test_a_mixture_is_trained(policy: Path, lora: LoraConfig | None, packed: bool | str, tmp_path: Path) -> None:
    run = Stage(policy, scored_pairs(policy, PAIRS), tmp_path)
    counts = run(lora=lora, packed=packed, max_steps=2)
    assert counts["step0_loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert counts["update_rms"] > 0
    check_checkpoint(run.model, "policy", CPU)


@pytest.mark.parametrize("packed", ["auto", False])
def test_routers_that_return_more_than_a_tensor_have_no_adapters(packed: bool | str, tmp_path: Path) -> None:
    """As Llama 4's, which are linear layers by their class."""
    policy = tmp_path / "policy"
    build("Llama4").save_pretrained(policy)
    make_tokenizer().save_pretrained(policy)
    run = Stage(policy, scored_pairs(policy, PAIRS), tmp_path)
    assert run(lora=LoraConfig(r=2), packed=packed, max_steps=2)["update_rms"] > 0
    start, trained = load_file(policy / "model.safetensors"), run.weights()
    changed = {name for name, value in trained.items() if not torch.equal(value, start[name])}
    assert any("self_attn" in name for name in changed)
    assert not any("router" in name for name in changed)


def test_the_loss_that_balances_experts_is_added_where_it_is_asked_for(policy: Path, tmp_path: Path) -> None:
    pairs = scored_pairs(policy, PAIRS)
    one_step = {"batch_size": PAIRS, "per_device_train_batch_size": PAIRS, "max_steps": 1}
    plain = Stage(policy, pairs, tmp_path / "plain")(**one_step)
    change_config(policy, output_router_logits=True, router_aux_loss_coef=0.5)
    run = Stage(policy, pairs, tmp_path / "balanced")
    balanced = run(**one_step)
    # About 2 of 4 experts, evenly: a loss near 2, which the factor halves.
    assert 0.5 < balanced["final_loss"] - plain["final_loss"] < 2.0
    assert any("a loss that balances its experts" in fields.get("text", "") for _, fields in run.events)
