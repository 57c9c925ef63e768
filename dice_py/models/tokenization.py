"""Tokenizers and chat templates: prompts and pairs as token ids. Without torch."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from dice_py.config.extras import require
from dice_py.config.shared import ModelConfig
from dice_py.data import Message, file_places
from dice_py.errors import DataError
from dice_py.events import Report, no_report
from dice_py.models.answer_tokens import encode_response as encode_response
from dice_py.models.chat_template import ChatTemplate, Conversation, keep_template, template_of, turn_tokens
from dice_py.models.control_tokens import ControlTokens
from dice_py.models.own_template import set_template
from dice_py.rows.bad_rows import BadRowRule, BadRows
from dice_py.storage.schemas import PAIRS
from dice_py.timing import timed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RULE = BadRowRule()
_FEWEST_TOKENS = 8  # in an empty vocabulary, where a class adds some of its own


def load_tokenizer(folder: Path, config: ModelConfig, *, generates: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Its padding token is the end-of-sequence token if it has none.

    Args:
        generates: the model writes responses, so that it needs an end-of-sequence token; else it only reads them.

    Raises:
        DataError: transformers cannot load it, or it lacks a chat template or an end-of-sequence token.
    """
    tokenizer = read_tokenizer(folder, config)
    set_template(tokenizer, config)
    if not tokenizer.chat_template:
        raise DataError(
            f"{folder}: its tokenizer has no chat template, so a prompt cannot be rendered; name a file with one "
            "(model.chat_template=FILE), or set model.chat_template=none to have the prompts of a base model as plain "
            "text"
        )
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        raise DataError(
            f"{folder}: its tokenizer has chat templates by the names {', '.join(sorted(tokenizer.chat_template))}, "
            "but none is named default; save the one to use as the tokenizer's only chat template"
        )
    stops: list[int] = []
    if generates:
        if tokenizer.eos_token_id is None:
            raise DataError(f"{folder}: its tokenizer has no end-of-sequence token, so a response cannot end")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        stops = stop_token_ids(folder, tokenizer)
    controls = ControlTokens.of(tokenizer, {*stops, *turn_tokens(tokenizer)})
    time = None if config.template_time is None else datetime.fromisoformat(config.template_time)
    keep_template(tokenizer, ChatTemplate(controls, time))
    return tokenizer


def read_tokenizer(folder: Path, config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder as it is; it need not have a chat template.

    Raises:
        DataError: transformers cannot load it.
    """
    require("transformers", extra="train")
    with timed("import"):
        from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # the tokenizers library raises Exception itself
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{folder}: transformers cannot load a tokenizer from it: {first_line}; its tokenizer's files are damaged, "
            "missing, or written by a newer version of the libraries"
        ) from None
    longest = tokenizer.model_max_length
    if not isinstance(longest, int | float):
        file = folder / "tokenizer_config.json"
        raise DataError(f"{file}: model_max_length is {longest!r:.40}, not a number; correct or remove it")
    # Without the file of their vocabulary, some classes load with nothing but their special tokens.
    ordinary = set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)
    if len(ordinary) <= _FEWEST_TOKENS:
        raise DataError(
            f"{folder}: its tokenizer has no vocabulary, only {len(tokenizer)} tokens; a file such as tokenizer.json "
            "or tokenizer.model is missing: fetch the model again"
        )
    return tokenizer


def stop_token_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end a response, sorted: the tokenizer's EOS and those of the model's generation_config.json.

    Where that file is absent or names none, those of config.json, as in transformers.

    Raises:
        DataError: one of the files is not JSON, or names what is no token id of the model.
    """
    eos = int(tokenizer.eos_token_id)
    listed = source = rows = None
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            nested = values.get("text_config")
            text = nested if isinstance(nested, dict) else {}
            if listed is None:
                listed, source = values.get("eos_token_id"), file
                listed = text.get("eos_token_id") if listed is None else listed
            sizes = [each.get("vocab_size") for each in (values, text)]
            rows = max((size for size in sizes if isinstance(size, int)), default=None)
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise DataError(f"{file} cannot be read ({error}); fix it, or fetch the model again") from None
    if rows is not None and eos >= rows:
        raise DataError(
            f"{folder}: the tokenizer's end-of-sequence token {tokenizer.eos_token!r} has id {eos}, but the model's "
            f"vocabulary has {rows} entries, so a response cannot end; correct eos_token in tokenizer_config.json"
        )
    stops = {eos}
    for token in listed if isinstance(listed, list) else [] if listed is None else [listed]:
        if not isinstance(token, int) or isinstance(token, bool) or (rows is not None and token >= rows):
            raise DataError(
                f"{source}: eos_token_id is {listed!r:.60}, but {token!r:.20} is no token id of the model; correct it "
                f"(the tokenizer's end-of-sequence token is {eos})"
            )
        if token >= 0:  # -1 stands for none
            stops.add(token)
    return sorted(stops)


def turn_end_note(tokenizer: PreTrainedTokenizerBase, stops: list[int], folder: Path) -> str | None:
    """A warning where the chat template ends an answer with a control token that is no stop token; else None.

    A policy that was trained on this template ends its answers with that token, and sampling runs on past it.
    """
    template = template_of(tokenizer)
    question: list[Message] = [{"role": "user", "content": "x"}]
    answer: list[Message] = [*question, {"role": "assistant", "content": "y"}]
    try:
        before = template.render(Conversation.of(question), "a turn", prompt=True)
        full = template.render(Conversation.of(answer), "a turn")
    except DataError:
        return None  # the prompts themselves will tell
    match = template.controls.pattern.search(full[len(before) :]) if full.startswith(before) else None
    if match is None or template.controls.by_spelling[match[0]] in stops:
        return None
    number = template.controls.by_spelling[match[0]]
    known = ", ".join(repr(tokenizer.convert_ids_to_tokens(stop)) for stop in stops)
    return (
        f"warning: the chat template ends an answer with {match[0]!r} (token {number}), which is no stop token (these "
        f"are {known}): responses run on past it. Add {number} to eos_token_id in {folder / 'generation_config.json'}"
    )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str = "prompt") -> list[int]:
    """Token ids of the prompt with the template's generation prompt, as the model reads it before it answers.

    The template writes the BOS token, so the tokenizer adds no special tokens. The texts of the messages give no
    control tokens (models/control_tokens.py).

    Raises:
        DataError: the chat template refuses the messages, or leaves out a part of them; `where` names the row.
    """
    template = template_of(tokenizer)
    conversation = Conversation.of(messages)
    guard = template.controls.guard([conversation.messages, conversation.options])
    text = template.render(conversation, where, prompt=True)
    template.check_complete(conversation, text, where, turns=len(messages), prompt=True)
    if guard is not None:
        text = template.render(conversation, where, prompt=True, guard=guard)
    ids = template.controls.encode(text, guard, where)
    if not ids:
        raise DataError(f"{where}: the chat template renders these messages as nothing")
    return ids


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Message], response: list[Message], where: str = "pair"
) -> list[int]:
    """Token ids of a complete conversation, as the template ends it: what a model reads that scores it.

    The texts of the messages give no control tokens.

    Raises:
        DataError: the chat template refuses the messages, or leaves out a part of them; `where` names the row.
    """
    template = template_of(tokenizer)
    conversation = Conversation.of([*prompt, *response])
    guard = template.controls.guard([conversation.messages, conversation.options])
    text = template.render(conversation, where)
    template.check_complete(conversation, text, where, turns=len(conversation.messages), prompt=False)
    template.check_words(response, text, where)
    if guard is not None:
        text = template.render(conversation, where, guard=guard)
    ids = template.controls.encode(text, guard, where)
    if not ids:
        raise DataError(f"{where}: the chat template renders these messages as nothing")
    return ids


def encode_prompts(
    prompts: pl.DataFrame,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rule: BadRowRule = _RULE,
    report: Report = no_report,
) -> list[tuple[int, list[int]]]:
    """(prompt_id, token ids) of prompts that the template renders.

    Args:
        prompts: `prompt_id` and `messages`, and `where` if they were read from a file.
        rule: what happens to a prompt that the chat template refuses.
        report: receives notes: on prompts that were left out, and on those that spell control tokens.

    Raises:
        DataError: the chat template refuses a prompt; the message has its place in the user's file.
    """
    places = file_places(prompts, "prompt")
    controls = template_of(tokenizer).controls
    bad = BadRows(rule, "the prompts", "prompts")
    spelled: list[tuple[str, str]] = []
    encoded = []
    for place, (prompt_id, messages) in zip(places, prompts.select("prompt_id", "messages").iter_rows(), strict=True):
        with bad.row():
            encoded.append((prompt_id, encode_prompt(tokenizer, messages, place)))
        if spelling := controls.spelled(messages):
            spelled.append((place, spelling))
    bad.finish(report)
    if spelled:
        place, spelling = spelled[0]
        report(
            "note",
            text=f"{len(spelled)} of {prompts.height} prompts hold the spelling of a control token, which is encoded "
            f"as plain text (the first: {spelling!r} in {place}). If they were rendered with a chat template already, "
            "give messages instead: the template is applied here",
        )
    return encoded


def encode_pairs(
    pairs: pl.DataFrame,
    tokenizer: PreTrainedTokenizerBase,
    stops: list[int],
    *,
    positions: float | None = None,
    rule: BadRowRule = _RULE,
    report: Report = no_report,
) -> pl.DataFrame:
    """Adds `prompt_ids`, `chosen_ids` and `rejected_ids` (lists of i32) to pairs of messages.

    Pairs whose two responses have the same tokens, and pairs that are longer than the model has positions, are left
    out, and counted in a note.

    Args:
        positions: the most tokens of a prompt and its longer response; None: no limit.
        rule: what happens to a pair that the chat template refuses.
        report: receives notes on pairs that are left out.

    Raises:
        DataError: the chat template refuses a pair; the message has its place in the user's file.
    """
    encoded: dict[str, list[list[int]]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    kept: list[int] = []
    places = file_places(pairs, "pair")
    bad = BadRows(rule, "the offline pairs", "pairs")
    equal = too_long = 0
    template = template_of(tokenizer)
    apart = template.in_two_parts
    for row, (prompt, chosen, rejected) in enumerate(pairs.select("prompt", "chosen", "rejected").iter_rows()):
        with bad.row():
            where = places[row]
            ids = {
                "prompt_ids": encode_prompt(tokenizer, prompt, where),
                "chosen_ids": encode_response(tokenizer, prompt, chosen, stops, f"{where}, chosen"),
                "rejected_ids": encode_response(tokenizer, prompt, rejected, stops, f"{where}, rejected"),
            }
            if ids["chosen_ids"] == ids["rejected_ids"]:
                equal += 1
                continue
            longer = max(len(ids["chosen_ids"]), len(ids["rejected_ids"]))
            if positions is not None and len(ids["prompt_ids"]) + longer > positions:
                too_long += 1
                continue
            kept.append(row)
            for name, tokens in ids.items():
                encoded[name].append(tokens)
    bad.finish(report)
    if equal:
        text = f"{equal} of {pairs.height} offline pairs left out: chosen and rejected are equal once tokenized"
        report("note", text=text)
    if too_long:
        text = f"{too_long} of {pairs.height} offline pairs left out: longer than the model's {positions:.0f} positions"
        report("note", text=text)
    if template.in_two_parts > apart:
        report(
            "note",
            text=f"the chat template renders a prompt differently once a response follows it, so "
            f"{template.in_two_parts - apart} responses of the offline pairs are rendered apart from their prompts, as "
            "after a neutral question",
        )
    columns = [pl.Series(name, ids, dtype=PAIRS[name]) for name, ids in encoded.items()]
    return pairs[kept].with_columns(columns)
