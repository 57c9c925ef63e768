"""The losses of training methods, written from their equations: plain torch in float64 on summed log-probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import torch
from tiny_sets import CPU
from torch.nn.functional import logsigmoid

from dice_py.models.loading import load_model

SIDES = ("chosen", "rejected")


def token_logps(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """(response tokens,) log π(y_t | x, y_<t) in nats, by one forward of the sequence alone."""
    ids = torch.tensor([[*prompt, *response]])
    logps = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(dim=-1)
    return logps.gather(1, torch.tensor(response)[:, None])[:, 0]


def sums(model: Any, pairs: pl.DataFrame, ld_alpha: float = 1.0) -> dict[str, torch.Tensor]:
    """(pairs,) Σ log π of chosen and rejected; tokens beyond the shorter response's length count `ld_alpha`."""
    found: dict[str, list[torch.Tensor]] = {side: [] for side in SIDES}
    for row in pairs.iter_rows(named=True):
        shared = min(len(row["chosen_ids"]), len(row["rejected_ids"]))
        for side in SIDES:
            logps = token_logps(model, row["prompt_ids"], row[f"{side}_ids"]).double()
            found[side].append(logps[:shared].sum() + ld_alpha * logps[shared:].sum())
    return {side: torch.stack(values) for side, values in found.items()}


def column(pairs: pl.DataFrame, name: str) -> torch.Tensor:
    return torch.tensor(pairs[name].cast(pl.Float64).to_list(), dtype=torch.float64)


def ratios(model: Any, pairs: pl.DataFrame) -> tuple[torch.Tensor, torch.Tensor]:
    """(pairs,) log(π/π_ref) of chosen and rejected, with the stored references."""
    logps = sums(model, pairs)
    chosen, rejected = (logps[side] - column(pairs, f"ref_{side}_logps") for side in SIDES)
    return chosen, rejected


def dpo(beta: float, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """(pairs,) −log σ(β·Δ)."""
    return -logsigmoid(beta * (chosen - rejected))


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def plain_model(policy: Path) -> Any:
    """The policy with all weights trained, in float32, without dropout."""
    model = load_model(policy, CPU, training=True)
    model.requires_grad_(True)
    return model
