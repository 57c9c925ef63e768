"""The results of the evidence on a real model, as in `evidence.json`: every policy's figures, and answers to read.

All of it is read from the files of the runs and of the evaluation of π_1, so that a finished task can be shown again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.evidence.annotator import Annotator, LabeledPair, measured_bias
from dice_py.evidence.data import with_scores
from dice_py.evidence.settings import Sizes
from dice_py.evidence.start import folder_samples, sft_metrics, start_metrics
from dice_py.runs.folder import round_name
from dice_py.storage.keys import versions
from dice_py.storage.parquet import read_parquet

METRICS = {
    "function_score": "oracle score",
    "function_win_rate": "win rate over π_1",
    "mean_response_tokens": "tokens of an answer",
    "cut_off_share": "share cut off",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "duplicate_share": "share of duplicates",
    "entropy_per_token": "entropy per token, nats",
    "kl_to_initial_reference": "KL from the SFT model, nats",
    "kl_to_start": "KL from π_1, nats",
    "function_on_policy_reward_accuracy": "reward orders own answers as the oracle",
}
"""The figures of each policy, by the evaluation's names, and what they are called."""
SFT, START = "SFT model", "π_1"
SHOWN_ANSWERS = 10
ABLATION = "ablation"
"""The folder of the ablation, in that of the evidence."""


def evidence_results(
    ablation: Mapping[str, Any],
    start: Mapping[str, Any],
    out: Path,
    *,
    pairs: Sequence[LabeledPair],
    annotator: Annotator,
    sizes: Sizes,
    model: str,
    seed: int,
) -> dict[str, Any]:
    """The results, ready for JSON.

    Args:
        ablation: of `run_ablation`.
        start: of `evaluate_start`.
        out: the folder of the evidence.
        pairs, annotator, sizes, model, seed: what the data was made of.

    Returns:
        `policies`: one entry for the SFT model, π_1, and each arm after each round: `name`, `arm` and `round` (None for
        the first two), and `metrics`, by the names of METRICS, each with `value` and `ci95` (over prompts; None where
        there is none). `contrasts`: of the ablation, paired by prompt. `mining`: of each arm and round. `answers`: for
        the first ten prompts of the evaluation, the first answer of the SFT model, of π_1 and of each arm after its
        last round, with the oracle's score. `annotator`: its settings, and its measured bias.
    """
    sft = folder_samples(out / "start" / "start")
    first = folder_samples(out / "start" / "evaluate" / "samples")
    assert sft is not None
    assert first is not None
    policies = [
        _policy(SFT, None, None, _pairs_of(sft_metrics(sft, dict(start), seed))),
        _policy(START, None, None, _pairs_of(start_metrics(dict(start)))),
    ]
    mining = []
    for arm in ablation["arms"]:
        for each in arm["rounds"]:
            found = {name: (value["mean"], value["ci95"]) for name, value in each["metrics"].items()}
            policies.append(_policy(f"{arm['label']}, round {each['round']}", arm["arm"], each["round"], found))
            mined = {name: value["mean"] for name, value in each["mining"].items()}
            mining.append({"arm": arm["arm"], "round": each["round"], **mined})
    shared = ("rounds", "settings", "seconds", "machine", "contrasts", "unfinished")
    return {
        "version": 1,
        "seed": seed,
        "model": Path(model).name if Path(model).exists() else model,
        "oracle": versions("vaderSentiment").get("vaderSentiment"),
        "sizes": sizes.as_json(),
        "annotator": {"settings": annotator.as_json(), "measured": measured_bias(pairs, seed)},
        "policies": policies,
        "mining": mining,
        "answers": _answers(ablation, sft, first, out, seed),
        **{name: ablation[name] for name in shared},
        "versions": versions("torch", "transformers", "trl"),
    }


def _pairs_of(metrics: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (metrics.get(name), metrics.get(f"{name}_ci95")) for name in METRICS}


def _policy(name: str, arm: str | None, number: int | None, found: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    metrics = {metric: dict(zip(("value", "ci95"), found.get(metric, (None, None)), strict=True)) for metric in METRICS}
    return {"name": name, "arm": arm, "round": number, "metrics": metrics}


def _answers(
    ablation: Mapping[str, Any], sft: pl.DataFrame, first: pl.DataFrame, out: Path, seed: int
) -> list[dict[str, Any]]:
    """Prompts with the first answer of each policy; the prompts are the first of the evaluation, not chosen ones."""
    sides = {SFT: sft, START: first}
    prompts: dict[int, str] = {}
    for arm in ablation["arms"]:
        if not arm["rounds"]:
            continue
        run = out / ABLATION / "runs" / arm["arm"] / f"seed-{seed}"
        samples = read_parquet(run / round_name(ablation["rounds"]) / "evaluate" / "samples.parquet")
        sides[arm["label"]] = with_scores(samples)
        asked = samples.select("prompt_id", text=pl.col("messages").list.last().struct.field("content"))
        prompts |= dict(asked.unique("prompt_id").iter_rows())
    shown = sorted(prompts)[:SHOWN_ANSWERS]
    by_side = {name: _first_answers(samples) for name, samples in sides.items()}
    return [
        {
            "prompt": prompts[prompt_id],
            "answers": [{"policy": name, **rows[prompt_id]} for name, rows in by_side.items() if prompt_id in rows],
        }
        for prompt_id in shown
    ]


def _first_answers(samples: pl.DataFrame) -> dict[int, dict[str, Any]]:
    """By prompt_id: `response`, `score`, `tokens` and `ended` of the sample that was drawn first."""
    rows = samples.sort("prompt_id", "sample_id").unique("prompt_id", keep="first", maintain_order=True)
    return {
        row["prompt_id"]: {
            "response": row["response"],
            "score": row["score"],
            "tokens": row["response_tokens"],
            "ended": row["finish_reason"] == "stop",
        }
        for row in rows.iter_rows(named=True)
    }
