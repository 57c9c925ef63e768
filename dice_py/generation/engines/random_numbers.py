"""Random numbers for the rows of a batch. Each row has a stream of its own, from its seed, whatever rows are beside it.

On a CPU the streams are NumPy's. On a GPU they would be drawn on the host and copied at each token, while the GPU
waits. There, the numbers are computed where they are used: a number is a function of (seed, position of the token,
index), by the counter-based generator Philox 4x32-10. Its source is Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011 (doi.org/10.1145/2063384.2063405); it passes TestU01's BigCrush, and CUDA's own generators use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np
import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF


class RandomNumbers(Protocol):
    """The streams of a batch's rows."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        """`seeds` are one for each row, at least 0 and below 2^63."""
        ...

    def draw(self, count: int) -> torch.Tensor:
        """The next numbers of each row: (rows, count) float64 on the device, uniform in [0, 1)."""
        ...

    def select(self, rows: list[int]) -> None:
        """Keeps the given rows, without duplicates."""
        ...

    def join(self, other: Self) -> None:
        """Appends the rows of `other`."""
        ...


class HostNumbers:
    """Streams of NumPy's Philox, drawn on the host."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.device = device
        self.streams = [np.random.Generator(np.random.Philox(key=seed)) for seed in seeds]

    def draw(self, count: int) -> torch.Tensor:
        """See `RandomNumbers`."""
        numbers = np.empty((len(self.streams), count))
        for row, stream in enumerate(self.streams):
            stream.random(out=numbers[row])
        return torch.from_numpy(numbers).to(self.device)

    def select(self, rows: list[int]) -> None:
        """See `RandomNumbers`."""
        self.streams = [self.streams[row] for row in rows]

    def join(self, other: HostNumbers) -> None:
        """See `RandomNumbers`."""
        self.streams += other.streams


class DeviceNumbers:
    """Streams of Philox 4x32-10, computed on the device: the host neither draws, nor copies, nor waits.

    Numbers 2i and 2i + 1 of a row's n-th draw come from the counter (i, 0, n, 0) under the row's seed as key.

    Attributes:
        keys: `round_keys` of the seeds.
        draws: (rows,) int64, draws so far: the position of the row's next token.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        halves = [[seed & _LOW for seed in seeds], [seed >> 32 for seed in seeds]]
        self.keys = round_keys(torch.tensor(halves, dtype=torch.int64, device=device))
        self.draws = torch.zeros(len(seeds), dtype=torch.int64, device=device)

    def draw(self, count: int) -> torch.Tensor:
        """See `RandomNumbers`."""
        pairs = -(-count // 2)
        even = torch.empty((2, len(self.draws), pairs), dtype=torch.int64, device=self.keys.device)
        even[0] = torch.arange(pairs, device=even.device)
        even[1] = self.draws[:, None]
        even, odd = philox(even, torch.zeros_like(even), self.keys[..., None])
        self.draws += 1
        # 53 bits: all of one word, and the upper 21 of the other.
        bits = (even << 21) | (odd >> 11)
        return bits.permute(1, 2, 0).reshape(len(self.draws), -1)[:, :count].double() * 2.0**-53

    def select(self, rows: list[int]) -> None:
        """See `RandomNumbers`."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.keys.device)
        self.keys, self.draws = self.keys[..., index], self.draws[index]

    def join(self, other: DeviceNumbers) -> None:
        """See `RandomNumbers`."""
        self.keys = torch.cat([self.keys, other.keys], dim=-1)
        self.draws = torch.cat([self.draws, other.draws])


def round_keys(key: torch.Tensor) -> torch.Tensor:
    """(2, …) int64, the two words of Philox's keys → (10, 2, …) int64, the keys of its rounds."""
    rounds = torch.stack([key] * _ROUNDS)
    for number in range(1, _ROUNDS):
        for word, step in enumerate(_WEYL):
            rounds[number, word] += number * step
    return rounds & _LOW


def philox(even: torch.Tensor, odd: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Philox 4x32-10, elementwise.

    Args:
        even: (2, …) int64, words 0 and 2 of the counters; every word is below 2^32.
        odd: (2, …) int64, words 1 and 3.
        keys: (10, 2, …) int64 of `round_keys`, broadcast.

    Returns:
        Words 0 and 2, and words 1 and 3, of the outputs, shaped like `even`.
    """
    # Filled on the device: a tensor made from a list would be copied there, and the copy waits for the device.
    multipliers = torch.empty((2,) + (1,) * (even.dim() - 1), dtype=torch.int64, device=even.device)
    multipliers[0].fill_(_MULTIPLIERS[0])
    multipliers[1].fill_(_MULTIPLIERS[1])
    for key in keys:
        # A product of 64 bits is negative where its first bit is 1; the mask removes the copies of that bit.
        product = even * multipliers
        even = ((product >> 32) & _LOW).flip(0) ^ odd ^ key
        odd = (product & _LOW).flip(0)
    return even, odd


def numbers_for(device: torch.device) -> type[RandomNumbers]:
    """The streams to use on a device."""
    return DeviceNumbers if device.type == "cuda" else HostNumbers
