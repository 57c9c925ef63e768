"""The chat template that model.chat_template sets in place of the tokenizer's: a file, its text, or none.

It becomes the template of every tokenizer that renders prompts, and is saved with the tokenizers of trained models.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_py.config.shared import ModelConfig
from dice_py.errors import DataError
from dice_py.storage.files import read_sealed, write_sealed
from dice_py.storage.keys import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "chat-template.json"
"""The run's own copy, in `inputs/`."""

NO_TEMPLATE = "none"
_KEY = "chat template"

PLAIN = (
    "{% set question = 1 if messages[0]['role'] == 'system' else 0 %}"
    "{% for message in messages %}"
    "{% if loop.index0 < question %}{{ message['content'] + '\\n\\n' }}"
    "{% elif loop.index0 == question and message['role'] == 'user' %}{{ message['content'] }}"
    "{% elif loop.index0 == question + 1 and message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('with model.chat_template=none a prompt is one user turn, after a system turn or "
    "none, since plain text does not tell turns apart; give a template that does') }}{% endif %}"
    "{% endfor %}"
)
"""The texts of a system turn and a user turn, with a blank line between them; an answer and the end-of-sequence token
follow without a space or a line break."""


def template_source(models: ModelConfig) -> str | None:
    """The text of model.chat_template, "none", or None where it is not set.

    Raises:
        DataError: its file cannot be read.
    """
    given = models.chat_template
    if given is None or given == NO_TEMPLATE or is_template_text(given):
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(
            f"model.chat_template: {given} cannot be read ({error}); name a file with a Jinja template, or write none "
            "for a base model without one"
        ) from None


def is_template_text(value: str) -> bool:
    """Whether model.chat_template is the template itself, and not the path of its file."""
    return "{{" in value or "{%" in value


def template_key(models: ModelConfig) -> dict[str, Any]:
    """The template for a stage's key, by content; empty where it is the tokenizer's own."""
    source = template_source(models)
    return (
        {} if source is None else {"chat_template": digest("chat template", PLAIN if source == NO_TEMPLATE else source)}
    )


def set_template(tokenizer: PreTrainedTokenizerBase, models: ModelConfig) -> None:
    """Gives a tokenizer the template of model.chat_template, if that is set.

    The plain one begins with the BOS token where the tokenizer itself puts it before a text.
    """
    source = template_source(models)
    if source == NO_TEMPLATE:
        ids: list[int] = tokenizer("x")["input_ids"]
        has_bos = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
        source = ("{{ bos_token }}" if has_bos else "") + PLAIN
    if source is not None:
        tokenizer.chat_template = source


def with_own_template(models: ModelConfig, file: Path) -> ModelConfig:
    """The config with the template's text in place of its file, of which a run keeps a copy.

    Args:
        file: the copy; it serves where the user's file is gone.

    Raises:
        DataError: the user's file cannot be read, and the copy is not whole.
    """
    if models.chat_template is None:
        return models
    try:
        source = template_source(models)
    except DataError:
        if read_sealed(file, _KEY) is None:
            raise
        return with_kept_template(models, file)
    write_sealed(file, {"text": source}, _KEY)
    return models.model_copy(update={"chat_template": source})


def with_kept_template(models: ModelConfig, file: Path) -> ModelConfig:
    """The config with the template's text as a run's copy has it; as it is where there is no copy."""
    stored = None if models.chat_template is None else read_sealed(file, _KEY)
    return models if stored is None else models.model_copy(update={"chat_template": stored["text"]})
