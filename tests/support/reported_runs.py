"""Run folders with everything that a report shows, made without a model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import polars as pl

from dice_py import mine_pairs
from dice_py.config.loading import dump, resolve
from dice_py.config.mining import MiningOptions
from dice_py.mining.distributions import mining_distributions
from dice_py.runs.folder import stage_names
from dice_py.storage.files import Manifest, write_sealed, write_sealed_text

STEPS = 8
"""Entries of the log of each training."""


def scored(seed: int, prompts: int = 60, samples: int = 6) -> pl.DataFrame:
    """Responses whose reward grows with their length."""
    draw = random.Random(seed)
    rows = []
    for prompt in range(prompts):
        for _ in range(samples):
            length = draw.randint(5, 90)
            rows.append((prompt, draw.gauss(0, 1) + 0.03 * length, length))
    return pl.DataFrame(rows, schema=["prompt_id", "reward", "response_tokens"], orient="row")


def log_of(seed: int, entries: int = STEPS) -> list[dict[str, Any]]:
    """A trainer's log."""
    draw = random.Random(seed)
    return [
        {
            "step": 10 * (n + 1), "loss": 0.7 - 0.01 * n, "grad_norm": 2 + draw.random(), "learning_rate": 1e-4,
            "rewards/chosen": 0.01 * n, "rewards/rejected": -0.02 * n, "rewards/margins": 0.03 * n,
            "rewards/accuracies": 0.5 + 0.04 * (n % 9), "logps/chosen": -30.0 - n, "logps/rejected": -40.0 - 2 * n,
        }
        for n in range(entries)
    ]  # fmt: skip


def metrics_of(number: int) -> dict[str, Any]:
    """An evaluation that is better from round to round."""
    rate = 0.5 + 0.02 * number
    return {
        "oracle_win_rate": rate, "oracle_win_rate_ci95": [rate - 0.03, rate + 0.03],
        "implicit_reward_accuracy": 0.6 + 0.01 * number, "implicit_reward_accuracy_ci95": [0.55, 0.75],
        "start_implicit_reward_accuracy": 0.58,
        "mean_response_tokens": 40.0 - number, "mean_response_tokens_ci95": [30.0, 45.0],
        "start_mean_response_tokens": 41.5, "kl_and_entropy": "KL is a mean over samples",
    }  # fmt: skip


def reported_run(folder: Path, rounds: int = 2, *assignments: str, seed: int = 0) -> Path:
    """A finished run on the world, of `rounds` rounds; returns its folder."""
    config = resolve([], [f"rounds={rounds}", *assignments])
    write_sealed_text(folder / "config.yaml", dump(config), "# {}")
    manifest = Manifest(folder / "manifest.json")
    model = {"folder": str(folder / "inputs/world/policy/model"), "identity": "c8363e7325f8c309f1635458"}
    manifest.data |= {
        "config": config.model_dump(mode="json"),
        "policy": model,
        "reference": {"folder": "the sft", "identity": "7c1926893eb16351cbfe0acb"},
        "versions": {"torch": "2.13.0"},
        "others": {"inputs/world/prompts.parquet": "a4ee32693ced70d59106e067f2b4bf89"},
        "outcome": {
            "settings": config.rounds.model_dump(mode="json"), "round": f"round-{rounds:02d}",
            "policy": f"round-{rounds:02d}/train/model", "comparisons": {}, "ended_after": None,
        },
    }  # fmt: skip
    inspected = [f"round-{number:02d}/inspect" for number in range(1, rounds + 1)]
    for name in dict.fromkeys([*stage_names(config), *inspected]):
        counts = {"pairs": 60} if name.endswith("mine") else {"mined": 60, "replay": 20} if "replay" in name else {}
        manifest.data["stages"][name] = {
            "key": "k", "status": "done", "started": 1.0, "seconds": 90.0, "counts": counts, "files": [],
            "warnings": [],
        }  # fmt: skip
    manifest.save()
    for number in range(1, rounds + 1):
        base = folder / f"round-{number:02d}"
        write_mining(base, scored(100 * seed + number), seed=number)
        write_sealed(base / "evaluate/metrics.json", metrics_of(number), "k")
        write_log(base / "train", log_of(100 * seed + number))
    return folder


def write_mining(base: Path, frame: pl.DataFrame, seed: int = 0) -> None:
    """`mine/mining.json` and `inspect/distributions.json` of a round."""
    options = MiningOptions(seed=seed)
    mined = mine_pairs(frame, options)
    found = {"length": "tokens", "debias": "linear", "pairing": "max_min", **mined.summary()}
    write_sealed(base / "mine/mining.json", {**found, "curve": mined.curve.to_dict(as_series=False)}, "k")
    distributions = mining_distributions(frame, mined.pairs, options, mined.alpha)
    write_sealed(base / "inspect/distributions.json", distributions, "k")


def write_log(folder: Path, entries: list[dict[str, Any]]) -> None:
    """`log.jsonl` of a train stage."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
