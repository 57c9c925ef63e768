"""What the pair browser of a page shows: pairs as JSON-ready data of bounded size (page/pairs.html.j2).

A page holds at most `BYTES` of texts and token credits as JSON, whatever the pairs are. Prompts and the two answers of
each pair get room first, then token credit, then the texts of the other candidates. Where room runs out, long items are
cut to the length at which all of them fit, and short ones stay whole. Every cut is in `notes`, and marked at the text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from dice_py.reporting.render import json_data

STYLES = ["style.css", "pairs.css"]
SCRIPTS = ["pair_text.js", "pair_difference.js", "pair_list.js", "pair_view.js", "pairs.js"]
"""What a page with `{% include "pairs.html.j2" %}` gives to `render_page`."""

BYTES = 24_000_000
MOST_CANDIDATES = 64
"""Of a pair. Of more, the best and the worst half as many are kept, and the chosen and the rejected one."""
MOST_TURNS = 200
_FIRST_LINE = 160
"""Bytes of each candidate's text that have room before token credit."""
_NAME = 200
"""Characters of a source, a role or a label's name: longer ones are cut."""
_NOT_FINITE = {"nan": "NaN", "inf": "∞", "-inf": "−∞"}
_BUCKETS = 4
_STEPS = (1 / 8, 1 / 4, 1 / 2, 1.0)

Text = str | list[Any]
"""A text, or [its first part, its complete number of characters]."""


class _Room:
    """Bytes for items of one kind, and how many of these did not fit."""

    def __init__(self, room: float, costs: list[int]) -> None:
        self.limit = fair_limit(costs, room)
        self.left = room - sum(min(cost, self.limit) for cost in costs)
        self.count = 0
        self.total = len(costs)

    def cut(self, text: str) -> Text:
        """The text, or a part of it."""
        cut = cut_text(text, self.limit)
        self.count += not isinstance(cut, str)
        return cut

    def shorten(self, credit: dict[str, Any], cost: int) -> None:
        """Keeps as many of the first tokens as fit."""
        self.count += cost > self.limit
        while cost > self.limit and credit["texts"]:
            kept = min(int(len(credit["texts"]) * self.limit / cost), len(credit["texts"]) - 1)
            for name in ("texts", "credits", "logps", "ref_logps"):
                credit[name] = credit[name][:kept]
            cost = _cost(credit)


@dataclass
class _Notes:
    """Counts of what is not on the page."""

    turns: int = 0
    candidates: int = 0
    names: int = 0
    sentences: list[str] = field(default_factory=list)


def pair_data(
    frames: dict[str, pl.DataFrame],
    most: int = 2000,
    whole: str = "round-NN/inspect/pairs.parquet in the run's folder",
) -> dict[str, Any]:
    """The data of a page's pair browser.

    Args:
        frames: by name of the run, of schema INSPECTED_PAIRS.
        most: pairs on the page. Of more, a sample that is even over runs and rounds, and over a round's rows.
        whole: where the complete texts are, for the sentences on what was cut.

    Returns:
        pairs: each with its key (its pair_id, or "run/pair_id" where there are several runs), the columns of the
            frame, `chars` of the answers, and `correlation`, Spearman's of reward and tokens over its candidates.
        runs: the names.
        length_unit, length_bounds: upper bounds of the buckets of the longer answer, quartiles.
        credit_bounds: four ascending bounds of |credit| in nats, at which the colors change; None: no credit.
        notes: sentences on what is not on the page.
    """
    rows = list(_picked(frames, most))
    total = sum(frame.height for frame in frames.values())
    notes = _Notes()
    if len(rows) < total:
        notes.sentences.append(f"{len(rows):,} of {total:,} pairs are on this page, evenly over runs and rounds.")
    prefixes = [f"{name}/" if len(frames) > 1 else "" for name in frames]
    pairs = [{"key": prefixes[run] + row["pair_id"], "run": run, **_pair(row, notes)} for run, row in rows]
    # Colors are of all credit, also of what is cut.
    bounds = _credit_bounds(pairs)
    _cut_to_size(pairs, notes.sentences)
    _count_left_out(notes)
    if notes.sentences:
        notes.sentences.append(f"The complete texts are in {whole}.")
    unit = "tokens" if all(_longer(pair, "tokens") is not None for pair in pairs) else "chars"
    return {
        "pairs": pairs,
        "runs": list(frames),
        "length_unit": unit,
        "length_bounds": _quartiles([_longer(pair, unit) for pair in pairs]),
        "credit_bounds": bounds,
        "notes": notes.sentences,
    }


def fair_limit(costs: Iterable[int], room: float) -> float:
    """The largest limit with Σ min(cost, limit) ≤ room; infinite if everything fits.

    Args:
        costs: non-negative.
        room: what there is of the same unit.
    """
    left = room
    ascending = sorted(costs)
    for index, cost in enumerate(ascending):
        share = left / (len(ascending) - index)
        if cost > share:
            return max(share, 0.0)
        left -= cost
    return math.inf


def cut_text(text: str, limit: float) -> Text:
    """The text if its JSON takes at most `limit` bytes, else [its longest part that was tried and fits, characters]."""
    cost = _cost(text)
    if cost <= limit or not text:
        return text
    kept = text
    while kept and cost > limit:
        kept = kept[: min(int(len(kept) * limit / cost), len(kept) - 1)]
        cost = _cost(kept)
    return [kept, len(text)]


def _cost(value: Any) -> int:
    """Bytes of a value in the page."""
    return len(json_data(value))


def _picked(frames: dict[str, pl.DataFrame], most: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number of the run and the row, of at most `most` pairs."""
    groups = [
        (run, group)
        for run, frame in enumerate(frames.values())
        for group in frame.partition_by("round", maintain_order=True)
    ]
    limit = fair_limit([group.height for _, group in groups], most)
    spare = most - sum(min(group.height, math.floor(min(limit, most))) for _, group in groups)
    for run, group in groups:
        count = min(group.height, math.floor(min(limit, most)))
        if count < group.height and spare > 0:
            count, spare = count + 1, spare - 1
        # Evenly spaced, since a stratified sample lies stratum by stratum.
        rows = [index * group.height // count for index in range(count)]
        yield from ((run, row) for row in _with_measures(group[rows]).iter_rows(named=True))


def _with_measures(frame: pl.DataFrame) -> pl.DataFrame:
    """The credits as a list for each field, since a dict for each token would take most of the time; and measures.

    They are the sum of the credits, and Spearman's correlation of reward and tokens over the candidates with a finite
    reward: null for fewer than three, or where one of the two does not vary.
    """
    digits = {"credit": 4, "logp": 5, "ref_logp": 5}
    columns = []
    for side in ("chosen", "rejected"):
        tokens = pl.col(f"{side}_credit")
        for name, kept in digits.items():
            values = tokens.list.eval(pl.element().struct.field(name).cast(pl.Float64).round_sig_figs(kept))
            columns.append(values.alias(f"{side}_{name}s"))
        columns.append(tokens.list.eval(pl.element().struct.field("text").fill_null("")).alias(f"{side}_texts"))
        exact = tokens.list.eval(pl.element().struct.field("credit").cast(pl.Float64))
        columns.append(exact.list.sum().alias(f"{side}_sum"))
    finite = pl.element().filter(pl.element().struct.field("reward").is_finite())
    fields = (finite.struct.field(name) for name in ("reward", "response_tokens"))
    correlation = pl.col("candidates").list.eval(
        pl.when(finite.len() > 2).then(pl.corr(*fields, method="spearman").fill_nan(None))
    )
    columns.append(correlation.list.first().alias("correlation"))
    return frame.with_columns(columns).drop("chosen_credit", "rejected_credit")


def _pair(row: dict[str, Any], notes: _Notes) -> dict[str, Any]:
    """A pair with complete texts."""
    answers = {side: _answer(row, side, notes) for side in ("chosen", "rejected")}
    return {
        "round": row["round"],
        "source": _name(row["source"], notes),
        "prompt": _turns(row["prompt"], notes),
        **answers,
        "margin": _figure(row["margin"]),
        "labels": _labels(row["labels"], notes),
        **_candidates(row["candidates"] or [], answers, notes),
        "correlation": None if row["correlation"] is None else _figure(row["correlation"]),
    }


def _answer(row: dict[str, Any], side: str, notes: _Notes) -> dict[str, Any]:
    turns = _turns(row[side], notes)
    return {
        "turns": turns,
        "tokens": row[f"{side}_tokens"],
        "chars": sum(len(text) for _, text, *_ in turns),
        "finish": row[f"{side}_finish_reason"],
        "reward": _figure(row[f"{side}_reward"]),
        "penalized": _figure(row[f"{side}_penalized_reward"]),
        "credit": _credit(row, side),
    }


def _turns(messages: list[dict[str, Any]] | None, notes: _Notes) -> list[list[Any]]:
    """[role, content] of each turn, and a third item where it says more than its content."""
    kept = messages or []
    if len(kept) > MOST_TURNS:
        notes.turns += len(kept) - MOST_TURNS
        kept = kept[-MOST_TURNS:]
    return [
        [_name(turn["role"], notes), turn["content"] or "", *([turn["extra"]] if turn.get("extra") else [])]
        for turn in kept
    ]


def _name(text: str | None, notes: _Notes) -> str:
    if text is not None and len(text) > _NAME:
        notes.names += 1
        return text[:_NAME] + "…"
    return text or ""


def _labels(text: str | None, notes: _Notes) -> list[list[Any]]:
    """[name, text] of each label; a text that is no JSON object is shown as it is."""
    if text is None:
        return []
    try:
        labels = json.loads(text)
    except (ValueError, RecursionError):
        labels = None
    if not isinstance(labels, dict):
        return [["labels", text]]
    return [
        [_name(name, notes), value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)]
        for name, value in labels.items()
    ]


def _credit(row: dict[str, Any], side: str) -> dict[str, Any] | None:
    """Columns of the tokens' credits, and their sum and number, which stay true of a part of them."""
    texts = row[f"{side}_texts"]
    if texts is None:
        return None
    return {
        "texts": texts,
        **{name: _finite(row[f"{side}_{name}"]) for name in ("credits", "logps", "ref_logps")},
        "sum": _figure(row[f"{side}_sum"]),
        "count": len(texts),
    }


def _finite(values: list[float | None]) -> list[float | str | None]:
    """NaN and infinities, which JSON has not, as texts."""
    return [value if value is None or math.isfinite(value) else _NOT_FINITE[str(value)] for value in values]


def _candidates(rows: list[dict[str, Any]], answers: dict[str, Any], notes: _Notes) -> dict[str, Any]:
    """The candidates with their ranks. A text that one of the pair's answers has too is None."""
    ranked = list(enumerate(rows, 1))
    if len(ranked) > MOST_CANDIDATES:
        half = MOST_CANDIDATES // 2
        kept = [item for item in ranked if item[0] <= half or item[0] > len(ranked) - half or item[1]["role"]]
        notes.candidates += len(ranked) - len(kept)
        ranked = kept
    return {
        "candidates": [
            {
                "rank": rank,
                "sample": row["sample_id"],
                "role": row["role"],
                "text": None if _is_answer(row, answers) else row["response"] or "",
                "reward": _figure(row["reward"]),
                "penalized": _figure(row["penalized_reward"]),
                "tokens": row["response_tokens"],
                "finish": row["finish_reason"],
            }
            for rank, row in ranked
        ],
        "candidate_count": len(rows),
    }


def _is_answer(row: dict[str, Any], answers: dict[str, Any]) -> bool:
    answer = answers.get(row["role"])
    return answer is not None and len(answer["turns"]) == 1 and answer["turns"][0][1] == row["response"]


def _figure(value: float | None, digits: int = 6) -> float | str | None:
    """A number to some significant digits; NaN and infinities, which JSON has not, as texts."""
    if value is None:
        return None
    return float(f"{value:.{digits}g}") if math.isfinite(value) else _NOT_FINITE[str(value)]


def _cut_to_size(pairs: list[dict[str, Any]], notes: list[str]) -> None:
    """Cuts texts and credits, in place, so that they take at most `BYTES`, and adds to `notes` what was cut."""
    turns = [turn for pair in pairs for turn in _all_turns(pair)]
    labels = [label for pair in pairs for label in pair["labels"]]
    answers = _Room(BYTES, [_cost(text) for parts in (*turns, *labels) for text in parts[1:]])
    for parts in (*turns, *labels):
        parts[1:] = [answers.cut(text) for text in parts[1:]]

    credits = [pair[side]["credit"] for pair in pairs for side in ("chosen", "rejected") if pair[side]["credit"]]
    costs = [_cost(credit) for credit in credits]
    others = [each for pair in pairs for each in pair["candidates"] if each["text"] is not None]
    candidate_costs = [_cost(each["text"]) for each in others]
    reserved = min(answers.left, sum(min(cost, _FIRST_LINE) for cost in candidate_costs))
    tokens = _Room(answers.left - reserved, costs)
    for credit, cost in zip(credits, costs, strict=True):
        tokens.shorten(credit, cost)

    candidates = _Room(tokens.left + reserved, candidate_costs)
    for each in others:
        each["text"] = candidates.cut(each["text"])
    for room, what in (
        (answers, "texts of prompts, answers and labels"),
        (tokens, "answers' token credits"),
        (candidates, "texts of candidates"),
    ):
        if room.count:
            notes.append(f"Cut so that the page stays small: {room.count:,} of {room.total:,} {what}.")


def _all_turns(pair: dict[str, Any]) -> list[list[Any]]:
    return [*pair["prompt"], *pair["chosen"]["turns"], *pair["rejected"]["turns"]]


def _count_left_out(notes: _Notes) -> None:
    for count, what in (
        (notes.turns, f"turns are left out: of a longer conversation the last {MOST_TURNS} are here"),
        (notes.candidates, f"candidates are left out: of more than {MOST_CANDIDATES} the best and the worst are here"),
        (notes.names, f"sources, roles and names of labels are cut to {_NAME} characters"),
    ):
        if count:
            notes.sentences.append(f"{count:,} {what}.")


def _longer(pair: dict[str, Any], unit: str) -> int | None:
    lengths = [pair[side][unit] for side in ("chosen", "rejected")]
    return None if None in lengths else max(lengths)


def _quartiles(lengths: list[int | None]) -> list[int]:
    """The upper bounds of the buckets but the last, ascending and distinct."""
    known = pl.Series([length for length in lengths if length is not None], dtype=pl.Int64)
    if known.is_empty():
        return []
    bounds = [known.quantile(step / _BUCKETS, "lower") for step in range(1, _BUCKETS)]
    return sorted({int(bound) for bound in bounds if bound is not None and bound < known.max()})  # type: ignore[operator]


def _credit_bounds(pairs: list[dict[str, Any]]) -> list[float] | None:
    """Bounds at 1/8, 1/4, 1/2 and 1 of a round number near the 95th percentile of |credit|."""
    sizes = [
        abs(value)
        for pair in pairs
        for side in ("chosen", "rejected")
        if pair[side]["credit"]
        for value in pair[side]["credit"]["credits"]
        if isinstance(value, float) and value
    ]
    if not sizes:
        return list(_STEPS) if any(pair["chosen"]["credit"] for pair in pairs) else None
    large = pl.Series(sizes).quantile(0.95, "nearest") or 1.0
    power = 10.0 ** math.floor(math.log10(large))
    top = min((step * power for step in (1, 2, 4, 8, 10)), key=lambda value: abs(math.log(value / large)))
    return [float(f"{top * step:.6g}") for step in _STEPS]
