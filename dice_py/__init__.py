"""Self-alignment of language models with DPO implicit rewards (DICE, arXiv 2406.09760).

The library's face is the miner: `df.pipe(dice_py.mine_pairs, …)`. Each stage of the loop stands in the file
of its name. Names are imported on first use, so that importing this package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dice_py.attach import attach_text
    from dice_py.mine import MinedPairs, mine_pairs
    from dice_py.replay import ReplayMix, mix_replay, sample_replay
    from dice_py.replay_buffer import ReplayBuffer
    from dice_py.replay_mix import BufferMix, OfflineBuffer, mix_buffers

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
    "attach_text": "dice_py.attach",
    "MinedPairs": "dice_py.mine",
    "mine_pairs": "dice_py.mine",
    "ReplayMix": "dice_py.replay",
    "mix_replay": "dice_py.replay",
    "sample_replay": "dice_py.replay",
    "ReplayBuffer": "dice_py.replay_buffer",
    "BufferMix": "dice_py.replay_mix",
    "OfflineBuffer": "dice_py.replay_mix",
    "mix_buffers": "dice_py.replay_mix",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
