"""The synthetic world's tokenizer and chat template: one token for each word of the task."""

from __future__ import annotations

from typing import Any

from dice_py.synthetic.task import FILLERS, LETTERS, OPERATIONS

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %} {{ message['content'] }}"
    "{{ eos_token }}{% else %} {{ message['content'] }} ={% endif %}{% endfor %}"
)


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [PAD, BOS, EOS, *LETTERS, *OPERATIONS, ":", "=", ".", *FILLERS]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS)
    fast.chat_template = TEMPLATE
    return fast
