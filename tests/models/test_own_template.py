"""model.chat_template: a template of the user's own, and plain text for base models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_tokenizer

from dice_py.config.shared import ModelConfig
from dice_py.errors import DataError
from dice_py.models.own_template import template_key, with_own_template
from dice_py.models.tokenization import encode_prompt, encode_response, load_tokenizer
from dice_py.stages.job import model_key_fields

OWN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def turns(*texts: str, first: str = "user") -> list[Any]:
    roles = ["system", "user", "assistant"] if first == "system" else ["user", "assistant", "user"]
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model's tokenizer: it has no template, and puts BOS before a text."""
    make_tokenizer("plain").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_base_model_needs_it_said(base: Path) -> None:
    with pytest.raises(DataError, match=r"no chat template.*model\.chat_template=none"):
        load_tokenizer(base, ModelConfig())


def test_prompts_of_a_base_model_are_plain_text(base: Path) -> None:
    made = load_tokenizer(base, ModelConfig(chat_template="none"))
    prompt = turns("Q: why?\nA:")
    assert encode_prompt(made, prompt) == made("Q: why?\nA:")["input_ids"]  # with BOS, as the tokenizer has it
    answer = [{"role": "assistant", "content": " Because </s>."}]
    text = made(" Because </s>.", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert encode_response(made, prompt, answer, [made.eos_token_id]) == [*text, made.eos_token_id]
    with_system = turns("Be brief.", "Why?", first="system")
    assert made.decode(encode_prompt(made, with_system)) == "<s>Be brief.\n\nWhy?"


@pytest.mark.parametrize("prompt", [turns("a", "b", "c"), [*turns("a"), *turns("b")]])
def test_several_turns_are_refused_in_plain_text(base: Path, prompt: list[Any]) -> None:
    made = load_tokenizer(base, ModelConfig(chat_template="none"))
    with pytest.raises(DataError, match="a prompt is one user turn"):
        encode_prompt(made, prompt)


def test_no_bos_where_the_tokenizer_writes_none(tmp_path: Path) -> None:
    make_tokenizer("qwen").save_pretrained(tmp_path)
    made = load_tokenizer(tmp_path, ModelConfig(chat_template="none"))
    assert made.decode(encode_prompt(made, turns("Why?"))) == "Why?"


def test_a_template_of_ones_own_is_used_and_saved(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(OWN)
    made = load_tokenizer(base, ModelConfig(chat_template=str(file)))
    assert made.decode(encode_prompt(made, turns("hi"))) == "<|im_start|>user: hi</s><|im_start|>"
    made.save_pretrained(tmp_path / "trained")
    again = load_tokenizer(tmp_path / "trained", ModelConfig())
    assert again.chat_template == OWN


def test_keys_have_the_template_by_content(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(OWN)
    assert model_key_fields(ModelConfig()).keys() == {"dtype", "device", "attn_implementation"}  # keys of earlier runs
    own, inline, plain = (template_key(ModelConfig(chat_template=value)) for value in (str(file), OWN, "none"))
    assert own == inline != plain
    file.write_text(OWN + " ")
    assert template_key(ModelConfig(chat_template=str(file))) != own


def test_a_run_keeps_a_copy(tmp_path: Path) -> None:
    file, copy = tmp_path / "own.jinja", tmp_path / "chat-template.json"
    models = ModelConfig(chat_template=str(file))
    with pytest.raises(DataError, match=r"model\.chat_template: .*own\.jinja cannot be read"):
        with_own_template(models, copy)
    file.write_text(OWN)
    assert with_own_template(models, copy).chat_template == OWN
    file.unlink()
    assert with_own_template(models, copy).chat_template == OWN
