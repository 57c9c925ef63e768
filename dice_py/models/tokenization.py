"""Tokenizers and chat templates: prompts and pairs as token ids. Without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from dice_py.config.shared import ModelConfig
from dice_py.data import Message
from dice_py.errors import DataError
from dice_py.models.loading import require
from dice_py.storage.schemas import PAIRS
from dice_py.timing import timed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path, config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Its padding token is the end-of-sequence token if it has none.

    Raises:
        DataError: transformers cannot load it, or it lacks a chat template or an end-of-sequence token.
    """
    require("transformers", extra="train")
    with timed("import"):
        from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise DataError(f"{folder}: transformers cannot load a tokenizer from it: {first_line}") from None
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
    """Token ids that end a response, sorted: the tokenizer's EOS and those in the model's generation_config.json."""
    stops = {int(tokenizer.eos_token_id)}
    file = folder / "generation_config.json"
    if file.is_file():
        listed = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        for token in listed if isinstance(listed, list) else [listed]:
            if isinstance(token, int):
                stops.add(token)
    return sorted(stops)


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str, **options: Any) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except TemplateError as error:
        raise DataError(f"{where}: the chat template refuses these messages: {error}") from None


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str = "prompt") -> list[int]:
    """Token ids of the prompt with the template's generation prompt, as the model reads it before it answers.

    The template writes the BOS token, so the tokenizer adds no special tokens.

    Raises:
        DataError: the chat template refuses the messages; `where` names the row in the message.
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
    """Token ids of an offline response as the policy would have sampled it: up to and with its first stop token.

    What the template writes after the stop token (a line break, for example) is cut off, since it is never sampled. A
    stop token is appended if the template writes none. Prompt and response are tokenized separately, as in sampling.

    Raises:
        DataError: the template renders the prompt differently once a response follows, or refuses the messages.
    """
    before = _render(tokenizer, prompt, where, add_generation_prompt=True)
    full = _render(tokenizer, [*prompt, *response], where)
    if not full.startswith(before):
        raise DataError(
            f"{where}: the chat template renders the prompt differently once a response follows it, so the tokens of "
            "the response cannot be separated; use a template whose generation prompt is a prefix of the conversation"
        )
    ids: list[int] = tokenizer(full[len(before) :], add_special_tokens=False)["input_ids"]
    for index, token in enumerate(ids):
        if token in stops:
            return ids[: index + 1]
    return [*ids, int(tokenizer.eos_token_id)]


def encode_pairs(pairs: pl.DataFrame, tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> pl.DataFrame:
    """Adds `prompt_ids`, `chosen_ids` and `rejected_ids` (lists of i32) to pairs of messages.

    Raises:
        DataError: the chat template refuses a pair; the message has its row.
    """
    encoded: dict[str, list[list[int]]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for row, (prompt, chosen, rejected) in enumerate(pairs.select("prompt", "chosen", "rejected").iter_rows()):
        encoded["prompt_ids"].append(encode_prompt(tokenizer, prompt, f"pair {row}"))
        encoded["chosen_ids"].append(encode_response(tokenizer, prompt, chosen, stops, f"pair {row}, chosen"))
        encoded["rejected_ids"].append(encode_response(tokenizer, prompt, rejected, stops, f"pair {row}, rejected"))
    columns = [pl.Series(name, ids, dtype=PAIRS[name]) for name, ids in encoded.items()]
    return pairs.with_columns(columns)
