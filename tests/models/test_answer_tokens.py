"""The tokens of an offline answer follow those of its prompt, and no word of the answer is lost in the template."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import make_tokenizer
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from dice_py.errors import DataError
from dice_py.models.tokenization import encode_prompt, encode_response

CHATML = make_tokenizer().chat_template.replace("{{ bos_token }}", "")
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# As DeepSeek's: what was thought is left out, of the last answer too.
UNTHOUGHT = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
# As Qwen3's: what was thought is written anew.
RETHOUGHT = CHATML.replace(
    "{{ message['content'] }}",
    "{% if message.role == 'assistant' and '</think>' in message.content %}"
    "{% set parts = message.content.split('</think>') %}"
    "{{ '<think>\n' + parts[0].split('<think>')[-1].strip('\n') + '\n</think>\n\n' + parts[1].lstrip('\n') }}"
    "{% else %}{{ message.content }}{% endif %}",
)


def with_spaces(kind: str, template: str) -> Any:
    """A tokenizer that puts a space before what it encodes, as SentencePiece's models do."""
    specials = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    letters = ["▁", "▁▁", *map(chr, range(33, 127)), "\n"]
    merged = ["▁Y", "▁Ye", "▁Yes"]
    merges = [("▁", "▁"), ("▁", "Y"), ("▁Y", "e"), ("▁Ye", "s")]
    names = [*specials, *letters, *merged]
    inner = Tokenizer(BPE({name: at for at, name in enumerate(names)}, merges, unk_token="<unk>"))
    if kind == "normalizer":  # Llama 2
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    made.chat_template = template
    return made


def turns(*texts: str) -> list[Any]:
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


@pytest.mark.parametrize("kind", ["normalizer", "first", "always"])
@pytest.mark.parametrize("template", [CHATML, LLAMA2], ids=["chatml", "llama2"])
@pytest.mark.parametrize("answer", ["Yes.", "Yes <|im_e", "> is greater"])
def test_no_space_is_put_before_an_answer(kind: str, template: str, answer: str) -> None:
    made = with_spaces(kind, template)
    question = turns("Is it?", "No.", "Really?")
    stop = made.convert_tokens_to_ids("<|im_end|>" if template is CHATML else "</s>")
    ids = encode_prompt(made, question) + encode_response(made, question, turns(answer, answer)[1:], [stop])
    rendered = made.apply_chat_template([*question, *turns("", answer)[1:]], tokenize=False)
    whole = made(rendered, add_special_tokens=False)["input_ids"]
    assert ids == whole[: len(ids)]
    assert ids[-1] == stop
    if template is LLAMA2 and answer.startswith("Yes"):
        assert "▁Yes" in made.convert_ids_to_tokens(ids)


def test_an_answer_whose_first_token_would_reach_into_the_prompt_is_encoded_alone() -> None:
    made = with_spaces("never", CHATML.replace("assistant\n", "assistant "))
    made.chat_template = made.chat_template.replace("{{ message['role'] }}\n", "{{ message['role'] }} ")
    response = encode_response(made, turns("q"), turns("", "Yes.")[1:], [4])
    assert made.convert_ids_to_tokens(response) == ["Y", "e", "s", ".", "<|im_end|>"]
    assert made.convert_ids_to_tokens(encode_prompt(made, turns("q")))[-1] == "▁"


def test_a_spelled_stop_token_does_not_move_the_border() -> None:
    made = with_spaces("always", LLAMA2)
    question = turns("Is </s> it?")
    response = encode_response(made, question, turns("", "Yes, </s> is.")[1:], [2])
    assert made.convert_ids_to_tokens(response)[0] == "▁Yes"
    assert made.decode(response) == " Yes, </s> is. </s>"


@pytest.mark.parametrize(
    "answer", ["<think>\nHm.\n</think>\n\nYes.", "<think>Hm.</think>Yes.", "Hm.\n</think>\nYes.", "  Yes.\n"]
)
def test_thoughts_that_the_template_writes_in_its_own_way(answer: str) -> None:
    made = make_tokenizer()
    made.chat_template = RETHOUGHT
    text = made.decode(encode_response(made, turns("q"), turns("", answer)[1:], [4]))
    assert "Hm." in text or "Hm." not in answer
    assert "Yes." in text


@pytest.mark.parametrize("answer", ["<think>\nHm.</think>\nYes.", "Hm. </think>Yes.", "Hm. <|im_end|> </think>Yes."])
def test_thoughts_that_the_template_leaves_out_of_an_answer_are_refused(answer: str) -> None:
    made = make_tokenizer()
    made.chat_template = UNTHOUGHT
    with pytest.raises(DataError, match=r"pair 3: the chat template leaves out a part of the answer, from 'Hm\."):
        encode_response(made, turns("q"), turns("", answer)[1:], [4], "pair 3")
    # In the turns before, the model is not to see what it thought.
    kept = encode_response(made, turns("q", answer, "r"), turns("", "Hm. Yes.")[1:], [4])
    assert made.decode(kept) == "Hm. Yes.<|im_end|>"


def test_an_answer_whose_beginning_the_template_cuts_is_refused() -> None:
    made = make_tokenizer()
    made.chat_template = CHATML.replace("message['content']", "message['content'][-12:]")
    with pytest.raises(DataError, match=r"leaves out a part of the answer, from 'This answer is the longest' on"):
        encode_response(made, turns("q"), turns("", "This answer is the longest")[1:], [4])
