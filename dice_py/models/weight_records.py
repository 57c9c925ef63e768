"""One pass over a model's weights: a digest of each tensor's values, and whether all are finite, or all are 0.

The result of a file is kept in the cache folder under its path, and is used again while size, inode and times of the
file stay what they were. A file that changed less than two seconds before it was read is not kept, since a further
change could leave the same time. Imports no torch; NumPy and xxhash are imported inside functions.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dice_py.errors import DataError, DiskFullError
from dice_py.models.weight_files import StoredTensor, read_header
from dice_py.storage.cache import cache_folder
from dice_py.storage.digests import bytes_digest, content_digest
from dice_py.storage.files import write_json

if TYPE_CHECKING:
    import numpy as np

_PART = 2**18  # bytes in memory, which stay in the cache of a core; a multiple of the width of every type
SETTLED_NS = 2 * 10**9
"""Age below which a change of a file may have left its times as they were."""
SMALL = 2**20
"""Bytes; reading a smaller file again takes no longer than looking it up."""
# The bits of the exponent, all of which are set in NaN and infinity, in the unsigned integer of the same width.
_EXPONENT = {
    "F64": ("u8", 0x7FF << 52),
    "F32": ("u4", 0xFF << 23),
    "BF16": ("u2", 0xFF << 7),
    "F16": ("u2", 0x1F << 10),
}


@dataclass(frozen=True)
class TensorRecord:
    """What a pass found of one tensor."""

    dtype: str
    shape: list[int]
    digest: str
    """xxh3-128 of its values' bytes."""
    finite: bool
    zero: bool = False
    """Whether all of its values are 0."""


def tensor_records(file: Path) -> dict[str, TensorRecord]:
    """The records of all tensors of a safetensors file, by name.

    Raises:
        DataError: as of `read_header`, or the file cannot be read.
    """
    kept = _remembered(file, _RECORDS, lambda: {name: asdict(record) for name, record in _read(file)})
    return {name: TensorRecord(**record) for name, record in kept.items()}


def file_content(file: Path) -> str:
    """xxh3-128 of a file's bytes.

    Raises:
        DataError: the file cannot be read.
    """
    return str(_remembered(file, _CONTENT, lambda: {"digest": content_digest(file)})["digest"])


def non_finite(values: np.ndarray, dtype: str) -> bool:
    """True if NaN or an infinity is among values, which are bytes (u8) of a type as safetensors names it."""
    if dtype not in _EXPONENT:
        return False
    unsigned, exponent = _EXPONENT[dtype]
    words = values.view("<" + unsigned)
    mask = words.dtype.type(exponent)
    return bool(words.size) and bool(((words & mask) == mask).any())


def _read(file: Path) -> Iterator[tuple[str, TensorRecord]]:
    with file.open("rb") as handle:
        for name, tensor in read_header(file).items():
            yield name, _record(handle, file, name, tensor)


def stored_parts(handle: BinaryIO, file: Path, name: str, tensor: StoredTensor, size: int) -> Iterator[np.ndarray]:
    """The bytes of a tensor of a safetensors file in order, (bytes of at most `size`,) uint8.

    Args:
        handle: `file`, opened.

    Raises:
        DataError: the file ends too early.
    """
    import numpy as np

    handle.seek(tensor.start)
    left = tensor.end - tensor.start
    while left:
        part = np.fromfile(handle, np.uint8, min(left, size))
        if not part.size:
            raise DataError(f"{file} ends within {name}; was it changed while it was read?")
        yield part
        left -= part.size


def _record(handle: BinaryIO, file: Path, name: str, tensor: StoredTensor) -> TensorRecord:
    import xxhash

    state, finite, zero = xxhash.xxh3_128(), True, True
    for part in stored_parts(handle, file, name, tensor, _PART):
        state.update(part.data)
        finite = finite and not non_finite(part, tensor.dtype)
        zero = zero and not part.any()
    return TensorRecord(tensor.dtype, list(tensor.shape), state.hexdigest(), finite, zero)


def _stamp(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


_RECORDS, _CONTENT = "records 2", "content"
"""What is remembered of a file. The number changes with the fields of TensorRecord."""
_in_process: dict[tuple[str, str], tuple[list[int], dict[str, Any]]] = {}


def forget() -> None:
    """Drops what this process remembers; the cache folder keeps it."""
    _in_process.clear()


def _remembered(file: Path, kind: str, make: Any) -> dict[str, Any]:
    """The result of `make` (JSON), which is kept by its kind and the file's path as long as its stamp holds."""
    path = os.path.realpath(file)
    key = (kind, path)
    try:
        stamp, began = _stamp(file), time.time_ns()
        if stamp[0] < SMALL:
            return dict(make())
        if key in _in_process and _in_process[key][0] == stamp:
            return _in_process[key][1]
        name = bytes_digest(f"{kind}\0{path}".encode("utf-8", "surrogateescape"))
        place = cache_folder() / "weights" / f"{name}.json"
        stored = _stored(place, stamp)
        made: dict[str, Any] = make() if stored is None else stored
        unchanged = _stamp(file) == stamp
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    if unchanged and max(stamp[2:]) < began - SETTLED_NS:
        _in_process[key] = (stamp, made)
        if stored is None:
            with contextlib.suppress(OSError, DiskFullError):  # it is read again the next time
                write_json(place, {"file": path, "stamp": stamp, "content": made})
    return made


def _stored(place: Path, stamp: list[int]) -> dict[str, Any] | None:
    try:
        kept = json.loads(place.read_text(encoding="utf-8"))
        return dict(kept["content"]) if kept["stamp"] == stamp else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
