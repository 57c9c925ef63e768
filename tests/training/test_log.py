"""The trainer's log: as it comes, up to the checkpoint after a resume, and never the end of a training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dice_py.events import no_report
from dice_py.training.log import LOG_FILE, TrainingLog, read_training_log

ENTRIES = [{"loss": 0.69, "rewards/margins": 0.0, "step": 2}, {"loss": 0.5, "rewards/margins": 0.25, "step": 4}]


class Notes:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, event: str, **fields: Any) -> None:
        assert event == "note"
        self.texts.append(fields["text"])


def test_entries_are_there_as_they_come_and_the_summary_is_none(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, "key", no_report)
    log.begin([])
    assert read_training_log(tmp_path) == []
    for number, entry in enumerate(ENTRIES, start=1):
        log.add(entry)
        assert read_training_log(tmp_path) == ENTRIES[:number]
    log.add({"train_runtime": 3.5, "train_loss": 0.6, "step": 4})
    assert read_training_log(tmp_path) == ENTRIES


def test_a_resumed_training_begins_with_the_entries_of_its_checkpoint(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, "key", no_report)
    log.begin([])
    for entry in [*ENTRIES, {"loss": 0.4, "step": 5}]:
        log.add(entry)
    resumed = TrainingLog(tmp_path, "key", no_report)
    resumed.begin(ENTRIES[:1])
    assert read_training_log(tmp_path) == ENTRIES[:1]
    resumed.add(ENTRIES[1])
    assert read_training_log(tmp_path) == ENTRIES


def test_values_that_are_not_finite_are_null_in_the_file_and_left_out_when_read(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, "key", no_report)
    log.begin([{"loss": math.nan, "grad_norm": math.inf, "learning_rate": 1e-6, "step": 1}])
    _, line = (tmp_path / LOG_FILE).read_text().splitlines()
    want = {"loss": None, "grad_norm": None, "learning_rate": 1e-6, "step": 1}
    assert json.loads(line, parse_constant=pytest.fail) == want
    assert read_training_log(tmp_path) == [{"learning_rate": 1e-6, "step": 1}]


def test_damaged_lines_are_left_out(tmp_path: Path) -> None:
    good = json.dumps(ENTRIES[0]).encode()
    lines = [
        *(b"\xff\x00", b"[1]", b'{"loss": 1.0}', b'{"step": "2"}', b'{"step": true}', b"9" * 5000, b"[" * 5000),
        *(good, b'{"step": 3, "loss": "low", "grad_norm": [1], "rewards/margins": 1' + b"0" * 400 + b"}", good[:-9]),
    ]
    (tmp_path / LOG_FILE).write_bytes(b"\n".join(lines))
    assert read_training_log(tmp_path) == [ENTRIES[0], {"step": 3}]


def test_without_the_file_the_entries_are_those_of_the_model(tmp_path: Path) -> None:
    assert read_training_log(tmp_path) == []
    (tmp_path / "model").mkdir()
    stored = tmp_path / "model" / "train_log.json"
    stored.write_text(json.dumps([*ENTRIES, {"train_runtime": 3.0, "step": 4}]))
    assert read_training_log(tmp_path) == ENTRIES
    stored.write_text("{}")
    assert read_training_log(tmp_path) == []


@pytest.mark.parametrize("content", [b"my own notes\n", b'{"step": 1, "text": "of a user"}\n', b""])
def test_a_file_of_the_users_is_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOG_FILE).write_bytes(content)
    notes = Notes()
    log = TrainingLog(tmp_path, "key", notes)
    log.begin([])
    log.add(ENTRIES[0])
    assert (tmp_path / LOG_FILE).read_bytes() == content
    assert len(notes.texts) == 1
    assert "is not of this program" in notes.texts[0]


def test_a_log_of_another_training_has_no_entries(tmp_path: Path) -> None:
    """Until a training begins, that of before lies there."""
    TrainingLog(tmp_path, "before", no_report).begin(ENTRIES)
    assert read_training_log(tmp_path, "before") == read_training_log(tmp_path) == ENTRIES
    assert read_training_log(tmp_path, "now") == []
    TrainingLog(tmp_path, "now", no_report).begin(ENTRIES[:1])
    assert read_training_log(tmp_path, "now") == ENTRIES[:1]


def test_a_log_that_cannot_be_written_is_one_note(tmp_path: Path) -> None:
    notes = Notes()
    log = TrainingLog(tmp_path, "key", notes)
    log.begin([])
    (tmp_path / LOG_FILE).unlink()
    (tmp_path / LOG_FILE).mkdir()
    for entry in ENTRIES:
        log.add(entry)
    assert len(notes.texts) == 1
    assert "is not written" in notes.texts[0]
    log.begin([])  # a folder in its place
    assert len(notes.texts) == 2
