"""Tiny sequence classifiers made on disk, of the families that reward models have: decoders and encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from tiny_models import make_tokenizer
from transformers import AutoModelForSequenceClassification as Classifier
from transformers import (
    BertConfig,
    DebertaV2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    RobertaConfig,
)

Family = Literal["llama", "qwen2", "bert", "deberta", "roberta"]
FAMILIES: tuple[Family, ...] = ("llama", "qwen2", "bert", "deberta", "roberta")
"""llama has no padding token, qwen2's is its end-of-sequence token, and roberta counts positions from after its own."""

POSITIONS = 192


def _config(family: Family, tokenizer: Any, **changes: Any) -> PreTrainedConfig:
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.2,
        "num_labels": 1,
        "pad_token_id": tokenizer.pad_token_id,
        **changes,
    }
    if family == "llama":
        return LlamaConfig(**{**shape, "pad_token_id": None, "num_key_value_heads": 1})
    if family == "qwen2":
        return Qwen2Config(**{**shape, "pad_token_id": tokenizer.eos_token_id, "num_key_value_heads": 1})
    if family == "bert":
        return BertConfig(**shape)
    if family == "roberta":
        return RobertaConfig(**{**shape, "type_vocab_size": 1})
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
    return DebertaV2Config(**shape, **relative, max_relative_positions=-1, position_buckets=16, norm_rel_ebd="none")


def make_classifier(folder: Path, family: Family, seed: int = 0, **changes: Any) -> Path:
    """A classifier with one label and a chat template; `changes` are keywords of its config. Returns `folder`."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer("chatml")
    # A conversation ends with the end-of-sequence token: a bad choice of padding, where the last token is scored.
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\n", "<|im_end|>")
    model: PreTrainedModel = Classifier.from_config(_config(family, tokenizer, **changes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def plain_scores(folder: Path, conversations: list[list[dict[str, str]]]) -> list[float]:
    """The score of each conversation, by transformers alone, one at a time."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Classifier.from_pretrained(folder, dtype=torch.float32).eval()
    scores = []
    with torch.inference_mode():
        for messages in conversations:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            scores.append(model(input_ids=ids).logits[0, 0].item())
    return scores
