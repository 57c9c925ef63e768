"""Tables and lines of text from results, as `dice` prints them to stdout."""

from __future__ import annotations

from typing import Any, Literal

from rich.table import Table

from cli.terminal import console, say
from dice_py.reporting.formatting import evaluation_rows, mining_rows, number, seconds, share

_PLAIN_WIDTH = 1000  # so that a pipe or a file gets each row of a table on one line

_HIGHLIGHTS = {
    "generate": ("responses", "response_tokens", "cut_off", "engine"),
    "score": ("responses", "mean_reward", "reward_std"),
    "mine": ("pairs", "alpha"),
    "replay": ("mined", "replay", "reached_share"),
    "inspect": ("pairs", "tokens", "failure", "credit_failure"),
    "train": ("pairs", "steps", "step0_loss", "final_loss", "skipped"),
    "reinforce": ("hard_prompts", "steps", "first_reward", "final_reward", "final_kl", "final_tokens", "skipped"),
    "extrapolate": ("alpha", "metric"),
    "benchmark": ("metrics",),
    "evaluate": (
        *(f"{judge}_win_rate" for judge in ("oracle", "reward_model", "implicit", "openai")),
        "oracle_accuracy",
        "mean_response_tokens",
        "kl_to_previous",
        "implicit_reward_accuracy",
    ),
}
_SHOWN_MARGINS = ("0.05", "0.5", "0.95")


def counts_text(stage: str, counts: dict[str, Any]) -> str:
    """The most telling counts of a stage, in one line; missing ones are left out."""
    parts = [
        f"{name.replace('_', ' ')} {number(counts[name])}" for name in _HIGHLIGHTS.get(stage, ()) if name in counts
    ]
    if stage == "mine" and counts:
        parts += _mining(counts)
    return ", ".join(parts)


def _mining(counts: dict[str, Any]) -> list[str]:
    parts = []
    for name, words in (("mean_length_gap", "mean length gap"), ("reward_length_correlation", "length correlation")):
        if f"{name}_after" in counts:
            parts.append(f"{words} {number(counts[f'{name}_before'])} to {number(counts[f'{name}_after'])}")
    if "chosen_longer_share" in counts:
        parts.append(f"chosen longer {share(counts['chosen_longer_share'])}")
    if "margin_quantiles" in counts:
        low, median, high = (number(counts["margin_quantiles"][name]) for name in _SHOWN_MARGINS)
        parts.append(f"margin {median} ({low} to {high})")
    return parts


def metrics_table(metrics: dict[str, dict[str, Any]]) -> Table:
    """The evaluation of each round, side by side."""
    table = _table("on held-out prompts and pairs", {"": "left", **dict.fromkeys(metrics, "right")})
    for row in evaluation_rows(metrics):
        table.add_row(*row)
    return table


def status_table(status: dict[str, Any]) -> Table:
    """The status of a run (runs/status.py): a row for each stage."""
    title = f"{status['run']}: {status['state']}, {status['done']} of {status['stages']} stages"
    table = _table(title, {"stage": "left", "status": "left", "time": "right", "counts": "left"})
    for entry in status["entries"]:
        counts = counts_text(entry["stage"].split("/")[-1], entry["counts"])
        table.add_row(entry["stage"], entry["status"], seconds(entry["seconds"]), counts)
    return table


def profile_table(profile: dict[str, Any]) -> Table:
    """The profile of a run (runs/profile.py): rows for each stage, the time between them, each round and the run."""
    heads = ("time", "share", "start-up", "load", "work", "GPU idle", "tokens/s", "MFU")
    table = _table(f"{profile['run']}: {profile['state']}", {"": "left", **dict.fromkeys(heads, "right")})

    def row(name: str, values: dict[str, Any]) -> None:
        starting = None if values["import_seconds"] is None else values["spawn_seconds"] + values["import_seconds"]
        rate = values.get("tokens_per_second")
        table.add_row(
            name,
            seconds(values["seconds"]),
            share(values.get("share")),
            *(seconds(part) for part in (starting, values["load_seconds"], values["work_seconds"])),
            share(values["gpu_idle_share"]),
            "–" if rate is None else f"{rate:,.1f}",
            share(values.get("mfu")),
        )

    if profile["before"]:
        row("before the rounds", profile["before"])
    for entry in profile["rounds"]:
        for stage in entry["stages"]:
            row(stage["stage"] + ("" if stage["status"] == "done" else " (unfinished)"), stage)
        if entry["between"]:
            row(f"{entry['round']}, between stages", entry["between"])
        row(entry["round"], entry | {"share": 1.0})
    row("all", profile["total"])
    return table


def profile_lines(profile: dict[str, Any]) -> list[str]:
    """The lines below the table of a profile: lost time, what was not measured, and the cost of starting up."""
    if not profile["rounds"]:
        return [f"{profile['run']}: {profile['state']}, and no stage has begun: there is no profile yet"]
    total = profile["total"]
    lines = []
    for stage in (stage for entry in profile["rounds"] for stage in entry["stages"]):
        if stage["lost_seconds"]:
            earlier = number(stage["attempts"] - 1)
            lines.append(f"{stage['stage']}: {seconds(stage['lost_seconds'])} more in earlier attempts ({earlier})")
    lines += profile["notes"]
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


def plan_table(plan: dict[str, Any]) -> Table:
    """A plan (planning/plan.py): a row for each stage, and the run."""
    heads = ("time", "start-up", "GPU h", "tokens", "disk", "peak memory")
    table = _table("planned", {"": "left", **dict.fromkeys(heads, "right"), "counts": "left"})
    for name, stage in plan["stages"].items():
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
        seconds(plan["total_seconds"]),
        seconds(sum(stage["startup_seconds"] for stage in plan["stages"].values())),
        number(plan["gpu_hours"]),
        number(sum(stage["tokens"] for stage in plan["stages"].values())),
        size(plan["disk_bytes"]),
        size(plan["peak_memory_bytes"]),
    )
    return table


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """The lines below the table of a plan: where its costs come from, and whether the run fits."""
    calibration, failure = plan["calibration"], plan["first_failure"]
    source = {"measured": "measured now", "stored": f"kept from a {calibration['of']}"}[calibration["source"]]
    lines = [
        f"costs: {source}, of this model shape in {calibration['dtype']} on {calibration['device']}, "
        f"engine {calibration['engine']}; responses of {number(calibration['mean_response_tokens'])} tokens on "
        "average; pairs are an estimate"
    ]
    if plan["method"] != "dpo" or plan["labels"]:
        labels = f"; mining adds {', '.join(plan['labels'])}" if plan["labels"] else ""
        lines.append(f"train.method={plan['method']}{labels}")
    if calibration["extrapolated_responses"]:
        lines.append(
            f"{calibration['extrapolated_responses']} of {calibration['responses']} responses of the calibration were "
            f"cut at {calibration['cut_at_tokens']} tokens: their lengths are extrapolated, and so are the times of "
            "all stages"
        )
    if plan["may_end_early"]:
        lines.append(f"rounds.stop_when=worse may end the run before its last round, {plan['rounds']}")
    if plan["not_estimated"]:
        lines.append(f"not in the estimate, since nothing is known of them: {', '.join(plan['not_estimated'])}")
    if plan["cluster"] is not None:
        lines += cluster_lines(plan["cluster"])
    if not plan["gpu_hours"]:
        lines.append(f"no GPU is used: {number(plan['cpu_hours'])} core hours")
    free = f"{size(plan['free_disk_bytes'])} of disk and {size(plan['free_memory_bytes'])} of memory are free"
    if failure is None:
        return [*lines, f"it fits: {free}"]
    return [*lines, f"it does not fit: {failure['text']} ({failure['setting']}); {failure['remedy']}", free]


def cluster_lines(cluster: dict[str, Any]) -> list[str]:
    """The lines of a plan about its cluster: what is reserved, what of it is idle in which stages, what is assumed."""
    lines = [f"cluster: {cluster['nodes']} node(s), {cluster['gpus']} GPUs, {number(cluster['node_hours'])} node hours"]
    if cluster["idle_share"] is not None:
        worst = sorted(cluster["idle_by_stage"].items(), key=lambda item: -item[1])[:3]
        stages = ", ".join(f"{name} {number(hours)}" for name, hours in worst)
        lines[0] += (
            f"; of {number(cluster['reserved_gpu_hours'])} GPU hours {100 * cluster['idle_share']:.0f} % are idle "
            f"({stages})"
        )
    lines.append(
        f"between nodes {size(cluster['network_bytes'])}, over the file system {size(cluster['filesystem_bytes'])}; "
        f"assumed: {number(cluster['assumed_network_gb_per_s'])} GB/s a node, "
        f"{number(cluster['assumed_filesystem_gb_per_s'])} GB/s for all (--network, --filesystem)"
    )
    return lines


def size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit, bytes_of_one in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= bytes_of_one / 10:
            return f"{count / bytes_of_one:,.1f} {unit}"
    return f"{count / 1024:,.1f} KiB"


def mining_table(summary: dict[str, Any], out: str) -> Table:
    """The summary of mining: a row for each measure."""
    table = _table(f"pairs in {out}", {"": "left", "found": "left"})
    table.show_header = False
    for row in mining_rows(summary):
        table.add_row(*row)
    return table


def comparison_table(summary: dict[str, Any], source: str) -> Table:
    """A comparison of minings (`MiningComparison.summary`): a row for each variant, within 100 columns.

    Overlap is with the first variant that could be mined.
    """
    from dice_py.mining.variants import show

    names = list(dict.fromkeys(name for entry in summary["variants"] for name in entry["settings"]))
    table = _table(f"pairs of {source}", {})
    table.collapse_padding = True
    for name in names:  # a long name takes several lines
        table.add_column(name.replace("_", "_\n"), vertical="bottom")
    for head in ("pairs", "overlap", "prompts", "α", "length gap", "longer", "corr.", "5 %", "margin", "95 %"):
        table.add_column(head, justify="right", vertical="bottom")
    first = next(at for at, entry in enumerate(summary["variants"]) if entry["error"] is None)
    for entry, overlap in zip(summary["variants"], summary["overlap"][first], strict=True):
        cells = [show(entry["settings"][name]) if name in entry["settings"] else "–" for name in names]
        if entry["error"] is None:
            cells += [
                number(entry["pairs"]),
                _tight_share(overlap),
                number(entry["prompts_with_pair"]),
                _significant(entry["alpha"]),
                " → ".join(_fixed(entry[f"mean_length_gap_{when}"]) for when in ("before", "after")),
                _tight_share(entry["chosen_longer_share"]),
                _fixed(entry["reward_length_correlation_after"]),
                *(_significant(entry["margin_quantiles"][name]) for name in _SHOWN_MARGINS),
            ]
        else:
            cells.append("refused")
        table.add_row(*cells)
    return table


def comparison_lines(summary: dict[str, Any]) -> list[str]:
    """The lines below the table of a comparison: why variants could not be mined."""
    return [f"{entry['variant']}: {entry['error']}" for entry in summary["variants"] if entry["error"] is not None]


def _tight_share(value: float | None) -> str:
    return share(value).replace(" ", "")


def _significant(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _fixed(value: float | None) -> str:
    """Two decimals, or none of a large number; nothing is -0.00."""
    if value is None:
        return "–"
    digits = 0 if abs(value) >= 100 else 2
    return f"{round(value, digits) + 0.0:,.{digits}f}"


def _table(title: str, columns: dict[str, Literal["left", "right"]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name, justify in columns.items():
        table.add_column(name, justify=justify)
    return table


def winrate_table(summary: dict[str, Any]) -> Table:
    """The summary of `dice winrate` (evaluation/winrate/summary.py): a row for each model."""
    controlled = "length-controlled" + ("" if summary["comparable"] else " (not comparable)")
    title = f"win rates against {summary['baseline']}, in percent, with 95 % intervals"
    heads = (controlled, "", "win rate", " ", "prompts", "mean length")
    table = _table(title, {"model": "left", **dict.fromkeys(heads, "right")})
    for model in summary["models"]:
        cells = []
        for name in ("length_controlled_win_rate", "win_rate"):
            interval = model[f"{name}_ci95"]
            is_sure = model["baseline"] or interval is None
            cells += [_points(model[name]), "" if is_sure else f"{interval[0]:.1f} to {interval[1]:.1f}"]
        length = model["mean_length"]
        name = f"{model['model']} (the baseline)" if model["baseline"] else model["model"]
        table.add_row(name, *cells, number(model["prompts"]), "–" if length is None else f"{length:,.0f}")
    return table


def _points(rate: float | None) -> str:
    return "–" if rate is None else f"{rate:.2f}"


def print_table(table: Table) -> None:
    """Prints to stdout; to a pipe or a file each row on one line, without trailing blanks."""
    terminal = console()
    if terminal.is_terminal:
        terminal.print(table)
        return
    terminal.width = _PLAIN_WIDTH
    with terminal.capture() as captured:
        terminal.print(table)
    for line in captured.get().splitlines():
        say(line.rstrip())
