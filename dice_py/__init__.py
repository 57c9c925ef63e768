"""Self-alignment of language models with DPO implicit rewards (DICE, arXiv 2406.09760).

Importing this imports Polars and the Rust extension, and neither torch nor transformers nor vLLM.
"""

from dice_py.mine import MinedPairs, mine_pairs
from dice_py.replay import ReplayMix, mix_replay, sample_replay

__all__ = ["MinedPairs", "ReplayMix", "mine_pairs", "mix_replay", "sample_replay"]
