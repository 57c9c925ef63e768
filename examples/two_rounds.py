"""Two rounds of DICE from Python, on the synthetic world that is made on first use. No GPU, no model hub.

    python examples/two_rounds.py --out runs/example
    python examples/two_rounds.py --out runs/example --set train.learning_rate=2e-4

A second call with the same options resumes the run; completed stages are kept. For your own model, set model.policy,
model.reference, data.prompts and data.replay.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dice_py.config.loading import resolve
from dice_py.reporting.html import write_report
from dice_py.runs.loop import run


def report(event: str, **fields: Any) -> None:
    """Prints the stages as they start and end. Other events report their progress."""
    if event == "stage":
        print(f"{fields['stage']}: {fields['status']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/example"), help="the run folder")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a config value")
    args = parser.parse_args()

    config = resolve(assignments=["rounds=2", *args.set])
    metrics = run(config, args.out, report=report, after_round=write_report)
    for name, measured in metrics.items():
        low, high = measured["oracle_win_rate_ci95"]
        print(f"{name}: win rate against the start {measured['oracle_win_rate']:.3f} [{low:.3f}, {high:.3f}]")
    print(f"report: {args.out / 'report.html'}")


# Stages run in processes of their own, which import this file again: only `main` may start a run.
if __name__ == "__main__":
    main()
