"""The search for the settings of the synthetic world: variants of the default, each over the seeds 0, 1 and 2.

    python benches/world_search.py --out runs/world-search

It began at γ = 0.3, which is set here in every variant that names no other; the world's default is what it found. Every
variant is an ablation with the arms `length` and `both` and two rounds, so that it shows whether a second round
still improves, and what replay does. The seeds are not those of the reported ablation. It writes
benches/results/world_search.json and prints the table of docs/evidence.md. A second call continues.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dice_py.ablation.arms import make_arms
from dice_py.ablation.run import Ablation, run_ablation
from dice_py.config.loading import resolve

RESULTS = Path(__file__).parent / "results" / "world_search.json"
SEEDS = (0, 1, 2)
ARMS = ("length", "both")
VARIANTS: dict[str, list[str]] = {
    "where it began": [],
    "rewards against the first reference": ["reward_reference=initial"],
    "LoRA of rank 8, learning rate 4e-4": ["train.lora.r=8", "train.learning_rate=4e-4"],
    "learning rate 5e-5": ["train.learning_rate=5e-5"],
    "learning rate 2e-4": ["train.learning_rate=2e-4"],
    "an early stop, after 16 steps": ["train.max_steps=16"],
    "400 prompts a round": ["data.prompts_per_round=400"],
    "K = 4": ["generate.samples=4"],
    "K = 16": ["generate.samples=16"],
    "temperature 0.7": ["generate.temperature=0.7"],
    "top-p 1": ["generate.top_p=1.0"],
    "γ = 0.1": ["replay.gamma=0.1"],
    "γ = 0.5": ["replay.gamma=0.5"],
    "γ = 0.7": ["replay.gamma=0.7"],
    "γ = 0.5, first reference": ["replay.gamma=0.5", "reward_reference=initial"],
    "no NLL of the chosen": ["train.sft_weight=0.0"],
    "NLL of the chosen with weight 1": ["train.sft_weight=1.0"],
    "candidates of both rounds": ["mine.pool_rounds=2"],
    "the larger half of the margins": ["mine.min_margin_quantile=0.5"],
    "width 64": ["world.width=64"],
    "width 192": ["world.width=192"],
}
BEGAN = ["replay.gamma=0.3"]
METRICS = (
    "oracle_accuracy",
    "oracle_win_rate",
    "oracle_win_rate_previous",
    "mean_response_tokens",
    "kl_to_start",
    "on_policy_reward_accuracy",
)


def report(event: str, **fields: Any) -> None:
    if event == "progress":
        print(f"  {fields['done']}/{fields['total']} {fields['unit']}", flush=True)


def row(name: str, results: dict[str, Any]) -> dict[str, Any]:
    """The means of a variant, by arm and round."""
    arms = {
        arm["arm"]: {
            "start_accuracy": arm["start"]["oracle_accuracy"]["mean"],
            "rounds": [{metric: made["metrics"][metric]["mean"] for metric in METRICS} for made in arm["rounds"]],
        }
        for arm in results["arms"]
    }
    return {"variant": name, "settings": VARIANTS[name], "arms": arms, "seconds": results["seconds"]}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: accuracies of the start and of both rounds, and win rates of round 2 over round 1."""
    columns = ("variant", "start", "`length`, rounds 1, 2", "`both`, rounds 1, 2", "round 2 over 1", "KL, `both`")
    lines = [f"| {' | '.join(columns)} |", "|---|---|---|---|---|---|"]
    for one in rows:
        length, both = (one["arms"][arm]["rounds"] for arm in ARMS)
        accuracy = [", ".join(f"{made['oracle_accuracy']:.3f}" for made in arm) for arm in (length, both)]
        over = ", ".join(f"{arm[1]['oracle_win_rate_previous']:.3f}" for arm in (length, both))
        kl = ", ".join(f"{made['kl_to_start']:.2f}" for made in both)
        start = one["arms"]["both"]["start_accuracy"]
        lines.append(f"| {one['variant']} | {start:.3f} | {accuracy[0]} | {accuracy[1]} | {over} | {kl} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/world-search"), help="the folder of the runs")
    parser.add_argument("--only", default="", help="a part of the names of the variants to run")
    args = parser.parse_args()

    rows = []
    for number, (name, settings) in enumerate(VARIANTS.items()):
        if args.only not in name:
            continue
        print(f"{name}: {' '.join(settings) or 'nothing set'}", flush=True)
        base = resolve(assignments=[*BEGAN, *settings, "report.pairs=0"])
        ablation = Ablation(base, make_arms(base, ARMS), SEEDS)
        results = run_ablation(ablation, args.out / f"variant-{number:02d}", report)
        rows.append(row(name, results))
        if not args.only:
            written = {"seeds": SEEDS, "machine": results["machine"], "versions": results["versions"], "rows": rows}
            RESULTS.write_text(json.dumps(written, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
