"""From what a calibration measured to seconds: the steps of a decoding, and how stages and start-ups overlap."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SIMULATED = 200_000
"""Responses beyond which the rest is taken to go on as these did."""


def decode_steps(lengths: Sequence[int], rows: int, joins: bool) -> int:
    """Forwards that responses of these lengths take, decoded `rows` at a time, in this order.

    With `joins`, a row that ended makes room for the next response, so that only the end waits for the longest; else
    a batch runs as long as its longest member.
    """
    if not len(lengths):
        return 0
    taken = list(lengths[:_SIMULATED])
    if not joins:
        steps = sum(max(taken[start : start + rows]) for start in range(0, len(taken), rows))
    else:
        ends: list[int] = []
        for length in taken:
            heapq.heappush(ends, length + (heapq.heappop(ends) if len(ends) >= rows else 0))
        steps = max(ends)
    return round(steps * len(lengths) / len(taken))


def draw_lengths(seen: Sequence[int], count: int) -> list[int]:
    """`count` lengths drawn from those that were seen, always the same ones."""
    drawn = np.random.default_rng(0).choice(np.asarray(seen), size=count)
    found: list[int] = drawn.tolist()
    return found


def fit_decoding(runs: Sequence[tuple[int, int, float]]) -> tuple[float, float]:
    """(seconds a step, seconds a token), none negative, from (steps, tokens, seconds) of two runs: small and large.

    Where the two do not tell them apart, all of the larger one is laid on its tokens or its steps, whichever also
    explains the smaller one better.
    """
    (steps, tokens, seconds), (more_steps, more_tokens, more_seconds) = runs[0], runs[-1]
    determinant = steps * more_tokens - more_steps * tokens
    if determinant:
        step = (seconds * more_tokens - more_seconds * tokens) / determinant
        token = (steps * more_seconds - more_steps * seconds) / determinant
        if step >= 0 and token >= 0:
            return step, token
    by_token, by_step = more_seconds / max(1, more_tokens), more_seconds / max(1, more_steps)
    if abs(by_step * steps - seconds) < abs(by_token * tokens - seconds):
        return by_step, 0.0
    return 0.0, by_token


@dataclass(frozen=True)
class Task:
    """A stage on the timeline."""

    name: str
    start: float | None
    """Seconds until its process has imported what it needs, alone; None: it works in the run's own process."""
    work: float
    """Seconds after that, alone."""
    prepares: bool = False
    """Whether the process of the next task that has one is started with it."""
    work_beside: float = 1.0
    """Speed of the work while another process imports, as a share of what it has alone."""
    start_beside: float = 1.0
    """The same of that import."""


def timeline(tasks: Sequence[Task], starts: float = 1.0) -> list[tuple[float, float]]:
    """(seconds, of these waiting for its process) of each task, one after the other.

    The next process is started when a stage starts (runs/folder.py), and imports while that one imports and
    works; on few cores both get slower by it.

    Args:
        starts: speed of each of two imports at one time, as a share of what it has alone.
    """
    found = []
    ahead: float | None = None  # what is left of the next process's import
    for at, task in enumerate(tasks):
        wait = 0.0
        if task.start is not None:
            own = task.start if ahead is None else ahead
            following = next((later.start for later in tasks[at + 1 :] if later.start is not None), None)
            ahead = following if task.prepares else None
            if ahead:
                both = min(own, ahead)
                wait = both / starts
                own, ahead = own - both, ahead - both
            wait += own
        left, took = task.work, 0.0
        if ahead:
            until = ahead / task.start_beside
            took = min(until, left / task.work_beside) if task.work_beside > 0 else until
            left = max(0.0, left - took * task.work_beside)
            ahead = max(0.0, ahead - took * task.start_beside)
        found.append((wait + took + left, wait))
    return found
