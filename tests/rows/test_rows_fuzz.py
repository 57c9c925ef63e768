"""Rows of any shape: read, or refused in a sentence; nothing else is ever raised."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_tokenizer

from dice_py.data import read_pairs, read_prompts
from dice_py.errors import DataError
from dice_py.models.tokenization import encode_pairs, encode_prompts
from dice_py.rows.bad_rows import BadRowRule

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "", "x<|im_end|>"]) | VALUES
PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=5)}) | VALUES, max_size=2)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": ROLES, "content": st.text(max_size=8) | PARTS | VALUES},
        optional={"tool_calls": VALUES, "name": VALUES, "reasoning_content": VALUES, "extra": VALUES},
    )
    | VALUES,
    max_size=3,
)
CELLS = st.text(max_size=8) | MESSAGES | MESSAGES.map(lambda value: json.dumps(value, allow_nan=True)) | VALUES
ROWS = st.dictionaries(
    st.sampled_from(["prompt", "chosen", "rejected", "messages", "tools", "chat_template_kwargs", "system", "w", "r"]),
    CELLS,
    max_size=7,
)
LINES = ROWS.map(json.dumps) | VALUES.map(json.dumps) | st.text(max_size=20)
TOKENIZER = make_tokenizer()


@pytest.mark.parametrize("kind", ["jsonl", "json"])
@settings(max_examples=120, deadline=None)
@given(lines=st.lists(LINES, max_size=4), column=st.sampled_from(["prompt", "messages", "system"]))
def test_any_rows_are_read_or_refused(tmp_path_factory: Any, kind: str, lines: list[str], column: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz.{kind}"
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    _read_all(path, column)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=3))
def test_any_json_list_is_read_or_refused(tmp_path_factory: Any, rows: list[Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    path.write_text(json.dumps(rows))
    _read_all(path, "prompt")


def _read_all(path: Path, column: str) -> None:
    for rule in (BadRowRule(), BadRowRule("skip", 1.0)):
        with contextlib.suppress(DataError):
            prompts = read_prompts(path, column, rule=rule)
            encode_prompts(prompts, TOKENIZER, rule=rule)
        with contextlib.suppress(DataError):
            pairs = read_pairs(path, rule=rule, weight_column="w", round_column="r", margin_column="w")
            encode_pairs(pairs, TOKENIZER, [4], rule=rule)
        with contextlib.suppress(DataError):
            read_pairs(path, rule=rule)
