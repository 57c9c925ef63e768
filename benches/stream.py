"""`dice mine` on more rows than fit in `--memory`: seconds and peak resident memory of the process.

`make bench-stream` (BENCH_ARGS="--rows 2e6" for a short run). Rows are drawn from a seed and written in row groups of a
million; with `--order shuffled` they are in random order, so that the miner partitions them on disk first.
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
import pyarrow as pa
import pyarrow.parquet as pq
from peak_memory import run_measured

GROUP = 1_000_000
RESPONSES = 16


def write_scored(path: Path, rows: int, order: str, seed: int) -> None:
    """prompt_id u32, reward f32, response_tokens u32; 16 responses per prompt (about 16 if shuffled)."""
    random = np.random.default_rng(seed)
    writer = None
    for start in range(0, rows, GROUP):
        count = min(GROUP, rows - start)
        prompt = np.arange(start, start + count, dtype=np.uint32) // RESPONSES
        if order == "shuffled":
            prompt = random.integers(0, max(1, rows // RESPONSES), count, dtype=np.uint32)
        length = np.clip(random.lognormal(5.5, 0.8, count), 10, 2000).astype(np.uint32)
        reward = random.standard_normal(count, dtype=np.float32) + length.astype(np.float32) * np.float32(0.002)
        table = pa.table({"prompt_id": prompt, "reward": reward, "response_tokens": length})
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd", compression_level=1)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def measure(scored: Path, out: Path, memory_gib: float) -> dict[str, Any]:
    """Runs `dice mine` in a process of its own."""
    command = [sys.executable, "-m", "cli.main", "mine", str(scored), "-o", str(out), "--memory", str(memory_gib)]
    done = run_measured([*command, "--json"])
    summary = json.loads(done.printed)
    return {
        "rows": summary["rows"],
        "pairs": summary["pairs"],
        "alpha": summary["alpha"],
        "seconds": done.seconds,
        "peak_resident_gib": done.peak_resident_gib,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda text: int(float(text)), default=200_000_000)
    parser.add_argument("--order", choices=["grouped", "shuffled"], default="grouped")
    parser.add_argument("--memory", type=float, default=1.0, help="--memory of dice mine, in GiB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="folder for the temporary files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        scored = Path(folder) / "scored.parquet"
        write_scored(scored, args.rows, args.order, args.seed)
        measured = measure(scored, Path(folder) / "pairs.parquet", args.memory)
    result = {"order": args.order, "memory_gib": args.memory, "cores": os.cpu_count(), **measured}
    print(json.dumps(result, indent=2))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"stream-{args.order}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
