"""Stage 2 of MPO: a step against its parts measured alone (benches/reinforcement.py), in bfloat16."""

from __future__ import annotations

import tempfile
from pathlib import Path

from gpu.context import Check

TINY = {"steps": "2", "batch": "4", "num-generations": "2", "micro-batch": "2", "mean-length": "8", "longest": "16"}
SMALL = {"steps": "4", "batch": "64", "num-generations": "8", "micro-batch": "8", "mean-length": "200"}
SMALL |= {"longest": "512", "prompt": "150", "token-budget": "65536"}


def reinforcement(check: Check) -> None:
    """A small model, all weights; the check of the first ratio is the stage's own, and ends the part."""
    import reinforcement as bench

    values = {"dtype": "bfloat16", "kl-beta": "0.05", "threads": "1"} | (TINY if check.cpu else SMALL)
    given = [item for name, value in values.items() for item in (f"--{name}", value)]
    options = bench.parse(["--shape", check.small, "--device", check.device, *given])
    with tempfile.TemporaryDirectory(dir=check.work) as scratch:
        folder = Path(scratch)
        bench.prepare(options, folder)
        found = bench.measure(options, folder)
    check.figures |= {"shape": check.small, "seconds": found, "ratio": bench.ratio(found)}
    check.figures["first_rms_difference"] = found["first_rms_difference"]
