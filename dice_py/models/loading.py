"""Checks, identifies and loads model folders, in this order below.

Importing this file imports neither torch nor transformers; its functions do. Tokenizers are in models/tokenization.py;
models/sources.py finds the folder that a name means.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_py.config.shared import ModelConfig
from dice_py.errors import DataError, UsageError
from dice_py.storage.keys import digest, file_digest
from dice_py.timing import timed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_HASHED_BYTES = 64 * 2**20  # files up to this size are identified by content, larger ones by name, size and mtime


def require(*modules: str, extra: str) -> None:
    """Checks that modules of an optional dependency set (`extra`) are installed.

    Raises:
        UsageError: a module is missing; the message has the command that installs it.
    """
    import importlib.util

    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"{', '.join(missing)} is not installed; add it with: pip install 'dice-align[{extra}]'")


def check_model_folder(folder: Path, *, role: str) -> None:
    """Checks that the folder has weights, and config.json or adapter_config.json.

    Raises:
        DataError: the message names the file that is missing.
    """
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise DataError(f"{role}: {folder} has no config.json; it is not a model folder in the Hugging Face layout")
    if not any(True for pattern in _WEIGHTS for _ in folder.glob(pattern)):
        raise DataError(
            f"{role}: {folder} has a config but no weights ({' or '.join(_WEIGHTS)}); "
            "was the download or the save interrupted?"
        )


def model_identity(folder: Path) -> str:
    """A digest of the files in a model folder: small files by content, large ones by name, size and mtime."""
    parts: list[Any] = []
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in (".json", ".safetensors", ".bin", ".model", ".jinja", ".txt"):
            stat = file.stat()
            content = file_digest(file) if stat.st_size <= _HASHED_BYTES else [stat.st_size, stat.st_mtime_ns]
            parts.append([file.name, content])
    return digest(parts)


@dataclass(frozen=True)
class Placement:
    """A device such as "cuda:0", and the name of a torch dtype."""

    device: str
    dtype: str


def placement(config: ModelConfig) -> Placement:
    """The device and dtype of models. "auto" is the first GPU, else the CPU; bfloat16 on a GPU with it, else float32.

    Raises:
        UsageError: this machine lacks the device, or torch or transformers is not installed.
    """
    require("torch", "transformers", extra="train")
    with timed("import"):
        import torch

    device = config.device
    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"model.device is {device!r}, but torch sees no GPU here; set model.device=cpu or auto")
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"
    return Placement(device, dtype)


def load_model(folder: Path, config: ModelConfig, *, training: bool = False) -> PreTrainedModel:
    """Loads a causal language model in evaluation mode.

    Args:
        folder: a model folder in the Hugging Face layout.
        config: dtype, device, attention implementation.
        training: leave the model on the CPU, since the trainer moves it.

    Raises:
        DataError: the folder is incomplete, or transformers cannot load it.
    """
    with timed("import"):
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

    logging.disable_progress_bar()
    place = placement(config)
    check_model_folder(folder, role="model")
    options: dict[str, Any] = {}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    with timed("load"):
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, place.dtype), trust_remote_code=config.trust_remote_code, **options
            )
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder}: transformers cannot load a causal language model from it: {error}") from None
        model.eval()
        return model if training else model.to(place.device)


_held: list[tuple[tuple[str, str, ModelConfig], PreTrainedModel]] = []


def held_model(folder: Path, config: ModelConfig) -> PreTrainedModel:
    """`load_model` with a cache of one: the last model stays in this process, so weights are not read twice in a row.

    The model stays until another one is requested or `release_held` is called. Call that before the device memory is
    needed for something else.
    """
    key = (str(folder.resolve()), model_identity(folder), config)
    if not _held or _held[0][0] != key:
        release_held()
        _held.append((key, load_model(folder, config)))
    return _held[0][1]


def release_held() -> None:
    """Drops the model of `held_model` and frees its memory."""
    if _held:
        device = _held[0][1].device
        _held.clear()
        release(device)


def release(device: torch.device) -> None:
    """Frees torch's cached memory on a GPU. Call it after the last reference to a model is dropped."""
    import gc

    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
