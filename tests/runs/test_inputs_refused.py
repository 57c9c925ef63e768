"""What a run says of its data before it looks at a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from notes import Notes

from dice_py.config.loading import resolve
from dice_py.errors import DataError
from dice_py.runs.folder import Run
from dice_py.runs.inputs import prepare


def prepared(tmp_path: Path, *assign: str) -> list[str]:
    """The notes of `prepare`, which stops at the latest where it looks for the models."""
    notes = Notes()
    named = {name: str(tmp_path / f"{name}.jsonl") for name in ("prompts", "replay")}
    config = resolve([], list(assign), {"model": {"policy": "/nowhere", "reference": "/nowhere"}, "data": named})
    run = Run(tmp_path / "run", config, notes)
    run.folder.mkdir()
    try:
        with pytest.raises(DataError) as caught:
            prepare(run)
    finally:
        run.close()
    return [*notes.texts, str(caught.value)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    def jsonl(name: str, rows: list[dict[str, Any]]) -> None:
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    jsonl("prompts", [{"prompt": f"What is {i}?"} for i in range(12)] + [{"prompt": ""}])
    jsonl("replay", [{"prompt": f"Say {i}.", "chosen": "a", "rejected": "b" if i else "a"} for i in range(6)])
    return tmp_path


def test_a_bad_row_and_the_option_that_skips_it(data: Path) -> None:
    error = prepared(data)[-1]
    assert "prompts.jsonl, line 13: 'prompt' is an empty text" in error
    assert "--set data.on_bad_row=skip" in error


def test_skipped_rows_and_equal_pairs_are_told(data: Path) -> None:
    notes = prepared(data, "data.on_bad_row=skip")
    assert any("1 of 13 prompts skipped (data.on_bad_row=skip): " in note for note in notes)
    assert any("1 of 6 pairs left out: chosen and rejected are equal" in note for note in notes)


def test_held_out_pairs_that_are_the_replay_file(data: Path) -> None:
    error = prepared(data, "data.on_bad_row=skip", f"data.eval_pairs={data / 'replay.jsonl'}")[-1]
    assert error.startswith("all 5 offline pairs of data.replay (")
    assert "are on prompts that are held out (data.eval_pairs" in error
