"""Mine preference pairs from scored responses, in Polars: with the length bias of the scores, and without it.

python examples/mine_scores.py                       on made-up scores that prefer long responses
python examples/mine_scores.py SCORES.parquet        on yours: prompt_id, prompt, response, score, response_chars
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import polars as pl

from dice_py import attach_text, mine_pairs


def made_up_scores(prompts: int = 2000, responses: int = 8) -> pl.DataFrame:
    """Responses of random quality and length; 500 more characters raise the score by one standard deviation."""
    random = np.random.default_rng(0)
    prompt_id = np.repeat(np.arange(prompts), responses)
    chars = random.lognormal(6.5, 0.6, len(prompt_id)).astype(np.uint32) + 1
    return pl.DataFrame(
        {
            "prompt_id": prompt_id,
            "prompt": [f"question {p}" for p in prompt_id],
            "response": [f"answer {i} to question {p}" for i, p in enumerate(prompt_id)],
            "response_chars": chars,
            "score": random.normal(size=len(prompt_id)) + chars / 500,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scores", type=Path, nargs="?", help="Parquet, one row per response")
    parser.add_argument("--out", type=Path, default=Path("pairs.parquet"))
    args = parser.parse_args()
    # A LazyFrame: the miner reads only the columns it needs, and attach_text only the chosen rows.
    scored = made_up_scores().lazy() if args.scores is None else pl.scan_parquet(args.scores)

    columns = {"reward_column": "score", "length_column": "response_chars", "min_responses": 2}
    biased = mine_pairs(scored, debias="none", **columns)
    mined = mine_pairs(scored, **columns)
    print(f"no penalty:     chosen is {biased.mean_length_gap_after:+.1f} characters longer on average")
    print(f"alpha {mined.alpha:.6f}: chosen is {mined.mean_length_gap_after:+.1f} characters longer on average")
    print(f"the same pairs for alpha from {mined.alpha_low:.6f} to {mined.alpha_high:.6f}")

    pairs = attach_text(mined.pairs, scored, prompt_columns=["prompt"]).select("prompt", "chosen", "rejected", "margin")
    pairs.write_parquet(args.out)
    print(f"{pairs.height} pairs in {args.out}")


if __name__ == "__main__":
    main()
