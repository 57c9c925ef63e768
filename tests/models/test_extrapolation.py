"""θ₁ + α·(θ₁ − θ₀) against sums in the test: shards, ties, dtypes, shapes, buffers, formats."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from moved_models import assert_equal, expected, trained, weights
from safetensors.torch import load_file, save_file
from tiny_families import LATENT, SHAPE, build
from tiny_models import make_llama, make_qwen2
from tiny_sets import CPU
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from dice_py.errors import DataError, UsageError
from dice_py.events import no_report
from dice_py.models import extrapolation
from dice_py.models.checkpoint import check_checkpoint
from dice_py.models.extrapolation import NotFiniteError, plan_extrapolation, write_extrapolated
from dice_py.models.rounding import Change
from dice_py.models.weight_files import weight_files


def extrapolate(start: Path, after: Path, folder: Path, alpha: float) -> Change:
    """Writes the weights, beside AFTER's config."""
    folder.mkdir()
    shutil.copy(after / "config.json", folder)
    return write_extrapolated(plan_extrapolation(start, after, CPU), folder, alpha)


@pytest.mark.parametrize("alpha", [0.3, 2.0, -0.5])
def test_the_formula(llama: Path, tmp_path: Path, alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extrapolation, "PART", 1000)  # several parts of a weight, the last one shorter
    after = trained(llama, tmp_path / "after")
    change = extrapolate(llama, after, tmp_path / "out", alpha)
    before, now = weights(llama), weights(after)
    assert_equal(weights(tmp_path / "out"), expected(before, now, alpha))
    deltas = torch.cat([(alpha * (now[name] - before[name])).flatten() for name in now]).double()
    assert change.rms == pytest.approx(float(deltas.square().mean().sqrt()), rel=1e-4)
    assert change.kept == pytest.approx(1.0, abs=1e-6)
    check_checkpoint(tmp_path / "out", "out", CPU)


def test_alpha_0_gives_the_files_of_after_and_minus_1_the_weights_of_start(llama: Path, tmp_path: Path) -> None:
    after = trained(llama, tmp_path / "after")
    model = after / "model.safetensors"
    values = load_file(model)
    values["model.norm.weight"][0] = -0.0  # −0 + 0·(−0 − θ₀) is +0
    save_file(values, model, metadata={"format": "pt"})
    assert extrapolate(llama, after, tmp_path / "out", 0.0).largest == 0.0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == model.read_bytes()
    extrapolate(llama, after, tmp_path / "back", -1.0)
    before = weights(llama)
    for name, value in weights(tmp_path / "back").items():
        assert torch.allclose(value, before[name], rtol=0, atol=1e-6)


def test_shards_stay_as_after_has_them(llama: Path, tmp_path: Path) -> None:
    start = trained(llama, tmp_path / "start", scale=0.0, max_shard_size="60KB")
    after = trained(llama, tmp_path / "after", max_shard_size="100KB")
    assert 1 < len(weight_files(after)) < len(weight_files(start))
    extrapolate(start, after, tmp_path / "out", 0.5)
    assert [file.name for file in weight_files(tmp_path / "out")] == [file.name for file in weight_files(after)]
    index = "model.safetensors.index.json"
    maps = [json.loads((folder / index).read_text(encoding="utf-8")) for folder in (after, tmp_path / "out")]
    assert maps[0]["weight_map"] == maps[1]["weight_map"]
    assert maps[0]["metadata"]["total_size"] == maps[1]["metadata"]["total_size"]
    assert_equal(weights(tmp_path / "out"), expected(weights(llama), weights(after), 0.5))
    check_checkpoint(tmp_path / "out", "out", CPU)


@pytest.mark.parametrize("sharded", [False, True])
def test_bin_files_become_safetensors(llama: Path, tmp_path: Path, sharded: bool) -> None:
    after = trained(llama, tmp_path / "after")
    wanted = weights(after)
    (after / "model.safetensors").unlink()
    names = sorted(wanted)
    parts = [names[:5], names[5:]] if sharded else [names]
    files = [f"pytorch_model-0000{at}-of-00002.bin" if sharded else "pytorch_model.bin" for at in (1, 2)][: len(parts)]
    for file, part in zip(files, parts, strict=True):
        torch.save({name: wanted[name] for name in part}, after / file)
    if sharded:
        places = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        content = {"metadata": {}, "weight_map": places}
        (after / "pytorch_model.bin.index.json").write_text(json.dumps(content), encoding="utf-8")
    extrapolate(llama, after, tmp_path / "out", 0.5)
    assert_equal(weights(tmp_path / "out"), expected(weights(llama), wanted, 0.5))
    check_checkpoint(tmp_path / "out", "out", CPU)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def untied(folder: Path, to: Path, move: float) -> Path:
    """A copy of a tied model with a head of its own, which differs from the embeddings by `move`."""
    shutil.copytree(folder, to)
    values = load_file(to / "model.safetensors")
    values["lm_head.weight"] = values["model.embed_tokens.weight"] + move
    save_file(values, to / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((to / "config.json").read_text(encoding="utf-8"))
    (to / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}), encoding="utf-8")
    return to


def test_a_head_that_was_untied_starts_from_the_embeddings(tmp_path: Path) -> None:
    start = make_qwen2(tmp_path / "start")
    after = untied(trained(start, tmp_path / "trained"), tmp_path / "after", 0.25)
    extrapolate(start, after, tmp_path / "out", 0.5)
    before = weights(start)
    assert "lm_head.weight" not in before
    before["lm_head.weight"] = before["model.embed_tokens.weight"]
    assert_equal(weights(tmp_path / "out"), expected(before, weights(after), 0.5))
    check_checkpoint(tmp_path / "out", "out", CPU)


def test_a_head_that_was_tied_needs_one_start(tmp_path: Path) -> None:
    tied = make_qwen2(tmp_path / "tied")
    after = trained(tied, tmp_path / "after")
    equal, other = untied(tied, tmp_path / "equal", 0.0), untied(tied, tmp_path / "other", 0.25)
    extrapolate(equal, after, tmp_path / "out", 0.5)
    assert_equal(weights(tmp_path / "out"), expected(weights(tied), weights(after), 0.5))
    with pytest.raises(DataError, match=r"lm_head\.weight and model\.embed_tokens\.weight are two weights in .*other"):
        plan_extrapolation(other, after, CPU)


def test_a_shape_or_a_layer_that_differs_is_named(llama: Path, tmp_path: Path) -> None:
    wider, deeper = (
        make_llama(tmp_path / "wider", intermediate_size=128),
        make_llama(tmp_path / "deeper", num_hidden_layers=3),
    )
    with pytest.raises(DataError, match=r"mlp\.\w+_proj\.weight has the shape \[.*128.*\] in .*wider and \[.*96"):
        plan_extrapolation(llama, wider, CPU)
    for start, after, has in ((llama, deeper, deeper), (deeper, llama, deeper)):
        with pytest.raises(DataError, match=rf"{has} has 9 weights that .* lacks \(model\.layers\.2\."):
            plan_extrapolation(start, after, CPU)


def stored_as(folder: Path, to: Path, dtype: torch.dtype) -> Path:
    shutil.copytree(folder, to)
    AutoModelForCausalLM.from_pretrained(folder).to(dtype).save_pretrained(to)
    return to


@pytest.mark.parametrize(
    ("dtype_of_start", "dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)],
)
def test_sums_are_in_float32_and_stored_as_after(
    llama: Path, tmp_path: Path, dtype_of_start: torch.dtype, dtype: torch.dtype
) -> None:
    start = stored_as(llama, tmp_path / "start", dtype_of_start)
    after = stored_as(trained(llama, tmp_path / "trained", scale=0.1), tmp_path / "after", dtype)
    extrapolate(start, after, tmp_path / "out", 0.7)
    assert_equal(weights(tmp_path / "out"), expected(weights(start), weights(after), 0.7))


def test_float64_is_not_rounded_to_float32(llama: Path, tmp_path: Path) -> None:
    start, after = stored_as(llama, tmp_path / "s", torch.float64), stored_as(llama, tmp_path / "a", torch.float64)
    values = {name: value * (1 + 1e-12) for name, value in weights(after).items()}
    save_file(values, after / "model.safetensors", metadata={"format": "pt"})
    extrapolate(start, after, tmp_path / "out", 1.0)
    before = weights(start)
    assert_equal(
        weights(tmp_path / "out"), {name: value + 1.0 * (value - before[name]) for name, value in values.items()}
    )


def test_what_rounding_leaves_is_measured(llama: Path, tmp_path: Path) -> None:
    start = stored_as(llama, tmp_path / "start", torch.bfloat16)
    after = stored_as(trained(start, tmp_path / "trained", scale=0.1), tmp_path / "after", torch.bfloat16)
    # A thousandth of a change of a few bits in the last place is below half of that place.
    lost = extrapolate(start, after, tmp_path / "out", 1e-4)
    assert lost.largest > 0
    assert lost.kept < 0.1
    assert extrapolate(start, after, tmp_path / "far", 5.0).kept == pytest.approx(1.0, abs=0.05)


def test_integers_and_old_buffers_are_copied(llama: Path, tmp_path: Path) -> None:
    after = trained(llama, tmp_path / "after")
    start = shutil.copytree(llama, tmp_path / "start")
    extra = "model.layers.0.self_attn.rotary_emb.inv_freq"
    for folder, value in ((start, 1.0), (after, 3.0)):
        values = load_file(folder / "model.safetensors") | {extra: torch.full((16,), value)}
        save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    plan = plan_extrapolation(start, after, CPU)
    assert plan.copied == 1
    extrapolate(start, after, tmp_path / "out", 0.5)
    assert torch.equal(weights(tmp_path / "out")[extra], torch.full((16,), 3.0))
    # One that START lacks is none of its weights.
    assert plan_extrapolation(llama, after, CPU).copied == 1


def test_infinite_weights_and_alphas_are_refused(llama: Path, tmp_path: Path) -> None:
    start = stored_as(llama, tmp_path / "start", torch.float16)
    after = trained(llama, tmp_path / "after", scale=0.1)
    after = stored_as(after, tmp_path / "half", torch.float16)
    with pytest.raises(NotFiniteError, match=r"\S+ would be NaN or infinite in float16 at alpha 1e\+06"):
        extrapolate(start, after, tmp_path / "out", 1e6)
    plan = plan_extrapolation(start, after, CPU)
    for alpha in (math.nan, math.inf):
        with pytest.raises(UsageError, match="give a finite number"):
            write_extrapolated(plan, tmp_path, alpha, no_report)


def assert_extrapolated(start: Path, after: Path, out: Path) -> None:
    """By the models that transformers loads: 0.5 of the parameters' change is added, and buffers are AFTER's."""
    before, now, made = (AutoModelForCausalLM.from_pretrained(folder) for folder in (start, after, out))
    trainable = {name for name, _ in made.named_parameters(remove_duplicate=False)}
    begun, ended = before.state_dict(), now.state_dict()
    for name, value in made.state_dict().items():
        change = 0.5 * (ended[name] - begun[name]) if name in trainable else torch.zeros(())
        assert torch.allclose(value, ended[name] + change, atol=1e-6), name


@pytest.mark.parametrize("family", ["Mixtral", "GPT2", "Gemma2", "Bloom"])
def test_other_families(family: str, tmp_path: Path) -> None:
    """Merged experts, ties, and names with and without a prefix."""
    build(family).save_pretrained(tmp_path / "start")
    after = trained(tmp_path / "start", tmp_path / "after")
    extrapolate(tmp_path / "start", after, tmp_path / "out", 0.5)
    assert_extrapolated(tmp_path / "start", after, tmp_path / "out")


def test_a_routers_correction_is_a_buffer(tmp_path: Path) -> None:
    shape = {**SHAPE, **LATENT, "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2}
    groups = {"n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**shape, **groups))
    model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value += 0.5
    model.save_pretrained(tmp_path / "after")
    assert plan_extrapolation(tmp_path / "start", tmp_path / "after", CPU).copied == 1
    extrapolate(tmp_path / "start", tmp_path / "after", tmp_path / "out", 0.5)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(weights(tmp_path / "out")[name], torch.full((4,), 0.5))
    assert_extrapolated(tmp_path / "start", tmp_path / "after", tmp_path / "out")
