"""The random numbers that a GPU computes for itself, exercised on CPU tensors: known answers, uniformity, layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from chi_square import chi_square
from device_traffic import Traffic
from engine_rig import Rig, of_prompt

from dice_py.config.shared import ModelConfig
from dice_py.config.stages import GenerateConfig
from dice_py.generation.engines.decoding import SeededSampling
from dice_py.generation.engines.random_numbers import DeviceNumbers, HostNumbers, numbers_for, philox, round_keys
from dice_py.storage.keys import seed_for

CPU = torch.device("cpu")
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
"""The first fractional bits of π, which Random123 tests with."""


def philox_by_hand(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox 4x32-10 in plain integers, as the paper defines it."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second % 2**32, (first >> 32) ^ c3 ^ k1, first % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@pytest.mark.parametrize(
    ("counter", "key", "output"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (PI[:4], PI[4:], (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], output: tuple[int, ...]) -> None:
    """Those of Random123, the authors' own library (its file kat_vectors)."""
    assert philox_by_hand(counter, key) == output
    words = torch.tensor(counter)[:, None]
    even, odd = philox(words[::2], words[1::2], round_keys(torch.tensor(key)[:, None]))
    assert (*even[0].tolist(), *even[1].tolist()) == output[::2]
    assert (*odd[0].tolist(), *odd[1].tolist()) == output[1::2]


def test_numbers_by_hand() -> None:
    """Each number is a function of seed, position and index, with all 53 bits of a float64."""
    seeds = [0, 1, 2**32, 2**63 - 1, seed_for(7, 1, 2)]
    numbers = DeviceNumbers(seeds, CPU)
    for position in range(3):
        drawn = numbers.draw(9)
        assert drawn.dtype == torch.float64
        for row, seed in enumerate(seeds):
            expected = []
            for pair in range(5):
                words = philox_by_hand((pair, 0, position, 0), (seed % 2**32, seed >> 32))
                expected += [(words[0] << 21 | words[1] >> 11) / 2**53, (words[2] << 21 | words[3] >> 11) / 2**53]
            assert drawn[row].tolist() == expected[:9]


def plane(first: torch.Tensor, second: torch.Tensor) -> float:
    """`chi_square` of pairs of numbers over a 32 × 32 grid of the unit square."""
    cells = (first * 32).long() * 32 + (second * 32).long()
    return chi_square(torch.bincount(cells.flatten(), minlength=1024), torch.full((1024,), 1 / 1024))


def test_numbers_are_uniform_and_independent() -> None:
    """Alone, and in pairs: of neighbors in a draw, of two positions, and of rows with neighboring seeds."""
    numbers = DeviceNumbers(range(512), CPU)
    first, second = numbers.draw(512), numbers.draw(512)
    assert float(first.min()) >= 0
    assert float(first.max()) < 1
    assert len(torch.cat([first, second]).unique()) == 2 * 512 * 512
    bins = torch.bincount((first * 4096).long().flatten(), minlength=4096)
    assert chi_square(bins, torch.full((4096,), 1 / 4096)) < 4
    assert plane(first[:, ::2], first[:, 1::2]) < 4  # of one counter
    assert plane(first[:, 1:-1:2], first[:, 2::2]) < 4  # of neighboring counters
    assert plane(first, second) < 4
    assert plane(first[:-1], first[1:]) < 4
    # Every bit is set in half of the numbers, within four standard deviations of 262,144 numbers.
    bits = ((first * 2**53).long()[..., None] >> torch.arange(53)) & 1
    assert float((bits.double().mean(dim=(0, 1)) - 0.5).abs().max()) < 4 * 0.5 / 512
    # The test can fail: a number and its neighbor in a plain linear sequence depend on each other.
    line = torch.arange(2**18).double() * 0.6180339887 % 1
    assert plane(line[:-1], line[1:]) > 4


@pytest.mark.parametrize("kind", [HostNumbers, DeviceNumbers])
def test_rows_that_leave_and_join_keep_their_numbers(kind: type[HostNumbers] | type[DeviceNumbers]) -> None:
    alone = [kind([seed], CPU) for seed in range(6)]
    expected = torch.stack([torch.cat([one.draw(10) for _ in range(4)]) for one in alone])  # (rows, positions, numbers)
    together = kind(range(4), CPU)
    assert torch.equal(together.draw(10), expected[:4, 0])
    together.select([3, 1])
    assert torch.equal(together.draw(10), expected[[3, 1], 1])
    together.join(kind([4, 5], CPU))
    assert torch.equal(together.draw(10), torch.stack([expected[3, 2], expected[1, 2], expected[4, 0], expected[5, 0]]))


def test_a_cpu_keeps_the_streams_of_numpy() -> None:
    numbers = numbers_for(CPU)([7, 2**63 - 1], CPU)
    for row, seed in enumerate([7, 2**63 - 1]):
        stream = np.random.Generator(np.random.Philox(key=seed))
        assert numbers_for(CPU)([seed], CPU).draw(300)[0].tolist() == stream.random(300).tolist()
        assert (
            numbers.draw(4)[row].tolist()
            == np.random.Generator(np.random.Philox(key=seed)).random(4 * (row + 1)).tolist()[4 * row :]
        )
    assert numbers_for(torch.device("cuda", 0)) is DeviceNumbers


def test_tokens_follow_the_distribution() -> None:
    scores = torch.randn(1, 1000, generator=torch.Generator().manual_seed(1)) * 2
    rows = 20_000
    config = GenerateConfig(temperature=1.0)
    sampling = SeededSampling([seed_for(n) for n in range(rows)], config, [0], CPU, DeviceNumbers)
    exact = scores[0].softmax(dim=-1)
    for _ in range(2):
        tokens = sampling.draw(torch.zeros(rows, 1, dtype=torch.long), scores.expand(rows, -1)).squeeze(1)
        assert chi_square(torch.bincount(tokens, minlength=1000), exact) < 4
        assert chi_square(torch.bincount(tokens, minlength=1000), exact**1.1 / (exact**1.1).sum()) > 4


def test_layout_changes_no_token(llama: Path) -> None:
    """Batches of every size and order, rows that leave and rows that join, with the numbers of a GPU."""
    config = GenerateConfig(max_new_tokens=24, temperature=1.0)
    rig = Rig(llama, config)
    requests = of_prompt(rig, 6, 8)
    on_host = rig.sample(requests)
    rig.engine.numbers = DeviceNumbers
    samples = rig.sample(requests)
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    assert [s.token_ids for s in samples] != [s.token_ids for s in on_host]
    assert len({tuple(sample.token_ids) for sample in samples}) > 40
    for budget, order in ((65536, -1), (900, 1), (700, -1), (1, 1)):
        rig.engine.config = config.model_copy(update={"token_budget": budget})
        other = rig.sample(requests[::order])[::order]
        assert [s.token_ids for s in other] == [s.token_ids for s in samples]
        assert [s.finish_reason for s in other] == [s.finish_reason for s in samples]
        assert [s.logp for s in other] == pytest.approx([s.logp for s in samples], abs=1e-4)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}, {"temperature": 0.9, "top_p": 0.7, "top_k": 20}])
def test_a_draw_waits_for_nothing(sampling: dict[str, float]) -> None:
    """Neither is anything copied from the host, nor does the host read a value: both would wait for the GPU."""
    device = torch.device("meta")
    config = GenerateConfig(**{"temperature": 1.0, **sampling})
    by_kind = {}
    for kind in (DeviceNumbers, HostNumbers):
        rows = SeededSampling(range(8), config, [0, 1, 2], device, kind)
        with Traffic() as traffic:
            rows.draw(torch.zeros(8, 1, dtype=torch.long, device=device), torch.zeros(8, 1000, device=device))
        by_kind[kind] = traffic.copies
    assert by_kind[DeviceNumbers] == []
    assert by_kind[HostNumbers] == ["aten::lift_fresh", "aten::_to_copy"]  # from NumPy, and to the device
    with pytest.raises(NotImplementedError, match="meta"):
        rows.alive.tolist()


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@on_gpu
def test_a_gpu_has_the_numbers_of_cpu_tensors() -> None:
    seeds = [seed_for(n) for n in range(512)]
    here, there = DeviceNumbers(seeds, CPU), DeviceNumbers(seeds, torch.device("cuda"))
    for count in (756, 3):
        assert torch.equal(here.draw(count), there.draw(count).cpu())


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}, {"top_p": 0.7, "top_k": 20}])
def test_a_draw_on_a_gpu_does_not_wait(sampling: dict[str, float]) -> None:
    device = torch.device("cuda")
    rows = SeededSampling(range(8), GenerateConfig(**{"temperature": 1.0, **sampling}), [0, 1, 2], device)
    tokens, logits = torch.zeros(8, 1, dtype=torch.long, device=device), torch.randn(8, 1000, device=device)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows.draw(tokens, logits)
        with pytest.raises(RuntimeError, match="synchroniz"):
            rows.logp.cpu()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.gpu
@on_gpu
def test_layout_changes_no_token_on_a_gpu(llama: Path) -> None:
    config = GenerateConfig(max_new_tokens=24, temperature=1.0)
    on_cpu = Rig(llama, config)
    on_cpu.engine.numbers = DeviceNumbers
    requests = of_prompt(on_cpu, 6, 8)
    rig = Rig(llama, config, ModelConfig(device="cuda", dtype="float32"))
    samples = rig.sample(requests)
    assert [s.token_ids for s in samples] == [s.token_ids for s in on_cpu.sample(requests)]
    for budget, order in ((900, 1), (700, -1)):
        rig.engine.config = config.model_copy(update={"token_budget": budget})
        other = rig.sample(requests[::order])[::order]
        assert [s.token_ids for s in other] == [s.token_ids for s in samples]
