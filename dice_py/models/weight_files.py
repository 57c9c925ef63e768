"""The weights of a model folder: which files hold them, and the names, types and shapes in their headers.

Reads headers and indexes, no weights, and imports neither torch nor NumPy. Format: https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import math
import re
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dice_py.errors import DataError

STORED_BYTES = {
    **{"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1},
    **{"U64": 8, "U32": 4, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8},
}
"""Bytes of a value of each type that safetensors stores in whole bytes."""

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_WHOLE_BIN, _INDEX_BIN = "pytorch_model.bin", "pytorch_model.bin.index.json"
_LFS = b"version https://git-lfs"
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    dtype: str
    """As safetensors names it, such as "BF16"."""
    shape: tuple[int, ...]
    start: int
    """Of its values, in bytes from the beginning of the file."""
    end: int


def is_lfs_pointer(file: Path) -> bool:
    """True for what `git clone` leaves in place of a large file where git-lfs is not installed."""
    with file.open("rb") as handle:
        return handle.read(len(_LFS)) == _LFS


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads the weights from: model.safetensors, else the shards of its index, else the
    same of pytorch_model.bin.

    Raises:
        DataError: there are none, an index or a shard is missing, or model.safetensors lies beside an index of others.
    """
    for whole, index in ((_WHOLE, _INDEX), (_WHOLE_BIN, _INDEX_BIN)):
        shards = _shards(folder / index) if (folder / index).is_file() else []
        if (folder / whole).is_file():
            if shards and shards != [folder / whole]:
                raise DataError(
                    f"{folder} holds weights twice: {whole}, and the shards that {index} names; libraries differ in "
                    "which they read. Delete one of the two"
                )
            return [folder / whole]
        if shards:
            return shards
    others = sorted(file.name for file in folder.glob("*.safetensors") if not file.name.startswith("adapter_model"))
    others += sorted(file.name for file in folder.glob("pytorch_model*.bin"))
    if others:
        index = _INDEX if others[0].endswith(".safetensors") else _INDEX_BIN
        raise DataError(
            f"{folder} has {first_few(others)}, but neither {index} nor a file of that name without a number, so what "
            "belongs to the model is not known; download or save the model again"
        )
    raise DataError(
        f"{folder} has a config but no weights (*.safetensors or pytorch_model*.bin); was the download or the save "
        "interrupted?"
    )


def _shards(index: Path) -> list[Path]:
    """The files of an index, all of which are there."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        named = content["weight_map"]
        files = sorted({str(name) for name in named.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        cause = "it is a git-lfs pointer" if is_lfs_pointer(index) else type(error).__name__
        raise DataError(f"{index} is not a complete index of weights ({cause}); download or save it again") from None
    if any(Path(name).name != name for name in files):
        raise DataError(f"{index} names files outside of its folder ({first_few(files)})")
    if not isinstance(content.get("metadata"), dict):
        raise DataError(f'{index} has no object "metadata", without which transformers loads no weights: add one, {{}}')
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise DataError(
            f"{index.parent} lacks {len(missing)} of the {len(files)} files of weights that {index.name} names "
            f"({first_few(missing)}); download or copy the model again"
        )
    for file in files:
        path = index.parent / file
        if path.suffix == ".safetensors":
            held = read_header(path)
            absent = sorted(name for name, place in named.items() if place == file and name not in held)
            if absent:
                raise DataError(
                    f"{path} lacks {len(absent)} of the tensors that {index.name} places there "
                    f"({first_few(absent)}); download or save the model again"
                )
    return [index.parent / name for name in files]


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, in the order of their values in the file.

    Raises:
        DataError: an empty or truncated file, a git-lfs pointer, or another format.
    """
    size = check_is_weights(file)
    try:
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > min(size - 8, _LONGEST_HEADER):
                raise ValueError(f"its header would take {length} bytes, and the file has {size}")
            entries = json.loads(handle.read(length))
        tensors = [(name, _tensor(entry, 8 + length)) for name, entry in entries.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise DataError(f"{file} is not a complete safetensors file ({error}); download or save it again") from None
    tensors.sort(key=lambda item: (item[1].start, item[1].end))
    at = 8 + length
    for name, tensor in tensors:
        if tensor.start != at or tensor.end > size:
            raise DataError(
                f"{file} is truncated or damaged: {name} lies at bytes {tensor.start} to {tensor.end}, and the file "
                f"has {size}; download or save it again"
            )
        at = tensor.end
    if at != size:
        raise DataError(f"{file} is damaged: its tensors end at byte {at}, the file at {size}; download it again")
    return dict(tensors)


def _tensor(entry: dict[str, Any], base: int) -> StoredTensor:
    dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
    start, end = (int(offset) for offset in entry["data_offsets"])
    if min(start, end - start, *shape, 0) < 0:
        raise ValueError("negative sizes in its header")
    width = STORED_BYTES.get(dtype)
    if width is not None and end - start != math.prod(shape) * width:
        raise ValueError(f"{end - start} bytes for {dtype} values in shape {list(shape)}")
    return StoredTensor(dtype, shape, base + start, base + end)


def check_is_weights(file: Path) -> int:
    """The size of a file of weights in bytes.

    Raises:
        DataError: it is empty, a git-lfs pointer, or a truncated zip archive (pytorch_model.bin).
    """
    size = file.stat().st_size
    if not size:
        raise DataError(f"{file} is empty; download or copy it again")
    if is_lfs_pointer(file):
        raise DataError(
            f"{file} is a git-lfs pointer, not weights: the repository was cloned without git-lfs; install it, then "
            "run `git lfs pull` in that folder"
        )
    if file.suffix == ".bin":
        with file.open("rb") as handle:
            archive = handle.read(2) == b"PK"
        if archive and not zipfile.is_zipfile(file):
            raise DataError(f"{file} is truncated: the end of its archive is missing; download or save it again")
    return size


_OLD_BUFFERS = re.compile(r"\.(attn|attention)\.(bias|masked_bias|causal_mask)$|rotary_emb\.inv_freq$")


def is_old_buffer(name: str) -> bool:
    """True for the masks and frequencies that models of older versions saved beside their weights."""
    return bool(_OLD_BUFFERS.search(name))


_WRAPPERS = re.compile(r"^((model|transformer|base_model|language_model|text_model)\.)+")


def without_wrapper(name: str) -> str:
    """The name of a weight without the prefix of the modules that wrap the layers, in which layouts differ."""
    return _WRAPPERS.sub("", name)


def first_few(names: Sequence[str], count: int = 3) -> str:
    """ "a, b, c and 5 more"."""
    rest = len(names) - count
    return ", ".join(names[:count]) + (f" and {rest} more" if rest > 0 else "")
