"""An adapter's sum with its base gives the logits that peft gives without merging, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_models import CPU, WEIGHTS, change_config, change_weights
from own_run import Events
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import make_llama, make_qwen2
from transformers import AutoConfig, AutoModelForCausalLM

from dice_py.errors import DataError, UsageError
from dice_py.models.checkpoint import check_checkpoint
from dice_py.models.comparison import check_distinct
from dice_py.models.sources import resolve_model

ADAPTER = "adapter_model.safetensors"
IDS = torch.arange(10, 30)[None]


@torch.no_grad()
def trained(folder: Path, base: Path, rows: int | None = None, config: Any = None, **lora: Any) -> torch.Tensor:
    """Saves an adapter with random weights, and returns its logits, f32 (tokens, vocabulary)."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    shape = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **lora}
    wrapped = get_peft_model(model, config or LoraConfig(**shape)).eval()
    for weight in wrapped.parameters():
        if weight.requires_grad:
            weight.add_(0.05 * torch.randn_like(weight))
    wrapped.save_pretrained(folder)
    change_config(folder, "adapter_config.json", base_model_name_or_path=str(base))
    return wrapped(IDS).logits[0]


@torch.no_grad()
def merged(adapter: Path) -> tuple[Path, torch.Tensor]:
    """The folder that an adapter is merged into, and the logits of its model."""
    folder = resolve_model(str(adapter), None, role="--policy")
    check_checkpoint(folder, "policy", CPU)
    return folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits[0]


def refusal(adapter: Path) -> str:
    with pytest.raises(DataError, match="the adapter cannot be merged into its base model") as caught:
        resolve_model(str(adapter), None, role="--policy")
    return str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("make", [make_llama, make_qwen2])
@pytest.mark.parametrize(
    ("lora", "apart"),
    [
        ({}, False),
        ({"target_modules": ["q_proj", "lm_head"]}, True),
        ({"target_modules": ["q_proj", "embed_tokens"]}, True),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, True),
        ({"trainable_token_indices": [10, 11]}, False),
    ],
)
def test_embeddings_and_head(
    make: Callable[..., Path], lora: dict[str, Any], apart: bool, tmp_path: Path, cache_folder: Path
) -> None:
    """What was tied stays so only if it is still equal, and config.json says it."""
    base = make(tmp_path / "base")
    logits = trained(tmp_path / "adapter", base, **lora)
    folder, ours = merged(tmp_path / "adapter")
    assert torch.allclose(ours, logits, atol=1e-4)
    tied = make is make_qwen2 and not apart
    assert AutoConfig.from_pretrained(folder).tie_word_embeddings is tied


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("make", [make_llama, make_qwen2])
@pytest.mark.parametrize("lora", [{"modules_to_save": ["lm_head", "embed_tokens"]}, {}])
def test_tokens_that_the_training_added(
    make: Callable[..., Path], lora: dict[str, Any], tmp_path: Path, cache_folder: Path
) -> None:
    base = make(tmp_path / "base")
    logits = trained(tmp_path / "adapter", base, rows=270, **lora)
    folder, ours = merged(tmp_path / "adapter")
    assert AutoConfig.from_pretrained(folder).vocab_size == 270
    assert torch.allclose(ours, logits, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-5, 0.0, 1.0])
def test_changes_that_rounding_takes_away(scale: float, tmp_path: Path, cache_folder: Path) -> None:
    """The base in bfloat16, added to in steps that are too small for it, would be the base again."""
    base = make_llama(tmp_path / "base")
    change_weights(base, lambda weights: {name: weight.bfloat16() for name, weight in weights.items()})
    trained(tmp_path / "adapter", base)
    change_weights(
        tmp_path / "adapter", lambda held: [w.mul_(scale) for name, w in held.items() if "lora_B" in name], ADAPTER
    )
    events = Events()
    folder = resolve_model(str(tmp_path / "adapter"), None, role="--policy", report=events)
    small = 0 < scale < 1
    assert {w.dtype for w in load_file(folder / WEIGHTS).values()} == {torch.float32 if small else torch.bfloat16}
    assert any("would leave 0% of what the adapter changes" in fields["text"] for _, fields in events.events) is small
    if scale:
        check_distinct(folder, base, allowed=False)
    else:
        with pytest.raises(UsageError, match="are the same model"):
            check_distinct(folder, base, allowed=False)


def test_rows_that_only_the_embeddings_have(tmp_path: Path, cache_folder: Path) -> None:
    adapter = tmp_path / "adapter"
    trained(adapter, make_llama(tmp_path / "base"), rows=270, modules_to_save=["embed_tokens"])
    change_weights(adapter, lambda held: {name: w for name, w in held.items() if "lm_head" not in name}, ADAPTER)
    assert "it has 270 rows of embeddings, and the base has 262" in refusal(adapter)


def test_tensors_that_the_base_has_no_place_for(tmp_path: Path, cache_folder: Path) -> None:
    """They would be left out without a word."""
    trained(tmp_path / "adapter", make_llama(tmp_path / "deep", num_hidden_layers=3))
    shallow = make_llama(tmp_path / "shallow")
    change_config(tmp_path / "adapter", "adapter_config.json", base_model_name_or_path=str(shallow))
    said = refusal(tmp_path / "adapter")
    assert "the base has no place for 2 of its tensors: base_model.model.model.layers.2.self_attn.q_proj" in said


def test_another_shape_is_named(tmp_path: Path, cache_folder: Path) -> None:
    trained(tmp_path / "adapter", make_llama(tmp_path / "base"))
    wide = make_llama(tmp_path / "wide", hidden_size=128)
    change_config(tmp_path / "adapter", "adapter_config.json", base_model_name_or_path=str(wide))
    assert "size mismatch for base_model.model.model.layers.0.self_attn.q_proj" in refusal(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PREFIX_TUNING puts learned vectors before"),
        (
            LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]]),
            "its layer_replication repeats layers",
        ),
    ],
)
def test_kinds_that_no_model_can_hold(config: Any, cause: str, tmp_path: Path, cache_folder: Path) -> None:
    trained(tmp_path / "adapter", make_llama(tmp_path / "base"), config=config)
    assert cause in refusal(tmp_path / "adapter")
