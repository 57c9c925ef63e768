"""Training: one epoch of DPO by the ways of benches/training.py, each in this process, one after the other."""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

from gpu.context import Check, PartError, PeakMemory, first_line, free_memory, log, synchronized

COMMON = {"dtype": "bfloat16", "threads": "1"}
TINY = {"pairs": "8", "batch-size": "4", "per-device-train-batch-size": "4", "max-response": "48"}
SMALL = {"pairs": "64", "batch-size": "16", "per-device-train-batch-size": "4", "response-median": "250"}
SMALL |= {"max-response": "1024", "prompt-median": "150"}
LARGE = {"pairs": "16", "batch-size": "8", "per-device-train-batch-size": "2", "response-median": "300", "lora": "16"}
LARGE |= {"max-response": "1024", "prompt-median": "200"}
LARGE_BYTES = 45e9  # a model of 8B in 16 bits, twice, and room


def training(check: Check) -> None:
    """A small model, all weights: float32 weights and bfloat16 autocast."""
    _compare(check, check.small, SMALL, None)
    counts = check.figures["ways"].get("ours", {}).get("counts") or {}
    if (loss := counts.get("step0_loss")) is not None:
        check.figures["step0_from_ln2"] = loss - math.log(2)
    _raise_for_failures(check)


def lora(check: Check) -> None:
    """Adapters on a large model in bfloat16, with and without checkpointing, against TRL."""
    _compare(check, check.large, LARGE, ("ours", "stock", "ours_checkpoint"))
    _raise_for_failures(check)


def _raise_for_failures(check: Check) -> None:
    if failed := {name: way["error"] for name, way in check.figures["ways"].items() if "error" in way}:
        raise PartError(f"ways failed: {failed}")


def _compare(check: Check, shape: str, sizes: dict[str, str], ways: tuple[str, ...] | None) -> None:
    """Prepares model and pairs, scores them, and runs each way once."""
    import training as bench
    from training_report import TRAINING

    values = COMMON | (TINY | ({"lora": "4"} if "lora" in sizes else {}) if check.cpu else sizes)
    given = [item for name, value in values.items() for item in (f"--{name}", value)]
    options = bench.parse(["--shape", shape, "--device", check.device, *given])
    figures, peak = check.figures, PeakMemory(check.cpu)
    figures |= {"shape": shape, "dtype": options.dtype, "lora": options.lora, "pairs": options.pairs, "ways": {}}
    with tempfile.TemporaryDirectory(dir=_scratch(check)) as scratch:
        folder = Path(scratch)
        began = synchronized(check.cpu)
        figures["lengths"] = bench.prepare(folder, options)
        free_memory(check.cpu)
        figures["prepare_seconds"] = round(synchronized(check.cpu) - began, 1)
        losses: dict[str, list[float]] = {}
        for way in ("score", *(ways or ordered(TRAINING))):
            try:
                figures["ways"][way] = _run_way(check, bench, way, folder, options, peak, losses)
            except Exception as error:
                traceback.print_exc()
                figures["ways"][way] = {"error": first_line(error)}
            bench.remove_made(folder)
            free_memory(check.cpu)
            _ratios(figures, losses, options)
            check.save()


def ordered(ways: tuple[str, ...]) -> tuple[str, ...]:
    """Ours first, then TRL's, then the others: a part that is stopped has what counts."""
    first = [way for way in ("ours", "stock") if way in ways]
    return (*first, *(way for way in ways if way not in first))


def _scratch(check: Check) -> Path:
    """The folder for models: shared memory where it has room, since writing and reading them takes no disk's time."""
    parent = check.shared_memory.parent
    room = shutil.disk_usage(parent).free if parent.is_dir() else 0
    if check.cpu or room < LARGE_BYTES:
        return check.work
    check.shared_memory.mkdir(exist_ok=True)
    return check.shared_memory


def _run_way(
    check: Check,
    bench: Any,
    way: str,
    folder: Path,
    options: argparse.Namespace,
    peak: PeakMemory,
    losses: dict[str, list[float]],
) -> dict[str, Any]:
    from dice_py.models.loading import release_held
    from dice_py.stages.train import TrainJob
    from dice_py.storage.files import read_json

    spans: dict[str, float] = {}
    work = {"stock": bench.stock, "score": bench.score}.get(way, bench.ours)
    run = TrainJob.run
    peak.start()
    began = synchronized(check.cpu)
    with mock.patch.object(TrainJob, "run", lambda job, report=None: run(job, report or check.report)):
        trained = work(folder, options, spans, way)
    measured: dict[str, Any] = {"seconds": round(synchronized(check.cpu) - began, 2), "peak_gb": peak.gb()}
    measured |= {f"{name}_seconds": round(value, 3) for name, value in spans.items()}
    if trained.losses:
        losses[way] = trained.losses
        measured["losses"] = [round(loss, 6) for loss in trained.losses]
    if trained.step0:
        measured["step0"] = trained.step0
    for stamp in folder.glob("tmp*/model/dice.json"):
        measured["counts"] = read_json(stamp)["counts"]
    release_held()
    log(f"{way}: {measured}")
    return measured


def _ratios(figures: dict[str, Any], losses: dict[str, list[float]], options: argparse.Namespace) -> None:
    """How far the losses of the ways measured so far are from one another, how far they may be, and their rates."""
    from training_report import loss_tolerance

    step0 = [way["step0"] for way in figures["ways"].values() if "step0" in way]
    figures["loss_tolerance"] = loss_tolerance(options, step0)
    curves = list(losses.values())
    if len(curves) > 1:
        figures["largest_loss_difference"] = max(
            abs(a - b) for curve in curves for a, b in zip(curve, curves[0], strict=True)
        )
    mean = {name: values["mean"] for name, values in figures["lengths"].items()}
    tokens = options.pairs * (2 * mean["prompt_ids"] + mean["chosen_ids"] + mean["rejected_ids"])
    measured = {name: way for name, way in figures["ways"].items() if way.get("training_seconds")}
    for way in measured.values():
        way["pair_tokens_per_second"] = round(tokens / way["training_seconds"])
    if "stock" in measured:
        stock = measured["stock"]["training_seconds"]
        figures["speedup_over_stock"] = {
            name: round(stock / way["training_seconds"], 3) for name, way in measured.items() if name != "stock"
        }
