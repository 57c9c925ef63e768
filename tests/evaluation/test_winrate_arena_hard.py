"""Arena-Hard's judgments and answers, and how kinds of files are told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from verdicts import BASELINE, judgment, write_annotation_rows, write_jsonl, write_rows

from dice_py.errors import DataError
from dice_py.evaluation.winrate.reading import file_form, read_comparisons


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("B>A", "A>B", 1.0),  # the model is B in the first game, and A in the second
        ("A>B", "B>A", 0.0),
        ("A=B", "A=B", 0.5),
        ("B>A", "B>A", 0.5),  # whoever comes second wins
        ("B>>A", "B>A", 3 / 4),  # a strong vote counts three times
        ("A>>B", "A>B", 1 / 4),
        ("B>>A", "A=B", 3.5 / 4),
        ("A<<B", "B<A", 1.0),
        (None, "A>B", None),
        ("A>B", None, None),
    ],
)
def test_verdicts_of_two_games(tmp_path: Path, first: Any, second: Any, expected: float | None) -> None:
    other = judgment("A=B", "A=B", question_id="other")
    path = write_jsonl(tmp_path / "ours.jsonl", [judgment(first, second), other])
    found = read_comparisons([path], BASELINE).table
    assert found["preference"].to_list() == pytest.approx([expected, 0.5])
    assert found["length"].null_count() == 2


def test_lengths_of_both_versions_of_answers(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "judgments.jsonl", [judgment("B>A", "A>B"), judgment("A=B", "A=B", question_id="r")])
    old = [
        {"question_id": q, "model_id": m, "choices": [{"turns": [{"content": "x" * n}, {"content": "yz"}]}]}
        for q, m, n in (("q", "ours", 3), ("r", "ours", 4))
    ]
    new = [
        {
            "uid": q,
            "model": BASELINE,
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": c}],
        }
        for q, c in (("q", {"answer": "seven.."}), ("r", "nine....."))
    ]
    outputs = [write_jsonl(tmp_path / "old.jsonl", old), write_jsonl(tmp_path / "new.jsonl", new)]
    found = read_comparisons([path], BASELINE, outputs=outputs)
    assert found.table["length"].to_list() == [5, 6]
    assert found.table["baseline_length"].to_list() == [7, 9]
    assert found.baseline_length == 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (judgment("A>B", "C>A"), "the score of game 2 is 'C>A'"),
        (judgment("A>B", 3), "the score of game 2 is 3"),
        ({**judgment("A>B", "A>B"), "games": [{}]}, "'games' must be a list of two"),
        ({**judgment("A>B", "A>B"), "baseline": "third"}, "the baseline is 'third'"),
        ({"model": "ours", "games": []}, "no field 'question_id'"),
    ],
)
def test_judgments_that_cannot_be_used(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as refused:
        read_comparisons([write_jsonl(tmp_path / "ours.jsonl", [values])], BASELINE)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "values",
    [
        {"uid": "q", "model": "m", "messages": []},
        {"uid": "q", "model": "m", "messages": [{"content": 5}]},
        {"question_id": "q", "model_id": "m", "choices": [{}]},
        {"neither": 1},
    ],
)
def test_outputs_that_cannot_be_used(tmp_path: Path, values: dict[str, Any]) -> None:
    path = write_jsonl(tmp_path / "ours.jsonl", [judgment("A>B", "A>B")])
    with pytest.raises(DataError, match=r"outputs\.jsonl, line 1"):
        read_comparisons([path], BASELINE, outputs=[write_jsonl(tmp_path / "outputs.jsonl", [values])])


def test_kinds_of_files(tmp_path: Path) -> None:
    files = {
        "responses": write_rows(tmp_path / "rows.jsonl", {}),
        "annotations": write_annotation_rows(tmp_path / "annotations.json", {}),
        "judgments": write_jsonl(tmp_path / "judgments.jsonl", [judgment("A>B", "A>B")]),
    }
    assert {form: file_form(path) for form, path in files.items()} == {form: form for form in files}
    with pytest.raises(DataError, match="give files of one kind"):
        read_comparisons([files["responses"], files["annotations"]], BASELINE)
