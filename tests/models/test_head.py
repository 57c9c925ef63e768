"""The head of a 16-bit model: its logits are not rounded, so that sampler and scorer agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from engine_rig import Rig, of_prompt
from tiny_models import make_llama
from tiny_sets import CPU

from dice_py.config.shared import ModelConfig
from dice_py.config.stages import GenerateConfig, ScoreConfig
from dice_py.generation.engines import transformers as engine
from dice_py.models.head import float32_logits, use_float32_head
from dice_py.models.loading import load_model
from dice_py.scoring.scorer import Scorer

BFLOAT16 = ModelConfig(device="cpu", dtype="bfloat16")


def factors(dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weights and a bias, whose logits are some tens."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(40, 64), (500, 64), (500,)]
    hidden, weight, bias = (3 * torch.randn(shape, generator=generator) for shape in shapes)
    return hidden.to(device, dtype), weight.to(device, dtype), bias.to(device, dtype)


def check_logits(device: str, dtype: torch.dtype, with_bias: bool) -> None:
    hidden, weight, bias = factors(dtype, device)
    exact = hidden.double() @ weight.double().T + (bias.double() if with_bias else 0.0)
    logits = float32_logits(hidden, weight, bias if with_bias else None)
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().max() < 1e-4
    assert exact.abs().max() > 100  # where bfloat16 rounds by up to 0.25


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_not_rounded(dtype: torch.dtype, with_bias: bool) -> None:
    check_logits("cpu", dtype, with_bias)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_not_rounded_on_a_gpu(dtype: torch.dtype, with_bias: bool) -> None:
    check_logits("cuda", dtype, with_bias)


def test_model_with_a_float32_head(llama: Path) -> None:
    model, plain = load_model(llama, BFLOAT16), load_model(llama, BFLOAT16)
    use_float32_head(model)
    ids = torch.randint(6, 200, (3, 7), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits, rounded = model(ids).logits, plain(ids).logits
        assert logits.dtype == torch.float32
        assert torch.equal(logits.bfloat16(), rounded)
        assert not torch.equal(logits, rounded.float())
        # By a product of the same shape: of another one, a processor may sum in another order.
        hidden = plain.model(ids).last_hidden_state[:, -1:]
        product = torch.nn.functional.linear(hidden.float(), plain.lm_head.weight.float())
        assert model(ids, logits_to_keep=1).logits.equal(product)
    float32 = load_model(llama, CPU)
    before = float32.lm_head.forward
    use_float32_head(float32)
    assert float32.lm_head.forward == before


def test_samples_come_with_the_scorers_log_probabilities_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_llama(tmp_path / "llama", initializer_range=0.02)
    model = load_model(folder, CPU)
    with torch.no_grad():
        model.lm_head.weight *= 30  # so that logits are large, as those of a trained model
    model.save_pretrained(folder)
    config = GenerateConfig(samples=4, max_new_tokens=16)

    def differences() -> np.ndarray:
        """Of the sums that came with the samples from the scorer's."""
        rig = Rig(folder, config, BFLOAT16)
        requests = of_prompt(rig, 8, 4)
        samples = rig.sample(requests)
        scorer = Scorer(load_model(folder, BFLOAT16), ScoreConfig())
        sums = scorer.sums([one.prompt_token_ids for one in requests], [one.token_ids for one in samples])
        return np.abs(np.array([one.logp for one in samples]) - sums)

    ours = differences()
    monkeypatch.setattr(engine, "use_float32_head", lambda model: None)
    rounded = differences()
    assert ours.max() < 0.01
    assert rounded.mean() > 0.1
