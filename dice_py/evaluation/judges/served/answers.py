"""A judge's answers: what they say of two responses, and the file that keeps them.

Answers are kept in one SQLite database in the cache folder, under a digest of the request. Each is stored as soon as it
is there, so a kill loses none, and several processes may use the file.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from dice_py.errors import DataError, DiskFullError, UsageError
from dice_py.storage.files import make_folder

_LABEL = re.compile(r"\[\[\s*(A>>B|A>B|B>>A|B>A|A=B|B=A|A|B|C|TIE)\s*\]\]", re.IGNORECASE)
_SECOND = ("B", "B>A", "B>>A")
_TIES = ("C", "TIE", "A=B", "B=A")
_LEAST_MASS = 0.1
"""Of A and B among the first tokens. A judge that most likely begins otherwise has not answered with a letter."""
_WAIT_SECONDS = 60.0


class Answer(NamedTuple):
    """An answer of a judge to one request."""

    text: str
    finish: str | None
    """Why it ended: "stop", "length", …"""
    tops: list[tuple[str, float]] | None
    """The most probable first tokens with their log-probabilities in nats, if they were asked for."""
    input_tokens: int | None
    output_tokens: int | None
    """As the server counts them; None where it does not."""


def first_wins(answer: Answer, verdict: Literal["text", "logprobs"]) -> float | None:
    """The probability, in [0, 1], that the response that was shown first is better; None if the answer has no verdict.

    text: 1, 0, or 0.5 by the last [[A]], [[B]] or [[C]] of the answer (or [[A>>B]], [[A>B]], [[A=B]], …, as in
    Arena-Hard); an answer that is one of the three letters alone counts too.
    logprobs: p(A) / (p(A) + p(B)) of the first token, as in AlpacaEval 2's weighted win rate.
    """
    if verdict == "logprobs":
        mass = {"A": 0.0, "B": 0.0}
        for token, logprob in answer.tops or []:
            if token.strip() in mass:
                mass[token.strip()] += math.exp(logprob)
        total = sum(mass.values())
        return mass["A"] / total if total >= _LEAST_MASS else None
    labels = _LABEL.findall(answer.text)
    label = labels[-1].upper() if labels else answer.text.strip()
    if not labels and label not in ("A", "B", "C"):
        return None
    return 0.5 if label in _TIES else 0.0 if label in _SECOND else 1.0


class AnswerCache:
    """The kept answers, by key. A context manager.

    Raises:
        DataError: the file is damaged, or another program's.
        DiskFullError: no room is left for an answer; the earlier ones are kept.
        UsageError: the file cannot be opened or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._errors():
            make_folder(path.parent)
            self._database = sqlite3.connect(path, timeout=_WAIT_SECONDS, isolation_level=None)
            self._database.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")

    def __enter__(self) -> AnswerCache:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def read(self, keys: Iterable[str]) -> dict[str, Answer]:
        """The answers that are there, of these keys."""
        found = {}
        with self._errors():
            for key in keys:
                row = self._database.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
                if row is not None:
                    found[key] = _decoded(row[0])
        return found

    def add(self, key: str, answer: Answer) -> None:
        """Keeps an answer. The first under a key stays: two processes may have asked at the same time."""
        with self._errors():
            self._database.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, json.dumps(answer)))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """SQLite's errors as sentences."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if "full" in str(error):
                raise DiskFullError(
                    f"no room left on the disk while writing {self.path}; the answers before are kept. Free some "
                    "space, then repeat the command"
                ) from None
            raise UsageError(
                f"{self.path}: {error}; check the file and its permissions, or set DICE_CACHE to another folder"
            ) from None
        except (sqlite3.DatabaseError, ValueError, TypeError) as error:
            raise DataError(
                f"{self.path} is damaged, or no file of a judge's answers ({error}): move it away; what it held is "
                "asked again"
            ) from None


def _decoded(text: str) -> Answer:
    answer, finish, tops, input_tokens, output_tokens = json.loads(text)
    return Answer(answer, finish, None if tops is None else [tuple(top) for top in tops], input_tokens, output_tokens)
