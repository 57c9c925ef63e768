"""The C allocator of processes that hold a model on a CPU: freed memory stays in the process, for the next tensor.

By default glibc returns a large block to the kernel when it is freed: from 128 KiB, later from 32 MiB. A forward or a
backward frees its tensors one after the other, and each new one then costs a page fault, in which the kernel clears
memory, for every 4 KiB. docs/figures.md has the share of time that this takes. glibc reads its settings when a process
starts, so they are set where one is started. Where freed memory stays, the peak is a little higher.

This module imports nothing heavy, since every worker imports it first.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path

SETTINGS = {"MALLOC_MMAP_THRESHOLD_": str(4 * 2**30), "MALLOC_TRIM_THRESHOLD_": str(8 * 2**30)}
"""Environment variables of glibc (`man mallopt`), in bytes: blocks of at least the first are mapped for themselves and
unmapped when they are freed, and free memory at the end of the heap is returned when it exceeds the second."""

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # parameters of mallopt
_LARGEST = 2**31 - 1  # mallopt takes an int
_OLD_LARGEST = 32 * 2**20  # of glibc before 2.35
_TESTED = 64 * 2**20
GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def allocator_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of `SETTINGS` to start a process with, beside those of `environment`.

    None where a GPU can be used, since tensors of the host decide nothing there; and none where the user chose: by one
    of these variables of glibc, or by an allocator in LD_PRELOAD.
    """
    chosen = (
        any(name in environment for name in (*SETTINGS, "MALLOC_MMAP_MAX_"))
        or "glibc.malloc" in environment.get("GLIBC_TUNABLES", "")
        or "malloc" in environment.get("LD_PRELOAD", "")
    )
    visible = environment.get("CUDA_VISIBLE_DEVICES", "all")
    gpu = visible not in ("", "-1") and any(Path(file).exists() for file in GPU_FILES)
    return {} if chosen or gpu else SETTINGS


@contextlib.contextmanager
def worker_environment() -> Iterator[None]:
    """Within the block, processes that are started get `allocator_settings` beside this process's environment."""
    settings = allocator_settings(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        for name in settings:
            os.environ.pop(name, None)


def check_allocator() -> str | None:
    """Checks, in a process that was started with `SETTINGS`, that they took effect, and sets what can be set where not.

    Returns:
        A sentence for the user where large blocks are returned to the kernel all the same; else None.
    """
    if any(os.environ.get(name) != value for name, value in SETTINGS.items()):
        return None  # a GPU, or the user's own choice
    libc = ctypes.CDLL(None)
    name = " ".join(platform.libc_ver()).strip() or "unknown"
    if not (hasattr(libc, "mallopt") and hasattr(libc, "mallinfo")):
        return f"the C library ({name}) has no settings of malloc: on a CPU, freed tensors go back to the kernel"
    if keeps_freed_memory(libc):
        return None
    libc.mallopt(_TRIM_THRESHOLD, -1)
    if libc.mallopt(_MMAP_THRESHOLD, _LARGEST) and keeps_freed_memory(libc):
        return None
    libc.mallopt(_MMAP_THRESHOLD, _OLD_LARGEST)
    return (
        f"the C library ({name}) ignores MALLOC_MMAP_THRESHOLD_={SETTINGS['MALLOC_MMAP_THRESHOLD_']}: on a CPU, freed "
        "tensors above 32 MiB go back to the kernel, which takes time; glibc 2.35 or newer, or jemalloc in LD_PRELOAD, "
        "keep them"
    )


class _MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ["arena", "ordblks", "smblks", "hblks", "hblkhd"]] + [
        ("rest", ctypes.c_int * 5)
    ]


def keeps_freed_memory(libc: ctypes.CDLL) -> bool:
    """True if a freed block of 64 MiB stays in the process. Nothing is written to it, so it takes no memory."""
    # `mallinfo2`, with figures above 2^31, is of glibc 2.33; a count of blocks needs none.
    libc.mallinfo.restype = _MallInfo
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    before = libc.mallinfo()
    block = libc.malloc(_TESTED)
    held = libc.mallinfo()
    libc.free(block)
    after = libc.mallinfo()
    return bool(held.hblks == before.hblks and after.arena == held.arena)
