"""Opens files of rows for reading, unpacking those that gzip, zstd, bzip2 or xz compressed, as a stream."""

from __future__ import annotations

import contextlib
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from dice_py.errors import DataError

PACKED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
_MAGIC = ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"))


def packing(path: Path) -> str | None:
    """What compressed a file, by its first bytes; None for other files. Its name may differ."""
    with path.open("rb") as file:
        first = file.read(8)
    return next((name for magic, name in _MAGIC if first.startswith(magic)), None)


@contextlib.contextmanager
def open_unpacked(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked part by part while they are read.

    Raises:
        DataError: the compressed data is damaged or cut off.
    """
    kind = packing(path)
    try:
        with contextlib.closing(_opened(path, kind)) as stream:
            yield stream
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if kind is None:
            raise
        raise DataError(
            f"{path} cannot be unpacked by {kind} ({error}): it is damaged or cut off; get it again"
        ) from None


def _opened(path: Path, kind: str | None) -> BinaryIO:
    if kind == "gzip":
        import gzip

        return cast(BinaryIO, gzip.open(path, "rb"))
    if kind == "bzip2":
        import bz2

        return cast(BinaryIO, bz2.open(path, "rb"))
    if kind == "xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    if kind == "zstd":
        import pyarrow as pa

        # Absolute: pyarrow would take "s3:" for the scheme of a URL.
        return cast(BinaryIO, io.BufferedReader(pa.input_stream(str(path.absolute()), compression="zstd")))
    return path.open("rb")
