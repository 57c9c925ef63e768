"""Whether policy and reference mean the same by a token id: their tokenizers are compared by content."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_py.config.shared import ModelConfig
from dice_py.errors import DataError
from dice_py.events import Report, no_report
from dice_py.models.limits import vocabulary_size
from dice_py.models.tokenization import read_tokenizer
from dice_py.storage.keys import file_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
_REMEDY = (
    "the reference must be the model that the policy's training started from, with the same tokenizer; if only the "
    "tokenizer's files are wrong, copy the policy's"
)


def has_tokenizer(folder: Path) -> bool:
    """True if a model folder has files of a tokenizer."""
    return any((folder / name).is_file() for name in _FILES)


def check_same_tokenizer(policy: Path, reference: Path, models: ModelConfig, report: Report = no_report) -> None:
    """Compares the vocabulary, the special tokens and the chat template of two model folders, and their sizes.

    A folder without a tokenizer is not compared, and padding tokens do not count: they are in no sequence. Another chat
    template, or another way from text to the same tokens, is a note, since the policy's serves all texts.

    Raises:
        DataError: the first token that differs; or the reference has no row for a token that the policy can sample.
    """
    if policy.resolve() == reference.resolve() or not has_tokenizer(policy):
        return
    ours = None
    if has_tokenizer(reference):
        if all(_digest(policy / name) == _digest(reference / name) for name in (*_FILES, "chat_template.jinja")):
            theirs = None
        else:
            ours, theirs = read_tokenizer(policy, models), read_tokenizer(reference, models)
            _compare(ours, theirs, policy, reference)
        if ours is not None and theirs is not None:
            differ = ["chat templates"] if theirs.chat_template != ours.chat_template else []
            for what in [*differ, *_other_steps(ours, theirs)]:
                report(
                    "note",
                    text=f"the {what} of {policy} and {reference} differ: the policy's make the tokens of all texts, "
                    "so the reference may see text in a form that it was not trained on",
                )
    _check_sizes(policy, reference, models, ours)


def _digest(file: Path) -> str | None:
    return file_digest(file) if file.is_file() else None


def _compare(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, policy: Path, reference: Path) -> None:
    unused = {tokenizer.pad_token_id for tokenizer in (ours, theirs)} - {ours.eos_token_id, theirs.eos_token_id}
    mine, others = ({number: text for text, number in t.get_vocab().items()} for t in (ours, theirs))
    for number in sorted((mine.keys() | others.keys()) - unused):
        if mine.get(number) != others.get(number):
            raise DataError(
                f"the tokenizers of policy and reference differ: token {number} is {_shown(mine.get(number))} in "
                f"{policy}, but {_shown(others.get(number))} in {reference}; {_REMEDY}"
            )
    for name in ("bos_token", "eos_token"):
        one, other = getattr(ours, name), getattr(theirs, name)
        if one is not None and other is not None and one != other:
            raise DataError(
                f"the tokenizers of policy and reference differ: {name} is {one!r} in {policy}, but {other!r} in "
                f"{reference}; {_REMEDY}"
            )


_STEPS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "normalizers of the tokenizers": lambda state: state["normalizer"],
    "pre-tokenizers": lambda state: state["pre_tokenizer"],
    "merges of the tokenizers": lambda state: state["model"].get("merges"),
}


def _other_steps(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> list[str]:
    """The steps from text to tokens that differ in two fast tokenizers of one vocabulary."""
    if not (ours.is_fast and theirs.is_fast):
        return []
    one, other = (json.loads(each.backend_tokenizer.to_str()) for each in (ours, theirs))
    return [what for what, step in _STEPS.items() if step(one) != step(other)]


def _shown(token: str | None) -> str:
    return "no token" if token is None else repr(token)


def _check_sizes(policy: Path, reference: Path, models: ModelConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Checks that the reference has a row for each token that the policy can sample; padding does not count."""
    ours, theirs = vocabulary_size(policy, models), vocabulary_size(reference, models)
    if ours is None or theirs is None or theirs >= ours:
        return
    tokenizer = tokenizer or read_tokenizer(policy, models)
    tokens = max(tokenizer.get_vocab().values()) + 1
    if theirs < min(ours, tokens):
        raise DataError(
            f"{reference}: the policy can sample token id {min(ours, tokens) - 1}, but this model's vocabulary has "
            f"{theirs} entries; {_REMEDY}"
        )
