"""`dice extrapolate`: a complete model folder, kept by a second call; and what it refuses, in a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from damage import notes
from moved_models import assert_equal, expected, trained, weights
from own_run import Events
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny_gguf import make_gguf, make_llama_for_gguf
from tiny_models import make_llama
from tiny_sets import CPU
from transformers import AutoModelForCausalLM

from dice_py.errors import DataError, UsageError
from dice_py.models.checkpoint import check_checkpoint
from dice_py.models.comparison import check_distinct
from dice_py.models.identity import model_identity
from dice_py.models.sources import resolve_model
from dice_py.stages.extrapolate import ExtrapolateJob
from dice_py.storage.integrity import damaged_in, read_stamp

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def after(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama` after a training. Read only."""
    folder = trained(llama, tmp_path_factory.mktemp("trained") / "after")
    (folder / "train_log.json").write_text("[]")
    return folder


def job(start: Path, after: Path, out: Path, alpha: float = 0.5) -> ExtrapolateJob:
    return ExtrapolateJob(CPU, start, after, alpha, out)


def test_the_folder_is_complete_and_stamped(llama: Path, after: Path, tmp_path: Path) -> None:
    made = job(llama, after, tmp_path / "out")
    result = made.run()
    assert result.files == [(made.target, made.key())]
    assert result.counts["alpha"] == 0.5
    assert result.counts["tensors"] == len(weights(after))
    assert made.incomplete(result.files) == []
    assert_equal(weights(made.target), expected(weights(llama), weights(after), 0.5))
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (made.target / file).read_bytes() == (after / file).read_bytes()
    assert (made.target / "chat_template.jinja").read_bytes() == (after / "chat_template.jinja").read_bytes()
    assert not (made.target / "train_log.json").exists()
    assert damaged_in(made.target) == []
    stamp = read_stamp(made.target)
    assert stamp is not None
    assert (stamp["key"], stamp["start"]) == (made.key(), model_identity(llama))
    check_checkpoint(made.target, "policy", CPU)
    modes = {file.stat().st_mode for file in made.target.iterdir() if file.name != "dice.json"}
    assert len(modes) == 1  # safetensors' files can be read by all who can read the config


def test_a_second_call_keeps_it_and_another_alpha_does_not(llama: Path, after: Path, tmp_path: Path) -> None:
    def inode() -> int:
        return (tmp_path / "model" / "model.safetensors").stat().st_ino

    first = job(llama, after, tmp_path).run().counts
    made, events = inode(), Events()
    assert job(llama, after, tmp_path).run(events).counts == first
    assert inode() == made
    assert "is there already" in " ".join(notes(events))
    assert job(llama, after, tmp_path, 0.25).run().counts["alpha"] == 0.25
    assert_equal(weights(tmp_path / "model"), expected(weights(llama), weights(after), 0.25))
    (tmp_path / "model" / "config.json").write_text("{}")
    events = Events()
    job(llama, after, tmp_path, 0.25).run(events)
    assert "cannot be used: config.json is damaged" in " ".join(notes(events))
    assert damaged_in(tmp_path / "model") == []


def test_alpha_0_is_the_model_after(llama: Path, after: Path, tmp_path: Path) -> None:
    job(llama, after, tmp_path, 0.0).run()
    assert model_identity(tmp_path / "model") == model_identity(after)


def test_models_that_do_not_belong_together(llama: Path, other: Path, after: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="have the same weights, so that there is no change"):
        job(llama, shutil.copytree(llama, tmp_path / "copy"), tmp_path / "out").run()
    broken = shutil.copytree(after, tmp_path / "broken")
    values = weights(broken)
    values["model.norm.weight"][0] = torch.nan
    save_file(values, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"AFTER: .*hold NaN or infinite numbers \(model\.norm\.weight\)"):
        job(llama, broken, tmp_path / "out").run()
    assert not (tmp_path / "out" / "model").exists()
    assert list(tmp_path.rglob(".*.tmp")) == []
    events = Events()
    job(other, llama, tmp_path / "out").run(events)
    assert "seem to share no history" in " ".join(notes(events))


def test_an_update_that_bfloat16_would_round_away(tmp_path: Path) -> None:
    start = make_llama(tmp_path / "start")
    AutoModelForCausalLM.from_pretrained(start).to(torch.bfloat16).save_pretrained(start)
    after = shutil.copytree(start, tmp_path / "after")
    AutoModelForCausalLM.from_pretrained(after).float().save_pretrained(after)
    moved = {name: value + 1e-6 for name, value in weights(after).items()}
    save_file(moved, after / "model.safetensors", {"format": "pt"})
    # In float32 nothing is lost, and the model is none of START's roundings.
    assert job(start, after, tmp_path / "out").run().counts["update_kept"] == pytest.approx(1.0, abs=0.1)
    check_distinct(tmp_path / "out" / "model", start, allowed=False)
    rounded = trained(start, tmp_path / "rounded", scale=0.1)
    AutoModelForCausalLM.from_pretrained(rounded).to(torch.bfloat16).save_pretrained(rounded)
    events = Events()
    counts = job(start, rounded, tmp_path / "lost", 1e-4).run(events).counts
    assert counts["update_kept"] < 0.5
    assert "warning: rounding to the dtype of" in " ".join(notes(events))


def test_an_adapter_is_refused_with_the_remedy(llama: Path, after: Path, tmp_path: Path, refused: Refused) -> None:
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path / "adapter")
    for models in ((llama, tmp_path / "adapter"), (tmp_path / "adapter", after)):
        sentence = refused(3, "extrapolate", *models, "-o", tmp_path / "out", "--alpha", "0.5")
        assert "is a LoRA adapter" in sentence
        assert "merge it into its base model first" in sentence
    with pytest.raises(DataError, match="is not merged into its base model"):
        job(llama, tmp_path / "adapter", tmp_path / "out").run()


def test_wrong_calls(llama: Path, after: Path, tmp_path: Path, refused: Refused) -> None:
    for alpha in ("nan", "inf"):
        sentence = refused(2, "extrapolate", llama, after, "-o", tmp_path / "out", "--alpha", alpha)
        assert "give a finite number" in sentence
    with pytest.raises(UsageError, match="give a finite number"):
        job(llama, after, tmp_path / "out", float("nan")).run()
    assert "is not a folder" in refused(3, "extrapolate", "/none", after, "-o", tmp_path / "out", "--alpha", "1")
    kept = shutil.copytree(after, tmp_path / "out" / "model")
    assert "would replace it" in refused(2, "extrapolate", llama, kept, "-o", tmp_path / "out", "--alpha", "1")


def test_gguf_files(tmp_path: Path, cache_folder: Path) -> None:
    start = make_llama_for_gguf(tmp_path / "start")
    moved = trained(start, tmp_path / "moved")
    files = [make_gguf(tmp_path / f"{folder.name}.gguf", folder) for folder in (start, moved)]
    folders = [resolve_model(str(file), None, role="model") for file in files]
    job(folders[0], folders[1], tmp_path / "out").run()
    before, now = weights(start), weights(moved)
    for name, value in weights(tmp_path / "out" / "model").items():
        assert torch.allclose(value, now[name] + 0.5 * (now[name] - before[name]), atol=1e-6), name


def test_the_command(llama: Path, after: Path, tmp_path: Path, dice: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = dice("extrapolate", llama, after, "-o", tmp_path, "--alpha", "-0.5", "--json")
    assert code == 0, err
    assert json.loads(out).items() >= {"model": str(tmp_path / "model"), "alpha": -0.5, "tensors_copied": 0}.items()
    assert_equal(weights(tmp_path / "model"), expected(weights(llama), weights(after), -0.5))
