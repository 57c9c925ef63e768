"""Each training method against its equation: the loss of a step and its gradients, on packed and on padded rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain_loss as plain
import polars as pl
import pytest
import torch
from tiny_sets import CPU, scored_pairs
from tiny_training import step_of

from dice_py.config.loss import LossTerm
from dice_py.config.training import TrainConfig
from dice_py.training.pair_terms import load_pairs
from dice_py.training.pair_trainer import PairTrainer
from dice_py.training.trainer import build_trainer

pytestmark = pytest.mark.slow

COUNT, BETA = 8, 0.3
BASE = {
    "batch_size": COUNT, "per_device_train_batch_size": COUNT, "save_steps": None, "packed_tokens": 60,
    "logging_steps": 1,
}  # fmt: skip
Loss = Callable[[Any, pl.DataFrame], torch.Tensor]
REPLAYED = 5
"""From this row on, pairs are of a file: they have no labels."""


@pytest.fixture(scope="module")
def labeled(llama: Path) -> pl.DataFrame:
    """Pairs whose log-ratios differ, with labels of mining; the last ones have none."""
    place = pl.int_range(COUNT)
    mined = place < REPLAYED

    def label(values: list[float]) -> pl.Expr:
        return pl.when(mined).then(pl.Series(values, dtype=pl.Float32))

    return (
        scored_pairs(llama, COUNT)
        .with_columns(
            pl.col("ref_chosen_logps") + 0.3 * place, pl.col("ref_rejected_logps") - 0.7 * (place * 5 % COUNT)
        )
        .with_columns(pl.col("prompt_ids").gather([0, 0, 1, 2, 3, 4, 5, 6]))  # two pairs of one prompt
        .with_columns(
            chosen_win_rate=label([0.9, 0.8, 0.7, 0.95, 0.6, 0, 0, 0]),
            rejected_win_rate=label([0.2, 0.1, 0.3, 0.05, 0.45, 0, 0, 0]),
            soft_label=label([0.9, 0.6, 0.7, 0.99, 0.55, 0, 0, 0]),
            consistency=label([0.8, 0.8, 0.3, 0.6, 1.0, 0, 0, 0]),
            margin=label([0.5, 1.5, 2.0, 0.0, 3.0, 0, 0, 0]),
            difficulty=pl.when(mined).then(pl.Series(["hard", "easy", "hard", "easy", "easy", "", "", ""])),
        )
    )


def build(policy: Path, pairs: pl.DataFrame, folder: Path, meta: Any = None, **changed: Any) -> PairTrainer:
    from dice_py.storage.parquet import write_parquet

    config = TrainConfig(**(BASE | changed))
    file = write_parquet(folder / "training_set.parquet", pairs, key="key", meta=meta)
    loaded, _ = load_pairs(file, config, BETA)
    return build_trainer(config, CPU, policy=policy, pairs=loaded, folder=folder, beta=BETA, seed=0)


def lengths(pairs: pl.DataFrame) -> tuple[torch.Tensor, torch.Tensor]:
    chosen, rejected = (torch.tensor(pairs[f"{side}_ids"].list.len().to_list()).double() for side in plain.SIDES)
    return chosen, rejected


def filled(pairs: pl.DataFrame, name: str, missing: float) -> torch.Tensor:
    return plain.column(pairs.with_columns(pl.col(name).fill_null(missing)), name)


def mixed(label: Callable[[pl.DataFrame], torch.Tensor]) -> Loss:
    def loss(model: Any, pairs: pl.DataFrame) -> torch.Tensor:
        chosen, rejected = plain.ratios(model, pairs)
        p = label(pairs)
        return (p * plain.dpo(BETA, chosen, rejected) + (1 - p) * plain.dpo(BETA, rejected, chosen)).mean()

    return loss


def rdpo(alpha: float) -> Loss:
    def loss(model: Any, pairs: pl.DataFrame) -> torch.Tensor:
        chosen, rejected = plain.ratios(model, pairs)
        longer, other = lengths(pairs)
        return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected) + alpha * (longer - other)).mean()

    return loss


def sppo(model: Any, pairs: pl.DataFrame) -> torch.Tensor:
    chosen, rejected = plain.ratios(model, pairs)
    wins, losses = filled(pairs, "chosen_win_rate", 1.0), filled(pairs, "rejected_win_rate", 0.0)
    return ((chosen - (wins - 0.5) / BETA) ** 2 + (rejected - (losses - 0.5) / BETA) ** 2).mean()


def weighted(model: Any, pairs: pl.DataFrame) -> torch.Tensor:
    chosen, rejected = plain.ratios(model, pairs)
    margin = pairs["margin"]
    weights = filled(pairs, "margin", float(margin.mean() or 0)) / float(margin.mean() or 0)
    return (weights * plain.dpo(BETA, chosen, rejected)).mean()


def soft_weighted_with_sft(model: Any, pairs: pl.DataFrame) -> torch.Tensor:
    """All at one time: weights of the pairs, labels, two types and the NLL of the chosen tokens."""
    chosen, rejected = plain.ratios(model, pairs)
    margin = pairs["margin"]
    weights = filled(pairs, "margin", float(margin.mean() or 0)) / float(margin.mean() or 0)
    p = filled(pairs, "soft_label", 1.0)

    def both(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        hinge = torch.relu(1 - BETA * (one - other))
        return 0.7 * plain.dpo(BETA, one, other) + 0.4 * hinge

    preference = weights * (p * both(chosen, rejected) + (1 - p) * both(rejected, chosen))
    nll = -(weights * plain.sums(model, pairs)["chosen"]).sum() / lengths(pairs)[0].sum()
    return preference.mean() + 0.2 * nll


def cream_of_round(pairs: pl.DataFrame) -> torch.Tensor:
    mean = (0.8 + 0.3 + 0.6 + 1.0) / 4  # of the four prompts
    return torch.tensor([mean] * REPLAYED + [1.0] * (COUNT - REPLAYED), dtype=torch.float64)


METHODS: dict[str, tuple[dict[str, Any], Loss]] = {
    "dpo": ({}, mixed(lambda pairs: torch.ones(COUNT, dtype=torch.float64))),
    "rdpo": ({"method": "rdpo", "length_weight": 0.05}, rdpo(0.05)),
    "rdpo auto": ({"method": "rdpo", "meta": {"mined_alpha": 0.02}}, rdpo(0.02)),
    "sppo": ({"method": "sppo"}, sppo),
    "cream": ({"method": "cream"}, mixed(cream_of_round)),
    "cream prompt": (
        {"method": "cream", "consistency": "prompt"}, mixed(lambda pairs: filled(pairs, "consistency", 1.0)),
    ),
    "spa": (
        {"method": "spa", "label_smoothing": 0.2},
        mixed(lambda pairs: torch.tensor([0.8, 1, 0.8, 1, 1, 1, 1, 1], dtype=torch.float64)),
    ),
    "soft": ({"method": "soft"}, mixed(lambda pairs: filled(pairs, "soft_label", 1.0))),
    "weights": ({"weight_column": "margin"}, weighted),
    "soft, weights, mixture": (
        {
            "method": "soft", "weight_column": "margin", "sft_weight": 0.2,
            "loss": [LossTerm(type="sigmoid", weight=0.7), LossTerm(type="hinge", weight=0.4)],
        },
        soft_weighted_with_sft,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradients_are_those_of_the_equation(
    llama: Path, labeled: pl.DataFrame, tmp_path: Path, name: str
) -> None:
    changed, loss = METHODS[name]
    model = plain.plain_model(llama)
    expected = loss(model, labeled)
    wanted = plain.gradients(model, expected)
    for packed in ("auto", False):
        made = build(llama, labeled, tmp_path / str(packed), **changed, packed=packed)
        found, gradients = step_of(made)
        assert found == pytest.approx(expected.item(), rel=1e-5)
        assert wanted.keys() == gradients.keys()
        for each, gradient in wanted.items():
            assert (gradient - gradients[each]).abs().max() <= 3e-5 * gradient.abs().max(), each
        if packed == "auto":
            assert len(made.packing[0]["pairs"]) > 2  # several rows of the step


def test_logged_rewards_are_those_of_the_true_references(llama: Path, labeled: pl.DataFrame, tmp_path: Path) -> None:
    plain_made = build(llama, labeled, tmp_path / "dpo")
    step_of(plain_made)
    for name in ("rdpo", "sppo", "cream"):
        made = build(llama, labeled, tmp_path / name, **METHODS[name][0])
        step_of(made)
        for metric in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen"):
            ours, theirs = (torch.cat(one._metrics["train"][metric]) for one in (made, plain_made))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_ld_alpha_against_the_equation(llama: Path, other: Path, labeled: pl.DataFrame, tmp_path: Path) -> None:
    """LD-DPO, arXiv 2409.06411: a response's tokens beyond the shorter one's length count α."""
    from dice_py.config.stages import ScoreConfig
    from dice_py.scoring.pairs import score_pairs

    scored = score_pairs(ScoreConfig(), CPU, policy=other, pairs=labeled, shared=True)
    pairs = labeled.hstack(scored.rename(lambda name: f"ref_{name}s").select(pl.col("^.*shared.*$"))).with_columns(
        ref_chosen_logps=scored["chosen_logp"], ref_rejected_logps=scored["rejected_logp"]
    )
    model, reference = plain.plain_model(llama), plain.plain_model(other)
    with torch.no_grad():
        of_reference = plain.sums(reference, pairs, 0.25)
    of_policy = plain.sums(model, pairs, 0.25)
    chosen, rejected = (of_policy[side] - of_reference[side] for side in plain.SIDES)
    expected = plain.dpo(BETA, chosen, rejected).mean()
    wanted = plain.gradients(model, expected)
    found, gradients = step_of(build(llama, pairs, tmp_path, ld_alpha=0.25))
    assert found == pytest.approx(expected.item(), rel=1e-5)
    for each, gradient in wanted.items():
        assert (gradient - gradients[each]).abs().max() <= 3e-5 * gradient.abs().max(), each


@pytest.mark.parametrize(
    ("changed", "formula"),
    [
        ({"f_divergence_type": "js_divergence"}, lambda u: math.log(2) + torch.nn.functional.logsigmoid(u)),
        ({"f_divergence_type": "forward_kl"}, lambda u: 1 - torch.exp(-u)),
        (
            {"f_divergence_type": "alpha_divergence", "trainer_args": {"f_alpha_divergence_coef": 0.4}},
            lambda u: (torch.exp(-0.6 * u) - 1) / -0.6,
        ),
    ],
    ids=lambda value: str(value.get("f_divergence_type")) if isinstance(value, dict) else "",
)
def test_divergences_and_passed_options_reach_trl(
    llama: Path,
    labeled: pl.DataFrame,
    tmp_path: Path,
    changed: dict[str, Any],
    formula: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    model = plain.plain_model(llama)
    chosen, rejected = plain.ratios(model, labeled)
    expected = plain.dpo(BETA, formula(chosen), formula(rejected)).mean()
    found, _ = step_of(build(llama, labeled, tmp_path, **changed))
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_wpo_weighs_by_the_policys_own_probability(llama: Path, labeled: pl.DataFrame, tmp_path: Path) -> None:
    """WPO, arXiv 2406.11827, eq. 2: exp of the mean over tokens of log π(y_t) − log Σ_v π(v)², of both responses."""
    model = plain.plain_model(llama)
    chosen, rejected = plain.ratios(model, labeled)
    weights = []
    for row in labeled.iter_rows(named=True):
        product = 0.0
        for side in plain.SIDES:
            ids = torch.tensor([[*row["prompt_ids"], *row[f"{side}_ids"]]])
            with torch.no_grad():
                logps = model(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1].log_softmax(dim=-1)
            own = logps.gather(1, torch.tensor(row[f"{side}_ids"])[:, None])[:, 0]
            product += (own - (2 * logps).logsumexp(dim=-1)).mean().item()
        weights.append(math.exp(product))
    expected = (torch.tensor(weights).double() * plain.dpo(BETA, chosen, rejected)).mean()
    found, _ = step_of(build(llama, labeled, tmp_path, use_weighting=True))
    assert found == pytest.approx(expected.item(), rel=1e-4)
