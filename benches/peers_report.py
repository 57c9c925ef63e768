"""The results of `peers.py` (the contents of mining.json) as tables and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ORDERS = ("grouped", "shuffled")
INK, PALE = "#222222", "#b8b8b8"
OURS = {"grouped": ("#1f5fa8", "-"), "shuffled": ("#c4501b", "--")}
PEERS = {
    "polars_bisection": ("Polars, the fastest bisection of several", "s"),
    "polars_pass": ("Polars, one pass at a fixed alpha", "^"),
    "duckdb_pass": ("DuckDB, one pass at a fixed alpha", "D"),
    "numpy": ("NumPy, sum of the three columns", "v"),
}


def short(seconds: float) -> str:
    """A duration with three digits, in s, ms or µs."""
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{digits(seconds / size)} {unit}"
    return f"{digits(seconds * 1e6)} µs"


def digits(value: float) -> str:
    """Three significant digits, trailing zeros included."""
    return f"{value:#.3g}".rstrip(".") if value < 999.5 else f"{value:.0f}"


def peer(results: dict[str, Any], kind: str, order: str) -> str:
    """The name of the fastest way of a kind; for NumPy, of the plain sum."""
    return "numpy_sum" if kind == "numpy" else str(results["fastest"][kind][order])


def median(results: dict[str, Any], name: str, order: str) -> float:
    return float(results["ways"][name][order]["median_s"])


def bytes_text(value: float | None) -> str:
    return "not measured: no /proc here" if value is None else f"{value:.1f}"


def setting(results: dict[str, Any]) -> str:
    machine, threads, parameters = results["machine"], results["threads"], results["parameters"]
    memory = "" if machine["memory_gb"] is None else f", {machine['memory_gb']} GB"
    return (
        f"{parameters['rows']:,} rows ({parameters['prompts']:,} prompts of {parameters['responses']} responses), "
        f"median of {parameters['repeats']}; {machine['cpu']}, {machine['cores']} cores{memory}, {machine['os']}; "
        f"Python {machine['python']}, Polars {machine['polars']} ({threads['polars']} threads), "
        f"DuckDB {machine['duckdb']} ({threads['duckdb']}), NumPy {machine['numpy']} ({threads['numpy']}), "
        f"dice {machine['dice']} ({threads['dice']})"
    )


def markdown(results: dict[str, Any]) -> str:
    """The table for docs/figures.md: the fastest way of each peer, which may differ between the orders."""
    lines = ["| frame to pairs | grouped by prompt | shuffled |", "| --- | ---: | ---: |"]

    def line(title: str, cells: list[str]) -> None:
        lines.append(f"| {title} | {' | '.join(cells)} |")

    def times(title: str, names: list[str]) -> None:
        line(title, [short(median(results, name, order)) for name, order in zip(names, ORDERS, strict=True)])

    times("**dice, exact alpha**", ["ours_auto"] * 2)
    steps = results["parameters"]["bisection_steps"]
    times(f"Polars, bisection for alpha by group_by and arg_max ({steps} steps)", ["polars_bisection_arg_max"] * 2)
    for kind, (title, _) in PEERS.items():
        times(f"{title} ({steps} steps)" if "bisection" in kind else title, [peer(results, kind, o) for o in ORDERS])
        if kind == "polars_bisection":
            times("dice, fixed alpha", ["ours_fixed"] * 2)
    for title, key in (
        ("dice, exact: faster than Polars' bisection by arg_max by", "speedup_over_polars_bisection"),
        ("dice, exact: faster than the fastest of them by", "speedup_over_fastest_polars_bisection"),
    ):
        line(title, [f"{digits(results[key][o])} ×" for o in ORDERS])
    line(
        "dice, exact: time over Polars' one pass",
        [digits(results[f"{order}_ratio_to_polars_pass"]) for order in ORDERS],
    )
    line("dice, exact: time over NumPy's sum", [digits(results["ratio_to_numpy_sum"][o]) for o in ORDERS])
    line(
        "dice, exact: peak memory beyond input and output, bytes a row",
        [bytes_text(results["bytes_per_row"][o]) for o in ORDERS],
    )
    return "\n".join([*lines, "", setting(results) + ".", ""])


def print_table(results: dict[str, Any]) -> None:
    """Every way in both orders, the memory and the scaling."""
    console = Console()
    # Rich assumes 80 columns where the output is a file, which would wrap the names of the ways.
    console.width = max(console.width, 110)
    ways = Table(title="Mining pairs, frame to pairs (* the fastest of its kind)")
    ways.add_column("way")
    for order in ORDERS:
        ways.add_column(f"{order}\nmedian", justify="right")
        ways.add_column("\nbest", justify="right")
    section = None
    for name, way in results["ways"].items():
        kind = way["kind"]
        if section not in (None, kind) and kind != "ours_fixed":
            ways.add_section()
        section = kind
        cells = []
        for order in ORDERS:
            mark = "*" if name == results["fastest"].get(kind, {}).get(order) else ""
            cells += [short(way[order]["median_s"]) + mark, short(way[order]["best_s"])] if order in way else ["", ""]
        ways.add_row(way["title"], *cells)
    console.print(ways)
    for order in ORDERS:
        agreement = results["agreement"][order]
        console.print(
            f"{order}: {agreement['pairs']:,} pairs, the same for every way at alpha "
            f"{results['parameters']['fixed_alpha']} (tied prompts left out: "
            f"{agreement['tied_prompts_left_out']['fixed_alpha']}); exact alpha {agreement['alpha']:.6g}; "
            f"peak memory beyond input and output, bytes a row: {bytes_text(results['bytes_per_row'][order])}"
        )
    measured = [point for point in results["scaling"] if "skipped" not in point]
    if measured:
        scaling = Table(title="dice, exact alpha: scaling")
        for title in ("rows", "order", "median", "best", "ns a row"):
            scaling.add_column(title, justify="left" if title == "order" else "right")
        for point in measured:
            each = digits(point["median_s"] / point["rows"] * 1e9)
            times = short(point["median_s"]), short(point["best_s"])
            scaling.add_row(f"{point['rows']:,}", point["order"], *times, each)
        console.print(scaling)
    for point in results["scaling"]:
        if "skipped" in point:
            console.print(f"skipped: {point['rows']:,} rows, {point['order']}: {point['skipped']}")


def draw(results: dict[str, Any], path: Path) -> None:
    """Seconds against rows, both logarithmic: dice at all sizes, and every peer at the main size."""
    main, machine = results["parameters"]["rows"], results["machine"]
    figure, axes = plt.subplots(figsize=(9, 5.2), dpi=160, layout="constrained")
    style: dict[str, Any] = {"markeredgewidth": 1.4, "linestyle": "none", "zorder": 3}
    largest = (main, median(results, "ours_auto", "grouped"))
    rows = [main]
    for order, (color, line) in OURS.items():
        inside = color if order == "grouped" else "white"
        points = [p for p in results["scaling"] if p["order"] == order and "skipped" not in p]
        x, y = [p["rows"] for p in points], [p["median_s"] for p in points]
        title = f"dice, exact alpha: {order}"
        axes.plot(x, y, line, color=color, marker="o", markersize=5, markerfacecolor=inside, linewidth=2, label=title)
        rows += x
        if order == "grouped" and points:
            largest = max(largest, (x[-1], y[-1]))
        for kind, marker in (("ours", "*"), *((kind, marker) for kind, (_, marker) in PEERS.items())):
            median_s = median(results, "ours_auto" if kind == "ours" else peer(results, kind, order), order)
            size = 13 if kind == "ours" else 8
            axes.plot(main, median_s, marker, markersize=size, color=inside, markeredgecolor=color, **style)
    # Only for the legend: the markers, whose color shows the order.
    for title, marker in (("dice, exact alpha, beside the peers", "*"), *PEERS.values()):
        size = 11 if marker == "*" else 7
        axes.plot([], [], marker, markersize=size, color="white", markeredgecolor=INK, **style, label=title)
    # Time in proportion to the rows, through the largest size.
    ends = (min(rows), max(rows))
    proportional = [largest[1] * end / largest[0] for end in ends]
    axes.plot(ends, proportional, color=PALE, linewidth=1, zorder=0, label="slope one: time in proportion to rows")
    axes.set(xscale="log", yscale="log", xlabel="rows (responses)", ylabel="seconds, frame to pairs (median)")
    title = f"Mining preference pairs: {machine['cpu']}, {machine['cores']} cores; peers at {main:,} rows"
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.grid(which="major", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.01, 0.5), labelspacing=0.8)
    figure.savefig(path)
    plt.close(figure)
