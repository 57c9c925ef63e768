#!/usr/bin/env python3
"""Checks the GPU paths on a machine with one GPU, in one command and nine minutes: `python3 benches/gpu/check.py`.

    make gpu-kit                                               # builds .gpukit/kit.tar.xz (build_kit.sh)
    python3 benches/gpu/check.py --kit .gpukit/kit.tar.xz --out results
    python3 benches/gpu/check.py … --only scoring,training --budget 240
    python3 benches/gpu/check.py --cpu                         # a dry run in tiny shapes

The machine needs Python 3.12, torch, transformers and accelerate; the kit has what else the project needs, and nothing
is downloaded. What is tested is the tree that this file is in (the kit holds one too: `tar xf kit.tar.xz project`).
Without a kit, the installed packages are used.

Each part runs in a process of its own, under a limit of its own and under what is left of the budget; one that fails or
is stopped costs no other its turn. The processes are forked from one that has imported torch and TRL already. Written
to `--out`: results.json after every part, log.txt, and run.tar.gz, the small files of the run. The table comes last on
standard output: how each part ended, whether it reached what it must, and every note of a path that fell back. Exit
status: 0 if all parts reached everything, 1 if not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

TREE = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TREE / "benches"), str(TREE)]

from gpu.context import Check  # noqa: E402
from gpu.criteria import evaluate, is_met, lines  # noqa: E402
from gpu.part import NO_GPU_AFTER_FORK, NVML_CHECK, PARTS, run_part  # noqa: E402

TESTED = ("dice_py", "cli", "benches", "tests", "configs", "pyproject.toml", "README.md")
LEAST_SECONDS = 15.0
"""A part is not started with less than this left of the budget."""
CPU_FACTOR = 4.0
"""Limits on a CPU are longer by this."""
LOG_BYTES = 8 * 2**20


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kit", type=Path, help="the archive; none: the packages that are installed")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder of the results")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds in all, unpacking included")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, separated by commas; of {', '.join(PARTS)}")
    parser.add_argument("--cpu", action="store_true", help="a dry run in tiny shapes")
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    if unknown := [name for name in options.only if name not in PARTS]:
        parser.error(f"--only: {', '.join(unknown)} unknown; choose from {', '.join(PARTS)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = parse(arguments)
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="dice-gpu-"))
    results: dict[str, Any] = {"cpu": options.cpu, "budget": options.budget, "parts": {}}
    try:
        repo = prepare(options.kit, work)
        results["unpack_seconds"] = round(time.monotonic() - began, 1)
        run_parts(options, repo, work, began, results)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    log = options.out / "log.txt"
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.write_bytes(log.read_bytes()[-LOG_BYTES:])
    return show(results)


def prepare(kit: Path | None, work: Path) -> Path:
    """Unpacks the kit, and sets up this process and those that it starts; returns the tree that is tested."""
    repo, paths = TREE, []
    (work / "cache").mkdir()
    if kit is not None:
        with tarfile.open(kit, "r:xz") as tar:
            tar.extractall(work, filter="data")
        repo = work / "tree"
        for name in TESTED:
            if (TREE / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.so", "results")
                shutil.copytree(TREE / name, repo / name, ignore=ignored)
            else:
                shutil.copy(TREE / name, repo / name)
        for extension in (work / "site" / "dice_py").glob("_native*.so"):
            shutil.copy(extension, repo / "dice_py")
        # What the wheel holds of the project's Python is the tree's, maybe of another day.
        for name in ("dice_py", "cli"):
            shutil.rmtree(work / "site" / name)
        if (work / "world").is_dir():
            shutil.move(work / "world", work / "cache" / "world")
        paths = [str(work / "site")]
    first = [str(repo / "benches"), str(repo)]
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and kit is None]
    sys.path[:] = [*first, *paths, *(path for path in sys.path if path not in (str(TREE), str(TREE / "benches")))]
    os.environ |= {
        "PYTHONPATH": os.pathsep.join([*first, *paths, *given]),
        "PYTHONUNBUFFERED": "1",
        "DICE_CACHE": str(work / "cache"),
        "HF_HOME": str(work / "hf"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        NVML_CHECK: "1",
    }
    return repo


def run_parts(options: argparse.Namespace, repo: Path, work: Path, began: float, results: dict[str, Any]) -> None:
    """Runs the parts, and writes results.json after each."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gpu.preload"])
    importing = context.Process(target=time.sleep, args=(0,))
    importing.start()  # returns once everything is imported
    importing.join()
    results["start_seconds"] = round(time.monotonic() - began, 1)
    out = options.out.resolve()
    for name in options.only:
        left = options.budget - (time.monotonic() - began)
        check = Check(name, repo, work, out, options.cpu)
        if left < LEAST_SECONDS:
            result: dict[str, Any] = {"code": "no time", "ok": False, "seconds": 0.0}
        else:
            limit = min(PARTS[name].seconds * (CPU_FACTOR if options.cpu else 1.0), left)
            result = run_in_process(context, check, out / "log.txt", limit)
            if result["code"] == NO_GPU_AFTER_FORK:
                print("CUDA cannot be used in forked processes here: parts are started anew", flush=True)
                context = multiprocessing.get_context("spawn")
                result = run_in_process(context, check, out / "log.txt", limit)
        result["criteria"] = evaluate(name, result.get("figures") or {})
        result["met"] = is_met(result, options.cpu)
        results["parts"][name] = result
        results["start_method"] = context.get_start_method()
        results["seconds"] = round(time.monotonic() - began, 1)
        (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        print("\n".join(lines(name, result)), flush=True)


def run_in_process(context: Any, check: Check, log: Path, limit: float) -> dict[str, Any]:
    """Runs one part in a process of its own; what is left of it after `limit` seconds is stopped."""
    began = time.monotonic()
    process = context.Process(target=run_part, args=(check, log, context.get_start_method() == "forkserver"))
    process.start()
    process.join(max(1.0, limit - (time.monotonic() - began)))
    code: int | str = "timeout" if process.exitcode is None else process.exitcode
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.exitcode is None:
        process.kill()
    process.join()
    shutil.rmtree(check.shared_memory, ignore_errors=True)
    found = json.loads(check.file.read_text(encoding="utf-8")) if check.file.exists() else {}
    return {"code": code, "ok": code == 0, "seconds": round(time.monotonic() - began, 1), **found}


def show(results: dict[str, Any]) -> int:
    """Prints the table; returns the exit status."""
    parts = results["parts"]
    print("\n" + "\n".join(line for name, result in parts.items() for line in lines(name, result)))
    unmet = [name for name, result in parts.items() if not result["met"]]
    if results["cpu"]:
        print("a dry run on a CPU: no rate here counts")
    print(
        f"{results['seconds']:.0f} s; " + (f"not met: {', '.join(unmet)}" if unmet else "all parts reached everything")
    )
    return 1 if unmet else 0


if __name__ == "__main__":
    sys.exit(main())
