"""Files for tests of the command line, and what is in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with its bytes."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def scored(path: Path, prompts: int = 20, responses: int = 4) -> Path:
    """One row a response, whose rewards grow with the length."""
    rows = [
        (p, r, 0.1 * ((7 * p + 3 * r) % 10) + 0.05 * (5 + r), 5 + r) for p in range(prompts) for r in range(responses)
    ]
    frame = pl.DataFrame(rows, schema=["prompt_id", "sample_id", "reward", "response_tokens"], orient="row")
    frame.write_parquet(path)
    return path
