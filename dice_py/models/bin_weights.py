"""The tensors of pytorch_model*.bin, by torch's restricted unpickler, which runs no code of the file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dice_py.errors import DataError
from dice_py.models.weight_files import check_is_weights
from dice_py.models.weight_records import TensorRecord
from dice_py.storage.digests import bytes_digest

if TYPE_CHECKING:
    import numpy as np
    import torch

_NAMES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def bin_tensors(file: Path, device: Literal["cpu", "meta"]) -> dict[str, torch.Tensor]:
    """The tensors by name. On the CPU they are mapped, and read when they are used, where the format allows it.

    Raises:
        DataError: the file is incomplete, asks for code, or is no dictionary of tensors.
    """
    import torch

    check_is_weights(file)
    try:
        with file.open("rb") as handle:
            archive = handle.read(2) == b"PK"  # the format before torch 1.6 cannot be mapped
        held = torch.load(file, map_location=device, weights_only=True, mmap=archive or None)
    except Exception as error:  # the unpickler passes on whatever a damaged file leads to
        text = (str(error).strip().splitlines() or [""])[0][:200]
        raise DataError(
            f"{file} cannot be read as weights ({type(error).__name__}: {text}); code in it is never run. Download or "
            "save the model again, best as safetensors"
        ) from None
    if not isinstance(held, dict) or not all(isinstance(value, torch.Tensor) for value in held.values()):
        raise DataError(f"{file} is not a dictionary of tensors by name; save the model with save_pretrained")
    return {str(name): tensor for name, tensor in held.items()}


def bin_records(file: Path) -> dict[str, TensorRecord]:
    """The records of all tensors, as `tensor_records` gives them for safetensors."""
    import torch

    records = {}
    for name, tensor in bin_tensors(file, "cpu").items():
        values = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
        kind = str(tensor.dtype).removeprefix("torch.")
        finite, zero = _is_finite(tensor), not bool(values.any())
        digest = bytes_digest(values.data)
        records[name] = TensorRecord(_NAMES.get(kind, kind), list(tensor.shape), digest, finite, zero)
    return records


def bin_values(file: Path, name: str, start: int, count: int) -> np.ndarray:
    """`count` values of a tensor from `start`, flat, as f32."""
    values: np.ndarray = bin_tensors(file, "cpu")[name].detach().flatten()[start : start + count].float().numpy()
    return values


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    return all(bool(part.isfinite().all()) for part in tensor.detach().flatten().split(2**22))
