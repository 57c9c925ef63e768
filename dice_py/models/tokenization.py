"""Tokenizers and chat templates: prompts and pairs as token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from dice_py.config.shared import ModelConfig
from dice_py.data import Message
from dice_py.errors import DataError
from dice_py.storage.schemas import PAIRS
from dice_py.timing import timed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from dice_py.models.loading import require


def load_tokenizer(folder: Path, config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with a chat template and a padding token.

    Raises:
        DataError: absent, or without a chat template or an end-of-sequence token.
    """
    require("transformers", extra="train")
    with timed("import"):
        from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        raise DataError(f"{folder}: transformers cannot load a tokenizer from it: {first}") from None
    if not tokenizer.chat_template:
        raise DataError(
            f"{folder}: its tokenizer has no chat template, so a prompt cannot be rendered; save one with the "
            "tokenizer (tokenizer.chat_template = …), or use the instruction-tuned tokenizer of this model"
        )
    if tokenizer.eos_token_id is None:
        raise DataError(f"{folder}: its tokenizer has no end-of-sequence token, so a response cannot end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stop_token_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a response: the tokenizer's EOS and those of the model's generation config."""
    found = {int(tokenizer.eos_token_id)}
    file = folder / "generation_config.json"
    if file.is_file():
        listed = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        for token in listed if isinstance(listed, list) else [listed]:
            if isinstance(token, int):
                found.add(token)
    return sorted(found)


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str, **options: Any) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except TemplateError as error:
        raise DataError(f"{where}: the chat template refuses these messages: {error}") from None


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str = "prompt") -> list[int]:
    """Token ids of the prompt as the model sees it before it answers.

    The template writes its own BOS: none is added, so that none is doubled.
    """
    text = _render(tokenizer, messages, where, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def encode_response(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[Message],
    response: list[Message],
    stops: list[int],
    where: str = "pair",
) -> list[int]:
    """Token ids of an offline answer as the policy would have sampled it: up to its first stop token.

    What a template writes after the stop token (a line break, say) is cut off, since nothing samples it; a
    stop token is added where the template writes none. Text and prompt are tokenised apart, which is how a
    sampled response meets its prompt.

    Raises:
        DataError: the template renders the prompt differently once an answer follows.
    """
    before = _render(tokenizer, prompt, where, add_generation_prompt=True)
    whole = _render(tokenizer, [*prompt, *response], where)
    if not whole.startswith(before):
        raise DataError(
            f"{where}: the chat template renders the prompt differently once an answer follows it, so the "
            "answer's tokens cannot be told apart; use a template whose generation prompt is a prefix"
        )
    ids: list[int] = tokenizer(whole[len(before) :], add_special_tokens=False)["input_ids"]
    for index, token in enumerate(ids):
        if token in stops:
            return ids[: index + 1]
    return [*ids, int(tokenizer.eos_token_id)]


def encode_pairs(pairs: pl.DataFrame, tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> pl.DataFrame:
    """Adds `prompt_ids`, `chosen_ids`, `rejected_ids` (list i32) to pairs of messages."""
    encoded: dict[str, list[list[int]]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for row, (prompt, chosen, rejected) in enumerate(pairs.select("prompt", "chosen", "rejected").iter_rows()):
        encoded["prompt_ids"].append(encode_prompt(tokenizer, prompt, f"pair {row}"))
        encoded["chosen_ids"].append(encode_response(tokenizer, prompt, chosen, stops, f"pair {row}, chosen"))
        encoded["rejected_ids"].append(encode_response(tokenizer, prompt, rejected, stops, f"pair {row}, rejected"))
    columns = [pl.Series(name, ids, dtype=PAIRS[name]) for name, ids in encoded.items()]
    return pairs.with_columns(columns)
