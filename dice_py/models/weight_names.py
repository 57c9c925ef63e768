"""The names and shapes of a model's weights, as its folder stores them and as its architecture expects them.

transformers fills a weight that a checkpoint lacks with random numbers. Here its own loading runs on the meta device,
with a stand-in for each tensor that the headers name, so that its renamings, merged experts and tied weights apply and
no weight is read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_py.errors import DataError
from dice_py.models.bin_weights import bin_tensors
from dice_py.models.folder_check import read_object
from dice_py.models.weight_files import first_few, is_old_buffer, read_header, weight_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_DTYPES = {
    **{"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "BOOL": "bool", "C64": "complex64"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "U16": "uint16"},
}


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder's weights by name, on the meta device: names, types and shapes, no values.

    Raises:
        DataError: a tensor is in two files, or has a type that torch does not know.
    """
    import torch

    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        if file.suffix == ".bin":
            held = bin_tensors(file, "meta")
        else:
            held = {}
            for name, tensor in read_header(file).items():
                if tensor.dtype not in _DTYPES:
                    raise DataError(f"{file}: {name} is stored as {tensor.dtype}, which is not a type of weights")
                dtype = getattr(torch, _DTYPES[tensor.dtype])
                held[name] = torch.empty(tensor.shape, dtype=dtype, device="meta")
        twice = sorted(tensors.keys() & held.keys())
        if twice:
            raise DataError(
                f"{folder}: {first_few(twice)} in two files of weights, one of them {file.name}; which counts is not "
                "known: download or save the model again"
            )
        tensors |= held
    return tensors


def compare_weights(folder: Path, built: PreTrainedModel) -> None:
    """Compares the names and shapes of a folder's weights with those of a model, as transformers would load them.

    Args:
        built: the model that config.json describes, on the meta device.

    Raises:
        DataError: weights are missing, unknown or of another shape, or no numbers of a float type; the first few are
            named.
    """
    import torch

    stored, architecture = stored_tensors(folder), type(built).__name__
    shapes = {name: list(tensor.shape) for name, tensor in stored.items()}
    try:
        model, loading = type(built).from_pretrained(
            None,
            config=built.config,
            state_dict=dict(stored),
            device_map={"": "meta"},
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # tensors that do not go together fail anywhere in a merge
        parts = _parts(built, shapes) or f" ({error_line(error)})"
        raise DataError(
            f"{folder}: its weights do not go together as a {architecture}'s{parts}; save or download the model again"
        ) from None
    try:
        check_loaded(folder, architecture, loading, shapes)
    except DataError as error:
        # Merged parts have other names in the files.
        merged = any(name not in shapes for name, *_ in loading["mismatched_keys"])
        raise DataError(f"{error}{_parts(built, shapes) if merged else ''}") from None
    expected = dict(model.state_dict())
    for name, tensor in stored.items():
        if name in expected and expected[name].is_floating_point() and not tensor.is_floating_point():
            raise DataError(
                f"{folder}: {name} is stored as {str(tensor.dtype).removeprefix('torch.')}: a quantized model, which "
                "can be neither trained nor scored exactly; give the model in float32, bfloat16 or float16"
            )


def _parts(model: PreTrainedModel, stored: dict[str, list[int]]) -> str:
    """Names what differs from a saved model of this kind: parts that are merged at load are named nowhere else."""
    try:
        from transformers.core_model_loading import revert_weight_conversion

        reverted = revert_weight_conversion(model, dict(model.state_dict()))
    except Exception:  # only some conversions can be reverted without values
        return ""
    saved = {name: list(tensor.shape) for name, tensor in reverted.items()}
    absent = sorted(saved.keys() - stored.keys() - set(model.all_tied_weights_keys))
    if len(absent) > len(saved) / 2:
        return ""  # the names are others altogether
    reshaped = [name for name in sorted(saved.keys() & stored.keys()) if saved[name] != stored[name]]
    shapes = [f"{name} is {stored[name]}, not {saved[name]}" for name in reshaped]
    return "".join(
        f"; {what}: {first_few(names)}" for what, names in (("missing", absent), ("of another shape", shapes)) if names
    )


def check_loaded(folder: Path, architecture: str, loading: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    """Refuses a model whose weights are not all in the folder.

    Args:
        architecture: for the message.
        loading: transformers' `output_loading_info`.
        shapes: of the stored tensors by name, where they are known.

    Raises:
        DataError: weights are missing, unexpected, or of another shape.
    """
    missing = sorted(loading["missing_keys"])
    unexpected = [name for name in sorted(loading["unexpected_keys"]) if not is_of_another_part(folder, name)]
    reshaped = sorted(loading["mismatched_keys"], key=str)
    failed = [str(text).splitlines()[0] for text in loading.get("error_msgs") or []]
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing ({first_few(missing)})")
    if reshaped:
        each = [f"{name} is {list(stored)}, not {list(expected)}" for name, stored, expected in reshaped]
        parts.append(f"{len(each)} of another shape ({first_few(each)})")
    if unexpected:
        named = [f"{name} {shapes[name]}" if name in shapes else name for name in unexpected]
        parts.append(f"{len(named)} that the model does not have ({first_few(named)})")
    if failed:
        parts.append(f"{len(failed)} that cannot be converted ({first_few(failed)})")
    if parts:
        random = "What is missing would be random numbers: save" if missing else "Save"
        raise DataError(
            f"{folder}: its weights are not those that config.json describes ({architecture}): {'; '.join(parts)}. "
            f"{random} or download the model again{_wrapper(missing, unexpected)}"
        )


def _wrapper(missing: list[str], unexpected: list[str]) -> str:
    """What stands before the names of the weights, if that is what is wrong with them."""
    first = unexpected[0] if unexpected else ""
    expected = next((name for name in missing if first.endswith(f".{name}")), None)
    prefix = "" if expected is None else first.removesuffix(expected)
    held = {name.removeprefix(prefix) for name in unexpected if name.startswith(prefix)}
    if not prefix or len(held & set(missing)) < len(missing) / 2:  # tied weights are missing and not stored
        return ""
    return f". Each name begins with {prefix!r}, that of a wrapper: save the model that it wraps"


_OTHER_SENSES = re.compile(r"vision|visual|image|audio|speech|multi_?modal|mm_projector|connector")


def is_of_another_part(folder: Path, name: str) -> bool:
    """Whether a tensor that the model does not have is a buffer of older versions, or of a part that reads no text."""
    if is_old_buffer(name):
        return True
    config = read_object(folder / "config.json")
    return any(key in config for key in ("vision_config", "audio_config")) and bool(_OTHER_SENSES.search(name))


def error_line(error: Exception) -> str:
    """The class of an error and the first line of its text; the second too where the first ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    return f"{type(error).__name__}: {text[:300]}"
