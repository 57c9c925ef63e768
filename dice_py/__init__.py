"""Self-alignment of language models with DPO implicit rewards (DICE, arXiv 2406.09760).

The library's face is the miner: `df.pipe(dice_py.mine_pairs, …)`. Each stage of the loop stands in the file
of its name. Names are imported on first use, so that importing this package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dice_py.mining.gather import attach_text
    from dice_py.mining.pairs import MinedPairs, mine_pairs
    from dice_py.replay.buffer import ReplayBuffer
    from dice_py.replay.mix import BufferMix, OfflineBuffer, mix_buffers
    from dice_py.replay.offline import ReplayMix, mix_replay, sample_replay

__all__ = [
    "BufferMix",
    "MinedPairs",
    "OfflineBuffer",
    "ReplayBuffer",
    "ReplayMix",
    "attach_text",
    "mine_pairs",
    "mix_buffers",
    "mix_replay",
    "sample_replay",
]

_HOME = {
    "attach_text": "dice_py.mining.gather",
    "MinedPairs": "dice_py.mining.pairs",
    "mine_pairs": "dice_py.mining.pairs",
    "ReplayMix": "dice_py.replay.offline",
    "mix_replay": "dice_py.replay.offline",
    "sample_replay": "dice_py.replay.offline",
    "ReplayBuffer": "dice_py.replay.buffer",
    "BufferMix": "dice_py.replay.mix",
    "OfflineBuffer": "dice_py.replay.mix",
    "mix_buffers": "dice_py.replay.mix",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
