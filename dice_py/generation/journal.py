"""The journal of an open shard: finished responses, appended as they come, in any order.

A response that is in a journal is not sampled again. The file is a header with the shard's key, then records,
each with its length and a checksum; a process that is killed, or a disk that is full, leaves at most a torn
record at the end, which the next opening cuts off. A journal of another key is dropped: its responses answer
another question.

    header   b"DICEJRN1", u16 bytes of the key, key, u32 CRC-32 of the header up to here
    record   u32 bytes of the body, u32 CRC-32 of the body, body
    body     u32 row, u8 finish reason (0 stop, 1 length), f64 logp, i32 token ids…

All numbers are little-endian.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dice_py.errors import DiskFullError
from dice_py.generation.engines.base import Sample
from dice_py.storage.files import is_disk_full

_MAGIC = b"DICEJRN1"
_RECORD = struct.Struct("<II")
_BODY = struct.Struct("<IBd")
_FINISH_REASONS = ("stop", "length")
_FSYNC_SECONDS = 5.0
"""A power cut loses what was written since the last fsync; a killed process loses nothing that was flushed."""


def _header(key: str) -> bytes:
    text = key.encode()
    header = _MAGIC + struct.pack("<H", len(text)) + text
    return header + struct.pack("<I", zlib.crc32(header))


class Journal:
    """Appends samples by row number and reads them back; only where each one lies is held in memory.

    Opening it keeps what is whole under the same key, so that `rows` tells what need not be made again.

    Raises:
        DiskFullError: from any method that writes; what was flushed before is kept.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self._places: dict[int, tuple[int, int]] = {}  # row → offset and bytes of its body
        self._unflushed: list[bytes] = []
        self._synced = time.monotonic()
        with self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                self._end = self._recover(_header(key))
                os.ftruncate(self._file, self._end)
                if self._end == 0:
                    self._end = self._write(_header(key))
            except BaseException:
                os.close(self._file)
                raise

    @property
    def rows(self) -> set[int]:
        """Row numbers of the responses in it."""
        return set(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def append(self, row: int, sample: Sample) -> None:
        """Takes a response in; it is safe from the death of this process after `flush`."""
        tokens = np.asarray(sample.token_ids, dtype="<i4").tobytes()
        body = _BODY.pack(row, _FINISH_REASONS.index(sample.finish_reason), sample.logp) + tokens
        self._places[row] = (self._end + _RECORD.size, len(body))
        self._end += _RECORD.size + len(body)
        self._unflushed.append(_RECORD.pack(len(body), zlib.crc32(body)) + body)

    def flush(self) -> None:
        """Hands what was appended to the operating system, and every few seconds to the disk."""
        if not self._unflushed:
            return
        with self._writing():
            self._write(b"".join(self._unflushed))
            self._unflushed.clear()
            if time.monotonic() - self._synced >= _FSYNC_SECONDS:
                os.fsync(self._file)
                self._synced = time.monotonic()

    def read(self, row: int) -> Sample:
        """The response of a row that was flushed."""
        offset, size = self._places[row]
        body = os.pread(self._file, size, offset)
        _, reason, logp = _BODY.unpack_from(body)
        return Sample(np.frombuffer(body, "<i4", offset=_BODY.size).tolist(), _FINISH_REASONS[reason], logp)

    def close(self) -> None:
        """Ends it without writing; what was not flushed is lost. A second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def remove(self) -> None:
        """Closes and deletes it: the shard is whole."""
        self.close()
        self.path.unlink()

    def _recover(self, header: bytes) -> int:
        """Reads what is there; the offset behind the last whole record, 0 where the header is another."""
        with self.path.open("rb") as file:
            if file.read(len(header)) != header:
                return 0
            end = len(header)
            while len(head := file.read(_RECORD.size)) == _RECORD.size:
                size, check = _RECORD.unpack(head)
                # A torn length may be any number: nothing is read for one that the file cannot hold.
                if not _BODY.size <= size <= os.fstat(self._file).st_size - end:
                    break
                body = file.read(size)
                if len(body) < size or zlib.crc32(body) != check:
                    break
                self._places[_BODY.unpack_from(body)[0]] = (end + _RECORD.size, size)
                end += _RECORD.size + size
        return end

    def _write(self, data: bytes) -> int:
        left = memoryview(data)
        while left:
            left = left[os.write(self._file, left) :]
        return len(data)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not is_disk_full(error):
                raise
            raise DiskFullError(
                f"no room left on the disk while writing {self.path}; the responses that were finished before are "
                "kept. Free some space, then `dice resume` the run (or call the stage again)"
            ) from error
