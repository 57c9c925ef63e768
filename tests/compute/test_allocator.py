"""The C allocator of workers: its settings, whose choice stands, and a note where they have no effect."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import worker_works as works
from places import child_environment

from dice_py.compute import allocator
from dice_py.compute.allocator import SETTINGS, allocator_settings, check_allocator
from dice_py.compute.stage_process import WarmPool, run_in_subprocess

PAGES = works.BLOCK // 2**21
"""Of a block: the fewest that it can have, with huge pages."""


@pytest.fixture(autouse=True)
def _no_gpu_and_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "GPU_FILES", ())
    for name in (*SETTINGS, "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES", "LD_PRELOAD", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def stage(tmp_path: Path) -> Callable[..., tuple[Any, list[str]]]:
    """Runs work in a worker: its value, and the notes."""

    def run(work: Any = works.memory_settings, **arguments: Any) -> tuple[Any, list[str]]:
        notes: list[str] = []

        def on_event(event: str, **fields: Any) -> None:
            if event == "note":
                notes.append(fields["text"])

        value = run_in_subprocess(work, log=tmp_path / "log", remedy="", report=on_event, **arguments)
        return value, notes

    return run


def test_workers_keep_freed_memory(stage: Callable[..., Any]) -> None:
    """A block that was freed is used again: the kernel need not clear its pages each time."""
    value, notes = stage()
    assert value["set"] == SETTINGS
    assert value["faults"][0] >= PAGES
    assert max(value["faults"][1:]) < PAGES / 2
    assert notes == []
    assert not set(SETTINGS) & set(os.environ)


def test_warm_workers_too(stage: Callable[..., Any], tmp_path: Path) -> None:
    with WarmPool() as pool:
        pool.prepare(["json"], log=tmp_path / "warm.log")
        value, _ = stage(warm=pool.take(["json"]))
    assert value["set"] == SETTINGS


@pytest.mark.parametrize(
    "chosen",
    [
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"MALLOC_MMAP_THRESHOLD_": "131072"},
        {"MALLOC_MMAP_MAX_": "100"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"},
        {"LD_PRELOAD": "/usr/lib/x86_64-linux-gnu/libjemalloc.so.2"},
        {"LD_PRELOAD": "libtcmalloc_minimal.so.4"},
    ],
    ids=["trim", "mmap", "mmap count", "tunables", "jemalloc", "tcmalloc"],
)
def test_the_users_choice_stands(chosen: dict[str, str]) -> None:
    assert allocator_settings(chosen) == {}
    others = {"MALLOC_ARENA_MAX": "2", "GLIBC_TUNABLES": "glibc.cpu.x86_ibt=off", "LD_PRELOAD": "libfaketime.so"}
    assert allocator_settings(others) == SETTINGS


def test_a_worker_has_the_users_choice(stage: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    value, notes = stage()
    assert value["set"] == {"MALLOC_MMAP_THRESHOLD_": "131072"}
    assert min(value["faults"]) >= PAGES  # every block is mapped anew
    assert notes == []


def test_nothing_is_set_where_there_is_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "nvidiactl"
    monkeypatch.setattr(allocator, "GPU_FILES", (str(file),))
    assert allocator_settings({}) == SETTINGS
    file.touch()
    assert allocator_settings({}) == {}
    assert allocator_settings({"CUDA_VISIBLE_DEVICES": "0"}) == {}
    assert allocator_settings({"CUDA_VISIBLE_DEVICES": ""}) == SETTINGS  # and none can be used


class Function:
    """A function as ctypes has it: with attributes for its types."""

    restype: Any = None
    argtypes: Any = None

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *arguments: Any) -> Any:
        return self.call(*arguments)


class Glibc:
    """A C library whose mallopt refuses thresholds above `largest`, and that maps blocks above the threshold."""

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self.set: dict[int, int] = {}
        self.mapped = 0
        self.mallopt, self.malloc = Function(self.choose), Function(self.allocate)
        self.free, self.mallinfo = Function(self.release), Function(self.info)

    def choose(self, parameter: int, value: int) -> int:
        accepted = parameter != -3 or value <= self.largest
        if accepted:
            self.set[parameter] = value
        return int(accepted)

    def allocate(self, size: int) -> int:
        self.mapped = int(size >= self.set.get(-3, 131072))
        return 1

    def release(self, block: int) -> None:
        self.mapped = 0

    def info(self) -> SimpleNamespace:
        return SimpleNamespace(arena=0, hblks=self.mapped)


@pytest.mark.parametrize(
    ("largest", "threshold", "note"),
    [(2**40, 2**31 - 1, None), (2**25, 2**25, "ignores MALLOC_MMAP_THRESHOLD_=4294967296")],
    ids=["the environment came too late", "glibc before 2.35"],
)
def test_settings_without_effect(
    monkeypatch: pytest.MonkeyPatch, largest: int, threshold: int, note: str | None
) -> None:
    """The highest threshold that the library takes is set in the process; a note says where that is not enough."""
    libc = Glibc(largest)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    assert check_allocator() is None  # not set: nothing is checked
    assert libc.set == {}
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    found = check_allocator()
    assert libc.set == {-1: -1, -3: threshold}
    assert (found is None) == (note is None)
    assert found is None or note in found


def test_the_check_tells_the_two_apart(stage: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert stage(works.keeps)[0] is True
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    assert stage(works.keeps)[0] is False
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=131072")
    assert stage(works.keeps)[0] is False


def test_the_note_comes_once(stage: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all processes of a run, their own workers included."""
    (tmp_path / "sitecustomize.py").write_text(
        "import ctypes, types\n"
        "load = ctypes.CDLL\n"
        "ctypes.CDLL = lambda name, *rest: types.SimpleNamespace() if name is None else load(name, *rest)\n"
    )
    path = child_environment()["PYTHONPATH"]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), path]))
    _, notes = stage()
    assert [note for note in notes if "has no settings of malloc" in note] == notes
    assert len(notes) == 1
    assert stage()[1] == []
    _, notes = stage(partial(works.in_its_own_worker, str(tmp_path / "inner.log")))
    assert notes == ["of the outer worker"]
