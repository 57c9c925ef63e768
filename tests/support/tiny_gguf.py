"""A tiny Llama as a GGUF file, written with gguf's own writer as llama.cpp's converter does it.

The weights are those of a model folder (tiny_models.make_llama), so that what comes back can be compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_models import make_llama, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
_NORMAL, _CONTROL = 1, 3  # llama.cpp's types of tokens
_MERGED = "zq"


def make_llama_for_gguf(folder: Path, seed: int = 0) -> Path:
    """A tiny Llama with a row for the token that `make_gguf` adds. Returns `folder`."""
    return make_llama(folder, seed, vocab_size=len(make_tokenizer()) + 1)


def _permuted(weight: Any, heads: int) -> Any:
    """llama.cpp pairs the coordinates of a head that rotate together; transformers has them half a head apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _tensors(model: Any) -> dict[str, Any]:
    """By GGUF name: float32 arrays."""
    config, tensors = model.config, {}
    for name, parameter in model.state_dict().items():
        weight = parameter.to(torch.float32).numpy()
        if ".q_proj." in name:
            weight = _permuted(weight, config.num_attention_heads)
        if ".k_proj." in name:
            weight = _permuted(weight, config.num_key_value_heads)
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            tensors[f"blk.{layer}.{_NAMES[rest]}"] = weight
        else:
            tensors[_NAMES[name]] = weight
    return tensors


def make_gguf(
    file: Path,
    folder: Path,
    *,
    architecture: str = "llama",
    quantized: bool = False,
    leave_out: str | None = None,
    extra: str | None = None,
    metadata: dict[str, int] | None = None,
) -> Path:
    """Writes the Llama in `folder` (of `make_llama_for_gguf`) to a GGUF file; returns `file`.

    Args:
        quantized: matrices are Q8_0, else float32.
        leave_out: the GGUF name of a tensor that the file lacks.
        extra: the name of a further tensor, of 16 values.
        metadata: further integers.
    """
    import gguf

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    config = model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    # An empty list of merges cannot be written, so the file has one, and the token that it makes.
    tokens = [*tokenizer.convert_ids_to_tokens(range(len(tokenizer))), _MERGED]
    assert len(tokens) == config.vocab_size
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([_CONTROL if token in tokenizer.all_special_tokens else _NORMAL for token in tokens])
    writer.add_token_merges([" ".join(_MERGED)])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    for name, value in (metadata or {}).items():
        writer.add_uint32(name, value)
    if extra is not None:
        writer.add_tensor(extra, np.full(16, 2.0, dtype=np.float32))
    for name, weight in _tensors(model).items():
        if name == leave_out:
            continue
        if quantized and weight.ndim == 2:
            blocks = gguf.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
