"""How well rewards judge a policy's own samples, round by round, on the synthetic world: what ends the gains.

    python benches/own_samples.py runs/ablation

It reads the runs of an ablation (docs/ablation.md) and samples nothing. Of the policy that a round ends with it takes
the evaluation's samples, and three rewards of them:

    previous    log π_t − log π_{t−1}, with which the next round mines by default
    initial     log π_t − log π_SFT, as reward_reference=initial has it
    frozen      log π_1 − log π_SFT, the reward of round 1, which no round changes

The accuracy is the share of pairs of one right and one wrong answer to a prompt in which the right one has the higher
reward (ties count half). Before round 1 all three are the same, on the samples that round 1 mines. Two differences
within a seed tell what is lost: `policy`, frozen − initial, by the policy that the reward is of; `reference`, initial −
previous, by its reference. Intervals are over seeds (Student's t). It writes
benches/results/own_samples.json (--out) and prints a table.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.ablation.statistics import over_seeds
from dice_py.storage.parquet import read_parquet
from dice_py.synthetic.task import oracle

RESULTS = Path(__file__).parent / "results" / "own_samples.json"
REWARDS = {
    "previous": ("sampled_logp", "previous_logp"),
    "initial": ("sampled_logp", "initial_ref_logp"),
    "frozen": ("start_logp", "initial_ref_logp"),
}
LOSSES = {"policy": ("frozen", "initial"), "reference": ("initial", "previous")}


def accuracy(prompts: list[int], right: list[bool], rewards: list[float]) -> float:
    """The share of pairs of a right and a wrong answer to one prompt that the rewards order."""
    sides: dict[int, tuple[list[float], list[float]]] = {}
    for prompt, is_right, reward in zip(prompts, right, rewards, strict=True):
        sides.setdefault(prompt, ([], []))[is_right].append(reward)
    agrees = [
        (good > bad) + 0.5 * (good == bad) for bads, goods in sides.values() for good, bad in product(goods, bads)
    ]
    if not agrees:
        raise ValueError("no prompt has both a right and a wrong answer, so no reward can be judged on them")
    return sum(agrees) / len(agrees)


def is_right(frame: pl.DataFrame) -> list[bool]:
    """Whether each `response` to `messages` is right."""
    return [oracle(messages, text)[1] for messages, text in frame.select("messages", "response").iter_rows()]


def first_round(run: Path) -> float:
    """The accuracy of round 1's reward on the samples that it mines."""
    folder = run / "round-01"
    samples, scores = (
        pl.concat([read_parquet(file) for file in sorted((folder / stage).glob(pattern))])
        for stage, pattern in (("generate", "generations-*.parquet"), ("score", "scores-*.parquet"))
    )
    prompts = dict(read_parquet(folder / "generate" / "prompts.parquet").select("prompt_id", "messages").iter_rows())
    asked = pl.Series("messages", [prompts[number] for number in samples["prompt_id"]])
    right = is_right(samples.select("response").with_columns(asked))
    return accuracy(samples["prompt_id"].to_list(), right, scores["reward"].to_list())


def later_round(run: Path, number: int) -> dict[str, float]:
    """The accuracy of each reward on the samples of the policy that a round ends with."""
    samples = read_parquet(run / f"round-{number:02d}" / "evaluate" / "samples.parquet")
    right, prompts = is_right(samples), samples["prompt_id"].to_list()
    return {
        name: accuracy(prompts, right, (samples[policy] - samples[reference]).to_list())
        for name, (policy, reference) in REWARDS.items()
    }


def measured(folder: Path) -> list[dict[str, Any]]:
    """For each arm and policy: its rewards' accuracies over the seeds."""
    ablation = json.loads((folder / "ablation.json").read_text(encoding="utf-8"))
    rows = []
    for arm in ablation["arms"]:
        runs = [folder / "runs" / arm["arm"] / f"seed-{seed}" for seed in arm["seeds"]]
        start = over_seeds([first_round(run) for run in runs])
        rows.append({"arm": arm["arm"], "policy": "π_1", **dict.fromkeys(REWARDS, start), "losses": None})
        for number in range(1, ablation["rounds"] + 1):
            found = [later_round(run, number) for run in runs]
            values = {name: over_seeds([one[name] for one in found]) for name in REWARDS}
            losses = {
                name: over_seeds([one[first] - one[second] for one in found])
                for name, (first, second) in LOSSES.items()
            }
            rows.append({"arm": arm["arm"], "policy": f"π_{number + 1}", **values, "losses": losses})
    return rows


def text(value: dict[str, Any]) -> str:
    """ ".584 (.571 to .597)"."""
    interval = value["ci95"]
    return f"{value['mean']:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ablation", type=Path, help="the folder of `dice ablate`")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file of the results")
    args = parser.parse_args()

    rows = measured(args.ablation)
    args.out.write_text(json.dumps({"rows": rows}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    columns = ("arm", "samples of", "against its predecessor", "against the SFT model", "round 1's reward")
    print(f"| {' | '.join((*columns, *(f'lost by the {name}' for name in LOSSES)))} |\n|{'---|' * 7}")
    for one in rows:
        lost = [text(one["losses"][name]) if one["losses"] else "" for name in LOSSES]
        print(f"| `{one['arm']}` | {one['policy']} | {' | '.join([*(text(one[name]) for name in REWARDS), *lost])} |")


if __name__ == "__main__":
    main()
