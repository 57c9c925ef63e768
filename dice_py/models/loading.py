"""Where models are placed, and how they are loaded.

Importing this file imports neither torch nor transformers; its functions do. Tokenizers are in models/tokenization.py;
models/sources.py finds the folder that a name means; models/checkpoint.py checks it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_py.config.extras import require
from dice_py.config.shared import ModelConfig
from dice_py.errors import DataError, UsageError
from dice_py.models.folder_check import check_model_folder
from dice_py.models.identity import model_identity
from dice_py.models.weight_names import check_loaded
from dice_py.timing import timed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


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
    _check_device(device)
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"
    return Placement(device, dtype)


def _check_device(name: str) -> None:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"model.device is {name!r}, which is not a device of models; set it to auto, cpu or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"model.device is {name!r}, but torch sees no GPU here; set model.device=cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"model.device is {name!r}, but torch sees {torch.cuda.device_count()} GPUs here, counted from 0; set "
            "model.device=auto, or a smaller number"
        )


def load_model(folder: Path, config: ModelConfig, *, training: bool = False) -> PreTrainedModel:
    """Loads a causal language model in evaluation mode.

    Args:
        folder: a model folder in the Hugging Face layout.
        config: dtype, device, attention implementation.
        training: leave the model on the CPU, since the trainer moves it.

    Raises:
        DataError: the folder is incomplete, transformers cannot load it, or it lacks weights, which would be random.
    """
    with timed("import"):
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

    from safetensors import SafetensorError
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    logging.disable_progress_bar()
    place = placement(config)
    check_model_folder(folder, role="model")
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    with timed("load"):
        try:
            model, loading = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, place.dtype),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, with names
                **options,
            )
        except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
            raise DataError(f"{folder}: transformers cannot load a causal language model from it: {error}") from None
        if not is_deepspeed_zero3_enabled():  # it does not tell what it lacks
            check_loaded(folder, type(model).__name__, loading, {})
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
