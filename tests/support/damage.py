"""Damage to files, and what must be equal of two runs."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
from own_run import Events

LOGS = (".jsonl", ".log")
TIMED = (
    *("manifest.json", "profile.json", "progress.json", "report.html", "train_log.json", "dice.json"),
    *("accelerate.yaml", ".lock", "adapter_config.json"),
)
"""Files that hold seconds, a path of the run's folder, or the digest of one that does."""


def flip(path: Path, seed: int = 0) -> None:
    """Flips one bit, anywhere in the file."""
    data = bytearray(path.read_bytes())
    bit = random.Random(f"{seed} {path.name}").randrange(8 * len(data))
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGE: dict[str, Callable[[Path], None]] = {"flip": flip, "truncate": truncate, "empty": empty}


def results(folder: Path) -> dict[str, Any]:
    """The result artifacts of a run by relative path: bytes, and of samples the columns that are equal in any batch."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or ".damaged" in name or path.suffix in LOGS or path.name in TIMED:
            continue
        if path.name.startswith("generations-"):
            # Sums that come with the samples differ in their last digits when a resume samples beside other rows.
            found[name] = pl.read_parquet(path).drop("sampled_logp").to_dict(as_series=False)
        else:
            found[name] = path.read_bytes()
    return found


def assert_same_results(folder: Path, expected: Path) -> None:
    """Two runs have the same result artifacts, and nothing temporary is left over."""
    ours, theirs = results(folder), results(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert not list(folder.rglob(".*.tmp"))


def notes(events: Events) -> list[str]:
    return [fields["text"] for event, fields in events.events if event == "note"]


def run_inline(work: Callable[..., Any], *, report: Any, **_: Any) -> Any:
    """In place of a process for each stage: the stage in this process, which has torch already."""
    return work(report=report)


def prepare_nothing(*_: Any, **__: Any) -> None:
    """In place of `WarmPool.prepare`."""
