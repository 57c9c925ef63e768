"""Mix offline pairs into mined ones: a share gamma of the training set, from two buffers with different shares.

    python examples/mix_replay.py --gamma 0.4 --out training_set.parquet

`mix_buffers` returns row numbers; the text is gathered once, at the end.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import polars as pl

from dice_py import OfflineBuffer, mix_buffers


def made_up_pairs(first_prompt: int, count: int, source: str) -> pl.DataFrame:
    """One pair for each prompt, with a margin that measures how clear the preference is."""
    prompts = range(first_prompt, first_prompt + count)
    return pl.DataFrame(
        {
            "prompt_id": prompts,
            "prompt": [f"question {p}" for p in prompts],
            "chosen": [f"good answer to question {p}" for p in prompts],
            "rejected": [f"bad answer to question {p}" for p in prompts],
            "margin": np.random.default_rng(first_prompt).normal(1.0, 1.0, count),
            "source": [source] * count,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gamma", type=float, default=0.4, help="share of offline pairs in the training set")
    parser.add_argument("--out", type=Path, default=Path("training_set.parquet"))
    args = parser.parse_args()

    mined = made_up_pairs(0, 600, "mined")
    # Prompts 400 to 599 were mined as well: offline pairs on them are never drawn.
    offline = {"labeled": made_up_pairs(400, 1000, "labeled"), "synthetic": made_up_pairs(2000, 1000, "synthetic")}
    buffers = [
        OfflineBuffer("labeled", offline["labeled"], share=3.0),
        OfflineBuffer("synthetic", offline["synthetic"], margin_power=1.0),  # clear preferences more often
    ]
    mix = mix_buffers(mined, buffers, gamma=args.gamma, seed=0)
    print(mix.summary())

    parts = [mined[mix.mined_rows], *(offline[name][draw.rows] for name, draw in mix.draws.items())]
    training_set = pl.concat(parts).select("prompt", "chosen", "rejected", "source")
    training_set.sample(fraction=1.0, shuffle=True, seed=0).write_parquet(args.out)
    print(f"{training_set.height} pairs in {args.out}")


if __name__ == "__main__":
    main()
