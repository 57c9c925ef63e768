"""Where a run's time went: each stage's share of its round, what processes cost to start, how idle the GPUs were.

Computed from a run folder's manifest.json and events.jsonl. A resumed run has several sessions in one file, each of
which begins with a `started` event. The values of a stage are those of its last attempt; the seconds of earlier ones
are `lost_seconds` (their completed shards were kept). A stage that a session kept costs nothing in that session, and a
session that kept every stage costs nothing at all.

The values, in seconds unless another unit is named:

    seconds               wall clock; for a round: its stages and the time between them, without lost seconds
    share                 of the round's seconds
    spawn_seconds         from the parent's call to the new interpreter's first line
    import_seconds        imports of the stage's module and its libraries
    load_seconds          weights read and placed
    start_up_seconds      the three together
    work_seconds          of the processes after their start-up; for a stage that runs in the parent, all of it
    rest_seconds          the remainder: processes that end, the parent's part of the stage
    gpu_idle_share        share of one-second samples in which a GPU ran no kernel, over all GPUs that the run may use
    gpu_mean_utilisation  share of time in which at least one kernel ran, however much of the GPU it used
    tokens_per_second     tokens over the time in which shards were worked on, of all groups, without start-up
    mfu                   model FLOPs over the FLOPs that the GPUs could have run in the shards' seconds

Where groups work in parallel, start-up is that of the slowest. None (null): not measured, or not applicable.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dice_py.runs.event_log import Event, finite_number, read_events
from dice_py.storage.files import Manifest, write_sealed

STARTS = ("spawn", "import", "load")
_SUMMED = ("processes", "start_up_seconds", *(f"{name}_seconds" for name in STARTS), "work_seconds", "rest_seconds")
_OLD = "start-up, GPUs and throughput are unknown: an older version, which did not record them, made this run"
_PARTLY_OLD = "where values are missing, an older version, which did not record them, made the stage"
_SLOWEST = "where groups work in parallel, start-up is that of the slowest"


@dataclass
class _Span:
    """A stretch of time (a stage, or the time between stages), and the events in it."""

    seconds: float = 0.0
    events: list[Event] = field(default_factory=list)

    def add(self, other: _Span) -> None:
        self.seconds += other.seconds
        self.events += other.events


@dataclass
class _Attempt(_Span):
    """One attempt at a stage: from `running` to `done`, or to the last event before it was cut short."""

    began: float = 0.0
    done: bool = False


@dataclass
class _Timeline:
    attempts: dict[str, list[_Attempt]] = field(default_factory=dict)
    between: dict[str, _Span] = field(default_factory=dict)
    """By round: the time of its sessions in which none of its stages ran."""
    before: _Span = field(default_factory=_Span)
    """Before a session's first round."""


def profile(folder: Path) -> dict[str, Any]:
    """The profile of a run folder, ready for JSON: `rounds`, `before`, `total`, `notes`.

    `rounds`: for each round its values, `between` (between its stages: the parent's own work) and `stages`.
    `before`: before the first round (data read, models checked). `total`: of the complete run.
    """
    manifest = Manifest(folder / "manifest.json").data["stages"]
    timeline = _timeline(read_events(folder / "events.jsonl"))
    rounds = [
        _round(name, manifest, timeline)
        for name in sorted({stage.partition("/")[0] for stage in (*manifest, *timeline.attempts)})
    ]
    before = _span_values(timeline.before) if timeline.before.seconds else None
    parts = [*rounds, *([] if before is None else [before])]
    total = {
        "seconds": _round_off(sum(part["seconds"] for part in parts)),
        "lost_seconds": _sum(entry["lost_seconds"] for entry in rounds),
        "between_seconds": _sum(entry["between"]["seconds"] for entry in rounds if entry["between"]),
        **{name: _sum(part[name] for part in parts) for name in _SUMMED},
        **_gpus([gpu for part in parts for gpu in part["gpus"] or []]),
    }
    total["start_up_share"] = _share(total["start_up_seconds"], total["seconds"])
    return {"rounds": rounds, "before": before, "total": total, "notes": _notes(rounds, timeline)}


def write_profile(folder: Path) -> None:
    """Writes `profile.json` into a run folder in which a stage has begun."""
    values = profile(folder)
    if values["rounds"]:
        write_sealed(folder / "profile.json", values, "profile")


def _timeline(events: list[Event]) -> _Timeline:
    sessions: list[list[Event]] = []
    for event in events:
        if event["event"] == "started":
            sessions.append([])
        if sessions:  # events before the first session are of an older version
            sessions[-1].append(event)
    timeline = _Timeline()
    for session in sessions:
        _add_session(timeline, session)
    return timeline


def _add_session(timeline: _Timeline, session: list[Event]) -> None:
    before = current = _Span()
    between: dict[str, _Span] = {}
    worked = set()
    last = session[0]["time"]
    for event in session:
        # The clock may have been set back.
        current.seconds += max(0.0, event["time"] - last)
        last = event["time"]
        kind, stage = event["event"], str(event.get("stage"))
        if kind == "round":
            current = between.setdefault(f"round-{event['number']:02d}", _Span())
        elif kind == "stage" and event.get("status") == "running":
            worked.add(stage.partition("/")[0])
            current = _Attempt(began=last)
            timeline.attempts.setdefault(stage, []).append(current)
        elif kind == "stage" and event.get("status") == "done":
            if isinstance(current, _Attempt):
                current.done = True
                current.seconds = finite_number(event.get("seconds")) or 0.0
            current = between.setdefault(stage.partition("/")[0], _Span())
        else:
            current.events.append(event)
    for name in worked:
        timeline.between.setdefault(name, _Span()).add(between.get(name, _Span()))
    if worked:
        timeline.before.add(before)


def _round(name: str, manifest: dict[str, Any], timeline: _Timeline) -> dict[str, Any]:
    named = dict.fromkeys(stage for stage in (*manifest, *timeline.attempts) if stage.startswith(f"{name}/"))
    stages = [_stage(stage, manifest.get(stage, {}), timeline.attempts.get(stage, [])) for stage in named]
    between = _span_values(timeline.between[name]) if name in timeline.between else None
    parts = [*stages, *([] if between is None else [between])]
    seconds = sum(part["seconds"] for part in parts)
    for part in parts:
        part["share"] = _share(part["seconds"], seconds)
    return {
        "round": name,
        "seconds": _round_off(seconds),
        "lost_seconds": _sum(stage["lost_seconds"] for stage in stages),
        **{name: _sum(part[name] for part in parts) for name in _SUMMED},
        **_gpus([gpu for part in parts for gpu in part["gpus"] or []]),
        "between": between,
        "stages": stages,
    }


def _stage(name: str, entry: dict[str, Any], attempts: list[_Attempt]) -> dict[str, Any]:
    head: dict[str, Any] = {"stage": name, "attempts": len(attempts) or None, "lost_seconds": None}
    if not attempts:  # made by an older version, which recorded no events
        nothing: dict[str, Any] = dict.fromkeys(("groups", *_SUMMED, "tokens", "tokens_per_second", "mfu"))
        status = "done" if entry.get("status") == "done" else "unfinished"
        seconds = _round_off(finite_number(entry.get("seconds")) or 0.0)
        return {**head, "status": status, "seconds": seconds, **nothing, **_gpus([]), "throughput": {}}
    *earlier, last = attempts
    head["lost_seconds"] = _round_off(sum(attempt.seconds for attempt in earlier))
    throughput = _throughput(last)
    own = name.rpartition("/")[2]
    # An evaluation generates and scores: a mean of the two rates would mean nothing.
    shown = throughput.get(own) or (next(iter(throughput.values())) if len(throughput) == 1 else {})
    return {
        **head,
        "status": "done" if last.done else "unfinished",
        **_span_values(last, measured=last.done),
        **{name: shown.get(name) for name in ("tokens", "tokens_per_second", "mfu")},
        "throughput": throughput,
    }


def _span_values(span: _Span, measured: bool = True) -> dict[str, Any]:
    """Values of a span's processes and GPUs. Not `measured`: its processes may have died without an event."""
    ended = [event for event in span.events if event["event"] == "process"]
    values: dict[str, Any] = {"seconds": _round_off(span.seconds), "groups": None, **dict.fromkeys(_SUMMED)}
    if ended or measured:
        path = _critical_path([_Process.of(event) for event in ended])
        # Without a process, the parent did the work.
        work = path.work if ended else span.seconds
        starts = {f"{name}_seconds": _round_off(path.starts[name]) for name in STARTS}
        start_up = sum(path.starts.values())
        values |= {
            "groups": len({event["group"] for event in ended if event.get("group") is not None}) or None,
            "processes": len(ended),
            "start_up_seconds": _round_off(start_up),
            **starts,
            "work_seconds": _round_off(work),
            "rest_seconds": _round_off(max(0.0, span.seconds - start_up - work)),
        }
    sampled = [event for event in span.events if event["event"] == "gpu"]
    return values | _gpus([gpu for event in sampled for gpu in event.get("gpus") or []])


@dataclass
class _Process:
    """When a process began and ended, and where its seconds went; or several processes, one after another."""

    began: float
    ended: float
    group: int | None
    starts: dict[str, float]
    work: float

    @classmethod
    def of(cls, event: Event) -> _Process:
        parts = event.get("seconds") or {}
        starts = {name: finite_number(parts.get(name)) or 0.0 for name in STARTS}
        total = finite_number(parts.get("total"))
        if total is None:
            total = sum(starts.values()) + (finite_number(parts.get("work")) or 0.0)
        work = max(0.0, total - sum(starts.values()))
        return cls(event["time"] - total, event["time"], event.get("group"), starts, work)

    @property
    def start_up(self) -> float:
        return sum(self.starts.values())

    @classmethod
    def chain(cls, parts: list[_Process]) -> _Process:
        starts = {name: sum(part.starts[name] for part in parts) for name in STARTS}
        began = min((part.began for part in parts), default=0.0)
        ended = max((part.ended for part in parts), default=0.0)
        return cls(began, ended, None, starts, sum(part.work for part in parts))


def _critical_path(processes: list[_Process]) -> _Process:
    """The sum of a span's processes, with only the slowest of the groups that ran in parallel.

    The work of a process that started groups and waited for them includes their start-up, which is subtracted.
    """
    hosts = [process for process in processes if process.group is None]
    slack = 1.0  # seconds by which an event may arrive late
    parts = list(hosts)
    for wave in _waves([process for process in processes if process.group is not None]):
        groups: dict[int | None, list[_Process]] = {}
        for process in wave:
            groups.setdefault(process.group, []).append(process)
        chains = [_Process.chain(members) for members in groups.values()]
        slowest = max(chains, key=lambda chain: chain.start_up + chain.work)
        if any(host.began - slack <= slowest.began and slowest.ended <= host.ended + slack for host in hosts):
            slowest.work = -slowest.start_up
        parts.append(slowest)
    path = _Process.chain(parts)
    path.work = max(0.0, path.work)
    return path


def _waves(processes: list[_Process]) -> list[list[_Process]]:
    """Processes, grouped by whether they overlap in time, directly or through others."""
    waves: list[list[_Process]] = []
    for process in sorted(processes, key=lambda process: process.began):
        if waves and process.began < max(other.ended for other in waves[-1]):
            waves[-1].append(process)
        else:
            waves.append([process])
    return waves


def _throughput(attempt: _Attempt) -> dict[str, dict[str, Any]]:
    """By kind of work (generate, score, …): the sum of its shards."""
    kinds: dict[str, list[Event]] = {}
    for event in attempt.events:
        if event["event"] == "throughput":
            kinds.setdefault(str(event.get("stage")).rpartition("/")[2], []).append(event)
    throughput = {}
    for kind, events in kinds.items():
        tokens = int(sum(finite_number(event.get("tokens")) or 0.0 for event in events))
        # Shards overlap, in one process and in several: a second of work on two shards counts once.
        seconds = _covered(
            (max(attempt.began, event["time"] - (finite_number(event.get("seconds")) or 0.0)), event["time"])
            for event in events
        )
        flops = possible = 0.0
        for event in events:
            flops_run, share = finite_number(event.get("flops")), finite_number(event.get("mfu"))
            if flops_run and share:
                flops += flops_run
                possible += flops_run / share
        throughput[kind] = {
            "shards": len(events),
            "sequences": int(sum(finite_number(event.get("sequences")) or 0.0 for event in events)),
            "tokens": tokens,
            "seconds": _round_off(seconds),
            "tokens_per_second": _round_off(tokens / seconds) if seconds else None,
            "mfu": _share(flops, possible),
        }
    return throughput


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    covered, reached = 0.0, -math.inf
    for began, ended in sorted(intervals):
        covered += max(0.0, ended - max(began, reached))
        reached = max(reached, ended)
    return covered


def _gpus(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Values of each GPU, and of all together; None where there is none."""
    gpus: dict[int, dict[str, Any]] = {}
    for one in events:
        new = {"index": one["index"], "samples": 0, "idle_samples": 0, "busy": 0.0, "peak_memory_bytes": None}
        gpu = gpus.setdefault(one["index"], new)
        gpu["memory_bytes"] = one["memory_bytes"]
        gpu["samples"] += one["samples"]
        gpu["idle_samples"] += one["idle_samples"]
        gpu["busy"] += (one["mean_utilisation"] or 0.0) * one["samples"]
        gpu["peak_memory_bytes"] = max(filter(None, (gpu["peak_memory_bytes"], one["peak_memory_bytes"])), default=None)
    samples = sum(gpu["samples"] for gpu in gpus.values())
    busy = sum(gpu["busy"] for gpu in gpus.values())
    for gpu in gpus.values():
        gpu["idle_share"] = _share(gpu["idle_samples"], gpu["samples"])
        gpu["mean_utilisation"] = _share(gpu.pop("busy"), gpu["samples"])
    return {
        "gpu_idle_share": _share(sum(gpu["idle_samples"] for gpu in gpus.values()), samples),
        "gpu_mean_utilisation": _share(busy, samples),
        "gpus": [gpus[index] for index in sorted(gpus)] or None,
    }


def _notes(rounds: list[dict[str, Any]], timeline: _Timeline) -> list[str]:
    stages = [stage for entry in rounds for stage in entry["stages"]]
    if stages and not timeline.attempts:
        return [_OLD]
    notes = [] if all(stage["attempts"] for stage in stages) else [_PARTLY_OLD]
    if any((stage["groups"] or 0) > 1 for stage in stages):
        notes.append(_SLOWEST)
    attempts = [attempt for many in timeline.attempts.values() for attempt in many]
    events = [event for span in (timeline.before, *timeline.between.values(), *attempts) for event in span.events]
    texts = [event["text"] for event in events if event["event"] == "gpu" and event.get("text")]
    return notes + list(dict.fromkeys(texts))


def _sum(values: Iterable[float | None]) -> float | None:
    """The sum of the values that are not None; None where there is no such value."""
    known = [value for value in values if value is not None]
    return _round_off(sum(known)) if known else None


def _round_off(value: float) -> float:
    """Rounds to thousandths; integers stay as they are."""
    return value if isinstance(value, int) else round(value, 3)


def _share(part: float | None, whole: float) -> float | None:
    return round(part / whole, 6) if part is not None and whole else None
