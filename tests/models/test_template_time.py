"""A chat template that prints the time prints that of the first call, in a run as in a stage alone."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from notes import Notes
from tiny_models import make_tokenizer

from dice_py.config.shared import ModelConfig
from dice_py.models import template_time
from dice_py.models.template_time import FILE, prints_time, with_template_time


class Clock(datetime):
    """A clock that goes on by a day with each look."""

    day = 0

    @classmethod
    def now(cls, tz: Any = None) -> Clock:
        cls.day += 1
        return cls(2026, 1, cls.day, 12, 0, 0, 999)


def model(folder: Path, template: Any) -> Path:
    made = make_tokenizer()
    made.chat_template = template
    made.save_pretrained(folder)
    return folder


def test_templates_that_print_the_time(tmp_path: Path) -> None:
    clock = "{{ strftime_now('%d') }}"
    assert prints_time(ModelConfig(), model(tmp_path / "one", clock))
    assert prints_time(ModelConfig(), model(tmp_path / "named", {"default": "x", "rag": clock}))
    assert not prints_time(ModelConfig(), model(tmp_path / "none", "{{ messages }}"))
    assert not prints_time(ModelConfig(), tmp_path / "absent")


def test_the_time_of_the_first_call_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_time, "datetime", Clock)
    policy, file, notes = model(tmp_path / "policy", "{{ strftime_now('%d') }}"), tmp_path / "out" / FILE, Notes()
    first = with_template_time(ModelConfig(), policy, file, notes)
    assert first.template_time == "2026-01-01T12:00:00"
    assert with_template_time(ModelConfig(), policy, file, notes) == first
    assert len(notes.texts) == 1
    for damaged in ('"noon"', "3", "null", '"2026-'):
        file.write_text(damaged)
        again = with_template_time(ModelConfig(), policy, file)
        assert again.template_time != first.template_time
        assert with_template_time(ModelConfig(), policy, file) == again
    # A run keeps a copy in its manifest.
    file.write_text("damaged")
    assert with_template_time(ModelConfig(), policy, file, notes, copy="2025-12-31T00:00:00").template_time == (
        "2025-12-31T00:00:00"
    )
    assert with_template_time(ModelConfig(), policy, file).template_time == "2025-12-31T00:00:00"
    assert len(notes.texts) == 1


def test_a_time_of_the_config_is_used_and_no_file_written_without_need(tmp_path: Path) -> None:
    policy = model(tmp_path / "policy", "{{ strftime_now('%d') }}")
    fixed = ModelConfig(template_time="2020-02-02")
    assert with_template_time(fixed, policy, tmp_path / FILE) == fixed
    plain = model(tmp_path / "plain", "{{ messages }}")
    assert with_template_time(ModelConfig(), plain, tmp_path / FILE) == ModelConfig()
    assert not (tmp_path / FILE).exists()
