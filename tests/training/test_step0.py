"""The check at step 0 in bfloat16: rounding passes it, and log-probabilities of other tokens do not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from tiny_models import make_llama, make_mistral
from tiny_sets import token_pairs

from dice_py.config.shared import ModelConfig
from dice_py.config.stages import ScoreConfig
from dice_py.config.training import TrainConfig
from dice_py.errors import DataError
from dice_py.models.loading import load_model
from dice_py.scoring.pairs import score_pairs
from dice_py.training.step0 import Step0, check_step0, measure_step0, rounded_otherwise
from dice_py.training.trainer import build_trainer

BFLOAT16 = ModelConfig(device="cpu", dtype="bfloat16")
AUTO = TrainConfig()
PAIRS = 48
SIDES = ("chosen", "rejected")
LOGPS = [f"ref_{side}_logps" for side in SIDES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    deep = {"num_hidden_layers": 6, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return {
        "llama": make_llama(folder / "llama"),
        "mistral": make_mistral(folder / "mistral", seed=1),
        "deep": make_llama(folder / "deep", seed=2, **deep),
    }


def scored(policy: Path, pairs: pl.DataFrame) -> list[pl.Series]:
    logps = score_pairs(ScoreConfig(), BFLOAT16, policy=policy, pairs=pairs)
    return [logps[f"{side}_logp"].alias(name) for side, name in zip(SIDES, LOGPS, strict=True)]


def shifted(pairs: pl.DataFrame, by: int) -> pl.DataFrame:
    """The pairs with the border between prompt and response moved, each side in a pair of its own."""
    rows = []
    for prompt, chosen, rejected in pairs.select("prompt_ids", "chosen_ids", "rejected_ids").iter_rows():
        for response in (chosen, rejected):
            tokens, border = [*prompt, *response], len(prompt) + by
            rows.append((tokens[:border], tokens[border : border + len(response)]))
    prompts, responses = zip(*rows, strict=True)
    return pl.DataFrame({"prompt_ids": prompts, "chosen_ids": responses, "rejected_ids": responses})


def references(policy: Path, pairs: pl.DataFrame, wrong: str) -> list[pl.Series]:
    """Reference log-probabilities as a scorer with an error computes them; right ones if `wrong` is empty."""
    if not wrong:
        return scored(policy, pairs)
    if wrong.startswith("mask"):
        logps = scored(policy, shifted(pairs, int(wrong.removeprefix("mask "))))[0]
        return [logps.gather_every(2, offset).alias(name) for offset, name in enumerate(LOGPS)]
    model = load_model(policy, BFLOAT16)
    columns = []
    for side, name in zip(SIDES, LOGPS, strict=True):
        sums = []
        for prompt, response in pairs.select("prompt_ids", f"{side}_ids").iter_rows():
            ids = torch.tensor([[*prompt, *response]])
            with torch.inference_mode():
                logps = model(input_ids=ids).logits[0].float().log_softmax(dim=-1)
            # Each position's own token instead of the next one.
            sums.append(logps.gather(1, ids[0][:, None])[len(prompt) :].sum().item())
        columns.append(pl.Series(name, sums, dtype=pl.Float32))
    return columns


def measured(policy: Path, folder: Path, wrong: str = "", pairs: int = PAIRS, **changed: Any) -> Step0:
    data = token_pairs(4 * pairs, seed=3).filter(pl.all_horizontal(pl.all().list.len() > 2)).head(pairs)
    assert data.height == pairs
    data = data.with_columns(references(policy, data, wrong))
    config = TrainConfig(per_device_train_batch_size=4, batch_size=4, **changed)
    trainer = build_trainer(config, BFLOAT16, policy=policy, pairs=data, folder=folder, beta=0.1, seed=0)
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)  # with autocast, as when training begins
    return measure_step0(trainer, pairs)


@pytest.mark.parametrize("packed", [False, True])
def test_rounding_passes(folders: dict[str, Path], tmp_path: Path, packed: bool) -> None:
    """Trainer and scorer differ about as much as two ways of rounding do, and by more than float32 may."""
    results = [measured(policy, tmp_path, packed=packed) for policy in folders.values()]
    for step0 in results:
        check_step0(step0, AUTO, float32=False)
        assert 0.5 * step0.spread < step0.rms_difference < 2 * step0.spread
        assert abs(step0.loss - math.log(2)) < step0.loss_limit() / 2
    assert max(step0.max_abs_difference for step0 in results) > 0.1


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("wrong", ["mask -1", "mask 1", "mask 2", "tokens"])
def test_log_probabilities_of_other_tokens_do_not(
    folders: dict[str, Path], tmp_path: Path, name: str, wrong: str
) -> None:
    right, step0 = (measured(folders[name], tmp_path, error) for error in ("", wrong))
    assert step0.spread == pytest.approx(right.spread)  # the limits do not depend on the references
    assert step0.rms_difference > 3 * step0.difference_limit() > 3 * right.rms_difference
    with pytest.raises(DataError, match=r"at step 0.*dice score"):
        check_step0(step0, AUTO, float32=False)


def test_one_pair_is_enough(folders: dict[str, Path], tmp_path: Path) -> None:
    for policy in folders.values():
        check_step0(measured(policy, tmp_path, pairs=1), AUTO, float32=False)
    with pytest.raises(DataError):
        check_step0(measured(folders["llama"], tmp_path, "mask 1", pairs=1), AUTO, float32=False)


# --- the limits, by hand ------------------------------------------------------------------------------------


def step0(**changed: Any) -> Step0:
    """Of 32 pairs with β = 0.1 whose rounding moves a response by 0.4 nats."""
    values = {"loss": math.log(2), "max_abs_difference": 1.0, "rms_difference": 0.5, "spread": 0.4, "pairs": 32}
    return Step0(**{**values, "beta": 0.1, **changed})


def test_limits() -> None:
    assert step0().difference_limit() == pytest.approx(0.1 + 3 * 0.4 * (1 + 2 / 8))
    margin = 0.1 * math.sqrt(2) * 1.5 * 0.4  # the standard deviation of a pair's margin
    assert step0().loss_limit() == pytest.approx(1e-3 + 4 * margin / (2 * math.sqrt(32)) + margin**2 / 4)
    assert step0(pairs=128).loss_limit() < step0().loss_limit() < step0(pairs=8).loss_limit()
    assert (step0(spread=0.0).loss_limit(), step0(spread=0.0).difference_limit()) == (1e-3, 0.1)


@pytest.mark.parametrize(
    ("changed", "tolerance", "float32", "says"),
    [
        ({}, "auto", False, None),
        ({"loss": math.log(2) + 0.025}, "auto", False, None),
        ({"loss": math.log(2) + 0.04}, "auto", False, "loss at step 0 is 0.73315"),
        ({"loss": math.log(2) - 0.04}, 0.05, False, None),
        ({"loss": math.log(2) - 0.02}, 0.01, False, r"allowed ±0.01"),
        ({"loss": math.nan}, "auto", False, "loss at step 0 is nan"),
        ({"rms_difference": 1.7}, "auto", False, r"differ by 1.7 nats .*allowed: 1.6; two ways of rounding .* 0.4"),
        ({"rms_difference": math.nan}, "auto", False, "differ by nan"),
        ({"rms_difference": 1.7}, 0.01, False, None),  # the user's number is the only limit
        ({"spread": 0.0, "max_abs_difference": 0.05, "rms_difference": 0.05}, "auto", True, None),
        ({"spread": 0.0, "max_abs_difference": 0.2}, "auto", True, "allowed in float32: 0.1"),
        ({"spread": 0.0, "loss": math.log(2) + 0.002}, "auto", True, r"allowed ±0.001"),
    ],
)
def test_what_passes(changed: dict[str, Any], tolerance: Any, float32: bool, says: str | None) -> None:
    config = TrainConfig(step0_tolerance=tolerance)
    if says is None:
        check_step0(step0(**changed), config, float32=float32)
    else:
        with pytest.raises(DataError, match=says):
            check_step0(step0(**changed), config, float32=float32)


def test_rounding_otherwise_moves_by_one_rounding_and_only_within_the_block() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 64).bfloat16()
    inputs = torch.randn(32, 16).bfloat16()
    before = layer(inputs)
    with rounded_otherwise(layer, torch.bfloat16):
        first = layer(inputs)
    with rounded_otherwise(layer, torch.bfloat16):
        assert torch.equal(layer(inputs), first)  # the same each time
        assert layer.float()(inputs.float()).equal(torch.nn.functional.linear(inputs.float(), layer.weight, layer.bias))
        layer.bfloat16()
    assert torch.equal(layer(inputs), before)
    moved = ((first - before).abs() / before.abs()).float()
    assert moved.max() <= torch.finfo(torch.bfloat16).eps
    assert 0.1 < (moved > 0).float().mean() < 0.9
