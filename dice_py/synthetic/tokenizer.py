"""The tokenizer and chat template of a synthetic world: one token per word of the task."""

from __future__ import annotations

from typing import Any

from dice_py.synthetic.task import FILLERS, LETTERS, OPERATIONS

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %} {{ message['content'] }}"
    "{{ eos_token }}{% else %} {{ message['content'] }} ={% endif %}{% endfor %}"
)


def make_tokenizer() -> Any:
    """A `PreTrainedTokenizerFast` whose vocabulary is the special tokens, letters, operations, marks and fillers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [PAD, BOS, EOS, *LETTERS, *OPERATIONS, ":", "=", ".", *FILLERS]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS)
    fast.chat_template = TEMPLATE
    return fast
