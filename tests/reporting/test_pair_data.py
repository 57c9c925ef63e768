"""The data of the pair browser: which pairs, how large, and what is said of the rest."""

from __future__ import annotations

import itertools
import json
import math
import random
from typing import Any

import polars as pl
import pytest
from inspected_pairs import hostile_pairs, inspected, many_pairs, plain_pairs, turns

from dice_py.reporting.pair_data import MOST_CANDIDATES, MOST_TURNS, cut_text, fair_limit, pair_data
from dice_py.reporting.render import json_data


def size(value: Any) -> int:
    return len(json_data(value))


def texts_and_credit(data: dict[str, Any]) -> int:
    """Bytes of what the bound counts, taken from the data's own form."""
    total = 0
    for pair in data["pairs"]:
        for turn in [*pair["prompt"], *pair["chosen"]["turns"], *pair["rejected"]["turns"]]:
            total += sum(size(text if isinstance(text, str) else text[0]) for text in turn[1:])
        total += sum(size(text if isinstance(text, str) else text[0]) for _, text in pair["labels"])
        total += sum(size(pair[side]["credit"]) for side in ("chosen", "rejected") if pair[side]["credit"])
        texts = [each["text"] for each in pair["candidates"] if each["text"] is not None]
        total += sum(size(text if isinstance(text, str) else text[0]) for text in texts)
    return total


def test_a_fair_limit_is_the_largest_that_fits() -> None:
    draw = random.Random(0)
    for _ in range(200):
        costs = [draw.randrange(30) for _ in range(draw.randrange(8))]
        room = draw.randrange(100)
        limit = fair_limit(costs, room)
        if sum(costs) <= room:
            assert limit == math.inf
        else:
            assert sum(min(cost, limit) for cost in costs) == pytest.approx(room)


@pytest.mark.parametrize("text", ["plain words", "<" * 50, "日本語" * 20, "\0" * 30, "a" + "\U0001f600" * 20, ""])
@pytest.mark.parametrize("limit", [0, 2, 7, 40, 1000])
def test_a_cut_text_fits(text: str, limit: int) -> None:
    cut = cut_text(text, limit)
    if isinstance(cut, str):
        assert cut == text
        assert size(text) <= limit or text == ""
    else:
        kept, characters = cut
        assert text.startswith(kept)
        assert kept != text
        assert characters == len(text)
        assert size(kept) <= limit or kept == ""


def test_small_data_is_whole() -> None:
    frame = plain_pairs(12)
    data = pair_data({"run": frame})
    assert data["notes"] == []
    assert data["runs"] == ["run"]
    by_key = {pair["key"]: pair for pair in data["pairs"]}
    assert len(by_key) == 12
    for row in frame.iter_rows(named=True):
        pair = by_key[row["pair_id"]]
        assert [turn[1] for turn in pair["prompt"]] == [turn["content"] for turn in row["prompt"]]
        for side in ("chosen", "rejected"):
            answer, tokens = pair[side], row[f"{side}_credit"]
            assert answer["turns"] == [["assistant", row[side][0]["content"]]]
            assert answer["chars"] == len(row[side][0]["content"])
            assert answer["reward"] == pytest.approx(row[f"{side}_reward"], rel=1e-5)
            credit = answer["credit"]
            assert credit["texts"] == [token["text"] for token in tokens]
            for name in ("credit", "logp", "ref_logp"):
                assert credit[name + "s"] == pytest.approx([token[name] for token in tokens], rel=1e-3)
            assert credit["sum"] == pytest.approx(row[f"{side}_reward"], rel=1e-4)
            assert credit["count"] == len(tokens)
        candidates = row["candidates"]
        assert [each["rank"] for each in pair["candidates"]] == list(range(1, len(candidates) + 1))
        for each, candidate in zip(pair["candidates"], candidates, strict=True):
            # The text of an answer is not there twice.
            assert each["text"] == (None if candidate["role"] else candidate["response"])


def test_the_sample_is_even_over_runs_and_rounds() -> None:
    small = plain_pairs(6)  # three of each round
    large = plain_pairs(80)
    data = pair_data({"small": small, "large": large}, most=31)
    counts: dict[tuple[int, int], int] = {}
    for pair in data["pairs"]:
        counts[pair["run"], pair["round"]] = counts.get((pair["run"], pair["round"]), 0) + 1
    assert sum(counts.values()) == 31
    assert counts[0, 1] == counts[0, 2] == 3
    assert {counts[1, 1], counts[1, 2]} == {12, 13}
    assert data["notes"][0] == "31 of 86 pairs are on this page, evenly over runs and rounds."
    # Even over the rows of a round too: they lie stratum by stratum.
    rows = [int(pair["key"].rpartition("-")[2]) for pair in data["pairs"] if pair["run"] == 1 and pair["round"] == 1]
    steps = [after - before for before, after in itertools.pairwise(rows)]
    assert set(steps) <= {4, 6, 8}
    assert data == pair_data({"small": small, "large": large}, most=31)
    assert len({pair["key"] for pair in data["pairs"]}) == 31
    assert all(pair["key"].startswith(("small/", "large/")) for pair in data["pairs"])


@pytest.mark.parametrize("most", [0, 1, 2, 3])
def test_hardly_any_pair(most: int) -> None:
    assert len(pair_data({"a": plain_pairs(4), "b": plain_pairs(4)}, most=most)["pairs"]) == most


@pytest.mark.parametrize("room", [158_000, 60_000, 20_000, 3_000, 0])
def test_the_page_is_bounded_and_says_what_is_cut(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = plain_pairs(24, words=60)
    whole = pair_data({"run": frame})
    assert texts_and_credit(whole) > 150_000
    monkeypatch.setattr("dice_py.reporting.pair_data.BYTES", room)
    data = pair_data({"run": frame}, whole="pairs.parquet")
    # An empty text takes two bytes, and empty credit its names and figures.
    empty = sum(2 * 4 + 2 * 120 + 2 * len(pair["candidates"]) for pair in data["pairs"])
    assert texts_and_credit(data) <= room + empty
    notes = " ".join(data["notes"])
    assert notes.endswith("The complete texts are in pairs.parquet.")
    cut = [each for pair in data["pairs"] for each in pair["candidates"] if isinstance(each["text"], list)]
    assert f"{len(cut)} of 36 texts of candidates." in notes
    answers = [turn for pair in data["pairs"] for turn in pair["chosen"]["turns"] + pair["rejected"]["turns"]]
    cut_answers = [turn for turn in answers if isinstance(turn[1], list)]
    # Candidates are cut first, then credit, and prompts and answers last.
    assert bool(cut_answers) == ("texts of prompts, answers and labels" in notes) == (room <= 20_000)
    shortened = [
        pair[side]["credit"] for pair in data["pairs"] for side in ("chosen", "rejected")
        if len(pair[side]["credit"]["texts"]) < pair[side]["credit"]["count"]
    ]  # fmt: skip
    assert (f"{len(shortened)} of 48 answers' token credits" in notes) == bool(shortened)
    assert bool(shortened) == (room <= 60_000)
    for credit in shortened:
        assert len(credit["texts"]) == len(credit["credits"]) == len(credit["logps"]) == len(credit["ref_logps"])
    # What was measured on the whole stays.
    assert data["credit_bounds"] == whole["credit_bounds"]
    sums = [[pair[side]["credit"]["sum"] for side in ("chosen", "rejected")] for pair in whole["pairs"]]
    assert [[pair[side]["credit"]["sum"] for side in ("chosen", "rejected")] for pair in data["pairs"]] == sums


def test_one_long_answer_does_not_cut_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = plain_pairs(12).to_dicts()
    rows[0]["chosen"] = turns("assistant", "word " * 200_000)
    monkeypatch.setattr("dice_py.reporting.pair_data.BYTES", 500_000)
    data = pair_data({"run": inspected(rows)})
    texts = {pair["key"]: pair["chosen"]["turns"][0][1] for pair in data["pairs"]}
    cut = {key: text[1] for key, text in texts.items() if not isinstance(text, str)}
    assert cut == {rows[0]["pair_id"]: 5 * 200_000}
    assert data["notes"][0] == "Cut so that the page stays small: 1 of 66 texts of prompts, answers and labels."


def test_many_candidates_and_turns_are_bounded() -> None:
    row = plain_pairs(1, candidates=3).to_dicts()[0]
    middle = row["candidates"][1]
    row["candidates"] = [middle | {"sample_id": i, "role": {40: "chosen", 250: "rejected"}.get(i)} for i in range(500)]
    row["prompt"] = [{"role": "user", "content": str(i)} for i in range(1000)]
    data = pair_data({"run": inspected([row])})
    (pair,) = data["pairs"]
    ranks = [each["rank"] for each in pair["candidates"]]
    assert len(ranks) == MOST_CANDIDATES + 2
    assert ranks[:32] == list(range(1, 33))
    assert ranks[-32:] == list(range(469, 501))
    assert ranks[32:34] == [41, 251]
    assert pair["candidate_count"] == 500
    assert [turn[1] for turn in pair["prompt"]] == [str(i) for i in range(1000 - MOST_TURNS, 1000)]
    notes = " ".join(data["notes"])
    assert "434 candidates are left out" in notes
    assert "800 turns are left out" in notes


def test_hostile_pairs_are_json() -> None:
    frame = hostile_pairs()
    text = str(json_data(pair_data({"run": frame})))
    assert "<" not in text
    assert text.isascii()
    data = json.loads(text)
    assert {pair["key"] for pair in data["pairs"]} == set(frame["pair_id"])
    assert {pair["chosen"]["reward"] for pair in data["pairs"]} == {"NaN"}
    assert {pair["rejected"]["reward"] for pair in data["pairs"]} == {"−∞"}


def test_what_is_not_known_is_none() -> None:
    row = dict.fromkeys(plain_pairs(1).columns) | {
        "pair_id": "file-1", "source": "file", "prompt": turns("user", "?"),
        "chosen": turns("assistant", "yes"), "rejected": [],
    }  # fmt: skip
    data = pair_data({"file": inspected([row])})
    (pair,) = data["pairs"]
    assert pair["candidates"] == pair["labels"] == pair["rejected"]["turns"] == []
    figures = [pair["margin"], pair["correlation"], pair["round"]]
    figures += [pair["chosen"][name] for name in ("reward", "penalized", "tokens", "finish", "credit")]
    assert figures == [None] * 8
    assert data["length_unit"] == "chars"  # where tokens are not counted
    assert data["length_bounds"] == []
    assert data["credit_bounds"] is None


def test_no_pair() -> None:
    data = pair_data({"run": plain_pairs(0)})
    assert (data["pairs"], data["notes"], data["length_bounds"], data["credit_bounds"]) == ([], [], [], None)


def test_buckets_of_length_are_quartiles() -> None:
    frame = many_pairs(200)
    data = pair_data({"run": frame})
    longer = frame.select(pl.max_horizontal("chosen_tokens", "rejected_tokens")).to_series()
    bounds = data["length_bounds"]
    assert len(bounds) == 3
    limits = itertools.pairwise([0, *bounds, 10**9])
    counts = [((longer > low) & (longer <= high)).sum() for low, high in limits]
    assert max(counts) <= 1.5 * min(counts)


@pytest.mark.parametrize(("scale", "top"), [(1.0, 1.0), (0.013, 0.01), (37.0, 40.0), (0.0, 1.0)])
def test_bounds_of_credit_are_round(scale: float, top: float) -> None:
    row = plain_pairs(1).to_dicts()[0]
    for side in ("chosen", "rejected"):
        row[f"{side}_credit"] = [
            {"text": "x", "logp": -1.0, "ref_logp": -1.0, "credit": credit}
            for credit in (scale, -scale, scale, math.nan, None)
        ]
    data = pair_data({"run": inspected([row])})
    assert data["credit_bounds"] == pytest.approx([top / 8, top / 4, top / 2, top])
    assert data["pairs"][0]["chosen"]["credit"]["credits"][3:] == ["NaN", None]
    assert data["pairs"][0]["chosen"]["credit"]["sum"] == "NaN"
