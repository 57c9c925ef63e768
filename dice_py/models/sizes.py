"""Sizes of a model from its config and the headers of its weights: parameters, shape, bytes. Reads no weights."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dice_py.errors import DataError
from dice_py.models.weight_files import weight_files
from dice_py.storage.files import read_json
from dice_py.storage.keys import digest

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_STORED = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "I32": 4, "I64": 8}
_NAMES = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
_CONFIG_NAMES = {
    "hidden": ("hidden_size", "n_embd", "d_model", "emb_dim"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "attention_heads"),
    "kv_heads": ("num_key_value_heads",),
    "head_size": ("head_dim",),
    "inner": ("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim"),
    "vocabulary": ("vocab_size",),
}


@dataclass(frozen=True)
class ModelSize:
    """Sizes of the model in a folder. For an adapter, only its own weights are counted, and the layer sizes are 0."""

    parameters: int
    stored_bytes: int
    """Size of the weight files."""
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    """Width of the feed-forward layer."""
    vocabulary: int
    shape: str
    """A digest that is equal for models of one architecture and size with different weights."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Values (not bytes) per token in the key/value cache: 2 × layers × key/value heads × size of a head."""
        return 2 * self.layers * self.kv_heads * self.head_size


def _header(file: Path) -> dict[str, Any]:
    """A safetensors header: u64 length, then JSON."""
    try:
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > file.stat().st_size:
                raise ValueError("the header is longer than the file")
            return dict(json.loads(handle.read(length)))
    except (OSError, ValueError, struct.error) as error:
        raise DataError(f"{file} is not a complete safetensors file ({error}); download or save it again") from None


def _files(folder: Path) -> list[Path]:
    """The files that transformers loads, without what else lies beside them; of an adapter, its own."""
    try:
        return weight_files(folder)
    except DataError:  # no complete model: models/checkpoint.py says what it lacks
        return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def _number(config: dict[str, Any], size: str) -> int:
    """A size in a model's config, by its names in transformers' families; of sizes by layer, the largest."""
    for name in _CONFIG_NAMES[size]:
        value = config.get(name)
        numbers = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int | float)]
        if any(numbers):
            return int(max(numbers))
    return 0


def model_size(folder: Path) -> ModelSize:
    """The sizes of the model in a folder, from config.json and the headers of its weights.

    Raises:
        DataError: a weight file is truncated.
    """
    file = folder / "config.json"
    config = read_json(file) if file.is_file() else {}
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) and nested else config
    parameters = 0
    files = _files(folder)
    stored = sum(weights.stat().st_size for weights in files)
    for weights in files:
        if weights.suffix == ".safetensors":
            for name, tensor in _header(weights).items():
                if name != "__metadata__" and tensor["dtype"] in _STORED:
                    parameters += math.prod(tensor["shape"])
    if not parameters:  # pytorch_model*.bin has no header: count by file size
        parameters = stored // DTYPE_BYTES.get(str(config.get("dtype") or config.get("torch_dtype")), 4)
    hidden, heads = _number(text, "hidden"), _number(text, "heads")
    return ModelSize(
        parameters=parameters,
        stored_bytes=stored,
        hidden=hidden,
        layers=_number(text, "layers"),
        heads=heads,
        kv_heads=_number(text, "kv_heads") or heads,
        head_size=_number(text, "head_size") or (hidden // heads if heads else 0),
        inner=_number(text, "inner") or 4 * hidden,
        vocabulary=_number(text, "vocabulary"),
        shape=digest({k: v for k, v in config.items() if k not in _NAMES and not k.endswith("token_id")}, parameters),
    )
