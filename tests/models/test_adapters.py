"""Adapters in place of models: merged once into the cache, or refused in a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_models import CPU, change_config, change_weights
from own_run import Events
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file
from tiny_models import make_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from dice_py.errors import DataError, DiceError
from dice_py.models import weight_records
from dice_py.models.checkpoint import check_checkpoint
from dice_py.models.sources import needs_conversion, resolve_model
from dice_py.stages.convert import ConvertJob

ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def folders(tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `base` and its `adapter`, which is the working folder."""
    monkeypatch.chdir(tmp_path)
    make_llama(Path("base"))
    save_adapter(Path("base"), Path("adapter"))
    return tmp_path


def save_adapter(base: Path, folder: Path, config: Any = None, **changes: Any) -> None:
    torch.manual_seed(3)
    shape = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **changes}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config or LoraConfig(**shape))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def resolve(name: str = "adapter", events: Events | None = None) -> Path:
    return resolve_model(name, None, role="--policy", report=events or Events())


def refusal(name: str = "adapter") -> str:
    with pytest.raises(DiceError) as caught:
        resolve(name)
    assert caught.value.exit_code == 3
    assert "adapter" in str(caught.value)
    return str(caught.value)


def test_it_is_merged_once(folders: Path, cache_folder: Path) -> None:
    events = Events()
    assert needs_conversion("adapter", None, "--policy")
    folder = resolve(events=events)
    assert folder.parent == cache_folder.resolve() / "merged"
    assert [fields["text"].split(",")[0] for _, fields in events.events] == [
        f"merging the adapter adapter into its base model {folders / 'base'}"
    ]
    check_checkpoint(folder, "policy", CPU)
    merged, base = load_file(folder / "model.safetensors"), load_file("base/model.safetensors")
    lora = load_file(f"adapter/{ADAPTER}")
    name = "model.layers.1.mlp.down_proj"
    up, down = (lora[f"base_model.model.{name}.lora_{side}.weight"] for side in "BA")
    # lora_alpha / r is 8 / 2.
    assert torch.allclose(merged[f"{name}.weight"], base[f"{name}.weight"] + 4 * up @ down, atol=1e-6)
    assert torch.equal(merged["lm_head.weight"], base["lm_head.weight"])
    assert (folder / "generation_config.json").read_text() == Path("base/generation_config.json").read_text()
    assert AutoTokenizer.from_pretrained(folder).chat_template == AutoTokenizer.from_pretrained("base").chat_template
    # Again, from a renamed folder, without a merge.
    Path("adapter").rename("renamed")
    assert not needs_conversion("renamed", None, "--policy")
    again = Events()
    assert resolve("renamed", again) == folder
    assert "was merged into its base model" in again.events[0][1]["text"]


def test_a_damaged_model_is_merged_again(folders: Path) -> None:
    folder = resolve()
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert needs_conversion("adapter", None, "--policy")
    events = Events()
    assert resolve(events=events) == folder
    assert file.read_bytes() == whole
    assert any("It is set aside as" in fields["text"] for _, fields in events.events)


def test_the_stage_does_it(folders: Path) -> None:
    job = ConvertJob("adapter", None, "--policy")
    ((folder, key),) = job.run().files
    assert job.incomplete([(folder, key)]) == []
    assert key == folder.name == job.key()


def test_another_base_is_another_model(folders: Path) -> None:
    first = resolve()
    make_llama(folders / "base", seed=4)
    assert resolve() != first


def test_weights_keep_the_bases_type(folders: Path) -> None:
    change_weights(Path("base"), lambda weights: {name: w.bfloat16() for name, w in weights.items()})
    change_config(Path("base"), dtype="bfloat16")
    merged = load_file(resolve() / "model.safetensors")
    assert {weight.dtype for weight in merged.values()} == {torch.bfloat16}


@pytest.mark.parametrize("place", ["adapter/base", "models/base"])
def test_a_base_beside_or_in_the_adapters_folder(folders: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(place).parent.mkdir(exist_ok=True)
    Path("base").rename(place)
    if place.startswith("models"):
        Path("adapter").rename("models/adapter")
    monkeypatch.chdir(Path("/"))
    resolve(str(folders / Path(place).parts[0] / ("adapter" if place.startswith("models") else "")))


def test_a_tokenizer_of_the_base(folders: Path) -> None:
    for file in Path("adapter").glob("*token*"):
        file.unlink()
    Path("adapter/chat_template.jinja").unlink(missing_ok=True)
    folder = resolve()
    assert AutoTokenizer.from_pretrained(folder).chat_template == AutoTokenizer.from_pretrained("base").chat_template


def test_the_weights_can_be_read_by_others(folders: Path) -> None:
    folder = resolve()
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


# --- refused


def test_a_base_that_is_not_there(folders: Path) -> None:
    shutil.rmtree("base")
    said = refusal()
    assert said.startswith(
        "--policy: adapter is an adapter whose base model cannot be used (base is not a local folder"
    )
    assert "base_model_name_or_path in adapter_config.json" in said


def test_a_base_by_an_absolute_path(folders: Path) -> None:
    change_config(Path("adapter"), "adapter_config.json", base_model_name_or_path="/absent/base")
    assert "/absent/base is not a folder" in refusal()


def test_a_quantized_base(folders: Path) -> None:
    change_config(Path("base"), quantization_config={"quant_method": "bitsandbytes"})
    assert "its base model: " in refusal()


def test_a_base_that_is_an_adapter(folders: Path) -> None:
    change_config(Path("adapter"), "adapter_config.json", base_model_name_or_path="adapter")
    assert "is an adapter itself" in refusal()


@pytest.mark.parametrize("name", [None, "", 3])
def test_no_base_is_named(folders: Path, name: Any) -> None:
    change_config(Path("adapter"), "adapter_config.json", base_model_name_or_path=name)
    assert "names no base model" in refusal()


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_broken_adapter_config(folders: Path, content: str) -> None:
    Path("adapter/adapter_config.json").write_text(content)
    assert "adapter_config.json" in refusal()


def test_no_adapter_weights(folders: Path) -> None:
    Path("adapter", ADAPTER).unlink()
    assert f"not the adapter's weights ({ADAPTER})" in refusal()


def test_adapter_weights_that_are_cut_off(folders: Path) -> None:
    file = Path("adapter", ADAPTER)
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file} is truncated" in refusal()


def test_a_full_model_beside_the_adapter(folders: Path) -> None:
    shutil.copy("base/model.safetensors", "adapter")
    assert "holds an adapter (adapter_config.json) and a full model's weights" in refusal()


def test_an_adapter_of_another_model(folders: Path) -> None:
    make_llama(Path("wide"), hidden_size=128)
    change_config(Path("adapter"), "adapter_config.json", base_model_name_or_path="wide")
    assert "cannot be merged into its base model" in refusal()


def test_an_adapter_that_lacks_weights(folders: Path) -> None:
    change_weights(Path("adapter"), lambda weights: weights.pop(next(iter(weights))), ADAPTER)
    assert "cannot be merged" in refusal()


def test_an_adapter_with_nan(folders: Path) -> None:
    change_weights(Path("adapter"), lambda weights: next(iter(weights.values())).fill_(float("nan")), ADAPTER)
    assert "holds NaN or infinite numbers" in refusal()


def test_an_adapter_of_prompts(folders: Path) -> None:
    shutil.rmtree("adapter")
    save_adapter(Path("base"), Path("adapter"), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2))
    assert json.loads(Path("adapter/adapter_config.json").read_text())["peft_type"] == "PROMPT_TUNING"
    assert "cannot be merged" in refusal()


def test_a_base_that_lacks_weights(folders: Path) -> None:
    change_weights(Path("base"), lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(DataError, match=r"its base model: .* 1 missing \(lm_head\.weight\)"):
        resolve()


def test_an_adapter_that_is_as_large_as_most_are(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered of large files: the content of the adapter's, for its key, and each tensor's, for NaN."""
    monkeypatch.setattr(weight_records, "SMALL", 0)
    monkeypatch.setattr(weight_records, "SETTLED_NS", -(10**18))
    merged = resolve_model("adapter", None, role="policy")
    weight_records.forget()  # as in another process
    assert resolve_model("adapter", None, role="policy") == merged
    check_checkpoint(merged, "policy", CPU)
