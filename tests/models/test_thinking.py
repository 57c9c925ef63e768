"""Templates that think: how offline answers become tokens, what texts keep, and what counts as the answer."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from notes import Notes
from tiny_models import make_tokenizer
from tokenizers import AddedToken

from dice_py.data import pairs_frame
from dice_py.errors import DataError
from dice_py.models.answer_tokens import answer_end, encode_sampled_text
from dice_py.models.thinking import AnswerLength, decode_responses, find_delimiters
from dice_py.models.tokenization import encode_pairs, encode_prompt, encode_response

# The generation prompt opens the thinking part, and earlier turns, answers too, are shown without theirs.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}"
    "{% else %}<|endoftext|>{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|endoftext|><think>\n{% endif %}"
)
# The generation prompt closes an empty thinking part where thinking is off; answers without thoughts have none.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}<|endoftext|>\n\n{{ m.content | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|endoftext|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
END = 4  # <|im_end|>


def tokenizer(template: str, *special: str, plain: tuple[str, ...] = ()) -> Any:
    made = make_tokenizer()
    made.add_tokens([AddedToken(name, special=True, normalized=False) for name in special], special_tokens=True)
    made.add_tokens([AddedToken(name, special=False, normalized=False) for name in plain])
    made.chat_template = template
    return made


def turns(*texts: str, **options: Any) -> list[Any]:
    import json

    made: list[Any] = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]
    if options:
        made[0]["extra"] = json.dumps({"conversation": {"chat_template_kwargs": options}})
    return made


def answered(made: Any, prompt: list[Any], answer: str) -> str:
    both = encode_prompt(made, prompt) + encode_response(
        made, prompt, [{"role": "assistant", "content": answer}], [END, 2]
    )
    return str(made.decode(both))


@pytest.mark.parametrize("template", [LLAMA3, GEMMA])
def test_templates_without_thinking_are_as_before(template: str) -> None:
    made = tokenizer(template)
    prompt = turns("Why?", "So.", "And?")
    full = made.apply_chat_template([*prompt, *turns("-", "Then.")[1:]], tokenize=False).removesuffix("\n")
    assert answered(made, prompt, "Then.") == full


def test_an_opened_thinking_part_is_gone_on_with() -> None:
    made = tokenizer(R1, "<think>", "</think>")
    prompt = turns("Why?", "Hm.</think>So.", "And?")
    start = "<s><|im_start|>Why?<|endoftext|>So.<|im_end|><|im_start|>And?<|endoftext|><think>\n"
    # The thoughts of the answer are kept: the template would leave them out.
    assert (
        answered(made, prompt, "<think>\nHm, and.\n</think>\n\nThen.")
        == f"{start}Hm, and.\n</think>\n\nThen.<|im_end|>"
    )
    assert answered(made, prompt, "Then.") == f"{start}Then.<|im_end|>"
    # What spells a control token is text, on this way too.
    ids = encode_response(made, prompt, turns("-", "Say <|im_end|> </think> so.")[1:], [END, 2])
    assert ids.count(END) == 1
    assert ids[-1] == END


def test_a_closed_thinking_part_comes_before_the_answer() -> None:
    made = tokenizer(QWEN3, plain=("<think>", "</think>"))
    prompt = turns("Why?", enable_thinking=False)
    start = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert answered(made, prompt, "So.") == f"{start}So.<|im_end|>"
    assert answered(made, turns("Why?"), "<think>\nHm.\n</think>\n\nSo.") == (
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\nHm.\n</think>\n\nSo.<|im_end|>"
    )


def test_it_is_told_once_of_a_file() -> None:
    made = tokenizer(QWEN3)
    good, bad = turns("-", "good")[1:], turns("-", "bad")[1:]
    prompts = [turns(f"q{n}", enable_thinking=False) for n in range(3)]
    pairs = [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt in prompts]
    notes = Notes()
    encode_pairs(pairs_frame(pairs), made, [END], report=notes)  # type: ignore[arg-type]
    (note,) = notes.texts
    assert "so 6 responses of the offline pairs are rendered apart" in note


@pytest.mark.parametrize(
    "template",
    [
        # The answer's turn depends on the question.
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ messages[0].content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}A:{% endif %}",
        # No place where the content begins: it is written in capitals.
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}",
    ],
)
def test_what_no_rule_separates_is_refused(template: str) -> None:
    with pytest.raises(DataError, match="cannot be separated"):
        answered(tokenizer(template), turns("Why?"), "So.")


def test_a_field_of_an_answer_that_would_be_lost_is_refused() -> None:
    import json

    template = QWEN3.replace("{{ m.content }}", "{{ m.reasoning_content }}{{ m.content.split('</think>')[-1] }}")
    answer = turns("-", "a</think>b")[1:]
    answer[0]["extra"] = json.dumps({"message": {"reasoning_content": "Hm."}})
    with pytest.raises(DataError, match="cannot be separated"):
        encode_response(tokenizer(template), turns("Why?", enable_thinking=False), answer, [END])


# What a model has written


@pytest.mark.parametrize("is_special", [True, False])
def test_texts_keep_the_delimiters(is_special: bool) -> None:
    names = ("<think>", "</think>")
    made = tokenizer(LLAMA3, *names) if is_special else tokenizer(LLAMA3, plain=names)
    text = "<think>Hm.</think>So."
    ids = [*made(text, add_special_tokens=False)["input_ids"], END]
    assert decode_responses(made, [ids, [*ids[-4:]]]) == [text, "So."]
    assert find_delimiters(made) == names
    # And text that was sampled elsewhere gives these tokens again.
    prompt = encode_prompt(made, turns("Why?"))
    assert encode_sampled_text(made, prompt, text, find_delimiters(made), "row 0") == ids[:-1]
    assert answer_end(made, [2, END]) == END


def test_other_delimiters() -> None:
    assert find_delimiters(tokenizer(LLAMA3, "[THINK]", "[/THINK]")) == ("[THINK]", "[/THINK]")
    assert find_delimiters(tokenizer(LLAMA3)) == ("<think>", "</think>")
    assert find_delimiters(tokenizer(LLAMA3, "[THINK]", "[/THINK]"), ["<a>", "</a>"]) == ("<a>", "</a>")


@pytest.mark.parametrize("kind", ["special", "added", "text"])
@pytest.mark.parametrize(
    ("prompt", "response", "answer"),
    [
        ("Why?", "So.", 3),
        ("Why?", "<think>Hm.</think>So.", 3),
        ("Why?", "Well, <think>Hm.</think>so <think>or</think>not", 6 + 3 + 3),
        ("Why?", "Hm.</think>So.", 3),  # begun inside of the thinking part
        ("Why?", "<think>Hm. So", -1),
        ("Why?", "Say: <think>Hm. So", -1),
        ("Why?<think>\n", "Hm.</think>So.", 3),
        ("Why?<think>\n", "Hm. So", -1),
        ("What is <think>?", "So.", 3),
    ],
)
def test_the_length_of_the_answer(kind: str, prompt: str, response: str, answer: int) -> None:
    names = ("<think>", "</think>")
    made = tokenizer(LLAMA3, *(names if kind == "special" else ()), plain=names if kind == "added" else ())
    asked, ids = (made(text, add_special_tokens=False)["input_ids"] for text in (prompt, response))
    # The stop token counts, as in every length; a response that only thinks has none to count.
    length = AnswerLength(made.backend_tokenizer)
    assert length.of([*ids, END], is_opened=length.is_opened_by(asked)) == answer + 1
    rows = {"prompt_id": [0, 0], "prompt_token_ids": [asked] * 2, "token_ids": [[*ids, END], ids]}
    assert length.of_shard(pl.DataFrame(rows)).to_list() == [answer + 1, max(answer, 0)]
