"""One round's files, made by hand: two shards of generations, their scores, mined pairs and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from dice_py.storage.parquet import write_parquet
from dice_py.storage.schemas import GENERATIONS, MINED, PROMPTS, SCORES

PROMPTS_OF_A_ROUND, SAMPLES = 4, 3
MINED_ROWS = [(0, 1, 2), (3, 11, 9)]
"""prompt_id, chosen_row, rejected_row; the rows count through both shards."""


def make_round(folder: Path, first: int = 0) -> dict[str, Any]:
    """The files, as keywords of `append_mined`; prompts "q0" … from `first` on, token ids that no text gives."""
    count = PROMPTS_OF_A_ROUND * SAMPLES
    rows = [
        (p, s, [100 + p], [10 * (1 + p) + s, 4], f"answer {first + p} {s}", 2, 10, "stop", -1.0)
        for p in range(PROMPTS_OF_A_ROUND)
        for s in range(SAMPLES)
    ]
    logps = [(-1.0 * i, -2.0, 0.1) for i in range(count)]
    generations, scores = [], []
    for n, part in enumerate((slice(count // 2), slice(count // 2, count))):
        frame = pl.DataFrame(rows[part], schema=GENERATIONS, orient="row")
        generations.append(write_parquet(folder / f"generations-{n:05d}.parquet", frame, key="g"))
        frame = pl.DataFrame(logps[part], schema=SCORES, orient="row")
        scores.append(write_parquet(folder / f"scores-{n:05d}.parquet", frame, key="s"))
    pairs = [(*row, 0.5, 0.1, 0.4 - 0.1 * at, 2, 2) for at, row in enumerate(MINED_ROWS)]
    mined = pl.DataFrame(pairs, schema=MINED, orient="row")
    messages = [[{"role": "user", "content": f"q{first + p}"}] for p in range(PROMPTS_OF_A_ROUND)]
    prompts = pl.DataFrame({"prompt_id": range(PROMPTS_OF_A_ROUND), "messages": messages}, schema=PROMPTS)
    return {
        "mined": write_parquet(folder / "mined.parquet", mined, key="m"),
        "generations": generations,
        "scores": scores,
        "prompts": write_parquet(folder / "prompts.parquet", prompts, key="p"),
        "key": f"mined from {first}",
    }
