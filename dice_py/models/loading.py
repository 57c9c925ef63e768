"""Models and tokenizers: found, checked, identified, loaded; prompts and pairs as token ids.

Importing this file imports neither torch nor transformers; its functions do.
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
_HASHED_WHOLE = 64 * 2**20  # bytes; larger files count by name, size and time


def require(*modules: str, extra: str) -> None:
    """Checks that modules of an optional extra are installed.

    Raises:
        UsageError: naming what is missing and the command that adds it.
    """
    import importlib.util

    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"{', '.join(missing)} is not installed; add it with: pip install 'dice-align[{extra}]'")


def resolve_model(name: str, revision: str | None, *, role: str) -> Path:
    """The local folder of a model: `name` itself if it is one, else a snapshot from the Hugging Face hub.

    Raises:
        DataError: the folder lacks a config or weights, or the hub does not give the model.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or folder.exists():
            raise DataError(f"{role}: {name} is not a folder; give a model folder or a Hugging Face id")
        folder = _snapshot(name, revision, role)
    check_model_folder(folder, role=role)
    return folder.resolve()


def _snapshot(name: str, revision: str | None, role: str) -> Path:
    require("huggingface_hub", extra="train")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "tokenizer*"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{role}: {name} is no folder here, and the Hugging Face hub does not give it ({first}); "
            "check the name, log in (hf auth login), or download it first and give its folder"
        ) from None


def check_model_folder(folder: Path, *, role: str) -> None:
    """Checks for config.json (or an adapter's) and for weights.

    Raises:
        DataError: naming what the folder lacks.
    """
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise DataError(f"{role}: {folder} has no config.json; it is not a model folder in the Hugging Face layout")
    if not any(True for pattern in _WEIGHTS for _ in folder.glob(pattern)):
        raise DataError(
            f"{role}: {folder} has a config but no weights (looked for {' and '.join(_WEIGHTS)}); "
            "was the download or the save cut off?"
        )


def model_identity(folder: Path) -> str:
    """A digest of what the folder holds: small files by content, large ones by name, size and time."""
    parts: list[Any] = []
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in (".json", ".safetensors", ".bin", ".model", ".jinja", ".txt"):
            stat = file.stat()
            content = file_digest(file) if stat.st_size <= _HASHED_WHOLE else [stat.st_size, stat.st_mtime_ns]
            parts.append([file.name, content])
    return digest(parts)


@dataclass(frozen=True)
class Placement:
    """Where a model is held and in which type: a device such as `cuda:0`, and a torch dtype's name."""

    device: str
    dtype: str


def placement(config: ModelConfig) -> Placement:
    """Resolves `auto`: the first GPU else the CPU; bfloat16 on a GPU that has it, else float32.

    Raises:
        UsageError: a device that this machine lacks.
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
    """A causal language model in evaluation mode on its device (left on the CPU for `training`).

    Raises:
        DataError: transformers cannot build it from the folder.
    """
    with timed("import"):
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

    logging.disable_progress_bar()
    where = placement(config)
    check_model_folder(folder, role="model")
    options: dict[str, Any] = {}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    with timed("load"):
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, where.dtype), trust_remote_code=config.trust_remote_code, **options
            )
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder}: transformers cannot load a causal language model from it: {error}") from None
        model.eval()
        return model if training else model.to(where.device)


_held: list[tuple[tuple[str, str, ModelConfig], PreTrainedModel]] = []


def held_model(folder: Path, config: ModelConfig) -> PreTrainedModel:
    """`load_model`, but the last one is held in this process, so that no weights are read twice in a row.

    Held until another is asked for, or `release_held`: whoever is about to fill the device otherwise calls that.
    """
    wanted = (str(folder.resolve()), model_identity(folder), config)
    if not _held or _held[0][0] != wanted:
        release_held()
        _held.append((wanted, load_model(folder, config)))
    return _held[0][1]


def release_held() -> None:
    """Gives the memory of the held model back."""
    if _held:
        device = _held[0][1].device
        _held.clear()
        release(device)


def release(device: torch.device) -> None:
    """Gives cached GPU memory back, after the last reference to a model was dropped."""
    import gc

    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
