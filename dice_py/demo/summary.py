"""What the demo shows at its end: three pairs, and what changed from π_1 to π_2 on held-out prompts.

Everything is read from the run folder, so that a finished run can be shown again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from dice_py.demo.data import HELD_OUT_PROMPTS, ROUND_PROMPTS, read_jsonl, with_rule
from dice_py.demo.rule import words
from dice_py.evaluation.metrics import bootstrap_ci95
from dice_py.mining.gather import attach_text
from dice_py.storage.files import read_json
from dice_py.storage.parquet import read_parquet

SHOWN_PAIRS = 3
_READABLE = range(4, 61)  # words of an answer that is shown


def summary(folder: Path) -> dict[str, Any]:
    """The results of the demo's run in `folder`, ready for JSON.

    Returns:
        `pairs`: three mined pairs (`prompt`, `chosen`, `rejected`, `margin`). `mined`: how many pairs were mined, and
        for how many the rule agrees, disagrees, or does not tell. `policies`: for π_1 and π_2, on held-out prompts, the
        share of answers that keep the rule and that ended, their mean length in tokens, and the share of held-out pairs
        whose chosen answer the implicit reward (against SmolLM2) ranks first. `rule_gain`: by how much more of π_2's
        answers keep the rule, and `rule_gain_ci95`, the 95 % interval over prompts.
    """
    mined = _mined_pairs(folder)
    metrics = read_json(folder / "round-01" / "evaluate" / "metrics.json")
    asked = read_jsonl(HELD_OUT_PROMPTS)
    start, new = (with_rule(_answers(folder / part), asked) for part in ("evaluate/start", "round-01/evaluate/samples"))
    rates = [answers.group_by("prompt_id").agg(pl.col("keeps").mean()).sort("prompt_id") for answers in (start, new)]
    gains = (rates[1]["keeps"] - rates[0]["keeps"]).to_list()
    return {
        "pairs": _shown(mined),
        "mined": {
            "pairs": mined.height,
            "rule_agrees": int((mined["chosen_keeps"] & ~mined["rejected_keeps"]).sum()),
            "rule_disagrees": int((~mined["chosen_keeps"] & mined["rejected_keeps"]).sum()),
            "rule_does_not_tell": int((mined["chosen_keeps"] == mined["rejected_keeps"]).sum()),
        },
        "held_out": {"prompts": len(asked), "answers": start.height, "pairs": metrics["eval_pairs"]},
        "policies": {
            "π_1": _policy(start, metrics["start_implicit_reward_accuracy"]),
            "π_2": _policy(new, metrics["implicit_reward_accuracy_initial_reference"]),
        },
        "length_only_accuracy": metrics["length_only_accuracy"],
        "rule_gain": sum(gains) / len(gains),
        "rule_gain_ci95": bootstrap_ci95(gains, 0),
    }


def _answers(folder: Path) -> pl.DataFrame:
    return pl.concat([read_parquet(file) for file in sorted(folder.glob("generations-*.parquet"))])


def _mined_pairs(folder: Path) -> pl.DataFrame:
    """The mined pairs with their texts, and whether each answer keeps the rule."""
    answers = with_rule(_answers(folder / "round-01" / "generate"), read_jsonl(ROUND_PROMPTS))
    pairs = read_parquet(folder / "round-01" / "mine" / "mined.parquet")
    return attach_text(pairs, answers, text_columns=["response", "keeps"], prompt_columns=["prompt", "form"])


def _policy(answers: pl.DataFrame, reward_accuracy: float) -> dict[str, Any]:
    return {
        "keep_the_rule": answers["keeps"].mean(),
        "ended": (answers["finish_reason"] == "stop").mean(),
        "mean_tokens": answers["response_tokens"].mean(),
        "reward_accuracy": reward_accuracy,
    }


def _shown(mined: pl.DataFrame) -> list[dict[str, Any]]:
    """The pairs of largest margin, each of another kind of form, and with answers of 4 to 60 words."""
    shown: dict[str, dict[str, Any]] = {}
    for row in mined.sort("margin", descending=True, maintain_order=True).iter_rows(named=True):
        kind = row["form"].partition(" ")[0]
        readable = all(len(words(row[side])) in _READABLE for side in ("chosen", "rejected"))
        if kind not in shown and readable and len(shown) < SHOWN_PAIRS:
            shown[kind] = {name: row[name] for name in ("prompt", "chosen", "rejected", "margin")}
    return list(shown.values())


def result_lines(results: dict[str, Any]) -> list[str]:
    """The results of `summary` as a person reads them: plain lines, of which three pairs come first."""
    mined, held_out, policies = results["mined"], results["held_out"], results["policies"]
    lines = [
        f"{len(results['pairs'])} of the {mined['pairs']} pairs that π_1 mined with its own reward: those of the "
        "largest margin, each of another kind of prompt."
    ]
    for pair in results["pairs"]:
        lines += ["", *pair_lines(pair)]
    lines += [
        "",
        f"Of the {mined['pairs']} pairs, the rule prefers the chosen answer in {mined['rule_agrees']}, the rejected "
        f"one in {mined['rule_disagrees']}, and neither in {mined['rule_does_not_tell']}.",
        "",
        f"On {held_out['prompts']} held-out prompts, {held_out['answers']} answers of each policy:",
        f"{'':<40}{'π_1':>10}{'π_2':>10}",
    ]
    for name, text in (
        ("keep_the_rule", "answers that keep the rule"),
        ("ended", "answers that ended by themselves"),
        ("mean_tokens", "mean length in tokens"),
        ("reward_accuracy", f"reward agrees with the rule ({held_out['pairs']} pairs)"),
    ):
        shown = [
            f"{policy[name]:.1f}" if name == "mean_tokens" else f"{100 * policy[name]:.1f} %"
            for policy in policies.values()
        ]
        lines.append(f"{text:<40}{shown[0]:>10}{shown[1]:>10}")
    low, high = results["rule_gain_ci95"]
    lines.append(
        f"change of the share that keeps the rule: {100 * results['rule_gain']:+.1f} points (95 % interval over "
        f"prompts: {100 * low:+.1f} to {100 * high:+.1f}); the longer answer is the one that keeps the rule in "
        f"{100 * results['length_only_accuracy']:.1f} % of the held-out pairs"
    )
    return lines


def pair_lines(pair: dict[str, Any]) -> list[str]:
    """A pair as three lines. The lines of an answer are joined by " / "."""
    return [
        f"{name}: {' / '.join(line.strip() for line in pair[name].splitlines() if line.strip())}"
        for name in ("prompt", "chosen", "rejected")
    ]
