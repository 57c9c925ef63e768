"""Tables and lines of text from results, as `dice` prints them to stdout."""

from __future__ import annotations

from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from dice_py.reporting.formatting import mining_rows, number, seconds, share

_PLAIN_WIDTH = 1000  # so that a pipe or a file gets each row of a table on one line

_HIGHLIGHTS = {
    "generate": ("responses", "response_tokens", "cut_off", "engine"),
    "score": ("responses", "mean_reward", "reward_std"),
    "mine": ("pairs", "alpha"),
    "replay": ("mined", "replay", "reached_share"),
    "train": ("pairs", "steps", "step0_loss", "final_loss"),
    "evaluate": ("oracle_win_rate", "oracle_accuracy", "mean_response_tokens", "implicit_reward_accuracy"),
}
_SHOWN_MARGINS = ("0.05", "0.5", "0.95")


def counts_text(stage: str, counts: dict[str, Any]) -> str:
    """What a stage's line says of its counts; those that are not there (yet) are left out."""
    told = [f"{name.replace('_', ' ')} {number(counts[name])}" for name in _HIGHLIGHTS[stage] if name in counts]
    if stage == "mine" and counts:
        told += _mining(counts)
    return ", ".join(told)


def _mining(counts: dict[str, Any]) -> list[str]:
    told = []
    for name, words in (("mean_length_gap", "mean length gap"), ("reward_length_correlation", "length correlation")):
        if f"{name}_after" in counts:
            told.append(f"{words} {number(counts[f'{name}_before'])} to {number(counts[f'{name}_after'])}")
    if "chosen_longer_share" in counts:
        told.append(f"chosen longer {share(counts['chosen_longer_share'])}")
    if "margin_quantiles" in counts:
        found = [number(counts["margin_quantiles"][name]) for name in _SHOWN_MARGINS]
        told.append(f"margin {found[1]} ({found[0]} to {found[2]})")
    return told


def metrics_table(metrics: dict[str, dict[str, Any]]) -> Table:
    """The evaluation of each round, side by side."""
    table = _table("on held-out prompts and pairs", {"": "left", **dict.fromkeys(metrics, "right")})
    for name in dict.fromkeys(name for found in metrics.values() for name in found):
        table.add_row(name.replace("_", " "), *(number(found.get(name)) for found in metrics.values()))
    return table


def status_table(found: dict[str, Any]) -> Table:
    """What `dice_py.runs.status.run_status` found: a row for each stage."""
    title = f"{found['run']}: {found['state']}, {found['done']} of {found['stages']} stages"
    table = _table(title, {"stage": "left", "status": "left", "time": "right", "counts": "left"})
    for entry in found["entries"]:
        told = counts_text(entry["stage"].split("/")[-1], entry["counts"])
        table.add_row(entry["stage"], entry["status"], seconds(entry["seconds"]), told)
    return table


def profile_table(found: dict[str, Any]) -> Table:
    """What `run_profile` found: rows for each stage, what lies between them, each round and the run."""
    heads = ("time", "share", "start-up", "load", "work", "GPU idle", "tokens/s", "MFU")
    table = _table(f"{found['run']}: {found['state']}", {"": "left", **dict.fromkeys(heads, "right")})

    def row(name: str, of: dict[str, Any]) -> None:
        starting = None if of["import_seconds"] is None else of["spawn_seconds"] + of["import_seconds"]
        rate = of.get("tokens_per_second")
        table.add_row(
            name,
            seconds(of["seconds"]),
            share(of.get("share")),
            *(seconds(part) for part in (starting, of["load_seconds"], of["work_seconds"])),
            share(of["gpu_idle_share"]),
            "–" if rate is None else f"{rate:,.1f}",
            share(of.get("mfu")),
        )

    if found["before"]:
        row("before the rounds", found["before"])
    for one in found["rounds"]:
        for stage in one["stages"]:
            row(stage["stage"] + ("" if stage["status"] == "done" else " (unfinished)"), stage)
        if one["between"]:
            row(f"{one['round']}, between stages", one["between"])
        row(one["round"], one | {"share": 1.0})
    row("all", found["total"])
    return table


def profile_lines(found: dict[str, Any]) -> list[str]:
    """What stands below the table of a profile: lost time, what was not measured, and the cost of starting up."""
    if not found["rounds"]:
        return [f"{found['run']}: {found['state']}, and no stage has begun: there is no profile yet"]
    total = found["total"]
    lines = []
    for stage in (stage for one in found["rounds"] for stage in one["stages"]):
        if stage["lost_seconds"]:
            earlier = number(stage["attempts"] - 1)
            lines.append(f"{stage['stage']}: {seconds(stage['lost_seconds'])} more in earlier attempts ({earlier})")
    lines += found["notes"]
    if total["start_up_seconds"] is not None:
        count = total["processes"]
        processes = f"{number(count)} process{'' if count == 1 else 'es'}"
        parts = ", ".join(f"{name} {seconds(total[f'{name}_seconds'])}" for name in ("spawn", "import", "load"))
        lines.append(
            f"start-up costs: {processes}, {seconds(total['start_up_seconds'])}, "
            f"{share(total['start_up_share'])} of the run ({parts})"
        )
    return lines


_PLANNED = ("shards", "prompts", "prompts_too_long", "responses", "pairs", "replayed", "steps", "checkpoints")


def plan_table(found: dict[str, Any]) -> Table:
    """What `dice_py.planning.plan.plan` found: a row for each stage, and the run."""
    heads = ("time", "start-up", "GPU h", "tokens", "disk", "peak memory")
    table = _table("planned", {"": "left", **dict.fromkeys(heads, "right"), "counts": "left"})
    for name, stage in found["stages"].items():
        table.add_row(
            name,
            seconds(stage["seconds"]),
            seconds(stage["startup_seconds"]),
            number(stage["gpu_hours"]),
            number(stage["tokens"]),
            size(stage["disk_bytes"] + stage["transient_disk_bytes"]),
            size(stage["peak_memory_bytes"]),
            ", ".join(f"{key.replace('_', ' ')} {number(stage[key])}" for key in _PLANNED if stage.get(key)),
        )
    table.add_row(
        "all",
        seconds(found["total_seconds"]),
        seconds(sum(stage["startup_seconds"] for stage in found["stages"].values())),
        number(found["gpu_hours"]),
        number(sum(stage["tokens"] for stage in found["stages"].values())),
        size(found["disk_bytes"]),
        size(found["peak_memory_bytes"]),
    )
    return table


def plan_lines(found: dict[str, Any]) -> list[str]:
    """What stands below the table of a plan: where its figures come from, and whether the run fits."""
    of, failure = found["calibration"], found["first_failure"]
    whence = {"measured": "measured now", "stored": f"remembered from a {of['of']}"}[of["source"]]
    lines = [
        f"figures: {whence}, of this model shape in {of['dtype']} on {of['device']}, engine {of['engine']}; "
        f"responses of {number(of['mean_response_tokens'])} tokens on average; pairs are an estimate"
    ]
    if not found["gpu_hours"]:
        lines.append(f"no GPU is used: {number(found['cpu_hours'])} core hours")
    free = f"{size(found['free_disk_bytes'])} of disk and {size(found['free_memory_bytes'])} of memory are free"
    if failure is None:
        return [*lines, f"it fits: {free}"]
    return [*lines, f"it does not fit: {failure['text']} ({failure['setting']}); {failure['remedy']}", free]


def size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit, bytes_of_one in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= bytes_of_one / 10:
            return f"{count / bytes_of_one:,.1f} {unit}"
    return f"{count / 1024:,.1f} KiB"


def mining_table(found: dict[str, Any], out: str) -> Table:
    """What `dice mine` found: a row for each measure."""
    table = _table(f"pairs in {out}", {"": "left", "found": "left"})
    table.show_header = False
    for row in mining_rows(found):
        table.add_row(*row)
    return table


def _table(title: str, columns: dict[str, Literal["left", "right"]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name, justify in columns.items():
        table.add_column(name, justify=justify)
    return table


def print_table(table: Table) -> None:
    """To stdout; to a pipe or a file in whole lines, without the blanks that fill a column."""
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(table)
        return
    console.width = _PLAIN_WIDTH
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        print(line.rstrip())
