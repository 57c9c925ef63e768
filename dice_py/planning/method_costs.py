"""What a training method adds to a round: labels of mining, and further passes over pairs in the replay stage."""

from __future__ import annotations

from dice_py.config.run import RunConfig
from dice_py.planning.counts import RoundCounts


def mining_labels(config: RunConfig) -> list[str]:
    """The labels that mining adds to the pairs."""
    mine = config.mine
    labels = {
        "win rates": mine.win_rates,
        "soft labels": mine.soft_labels,
        "difficulty": mine.difficulty_quantile is not None,
        "consistency": mine.second_reward is not None,
    }
    return [name for name, is_on in labels.items() if is_on]


def pair_passes(config: RunConfig, counts: RoundCounts, mined: int, number: int) -> tuple[int, float, int]:
    """The scoring of pairs in the replay stage (stages/pair_logps.py).

    Args:
        mined: pairs of the training set.
        number: of the round; round 0 trains by plain DPO.

    Returns:
        Passes over the replayed pairs, and the tokens and sequences of all passes.
    """
    train = config.train
    if number == 0:
        return 1, float(counts.replay_tokens), 2 * counts.replay
    passes = 2 if train.reference == "initial" else 1
    has_reference = train.reference == "policy" or config.reward_reference == "initial" or number == 1
    rescored = mined if train.ld_alpha is not None or not has_reference else 0
    sequences = 3 if train.ld_alpha is not None else 2  # of a pair: the start of its longer response too
    tokens = (counts.replay_tokens * passes + rescored * counts.pair_tokens) * sequences / 2
    return passes, tokens, sequences * (counts.replay * passes + rescored)
