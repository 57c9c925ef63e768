"""Mining against Polars, DuckDB and NumPy: `make bench-peers`, or `python benches/peers.py --help`.

All ways (peers_ways.py) are timed in this process, in turn within each repeat, so that the machine's noise affects them
alike. Before that, each runs once, and its answer is compared with dice's; after a mismatch the bench exits with status
1 and writes nothing. Memory and scaling are measured in processes of their own. Results are written to `--out`:
mining.json, mining.png and mining.md (the table in docs/figures.md).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# These variables select kernels of OpenBLAS. Nothing here uses BLAS, and NumPy should run with its defaults.
os.environ.pop("OPENBLAS_CORETYPE", None)
os.environ.pop("OPENBLAS_L2_SIZE", None)

import duckdb
import polars as pl
from peers_ways import (
    BRACKET,
    FIXED_ALPHA,
    ORDERS,
    PLAIN_BISECTION,
    STEPS,
    Answer,
    MismatchError,
    Way,
    check_alpha,
    check_pairs,
    make_frame,
    make_ways,
    max_by,
    ours,
    tied_prompts,
)
from rich.console import Console

from dice_py.storage.files import write_json, write_text

NEEDED_BYTES = 64
"""Assumed memory per row of the scaling curve: the data, its shuffled copy, and the miner."""
UNKNOWN_MEMORY_ROWS = 10_000_000
"""The largest size on platforms that do not report free memory."""
PROC = Path("/proc/self")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.child:
        print(json.dumps(child(json.loads(options.child))))
        return 0
    rows = options.prompts * options.responses
    log = Console(stderr=True)
    with duckdb.connect() as connection:
        connection.execute("SET preserve_insertion_order = false")
        threads = {
            "dice": int(os.environ.get("RAYON_NUM_THREADS") or usable_cores()),
            "polars": pl.thread_pool_size(),
            "duckdb": connection.execute("SELECT current_setting('threads')").fetchall()[0][0],
            "numpy": 1,
        }
        ways = make_ways(connection)
        frames = {order: make_frame(rows, options.responses, options.seed, order) for order in ORDERS}
        try:
            agreement = {order: warm_up(ways, order, frames[order], log) for order in ORDERS}
        except MismatchError as error:
            print(f"the answers differ: {error}", file=sys.stderr)
            return 1
        timings = measure(ways, frames, options.repeats, log)
        frames.clear()
    task = {"responses": options.responses, "seed": options.seed}
    log.print("memory")
    memory = {order: in_child({"do": "memory", "rows": rows, "order": order, **task}) for order in ORDERS}
    scaling = []
    for size in options.sizes:
        for order in ORDERS:
            log.print(f"scaling: {size:,} rows, {order}")
            scaling.append(scale(size, order, {"repeats": options.repeats, **task}))
    results = {
        "machine": machine(),
        "threads": threads,
        "parameters": {
            "prompts": options.prompts,
            "responses": options.responses,
            "rows": rows,
            "repeats": options.repeats,
            "seed": options.seed,
            "fixed_alpha": FIXED_ALPHA,
            "bisection_steps": STEPS,
            "bisection_bracket": [0.0, BRACKET],
        },
        "agreement": agreement,
        **compare(ways, timings),
        "bytes_per_row": memory,
        "scaling": scaling,
    }
    write(results, options.out)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare dice's pair miner with Polars, DuckDB and NumPy.")

    def integer(least: int) -> Any:
        def convert(text: str) -> int:
            value = float(text)
            if not math.isfinite(value) or value != int(value) or value < least:
                raise ValueError
            return int(value)

        convert.__name__ = f"integer of {least} or more"
        return convert

    parser.add_argument("--prompts", type=integer(1), default=1_000_000)
    parser.add_argument("--responses", type=integer(2), default=16, help="responses per prompt")
    parser.add_argument("--repeats", type=integer(1), default=3)
    parser.add_argument("--seed", type=integer(0), default=0)
    parser.add_argument("--sizes", default="1e5,1e6,1e7,1e8", help="rows of the scaling curve; '' for none")
    parser.add_argument("--out", type=Path, default=Path("benches/results"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        options.sizes = sorted({integer(options.responses)(size) for size in options.sizes.split(",") if size.strip()})
    except ValueError:
        parser.error(f"--sizes is {options.sizes!r}, but must be row counts with commas, each at least --responses")
    return options


# --- Time -------------------------------------------------------------------------------------------------


def warm_up(ways: dict[str, Way], order: str, frame: pl.DataFrame, log: Console) -> dict[str, Any]:
    """Runs every way once and compares the answers.

    Raises:
        MismatchError: two answers differ.
    """
    log.print(f"warm-up and comparison of the answers: {order}")
    fixed, exact = ours(frame, FIXED_ALPHA), ours(frame)
    assert fixed.pairs is not None
    assert exact.pairs is not None
    assert exact.alpha is not None
    assert exact.interval is not None
    tied, tied_exact = tied_prompts(frame, FIXED_ALPHA), tied_prompts(frame, exact.alpha)
    # One pass of Polars must have the same pairs at the exact alpha, too.
    check_pairs("Polars at dice's alpha", max_by(frame, exact.alpha, engine="streaming"), exact.pairs, tied_exact)
    alphas = {}
    for name, way in ways.items():
        if order not in way.orders:
            continue
        answer = way.run(frame)
        if way.kind in ("polars_pass", "duckdb_pass", "ours_fixed"):
            assert answer.pairs is not None
            check_pairs(name, answer.pairs, fixed.pairs, tied)
        elif way.kind == "polars_bisection":
            assert answer.alpha is not None
            check_alpha(name, answer.alpha, exact.interval)
            alphas[name] = answer.alpha
    return {
        "pairs": fixed.pairs.height,
        "tied_prompts_left_out": {"fixed_alpha": tied.height, "exact_alpha": tied_exact.height},
        "alpha": exact.alpha,
        "alpha_interval": [end if end < float("inf") else None for end in exact.interval],
        "bisection_alphas": alphas,
    }


def seconds(run: Any, *arguments: Any) -> tuple[float, Answer]:
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    answer = run(*arguments)
    elapsed = time.perf_counter() - start
    gc.enable()
    return elapsed, answer


def measure(
    ways: dict[str, Way], frames: dict[str, pl.DataFrame], repeats: int, log: Console
) -> dict[str, dict[str, list[float]]]:
    """Seconds of every repeat, by way and order."""
    timings: dict[str, dict[str, list[float]]] = {n: {order: [] for order in way.orders} for n, way in ways.items()}
    for repeat in range(repeats):
        log.print(f"repeat {repeat + 1} of {repeats}")
        for name, way in ways.items():
            for order in way.orders:
                timings[name][order].append(seconds(way.run, frames[order])[0])
    return timings


def summary(times: list[float]) -> dict[str, float]:
    return {"median_s": statistics.median(times), "best_s": min(times)}


def compare(ways: dict[str, Way], timings: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """The results by way, the fastest way of each kind and order, and the ratios (of medians)."""
    by_way: dict[str, dict[str, Any]] = {
        name: {"kind": way.kind, "title": way.title, **{o: summary(timings[name][o]) for o in way.orders}}
        for name, way in ways.items()
    }

    def time_of(name: str, order: str) -> float:
        return float(by_way[name][order]["median_s"])

    def fastest(kind: str, order: str) -> str:
        names = [name for name, way in ways.items() if way.kind == kind and order in way.orders]
        return min(names, key=lambda name: time_of(name, order))

    kinds = ("polars_pass", "polars_bisection", "duckdb_pass")
    best = {kind: {order: fastest(kind, order) for order in ORDERS} for kind in kinds}
    plain = {o: time_of(PLAIN_BISECTION, o) / time_of("ours_auto", o) for o in ORDERS}
    fast = {o: time_of(best["polars_bisection"][o], o) / time_of("ours_auto", o) for o in ORDERS}
    to_numpy = {o: time_of("ours_auto", o) / time_of("numpy_sum", o) for o in ORDERS}
    to_pass = {o: time_of("ours_auto", o) / time_of(best["polars_pass"][o], o) for o in ORDERS}
    return {
        "ways": by_way,
        "fastest": best,
        # All with the exact alpha.
        "speedup_over_polars_bisection": plain,
        "speedup_over_fastest_polars_bisection": fast,
        "ratio_to_numpy_sum": to_numpy,
        "grouped_ratio_to_polars_pass": to_pass["grouped"],
        "shuffled_ratio_to_polars_pass": to_pass["shuffled"],
    }


# --- Memory and scaling, each in a process of its own -----------------------------------------------------


def in_child(task: dict[str, Any]) -> Any:
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode != 0:
        # The process shares our standard error, so its message is printed already.
        raise SystemExit(f"the process for {task} ended with status {ended.returncode}")
    return json.loads(ended.stdout)


def child(task: dict[str, Any]) -> Any:
    ours(make_frame(10 * task["responses"], task["responses"], task["seed"], task["order"]))
    frame = make_frame(task["rows"], task["responses"], task["seed"], task["order"])
    if task["do"] == "memory":
        return extra_bytes_per_row(frame)
    return summary([seconds(ours, frame)[0] for _ in range(task["repeats"])])


def extra_bytes_per_row(frame: pl.DataFrame) -> float | None:
    """Peak resident memory of `mine_pairs` beyond its input and its output; None where Linux's /proc is absent."""
    if not (PROC / "clear_refs").is_file():
        return None
    gc.collect()
    # Memory that the allocator still holds from making the data would hide as much of the miner's.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    (PROC / "clear_refs").write_text("5")  # sets the peak (VmHWM) to what is resident now
    before = status_bytes("VmRSS")
    pairs = ours(frame).pairs
    peak = status_bytes("VmHWM")
    assert pairs is not None
    return (peak - before - pairs.estimated_size()) / frame.height


def status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", (PROC / "status").read_text(), re.MULTILINE)
    assert match, f"/proc/self/status has no {field}"
    return int(match[1]) * 1024


def scale(rows: int, order: str, task: dict[str, Any]) -> dict[str, Any]:
    point = {"rows": rows - rows % task["responses"], "order": order}
    free = free_memory()
    if free is None and rows > UNKNOWN_MEMORY_ROWS:
        return {**point, "skipped": "this platform does not report free memory"}
    if free is not None and rows * NEEDED_BYTES > free / 2:
        reason = f"needs about {rows * NEEDED_BYTES / 1e9:.3g} GB, more than half of the {free / 1e9:.3g} GB free"
        return {**point, "skipped": reason}
    return {**point, **in_child({"do": "scaling", **point, **task})}


def free_memory() -> int | None:
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


# --- Results ----------------------------------------------------------------------------------------------


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Hardware and versions, without the names of the machine and its user."""
    try:
        model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        model = None
    release = re.match(r"[\d.]*\d", platform.release())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    packages = {"polars": "polars", "duckdb": "duckdb", "numpy": "numpy", "dice": "dice-align"}
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "memory_gb": None if memory is None else round(memory / 1e9, 1),
        "os": f"{platform.system()} {release[0] if release else ''} {platform.machine()}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(package) for name, package in packages.items()},
    }


def write(results: dict[str, Any], out: Path) -> None:
    # Imported here: it takes a second, and the other processes do not draw.
    from peers_report import draw, markdown, print_table

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "mining.json", results)
    table = markdown(results)
    write_text(out / "mining.md", table)
    draw(results, out / "mining.png")
    print_table(results)
    print(table)


if __name__ == "__main__":
    sys.exit(main())
