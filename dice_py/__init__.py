"""Self-alignment of language models with DPO implicit rewards (DICE, arXiv 2406.09760).

The public functions mine preference pairs from scored responses (`df.pipe(dice_py.mine_pairs, …)`) and mix them with
offline pairs. They need neither torch nor a GPU. The loop itself is the command line `dice`; its stages are in stages/.
Names are imported on first use, so that `import dice_py` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dice_py.mining.comparison import MiningComparison, compare_mining
    from dice_py.mining.gather import attach_text
    from dice_py.mining.pairs import MinedPairs, mine_pairs
    from dice_py.replay.buffer import ReplayBuffer
    from dice_py.replay.mix import BufferMix, OfflineBuffer, mix_buffers
    from dice_py.replay.offline import ReplayMix, mix_replay, sample_replay

    __version__: str

__all__ = [
    "BufferMix",
    "MinedPairs",
    "MiningComparison",
    "OfflineBuffer",
    "ReplayBuffer",
    "ReplayMix",
    "__version__",
    "attach_text",
    "compare_mining",
    "mine_pairs",
    "mix_buffers",
    "mix_replay",
    "sample_replay",
]

_MODULES = {
    "attach_text": "dice_py.mining.gather",
    "MiningComparison": "dice_py.mining.comparison",
    "compare_mining": "dice_py.mining.comparison",
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
    if name == "__version__":
        return _version()
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """The version of the installed package; "0+unknown" for sources on the path that were never installed."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import, and rarely needed

    try:
        return version("dice-align")
    except PackageNotFoundError:
        return "0+unknown"
