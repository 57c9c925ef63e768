"""The token budget: how it starts, grows and shrinks, on examples computed by hand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from dice_py.compute import memory as device_memory
from dice_py.compute.memory import free_host_memory
from dice_py.models.flops import Shape
from dice_py.scoring import token_budget
from dice_py.scoring.token_budget import TokenBudget
from dice_py.storage.cache import recall, remember

# A token takes 4 bytes × (8 × 64 + 4 × 96) = 3584 bytes in float32, and half of it in bfloat16.
SHAPE = Shape("tiny", layer_weights=1, head_weights=1, vocabulary=10, hidden=64, widest=96, attention=1)
KIND = "token budgets"
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DICE_CACHE", str(tmp_path))
    monkeypatch.setattr(token_budget, "device_name", lambda device: f"a {device.type}")
    return tmp_path


class Memory:
    """A simulated device's memory in bytes, as torch.cuda and the host report it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
        self.free, self.allocated, self.peak, self.reserved = free, 0, 0, 0
        self.emptied = 0
        calls = {
            "mem_get_info": lambda _: (self.free, 10**12),
            "memory_allocated": lambda _: self.allocated,
            "max_memory_allocated": lambda _: self.peak,
            "memory_reserved": lambda _: self.reserved,
            "reset_peak_memory_stats": lambda _: setattr(self, "peak", self.allocated),
            "empty_cache": lambda: setattr(self, "emptied", self.emptied + 1),
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "current_device": lambda: 0,
        }
        for name, call in calls.items():
            monkeypatch.setattr(torch.cuda, name, call)
        monkeypatch.setattr(device_memory, "free_host_memory", lambda: self.free)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    """Half of 0.9 of it holds 1000 tokens in float32."""
    return Memory(monkeypatch, 7_964_445)


def make(
    setting: int | Literal["auto"] = "auto",
    *,
    device: torch.device = CUDA,
    dtype: torch.dtype = torch.float32,
    shape: Shape = SHAPE,
    notes: list[str] | None = None,
) -> TokenBudget:
    def on_event(event: str, **fields: Any) -> None:
        assert event == "note"
        if notes is not None:
            notes.append(fields["text"])

    return TokenBudget(setting, shape, dtype, device, on_event)


# --- the start ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_starts_at_the_estimate_from_the_shape(device: torch.device) -> None:
    assert make(device=device).tokens == 1000
    assert make(device=device, dtype=torch.bfloat16).tokens == 2000


@pytest.mark.parametrize(("device", "cap"), [(CPU, 8192), (CUDA, 131072)])
def test_starts_between_minimum_and_cap(monkeypatch: pytest.MonkeyPatch, device: torch.device, cap: int) -> None:
    Memory(monkeypatch, 10**14)
    assert make(device=device).tokens == cap
    Memory(monkeypatch, 1000)
    assert make(device=device).tokens == TokenBudget.minimum == 256


def test_cached_memory_is_free(memory: Memory) -> None:
    memory.free, memory.reserved, memory.allocated = memory.free - 1_000_000, 3_000_000, 2_000_000
    assert make().tokens == 1000


def test_starts_at_the_cached_budget(memory: Memory) -> None:
    remember(KIND, "tiny, torch.float32, a cuda", 700)
    assert make().tokens == 700
    remember(KIND, "tiny, torch.float32, a cuda", 50_000)
    assert make().tokens == 1000  # but not above the current estimate
    remember(KIND, "tiny, torch.float32, a cuda", 3)
    assert make().tokens == 256
    # A budget cached for another dtype, device or model is not used.
    remember(KIND, "tiny, torch.float32, a cuda", 700)
    other = Shape("other", **{name: value for name, value in vars(SHAPE).items() if name != "name"})
    assert make(dtype=torch.bfloat16).tokens == 2000
    assert make(device=CPU).tokens == make(shape=other).tokens == 1000


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"token budgets": 3}',
        *(
            json.dumps({KIND: {"tiny, torch.float32, a cuda": value}})
            for value in ("many", None, [700], {"tokens": 700}, 700.5)
        ),
    ],
)
def test_invalid_cache_content_is_ignored(folder: Path, content: str) -> None:
    (folder / "remembered.json").write_text(content)
    budget = make()
    assert budget.tokens == 1000
    budget.halve(1000)
    assert recall(KIND, "tiny, torch.float32, a cuda") == 500


# --- growing ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize(
    ("tokens", "used", "free", "want"),
    [
        (1000, 100, 100_000, 2000),  # there is room for 900 times as much, but it only doubles
        (1000, 1000, 2000, 1800),  # 0.9 × 2000 bytes / 1 byte a token
        (1000, 1000, 1200, 1080),
        (1000, 1000, 1112, 1000),  # 0.9 × 1112 = 1000.8: full
        (1000, 1000, 1000, 1000),  # it does not shrink after a success
        (500, 500, 10_000, 2000),  # twice the budget, not twice the batch
        (499, 1, 10_000, 1000),  # too small a batch
        (600, 1200, 3000, 1350),  # 0.9 × 3000 × 600 / 1200
        (1000, 0, 5000, 2000),  # no division by zero
    ],
)
def test_grows(tokens: int, used: int, free: int, want: int) -> None:
    budget = make()
    budget.grow(tokens, used, free)
    assert budget.tokens == want
    assert recall(KIND, "tiny, torch.float32, a cuda") == (want if want > 1000 else None)


@pytest.mark.usefixtures("memory")
def test_grows_to_the_cap() -> None:
    budget, seen = make(), []
    for _ in range(9):
        budget.grow(budget.tokens, 1, 10**9)
        seen.append(budget.tokens)
    assert seen == [2000, 4000, 8000, 16000, 32000, 64000, 128000, 131072, 131072]


def test_grows_by_the_memory_that_the_device_reports(memory: Memory) -> None:
    budget = make()
    memory.allocated = memory.peak = 5_000_000  # the model
    memory.peak = 60_000_000  # of earlier work
    budget.start()
    memory.peak = max(memory.peak, 6_000_000)  # the batch: a million bytes above the model
    memory.free, memory.reserved = 1_000_000, 5_700_000  # 1.7 million bytes are available: 0.9 of it is 1530 tokens
    budget.record_success(1000)
    assert budget.tokens == 1530


def test_the_reported_peak_is_that_of_all_batches(memory: Memory) -> None:
    """The budget needs the peak of each batch, for which torch forgets the one before."""
    budget = make()
    device_memory.forget_peak(CUDA)
    for of_batch in (6_000_000, 9_000_000, 7_000_000):
        memory.allocated = 5_000_000
        budget.start()
        memory.peak = of_batch
        assert device_memory.peak_since_start(CUDA) == of_batch
        budget.record_success(1000)
    assert device_memory.peak_memory() == 9_000_000
    memory.peak = 9_500_000  # after the last batch
    assert device_memory.peak_memory() == 9_500_000
    device_memory.forget_peak(CUDA)
    assert device_memory.peak_memory() == 5_000_000


def test_the_peak_of_the_host_can_be_forgotten() -> None:
    block = bytearray(64 << 20)
    block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])
    high = device_memory.peak_memory()
    del block
    device_memory.forget_peak(CPU)
    assert device_memory.peak_memory() < high - (32 << 20)


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("setting", [100, 1000])
def test_a_fixed_number_does_not_grow(memory: Memory, folder: Path, device: torch.device, setting: int) -> None:
    budget = make(setting, device=device)
    budget.start()
    budget.record_success(setting)
    assert budget.tokens == setting
    assert not list(folder.iterdir())


@pytest.mark.usefixtures("memory")
def test_on_a_cpu_it_does_not_grow() -> None:
    budget = make(device=CPU)
    budget.start()
    budget.record_success(1000)
    assert budget.tokens == 1000


# --- shrinking ----------------------------------------------------------------------------------------------


def test_halves_after_running_out_of_memory(memory: Memory) -> None:
    notes: list[str] = []
    budget = make(notes=notes)
    budget.halve(1000)
    assert budget.tokens == 500
    budget.halve(431)
    assert budget.tokens == 256  # not below the minimum
    assert notes == [
        "out of memory with 1000 tokens in a batch; continuing with 500",
        "out of memory with 431 tokens in a batch; continuing with 256",
    ]
    assert recall(KIND, "tiny, torch.float32, a cuda") == 256
    assert memory.emptied == 2


@pytest.mark.usefixtures("memory")
def test_does_not_grow_back_to_a_size_that_failed() -> None:
    budget = make()
    budget.halve(900)
    budget.grow(450, 1, 10**9)
    assert budget.tokens == 450
    assert make().tokens == 450
    again = make()  # a later stage may, since it may have more memory
    again.grow(450, 1, 10**9)
    assert again.tokens == 900


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_fixed_number_is_halved_and_not_cached(memory: Memory, folder: Path, device: torch.device) -> None:
    budget = make(5000, device=device)
    budget.halve(4800)
    assert budget.tokens == 2400
    assert not list(folder.iterdir())
    assert memory.emptied == (device.type == "cuda")


# --- the host's memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({"meminfo": ["MemTotal: 9000 kB", "MemAvailable:    7000 kB"]}, 7000 * 1024),
        ({"meminfo": ["MemAvailable: 7000 kB"], "memory.max": ["max"], "memory.current": ["5"]}, 7000 * 1024),
        ({"meminfo": ["MemAvailable: 7000 kB"], "memory.max": ["3000"], "memory.current": ["1000"]}, 2000),
        (
            {
                "meminfo": ["MemAvailable: 7000 kB"],
                "memory.max": ["3000"],
                "memory.current": ["2500"],
                "memory.stat": ["anon 700", "file 1800", "inactive_file 900", "active_file 800", "shmem 100"],
            },
            3000 - 800,
        ),
        ({"meminfo": ["MemAvailable: 1 kB"], "memory.max": ["3000"], "memory.current": ["1000"]}, 1024),
        ({"meminfo": ["MemAvailable: 1 kB"], "memory.max": ["3000"], "memory.current": ["4000"]}, 0),
        ({}, 10 * 4096),
    ],
)
def test_memory_of_the_host(monkeypatch: pytest.MonkeyPatch, files: dict[str, list[str]], want: int) -> None:
    def read_text(file: Path) -> str:
        if file.name not in files:
            raise FileNotFoundError(file)
        return "\n".join(files[file.name])

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": 10, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert free_host_memory() == want


def test_memory_of_this_host() -> None:
    assert 0 < free_host_memory() < 2**50
