"""The rows of an audit as token ids: the distinct responses that models are run over, and what is known of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import polars as pl

from dice_py.data import Message, file_places, prompt_key
from dice_py.errors import DataError
from dice_py.evaluation.audit.data import AuditData, Comparisons, comparisons_of_scores
from dice_py.events import Report, no_report
from dice_py.models.tokenization import encode_pairs, encode_prompt, encode_response
from dice_py.rows.bad_rows import BadRowRule, BadRows
from dice_py.storage.schemas import PAIRS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIDES = ("chosen", "rejected")


class AuditInputs(NamedTuple):
    """What models are run over, and what their rewards are measured on."""

    rows: pl.DataFrame
    """The rows that are used, with their token ids: `prompt_ids`, and those of the responses."""
    prompts: list[np.ndarray]
    responses: list[np.ndarray]
    """Token ids of the distinct (prompt, response)."""
    distinct: np.ndarray
    """(responses of `data`,) int64: which of the distinct ones each is."""
    data: AuditData


def encode_rows(
    rows: pl.DataFrame,
    tokenizer: PreTrainedTokenizerBase,
    stops: list[int],
    *,
    positions: float | None = None,
    rule: BadRowRule,
    report: Report = no_report,
) -> AuditInputs:
    """Encodes the rows of an audit (evaluation/audit/reading.py): preference pairs, or scored responses.

    Args:
        positions: the most tokens of a prompt and a response; longer rows are left out, and counted in a note.
        rule: what happens to a row that the chat template refuses.
        report: receives notes on rows that are left out.

    Raises:
        DataError: a row cannot be encoded, or none is left.
    """
    if "score" in rows.columns:
        return _of_scored(rows, tokenizer, stops, positions, rule, report)
    encoded = encode_pairs(rows, tokenizer, stops, positions=positions, rule=rule, report=report)
    if encoded.is_empty():
        raise DataError(
            f"none of the {rows.height} pairs can be used: they are too long for the models, or chosen and rejected "
            "have the same tokens"
        )
    prompts, responses, distinct, prompt = _distinct(encoded, SIDES)
    pairs = np.arange(encoded.height)
    comparisons = Comparisons(2 * pairs, 2 * pairs + 1, np.ones(len(pairs)), _source(encoded))
    names = [f"{side}_model" for side in SIDES]
    model, models = _numbered(*encoded.select(names)) if set(names) <= set(encoded.columns) else (None, ())
    data = AuditData(prompt, _lengths(responses, distinct), comparisons, None, model, models)
    return AuditInputs(encoded, prompts, responses, distinct, data)


def _of_scored(
    rows: pl.DataFrame,
    tokenizer: PreTrainedTokenizerBase,
    stops: list[int],
    positions: float | None,
    rule: BadRowRule,
    report: Report,
) -> AuditInputs:
    encoded = _encoded_responses(rows, tokenizer, stops, positions, rule, report)
    alone = encoded.height - encoded.filter(pl.len().over("prompt_ids") > 1).height
    if alone:
        report("note", text=f"{alone} of {rows.height} responses left out: no other response to their prompt is there")
        encoded = encoded.filter(pl.len().over("prompt_ids") > 1)
    if encoded.is_empty():
        raise DataError(
            f"none of the {rows.height} scored responses can be used: no prompt has two of them (rows of one prompt "
            "have equal prompts)"
        )
    prompts, responses, distinct, prompt = _distinct(encoded, ("response",))
    score = encoded["score"].to_numpy()
    comparisons = comparisons_of_scores(prompt, score)
    source = _source(encoded)
    if source is not None:
        source = source.gather(pl.Series(comparisons.better, dtype=pl.Int64))
    model, models = _numbered(encoded["model"]) if "model" in encoded.columns else (None, ())
    comparisons = Comparisons(comparisons.better, comparisons.worse, comparisons.weight, source)
    data = AuditData(prompt, _lengths(responses, distinct), comparisons, score, model, models)
    return AuditInputs(encoded, prompts, responses, distinct, data)


def _encoded_responses(
    rows: pl.DataFrame,
    tokenizer: PreTrainedTokenizerBase,
    stops: list[int],
    positions: float | None,
    rule: BadRowRule,
    report: Report,
) -> pl.DataFrame:
    """The rows with `prompt_ids` and `response_ids`. Each prompt is encoded once."""
    known: dict[str, list[int]] = {}
    kept: list[int] = []
    ids: dict[str, list[list[int]]] = {"prompt_ids": [], "response_ids": []}
    bad = BadRows(rule, "the scored responses", "responses")
    places, too_long = file_places(rows, "response"), 0
    prompts: list[tuple[list[Message], list[Message]]] = rows.select("prompt", "response").rows()
    for row, (prompt, response) in enumerate(prompts):
        with bad.row():
            key = prompt_key(prompt)
            if key not in known:
                known[key] = encode_prompt(tokenizer, prompt, places[row])
            tokens = encode_response(tokenizer, prompt, response, stops, places[row])
            if positions is not None and len(known[key]) + len(tokens) > positions:
                too_long += 1
                continue
            kept.append(row)
            ids["prompt_ids"].append(known[key])
            ids["response_ids"].append(tokens)
    bad.finish(report)
    if too_long:
        report(
            "note",
            text=f"{too_long} of {rows.height} responses left out: longer than the model's {positions:.0f} positions",
        )
    return rows[kept].with_columns(pl.Series(name, values, dtype=PAIRS["prompt_ids"]) for name, values in ids.items())


def _distinct(
    rows: pl.DataFrame, sides: tuple[str, ...]
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray, np.ndarray]:
    """Distinct prompts and responses, which of them each response of each row is, and the number of its prompt."""
    seen: dict[tuple[int, tuple[int, ...]], int] = {}
    numbers: dict[tuple[int, ...], int] = {}
    prompts: list[np.ndarray] = []
    responses: list[np.ndarray] = []
    distinct: list[int] = []
    prompt: list[int] = []
    for prompt_ids, *answers in rows.select("prompt_ids", *(f"{side}_ids" for side in sides)).iter_rows():
        number = numbers.setdefault(tuple(prompt_ids), len(numbers))
        for answer in answers:
            key = (number, tuple(answer))
            if key not in seen:
                seen[key] = len(seen)
                prompts.append(np.array(prompt_ids, dtype=np.int64))
                responses.append(np.array(answer, dtype=np.int64))
            distinct.append(seen[key])
            prompt.append(number)
    return prompts, responses, np.array(distinct), np.array(prompt)


def _lengths(responses: list[np.ndarray], distinct: np.ndarray) -> np.ndarray:
    lengths: np.ndarray = np.array([len(response) for response in responses])[distinct]
    return lengths


def _source(rows: pl.DataFrame) -> pl.Series | None:
    return rows["source"] if "source" in rows.columns and rows["source"].null_count() < rows.height else None


def _numbered(*columns: pl.Series) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """The number of each response's model (−1: not known), row by row, and the names by number."""
    values: list[Any] = [name for row in zip(*columns, strict=True) for name in row]
    names = sorted({name for name in values if name is not None})
    if not names:
        return None, ()
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers.get(name, -1) for name in values]), tuple(names)
