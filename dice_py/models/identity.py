"""What makes two model folders the same model: the content of weights, configs, tokenizer and chat template.

No time, no name of a folder and no log is part of it, so that a copy, a renamed folder or the same training at another
time is the same model. Imports neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from dice_py.errors import DataError
from dice_py.models.weight_files import weight_files
from dice_py.models.weight_records import file_content, tensor_records
from dice_py.storage.keys import digest
from dice_py.storage.removed import was_removed

MERGED_STAMP = "merged.json"
"""The stamp of a folder that an adapter was merged into; its `start` is the identity of the base model."""

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
_OTHERS = (
    *("tokenizer*", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template*", "*.jinja", "additional_chat_templates/*", "*.py"),
)
# Where the model came from and which version saved it: they change nothing.
_PROVENANCE = ("_name_or_path", "name_or_path", "transformers_version")


def model_identity(folder: Path) -> str:
    """A digest of a model's content: weights, config.json, generation_config.json, tokenizer, chat template, and code.

    Weights count tensor by tensor, so that another sharding is the same model. pytorch_model*.bin, and what is no
    complete model, counts by its bytes: whether a model can be used is models/checkpoint.py's to say. Of a model whose
    weights were removed to free their space, it is what it was.

    Raises:
        DataError: a file cannot be read.
    """
    removed = was_removed(folder)
    if removed is not None and removed.identity is not None:
        return removed.identity
    configs = [[name, _config(folder / name)] for name in _CONFIGS if (folder / name).is_file()]
    contents = [
        [str(file.relative_to(folder)), file_content(file)]
        for file in files_beside_weights(folder)
        if file.name not in _CONFIGS
    ]
    return digest("model", _weights(folder), configs, contents)


def files_beside_weights(folder: Path) -> list[Path]:
    """The files of a model that hold no weights, sorted: configs, tokenizer, chat templates and code."""
    patterns = (*_CONFIGS, *_OTHERS)
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def _weights(folder: Path) -> list[Any]:
    try:
        files = weight_files(folder)
    except DataError:
        files = sorted({file for pattern in _WEIGHTS for file in folder.glob(pattern)})
    parts: list[Any] = []
    for file in files:
        with contextlib.suppress(DataError):
            if file.suffix == ".safetensors":
                records = tensor_records(file).items()
                parts += [[name, record.dtype, record.shape, record.digest] for name, record in records]
                continue
        parts.append([file.name, file_content(file)])
    return sorted(parts, key=str)


def _config(file: Path) -> Any:
    """A JSON object without its provenance; the digest of a file that is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if isinstance(content, dict):
        return {name: value for name, value in content.items() if name not in _PROVENANCE}
    return file_content(file)
