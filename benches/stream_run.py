"""The mine and replay stages of a run on a round of many rows: seconds, and peak resident memory of the process.

`make bench-stream-run` (BENCH_ARGS="--rows 2e7" for a short run). The round's shards are synthetic: 16 responses to a
prompt, their lengths and rewards drawn from a seed, their tokens and text short. Each stage runs in a process of its
own: `MineJob`, and `ReplayJob` without offline pairs, which makes the training set of all mined ones.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from peak_memory import run_measured

from dice_py.config.mining import MineConfig
from dice_py.config.shared import ModelConfig
from dice_py.config.stages import ReplayConfig, ScoreConfig
from dice_py.stages.mine import MineJob
from dice_py.storage.parquet import write_parquet
from dice_py.storage.schemas import GENERATIONS, PROMPTS, SCORES

SHARD = 1 << 18
RESPONSES = 16


def write_round(folder: Path, rows: int, seed: int) -> None:
    """Shards as the stages write them, and the prompts."""
    random = np.random.default_rng(seed)
    for number, start in enumerate(range(0, rows, SHARD)):
        count = min(SHARD, rows - start)
        row = np.arange(start, start + count)
        length = np.clip(random.lognormal(5.5, 0.8, count), 10, 2000).astype(np.uint32)
        reward = random.standard_normal(count, dtype=np.float32) + length.astype(np.float32) * np.float32(0.002)
        tokens = pl.Series(random.integers(0, 32_000, count, dtype=np.int32)).reshape((count, 1)).arr.to_list()
        sampled = pl.DataFrame(
            {
                "prompt_id": (row // RESPONSES).astype(np.uint32),
                "sample_id": (row % RESPONSES).astype(np.uint16),
                "prompt_token_ids": pl.Series(row // RESPONSES % 32_000, dtype=pl.Int32)
                .reshape((count, 1))
                .arr.to_list(),
                "token_ids": tokens,
                "response": pl.Series(row.astype(np.int64)).cast(pl.String),
                "response_tokens": length,
                "response_chars": length * 4,
            }
        ).with_columns(pl.lit("stop").alias("finish_reason"), pl.lit(None, pl.Float32).alias("sampled_logp"))
        scored = pl.DataFrame({"logp": -reward - 20, "ref_logp": -reward - 30, "reward": reward})
        write_parquet(folder / f"generations-{number:05d}.parquet", sampled, key="g", schema=GENERATIONS)
        write_parquet(folder / f"scores-{number:05d}.parquet", scored, key="s", schema=SCORES)
    ids = pl.int_range(-(-rows // RESPONSES), eager=True)
    turns = pl.concat_list(pl.struct(role=pl.lit("user"), content=pl.col("prompt_id").cast(pl.String)))
    prompts = pl.DataFrame({"prompt_id": ids}).with_columns(messages=turns)
    write_parquet(folder / "prompts.parquet", prompts, key="p", schema=PROMPTS)


def shards(folder: Path) -> tuple[list[Path], list[Path]]:
    return sorted(folder.glob("generations-*.parquet")), sorted(folder.glob("scores-*.parquet"))


def mine(folder: Path) -> dict[str, Any]:
    generations, scores = shards(folder)
    job = MineJob(
        config=MineConfig(),
        generations=generations,
        scores=scores,
        score_keys=[str(number) for number in range(len(scores))],
        rounds=[1] * len(scores),
        out=folder / "mine",
        seed=0,
    )
    counts = job.run().counts
    return {name: counts[name] for name in ("rows", "pairs", "alpha")}


def replay(folder: Path) -> dict[str, Any]:
    from dice_py.stages.replay import ReplayJob  # it imports torch, which the process that mines in a run does not

    generations, scores = shards(folder)
    job = ReplayJob(
        config=ReplayConfig(gamma=0.0),
        score_config=ScoreConfig(),
        models=ModelConfig(device="cpu", dtype="float32"),
        policy=folder / "policy",
        mined=folder / "mine/mined.parquet",
        generations=generations,
        scores=scores,
        prompts=folder / "prompts.parquet",
        offline=None,
        input_keys="mined",
        out=folder / "replay",
        seed=0,
    )
    result = job.run()
    return {"pairs": result.counts["mined"], "bytes": result.files[0][0].stat().st_size}


STEPS = {"mine": mine, "replay": replay}


def measure(step: str, folder: Path) -> dict[str, Any]:
    """Runs a step in a process of its own."""
    done = run_measured([sys.executable, __file__, "--step", step, "--folder", str(folder)])
    seconds, peak = round(done.seconds, 1), round(done.peak_resident_gib, 2)
    return {**json.loads(done.printed), "seconds": seconds, "peak_resident_gib": peak}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda text: int(float(text)), default=200_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="folder for the temporary files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--only", choices=STEPS, default=None)
    parser.add_argument("--step", choices=STEPS, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.step:
        print(json.dumps(STEPS[args.step](args.folder)))
        return
    result: dict[str, Any] = {
        "command": f"make bench-stream-run BENCH_ARGS='--rows {args.rows}'",
        "rows": args.rows,
        "cores": os.cpu_count(),
    }
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        from shapes import write_model

        write_model(Path(folder) / "policy", "tiny", "float32")
        write_round(Path(folder), args.rows, args.seed)
        result["bytes_of_shards"] = sum(file.stat().st_size for file in Path(folder).glob("*.parquet"))
        for step in [args.only] if args.only else STEPS:
            result[step] = measure(step, Path(folder))
            print(json.dumps({step: result[step]}))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "stream-run.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
