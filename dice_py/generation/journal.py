"""The journal of an unfinished shard: finished responses, appended in the order in which they end.

A response that is in a journal is not sampled again. The file is a header with the shard's key, then records, each with
its length and a checksum. A killed process or a full disk leaves at most one torn record at the end, which is cut off
when the journal is opened next. A journal with another key is emptied, since its responses belong to other settings.

Who opens a journal that is there goes on in a copy of it. A process that was given up, but still runs on a node that
the others cannot reach, writes into the file that it has open, which is no longer the journal, and notices it before it
writes the shard (`check_ours`).

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

from dice_py.errors import DiskFullError, InterruptedRunError
from dice_py.generation.engines.base import Sample
from dice_py.storage.files import TEMPORARY, is_disk_full, make_folder

_MAGIC = b"DICEJRN1"
_RECORD = struct.Struct("<II")
_BODY = struct.Struct("<IBd")
_FINISH_REASONS = ("stop", "length")
_FSYNC_SECONDS = 5.0
"""A power failure loses what was written since the last fsync; a killed process loses nothing that was flushed."""


_CHUNK = 2**20  # bytes that are copied at a time


def _open(path: Path, flags: int) -> int:
    return os.open(path, flags | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def _header(key: str) -> bytes:
    text = key.encode()
    header = _MAGIC + struct.pack("<H", len(text)) + text
    return header + struct.pack("<I", zlib.crc32(header))


class Journal:
    """Appends samples by row number and reads them back. Only the offsets of the records are in memory.

    Opening a journal keeps its complete records if they have the same key; `rows` are those that need no sampling.

    Args:
        path: created, with its folder, if it does not exist.
        key: of the shard.

    Raises:
        DiskFullError: from any method that writes; what was flushed before is kept.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self._bodies: dict[int, tuple[int, int]] = {}  # row → offset and bytes of its body
        self._unflushed: list[bytes] = []
        self._synced = time.monotonic()
        with self._writing():
            make_folder(path.parent)
            self._file = _open(path, os.O_CREAT)
            try:
                self._end = self._recover(_header(key))
                if self._end:
                    self._take_over()
                else:
                    os.ftruncate(self._file, 0)
                    self._end = self._write(_header(key))
            except BaseException:
                os.close(self._file)
                raise

    def check_ours(self) -> None:
        """Checks that no other process has opened the journal since, to go on with its shard.

        Raises:
            InterruptedRunError: one has.
        """
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(self.path.stat(), os.fstat(self._file)):
                return
        raise InterruptedRunError(f"{self.path} was taken over by another process, which goes on with this shard")

    @property
    def rows(self) -> set[int]:
        """Row numbers of the responses in it."""
        return set(self._bodies)

    def __len__(self) -> int:
        return len(self._bodies)

    def append(self, row: int, sample: Sample) -> None:
        """Adds a response to the next `flush`. A row that is appended twice has the later response."""
        tokens = struct.pack(f"<{len(sample.token_ids)}i", *sample.token_ids)
        body = _BODY.pack(row, _FINISH_REASONS.index(sample.finish_reason), sample.logp) + tokens
        self._bodies[row] = (self._end + _RECORD.size, len(body))
        self._end += _RECORD.size + len(body)
        self._unflushed.append(_RECORD.pack(len(body), zlib.crc32(body)) + body)

    def flush(self) -> None:
        """Writes what was appended, so that it survives the end of this process. Syncs to disk every few seconds."""
        if not self._unflushed:
            return
        with self._writing():
            self._write(b"".join(self._unflushed))
            self._unflushed.clear()
            if time.monotonic() - self._synced >= _FSYNC_SECONDS:
                os.fsync(self._file)
                self._synced = time.monotonic()
                self.check_ours()

    def read(self, row: int) -> Sample:
        """The response of a row, which must have been flushed.

        Raises:
            KeyError: the row is not in the journal.
        """
        offset, size = self._bodies[row]
        body = os.pread(self._file, size, offset)
        _, reason, logp = _BODY.unpack_from(body)
        tokens = struct.unpack_from(f"<{(len(body) - _BODY.size) // 4}i", body, _BODY.size)
        return Sample(list(tokens), _FINISH_REASONS[reason], logp)

    def close(self) -> None:
        """Closes the file without writing; what was not flushed is lost. A second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def remove(self) -> None:
        """Closes and deletes the journal, when the shard is complete."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _recover(self, header: bytes) -> int:
        """Reads the records; returns the offset behind the last complete one, or 0 if the header differs."""
        with open(self._file, "rb", closefd=False) as file:
            if file.read(len(header)) != header:
                return 0
            end = len(header)
            while len(head := file.read(_RECORD.size)) == _RECORD.size:
                size, check = _RECORD.unpack(head)
                # A torn length may be any number. One that exceeds the file is not read.
                if not _BODY.size <= size <= os.fstat(self._file).st_size - end:
                    break
                body = file.read(size)
                if len(body) < size or zlib.crc32(body) != check:
                    break
                self._bodies[_BODY.unpack_from(body)[0]] = (end + _RECORD.size, size)
                end += _RECORD.size + size
        return end

    def _take_over(self) -> None:
        """Puts a copy of the complete records in the place of the file, and goes on in it."""
        copy = self.path.with_name(f".{self.path.name}.{os.getpid()}{TEMPORARY}")
        before, self._file = self._file, _open(copy, os.O_CREAT | os.O_TRUNC)
        try:
            at = 0
            while at < self._end:
                at += self._write(os.pread(before, min(_CHUNK, self._end - at), at))
            copy.rename(self.path)
        except OSError as error:
            copy.unlink(missing_ok=True)
            if not is_disk_full(error):
                raise
            # Who has the file open could not write either: what is there can be read.
            before, self._file = self._file, before
            os.ftruncate(self._file, self._end)
        finally:
            os.close(before)

    def _write(self, data: bytes) -> int:
        remaining = memoryview(data)
        while remaining:
            remaining = remaining[os.write(self._file, remaining) :]
        return len(data)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Around writes: raises a full disk as DiskFullError."""
        try:
            yield
        except OSError as error:
            if not is_disk_full(error):
                raise
            raise DiskFullError(
                f"no room left on the disk while writing {self.path}; the responses that were written before are kept. "
                "Free some space, then `dice resume` the run (or call the stage again)"
            ) from error
