"""Rows of any shape: read, or refused in a sentence; nothing else is ever raised."""

from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from property_examples import examples
from tiny_models import make_tokenizer

from dice_py.data import read_pairs, read_prompts
from dice_py.errors import DataError
from dice_py.models.tokenization import encode_pairs, encode_prompts
from dice_py.rows.bad_rows import BadRowRule
from dice_py.rows.sources import find_source

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
    | st.fixed_dictionaries(
        {"from": st.sampled_from(["human", "gpt", "x"]) | VALUES, "value": st.text(max_size=5) | VALUES}
    )
    | VALUES,
    max_size=3,
)
TRANSCRIPTS = st.lists(
    st.sampled_from(["Human:", "\n\nHuman:", "\n\nAssistant:", "\nHuman: ", "Assistant:", " a", "\n\n", ""]), max_size=6
).map("".join)
CELLS = (
    st.text(max_size=8)
    | TRANSCRIPTS
    | MESSAGES
    | MESSAGES.map(lambda value: json.dumps(value, allow_nan=True))
    | VALUES
)
COLUMNS = ["prompt", "chosen", "rejected", "messages", "conversations", "instruction", "input", "tools"]
COLUMNS += ["chat_template_kwargs", "system", "score_chosen", "score_rejected", "w", "r"]
ROWS = st.dictionaries(
    st.sampled_from(COLUMNS),
    CELLS,
    max_size=7,
)
LINES = ROWS.map(json.dumps) | VALUES.map(json.dumps) | st.text(max_size=20)
TOKENIZER = make_tokenizer()


@pytest.mark.parametrize("kind", ["jsonl", "json"])
@settings(max_examples=examples(120), deadline=None)
@given(lines=st.lists(LINES, max_size=4), column=st.sampled_from(["prompt", "messages", "system"]))
def test_any_rows_are_read_or_refused(tmp_path_factory: Any, kind: str, lines: list[str], column: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz.{kind}"
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    _read_all(path, column)


@settings(max_examples=examples(60), deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=3))
def test_any_json_list_is_read_or_refused(tmp_path_factory: Any, rows: list[Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    path.write_text(json.dumps(rows))
    _read_all(path, "prompt")


@settings(max_examples=examples(150), deadline=None)
@given(
    data=st.binary(max_size=40) | st.text('prompt\n\r",{}[]:ab\0', max_size=40).map(str.encode), packed=st.booleans()
)
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_any_bytes_are_read_or_refused(tmp_path_factory: Any, kind: str, data: bytes, packed: bool) -> None:
    path = tmp_path_factory.getbasetemp() / f"bytes.{kind}"
    path.write_bytes(gzip.compress(data)[: -1 - len(data) % 3] if packed else data)
    for rule in (BadRowRule(), BadRowRule("skip", 1.0)):
        with contextlib.suppress(DataError):
            read_prompts(path, rule=rule)


WRITTEN = st.text("a./:@[]%*?+-0123456789", max_size=14) | st.text(max_size=8)


@settings(max_examples=examples(200), deadline=None)
@given(before=st.sampled_from(["{}/", "{}/rows.jsonl", "{}:", "an-owner/"]), text=WRITTEN)
def test_whatever_is_written_is_found_or_refused(tmp_path_factory: Any, before: str, text: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "written"
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text('{"prompt": "a"}\n')
    assume(".." not in text)  # nothing above the folder
    with contextlib.suppress(DataError):
        find_source(before.format(folder) + text)


def _read_all(path: Path, column: str) -> None:
    for rule in (BadRowRule(), BadRowRule("skip", 1.0)):
        with contextlib.suppress(DataError):
            prompts = read_prompts(path, column, rule=rule)
            encode_prompts(prompts, TOKENIZER, rule=rule)
        with contextlib.suppress(DataError):
            pairs = read_pairs(path, rule=rule, weight_column="w", round_column="r", margin_column="margin")
            encode_pairs(pairs, TOKENIZER, [4], rule=rule)
        with contextlib.suppress(DataError):
            read_pairs(path, rule=rule)
