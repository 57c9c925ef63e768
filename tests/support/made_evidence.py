"""Results of the evidence, read from files that no model has made: two arms of two rounds, of which one has answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from dice_py.evidence.annotator import Annotator, LabeledPair
from dice_py.evidence.results import evidence_results
from dice_py.evidence.settings import SMALL

ARMS = {"neither": "neither", "both": "length penalty and replay"}
GOOD, BAD, NEUTRAL = "It is wonderful.", "It is awful.", "It is a kettle."
PAIRS: list[LabeledPair] = [
    {
        "prompt": "Review it.", "chosen": GOOD, "rejected": BAD, "chosen_score": 0.6, "rejected_score": -0.5,
        "chosen_tokens": 5, "rejected_tokens": 4,
    }
]  # fmt: skip
START_METRICS: dict[str, Any] = {
    "function_score": 0.25, "function_score_ci95": [0.2, 0.3],
    "function_win_rate": 0.625, "function_win_rate_ci95": [0.5, 0.75],
    "mean_response_tokens": 5.0, "mean_response_tokens_ci95": [4.0, 6.0],
    "distinct_1": 0.9, "distinct_1_ci95": [0.8, 1.0],
    "kl_to_initial_reference": 1.5, "kl_to_initial_reference_ci95": [1.0, 2.0],
    "kl_to_start": 1.5, "kl_to_start_ci95": [1.0, 2.0],
}  # fmt: skip


def value(mean: float, ci95: list[float] | None = None) -> dict[str, Any]:
    return {"mean": mean, "ci95": ci95, "by_seed": [mean]}


def ablation() -> dict[str, Any]:
    """As `run_ablation` returns it, as far as it is read."""
    arms = [
        {
            "arm": arm,
            "label": label,
            "rounds": [
                {
                    "round": number,
                    "metrics": {
                        "function_score": value(0.3 + number / 10, [0.3, 0.6]),
                        "mean_response_tokens": value(50.0 + number, [40.0, 60.0]),
                        "function_win_rate": value(0.55, [0.5, 0.6]),
                        "kl_to_initial_reference": value(2.0 * number, [1.0, 5.0]),
                        "kl_to_start": value(1.0 * number, [0.5, 2.5]),
                    },
                    "mining": {"pairs": value(100.0), "alpha": value(0.01)},
                }
                for number in (1, 2)
            ],
        }
        for arm, label in ARMS.items()
    ]
    contrast = {
        "claim": "length", "text": "with the length penalty − without it", "arm": "both", "round": 2,
        "against_arm": "neither", "against_round": 2, "metric": "function_score",
        "difference": value(0.1, [0.02, 0.18]), "verdict": "shown",
    }  # fmt: skip
    shared = {"rounds": 2, "settings": {"beta": 0.1}, "seconds": 61.0, "machine": "2 cores", "unfinished": []}
    return {"arms": arms, "contrasts": [contrast], **shared}


def write_shard(folder: Path, *texts: str) -> None:
    """Two samples to each of two prompts, as the generate stage writes them."""
    folder.mkdir(parents=True)
    frame = pl.DataFrame(
        {
            "prompt_id": [1, 1, 0, 0],
            "sample_id": [0, 1, 0, 1],
            "response": texts,
            "response_tokens": [5, 6, 7, 8],
            "response_chars": [20, 20, 20, 20],
            "finish_reason": ["stop", "stop", "length", "stop"],
            "token_ids": [[1, 2], [1, 3], [1, 2], [4, 5]],
            "sampled_logp": [-1.0, -2.0, -3.0, -4.0],
        }
    )
    frame.write_parquet(folder / "generations-00000.parquet")


def made_evidence(out: Path) -> dict[str, Any]:
    """Writes the files into a folder, and returns what is read of them."""
    write_shard(out / "start" / "start", BAD, GOOD, NEUTRAL, NEUTRAL)
    write_shard(out / "start" / "evaluate" / "samples", NEUTRAL, BAD, GOOD, BAD)
    for arm in ARMS:
        folder = out / "ablation" / "runs" / arm / "seed-3" / "round-02" / "evaluate"
        folder.mkdir(parents=True)
        frame = pl.DataFrame(
            {
                "prompt_id": [0, 1],
                "sample_id": [0, 0],
                "messages": [[{"role": "user", "content": f"Review {n}."}] for n in range(2)],
                "response": [f"{arm}: {GOOD}", BAD],
                "response_tokens": [9, 4],
                "finish_reason": ["stop", "stop"],
            }
        )
        frame.write_parquet(folder / "samples.parquet")
    return evidence_results(
        ablation(),
        START_METRICS,
        out,
        pairs=PAIRS,
        annotator=Annotator(),
        sizes=SMALL,
        model="folder/model.gguf",
        seed=3,
    )
