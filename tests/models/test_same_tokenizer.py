"""The tokenizers of policy and reference are compared by what their token ids mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from notes import Notes
from tiny_models import make_tokenizer

from dice_py.config.shared import ModelConfig
from dice_py.errors import DataError
from dice_py.models.same_tokenizer import check_same_tokenizer


def model(folder: Path, tokenizer: Any = None, size: int = 262) -> Path:
    """A folder with a config and, unless it is None, a tokenizer; without weights, which nobody reads."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": size}))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def check(tmp_path: Path, other: Any, size: int = 262, report: Any = lambda *_, **__: None) -> None:
    policy = model(tmp_path / "policy", make_tokenizer())
    check_same_tokenizer(policy, model(tmp_path / "reference", other, size), ModelConfig(), report)


def swapped() -> Any:
    """A tokenizer of the same size, with two letters exchanged."""
    made = make_tokenizer()
    state = json.loads(made.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    made._tokenizer = type(made.backend_tokenizer).from_str(json.dumps(state))
    return made


def test_the_same_tokenizer_and_none(tmp_path: Path) -> None:
    notes = Notes()
    check(tmp_path, make_tokenizer(), report=notes)
    check_same_tokenizer(tmp_path / "policy", model(tmp_path / "bare"), ModelConfig(), notes)
    check_same_tokenizer(tmp_path / "bare", tmp_path / "policy", ModelConfig(), notes)
    assert notes.texts == []


def test_other_ids_are_refused_with_the_first(tmp_path: Path) -> None:
    message = (
        r"tokenizers of policy and reference differ: token 70 is 'a' in .*policy, but 'b' in .*reference; the reference"
    )
    with pytest.raises(DataError, match=message):
        check(tmp_path, swapped())


def test_another_end_of_sequence_is_refused(tmp_path: Path) -> None:
    other = make_tokenizer()
    other.eos_token = "</s>"
    with pytest.raises(DataError, match=r"eos_token is '<\|im_end\|>' in .*, but '</s>' in"):
        check(tmp_path, other)


def test_a_token_more_is_refused_but_not_a_padding_token(tmp_path: Path) -> None:
    other = make_tokenizer()
    other.add_special_tokens({"pad_token": "[PAD]"})
    check(tmp_path, other, size=300)
    more = make_tokenizer()
    more.add_tokens(["<more>"])
    with pytest.raises(DataError, match=r"token 262 is no token in .*policy, but '<more>' in"):
        check_same_tokenizer(tmp_path / "policy", model(tmp_path / "more", more, 300), ModelConfig())


def test_another_template_is_a_note(tmp_path: Path) -> None:
    other, notes = make_tokenizer(), Notes()
    other.chat_template = "{{ messages[0].content }}"
    check(tmp_path, other, report=notes)
    (note,) = notes.texts
    assert note.startswith("the chat templates of ")


def test_padded_sizes_may_differ_down_to_the_tokenizer(tmp_path: Path) -> None:
    policy = model(tmp_path / "policy", make_tokenizer(), 512)
    check_same_tokenizer(policy, model(tmp_path / "padded", make_tokenizer(), 262), ModelConfig())
    with pytest.raises(
        DataError, match=r"small: the policy can sample token id 261, but this model's vocabulary has 261 entries"
    ):
        check_same_tokenizer(policy, model(tmp_path / "small", make_tokenizer(), 261), ModelConfig())


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda state: state.update(normalizer={"type": "Lowercase"}), "normalizers of the tokenizers"),
        (lambda state: state["pre_tokenizer"].update(use_regex=True), "pre-tokenizers"),
        (lambda state: state["model"].update(merges=[["a", "b"]]), "merges of the tokenizers"),
    ],
)
def test_another_way_to_the_same_tokens_is_a_note(tmp_path: Path, change: Callable[[Any], None], what: str) -> None:
    made, notes = make_tokenizer(), Notes()
    state = json.loads(made.backend_tokenizer.to_str())
    state["model"]["vocab"]["ab"] = len(made)
    folders = []
    for name in ("policy", "reference"):
        made._tokenizer = type(made.backend_tokenizer).from_str(json.dumps(state))
        folders.append(model(tmp_path / name, made))
        change(state)
        made.padding_side = "left"  # which makes no difference
    check_same_tokenizer(*folders, ModelConfig(), notes)
    (note,) = notes.texts
    assert note.startswith(f"the {what} of ")
