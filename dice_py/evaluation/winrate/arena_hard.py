"""Reads Arena-Hard's judgments, one model in a file, and the answers that they judge.

A judgment has `question_id` (or `uid`, from version 2), `model`, and two `games`: in the first the baseline is A and
the model is B, in the second they have changed places. Each has a `score`: A>>B, A>B, A=B, B>A or B>>A, or null where
the judge gave none. As in Arena-Hard's own figures, a verdict with >> counts three times; the preference of a prompt is
the mean of its votes, and prompts count equally. A prompt with a game that has no verdict has none.

Answers are needed for lengths, since judgments hold none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.errors import DataError
from dice_py.evaluation.winrate.comparisons import (
    COMPARISONS,
    Comparisons,
    build_comparisons,
    no_such_baseline,
    text_key,
)
from dice_py.evaluation.winrate.responses import Lengths
from dice_py.rows.row import Row
from dice_py.rows.sources import read_rows

_STRONG = 3
_VOTES = {
    "A>>B": (1.0, _STRONG),
    "A>B": (1.0, 1),
    "A=B": (0.5, 1),
    "B=A": (0.5, 1),
    "A<B": (0.0, 1),
    "B>A": (0.0, 1),
    "A<<B": (0.0, _STRONG),
    "B>>A": (0.0, _STRONG),
    "B<A": (1.0, 1),
    "B<<A": (1.0, _STRONG),
}
"""How much of a vote is for A, and how many votes it is."""


def read_judgments(files: Sequence[Path], baseline: str | None, lengths: Lengths | None = None) -> Comparisons:
    """The comparisons of judgments of one or more models.

    Args:
        lengths: of the models' answers and the baseline's, by `read_answer_lengths`.

    Raises:
        DataError: a judgment cannot be used; the message names it.
        UsageError: no baseline is named.
    """
    lengths = lengths or {}
    rows: list[dict[str, Any]] = []
    for file in files:
        for row in read_rows(file):
            values = row.columns
            prompt, model = _keys(row, values)
            if values.get("baseline", baseline) != baseline and baseline is not None:
                raise DataError(f"{row.where}: the baseline is {values['baseline']!r:.80}, and not {baseline!r:.80}")
            rows.append(
                {
                    "prompt": prompt,
                    "model": model,
                    "preference": _preference(row, values),
                    "length": lengths.get((prompt, model)),
                    "baseline_length": lengths.get((prompt, baseline)) if baseline is not None else None,
                    "annotator": values.get("judge") if isinstance(values.get("judge"), str) else None,
                }
            )
    source = ", ".join(str(file) for file in files)
    if not rows:
        raise DataError(f"{source} holds no rows; give Arena-Hard's judgments")
    if baseline is None:
        raise no_such_baseline(None, sorted({row["model"] for row in rows}), source)
    table = pl.DataFrame([{**dict.fromkeys(COMPARISONS), **row} for row in rows], schema=COMPARISONS)
    own = [length for (_, model), length in lengths.items() if model == baseline]
    return build_comparisons(table, baseline, source, (), sum(own) / len(own) if own else None)


def is_judgment(values: dict[str, Any]) -> bool:
    """Whether a row of a file is a judgment."""
    return "games" in values and "model" in values


def is_answer(values: dict[str, Any]) -> bool:
    """Whether a row of a file is an answer."""
    return ("uid" in values and "messages" in values) or ("question_id" in values and "choices" in values)


def answer_length(row: Row, values: dict[str, Any]) -> tuple[tuple[str, str], int]:
    """The prompt and the model of an answer, and its characters.

    Raises:
        DataError: a field is missing, or has another shape.
    """
    prompt = values["uid"] if "uid" in values else values["question_id"]
    model = values.get("model", values.get("model_id"))
    key = (text_key(prompt, row.where, "uid"), text_key(model, row.where, "model"))
    try:
        if "messages" in values:
            content = values["messages"][-1]["content"]
            turns = [content["answer"] if isinstance(content, dict) else content]
        else:
            turns = [turn["content"] for turn in values["choices"][0]["turns"]]
        return key, sum(len(_text(turn)) for turn in turns)
    except (KeyError, IndexError, TypeError):
        raise DataError(
            f"{row.where}: no text of an answer in 'messages' or 'choices', as Arena-Hard's model_answer files have it"
        ) from None


def _text(turn: Any) -> str:
    text = turn["answer"] if isinstance(turn, dict) else turn
    if not isinstance(text, str):
        raise TypeError
    return text


def _keys(row: Row, values: dict[str, Any]) -> tuple[str, str]:
    name = "uid" if "uid" in values else "question_id"
    for needed in (name, "model", "games"):
        if needed not in values:
            raise DataError(
                f"{row.where}: no field {needed!r}; its fields are {', '.join(values) or 'none'}. A judgment of "
                "Arena-Hard has question_id (or uid), model and games"
            )
    return text_key(values[name], row.where, name), text_key(values["model"], row.where, "model")


def _preference(row: Row, values: dict[str, Any]) -> float | None:
    """The model's share of the votes of both games."""
    games = values["games"]
    if not isinstance(games, list) or len(games) != 2:
        raise DataError(f"{row.where}: 'games' must be a list of two, one for each order of the pair")
    won = votes = 0.0
    for number, game in enumerate(games):
        score = game.get("score") if isinstance(game, dict) else None
        if score is None:
            return None
        if not isinstance(score, str) or score not in _VOTES:
            raise DataError(
                f"{row.where}: the score of game {number + 1} is {score!r:.80}; known are {', '.join(_VOTES)}"
            )
        for_a, count = _VOTES[score]
        won += count * (for_a if number == 1 else 1 - for_a)  # the model is A in the second game
        votes += count
    return won / votes
