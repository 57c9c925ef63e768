"""The files that an audit reads: the four forms, the columns' names, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from command_line import jsonl
from hostile_texts import HOSTILE

from dice_py.errors import DataError
from dice_py.evaluation.audit.reading import AuditColumns, form_of, read_audit
from dice_py.rows.bad_rows import BadRowRule

USUAL = AuditColumns()
SKIP = BadRowRule("skip", 1.0)


def read(file: Path, columns: AuditColumns = USUAL, rule: BadRowRule | None = None) -> tuple[pl.DataFrame, list[str]]:
    notes: list[str] = []

    def report(event: str, **fields: Any) -> None:
        assert event == "note"
        notes.append(fields["text"])

    return read_audit(file, columns, rule=rule or BadRowRule(), report=report), notes


def texts(frame: pl.DataFrame, column: str) -> list[str]:
    """The text of the only or last turn of each row."""
    return [turns[-1]["content"] for turns in frame[column]]


def test_pairs_as_rewardbench_has_them(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"p{n}", "chosen": f"good {n}", "rejected": f"bad {n}", "subset": "math" if n else None,
         "chosen_model": "a", "rejected_model": f"b{n}", "id": n}
        for n in range(3)
    ]  # fmt: skip
    frame, _ = read(jsonl(tmp_path / "f.jsonl", *rows))
    assert set(frame.columns) == {"prompt", "chosen", "rejected", "where", "source", "chosen_model", "rejected_model"}
    assert texts(frame, "chosen") == ["good 0", "good 1", "good 2"]
    assert frame["source"].to_list() == [None, "math", "math"]
    assert frame["rejected_model"].to_list() == ["b0", "b1", "b2"]
    assert frame["where"].to_list() == ["f.jsonl, line 1", "f.jsonl, line 2", "f.jsonl, line 3"]
    plain, _ = read(
        jsonl(tmp_path / "g.jsonl", *({k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows))
    )
    assert set(plain.columns) == {"prompt", "chosen", "rejected", "where"}


def test_columns_by_other_names(tmp_path: Path) -> None:
    rows = [{"q": "p", "w": "good", "l": "bad", "origin": "web", "mc": "a", "mr": "b"}]
    columns = AuditColumns("q", "w", "l", source="origin", chosen_model="mc", rejected_model="mr")
    frame, _ = read(jsonl(tmp_path / "f.jsonl", *rows), columns)
    assert frame.select("source", "chosen_model", "rejected_model").row(0) == ("web", "a", "b")
    for wrong in (AuditColumns("q", "w", "l", source="org"), AuditColumns("q", "w", "l", chosen_model="nobody")):
        with pytest.raises(DataError, match=r"line 1: no column .*; its columns are q, w, l"):
            read(tmp_path / "f.jsonl", wrong)
    rows.append({**rows[0], "l": "worse", "origin": 5})  # type: ignore[dict-item]
    with pytest.raises(DataError, match=r"line 2: 'origin' must be text, got 5"):
        read(jsonl(tmp_path / "g.jsonl", *rows), AuditColumns("q", "w", "l", source="origin"))


def test_votes_as_ppe_has_them(tmp_path: Path) -> None:
    winners = ["model_a", "model_b", "tie", "model_b", "tie (bothbad)"]
    rows = [
        {"prompt": f"p{n}", "response_1": f"one {n}", "response_2": f"two {n}", "winner": winner, "model_a": "a",
         "model_b": "b", "question_id": "x"}
        for n, winner in enumerate(winners)
    ]  # fmt: skip
    frame, notes = read(jsonl(tmp_path / "f.jsonl", *rows))
    assert texts(frame, "chosen") == ["one 0", "two 1", "two 3"]
    assert texts(frame, "rejected") == ["two 0", "one 1", "one 3"]
    assert frame["chosen_model"].to_list() == ["a", "b", "b"]
    assert frame["rejected_model"].to_list() == ["b", "a", "a"]
    assert notes == [f"{tmp_path / 'f.jsonl'}: 2 of 5 votes left out: they are ties, which prefer neither response"]
    with pytest.raises(DataError, match=r"line 1: 'winner' is \['a'\], but must be model_a, model_b or tie"):
        read(jsonl(tmp_path / "g.jsonl", {**rows[0], "winner": ["a"]}))
    with pytest.raises(DataError, match="holds no votes for one of two responses"):
        read(jsonl(tmp_path / "h.jsonl", rows[2]))


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [("score", [0, 0.25, 3.5], [0.0, 0.25, 3.5]), ("correct", [True, False, 1], [1.0, 0.0, 1.0])],
)
def test_scored_responses(tmp_path: Path, name: str, values: list[Any], expected: list[float]) -> None:
    rows = [{"prompt": "p", "response": f"r{n}", name: value, "model": f"m{n}"} for n, value in enumerate(values)]
    frame, _ = read(jsonl(tmp_path / "f.jsonl", *rows))
    assert frame["score"].to_list() == expected
    assert texts(frame, "response") == ["r0", "r1", "r2"]
    assert frame["model"].to_list() == ["m0", "m1", "m2"]
    assert "source" not in frame.columns
    pl.DataFrame(
        [{**row, "response": [{"role": "assistant", "content": row["response"]}]} for row in rows]
    ).write_parquet(tmp_path / "f.parquet")
    assert read(tmp_path / "f.parquet")[0].drop("where").equals(frame.drop("where"))
    other = [{"prompt": "p", "text": f"r{n}", "points": float(value)} for n, value in enumerate(values)]
    named = AuditColumns(response="text", score="points")
    assert read(jsonl(tmp_path / "g.jsonl", *other), named)[0]["score"].to_list() == expected


def test_sets_with_a_prompt_a_row(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"p{n}", "response_1": "a", "response_2": "b", "response_3": f"c{n}", "scores": [True, False, n],
         "model_name": "m", "sampled_conflict_pairs": [[0, 1]]}
        for n in range(2)
    ]  # fmt: skip
    frame, _ = read(jsonl(tmp_path / "f.jsonl", *rows))
    assert texts(frame, "response") == ["a", "b", "c0", "a", "b", "c1"]
    assert frame["score"].to_list() == [1.0, 0.0, 0.0, 1.0, 0.0, 1.0]
    assert frame["model"].to_list() == ["m"] * 6
    for scores, said in (([1, 0, 1, 1], "no column 'response_4'"), ("1,0", "'scores' must be a list")):
        broken = jsonl(tmp_path / "g.jsonl", rows[0], {**rows[1], "scores": scores})
        with pytest.raises(DataError, match=f"line 2: {said}"):
            read(broken)
        kept, notes = read(broken, rule=SKIP)
        assert kept.height == 3  # nothing of the broken row
        assert "1 of 2 rows of scored responses skipped" in notes[0]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", '"0.5"', "null", "[1]", "1e999", "9" * 400])
def test_scores_that_are_no_finite_numbers(tmp_path: Path, value: str) -> None:
    file = tmp_path / "f.jsonl"
    file.write_text(
        f'{{"prompt": "p", "response": "r", "score": 1}}\n{{"prompt": "p", "response": "s", "score": {value}}}\n'
    )
    with pytest.raises(DataError, match=r"line 2: 'score' must be a finite number"):
        read(file)
    assert read(file, rule=SKIP)[0].height == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "f.jsonl"),
        ("\n\n", "f.jsonl"),
        (
            '{"prompt": "p"}\n',
            r"line 1: no audit can be made of the columns prompt\. It needs chosen and rejected; or ",
        ),
        ('{"prompt": "p", "response": "r"}\n', "no audit can be made of the columns prompt, response"),
        ("not json\n", "not valid JSON"),
        ('{"prompt": "p", "prompt": "q", "chosen": "a", "rejected": "b"}\n', "the key 'prompt' twice"),
        ('{"prompt": "p", "response": "", "score": 1}\n', "line 1: 'response' is an empty text"),
        ('{"response": "r", "score": 1}\n', "line 1: no column 'prompt'"),
        ('{"prompt": "p", "response": [{"role": "user", "content": "r"}], "score": 1}\n', "must be one assistant turn"),
    ],
)
def test_files_that_cannot_be_audited(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "f.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=said):
        read(file)


def test_the_form_is_that_of_the_first_row_that_can_be_read(tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    file.write_text('broken\n{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    assert form_of(file, USUAL) == "pairs"
    with pytest.raises(DataError, match="line 1"):
        read(file)
    assert read(file, rule=SKIP)[0].height == 1


def test_marks_line_ends_and_hostile_texts_are_kept_as_they_are(tmp_path: Path) -> None:
    names = [text for text in HOSTILE.values() if "\udcff" not in text]
    rows = [
        {"prompt": f"p{n}", "chosen": f"a {name}", "rejected": "b", "subset": name, "chosen_model": name,
         "rejected_model": "m"}
        for n, name in enumerate(names)
    ]  # fmt: skip
    file = tmp_path / "f.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + "".join(f"{json.dumps(row)}\r\n" for row in rows).encode())
    frame, _ = read(file)
    assert frame["source"].to_list() == frame["chosen_model"].to_list() == names


def test_whether_a_response_is_right_in_csv(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text("prompt,response,correct\na,b,True\na,c,false\na,d,1\na,e,0.5\n")
    assert read(tmp_path / "f.csv")[0]["score"].to_list() == [1.0, 0.0, 1.0, 0.5]
    (tmp_path / "f.csv").write_text("prompt,response,correct\na,b,yes\n")
    with pytest.raises(DataError, match="line 2: 'correct' must be a finite number, got 'yes'"):
        read(tmp_path / "f.csv")
