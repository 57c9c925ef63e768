"""Tiny models made on disk, for tests: no download, a second each, and shaped like the real ones.

Three families that differ in what usually breaks: the template, the stop tokens and the padding token.

    make_llama    Llama, ChatML-like template with BOS, two stop tokens, a padding token of its own
    make_mistral  Mistral, `[INST] … [/INST]`, a template that refuses a system turn, no padding token
    make_qwen2    Qwen2 (attention biases, tied embeddings), ChatML without any BOS

`changes` are keywords of the family's config class. The weights are random, so nothing they say means
anything; but they are drawn wide enough that the next-token distribution is far from flat, and the stop
tokens are raised to a few per cent, so that samples end both ways ("stop" and "length"). The head size is 32,
the smallest that vLLM's CPU attention knows (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

# A second thread gains nothing on matrices of this size, and costs a hundredfold on a busy machine: OpenMP's
# threads spin while they wait for each other.
torch.set_num_threads(1)

Style = Literal["chatml", "mistral", "qwen", "plain"]
"""`plain` has no chat template: what `dice_py.models.tokenization.load_tokenizer` refuses."""

MAX_POSITIONS = 256
"""`max_position_embeddings` of every tiny model."""

OPINIONATED: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.1,
    "top_k": 1,
    "top_p": 0.1,
    "repetition_penalty": 5.0,
    "max_new_tokens": 2,
}
"""Entries of a generation_config.json (`set_generation_config`) that no engine may follow."""

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant turns are supported') }}{% endif %}{% endfor %}"
)

_SPECIALS: dict[str, dict[str, str]] = {
    "chatml": {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>"},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>"},
    "qwen": {"eos_token": "<|im_end|>", "pad_token": "<pad>"},
    "plain": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
}

_TEMPLATES = {"chatml": "{{ bos_token }}" + _CHATML, "mistral": _MISTRAL, "qwen": _CHATML}


def make_tokenizer(style: Style = "chatml") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer (any text, one token a byte, 262 entries) with the family's specials, template.

    Where the family has a BOS, `tokenizer(text)` writes one, as Llama's and Mistral's do: so a prompt that
    was rendered with a template and then tokenized carelessly gets two of them.
    """
    # Qwen2Tokenizer adds `<|endoftext|>` by itself where it is missing, outside the embedding.
    specials = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    names = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if "bos_token" in _SPECIALS[style]:
        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", names.index("<s>"))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=specials,
        clean_up_tokenization_spaces=False,
        **_SPECIALS[style],
    )
    if style in _TEMPLATES:
        fast.chat_template = _TEMPLATES[style]
    return fast


def _shape(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": MAX_POSITIONS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.2,
        **changes,
    }


@torch.no_grad()
def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    stops: list[int],
    raise_by: float,
) -> Path:
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    # Coordinate 0 of the residual stream is about the same for every token, and the stop tokens' rows of the
    # head read it: a bias towards stopping, in architectures whose head has none.
    embedding[:, 0] = 1.0
    head[:, 0] = 0.0 if head is not embedding else 1.0
    for stop in stops:
        head[stop, 0] += raise_by
    model.generation_config.eos_token_id = stops
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_llama(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A Llama with a ChatML-like template; `<|im_end|>` and `</s>` both end a response. Returns `folder`."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer("chatml")
    model = LlamaForCausalLM(LlamaConfig(**_shape(tokenizer, tie_word_embeddings=False, **changes)))
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("</s>")]
    return save_model(model, tokenizer, folder, stops, raise_by=1.5)


def make_mistral(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A Mistral with `[INST] … [/INST]`, `</s>` the only stop token, no padding token. Returns `folder`."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer("mistral")
    model = MistralForCausalLM(
        MistralConfig(**_shape(tokenizer, sliding_window=None, tie_word_embeddings=False, **changes))
    )
    return save_model(model, tokenizer, folder, [tokenizer.eos_token_id], raise_by=1.5)


def make_qwen2(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A Qwen2 with ChatML, no BOS and tied embeddings. Returns `folder`."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer("qwen")
    model = Qwen2ForCausalLM(Qwen2Config(**_shape(tokenizer, tie_word_embeddings=True, **changes)))
    return save_model(model, tokenizer, folder, [tokenizer.eos_token_id], raise_by=1.5)


def set_generation_config(folder: Path, **values: Any) -> None:
    """Writes `values` into the folder's generation_config.json, as a published model's file has them."""
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**settings, **values}), encoding="utf-8")
