"""Pairs in a plan: the labels that mining adds for the training method, their scoring, and what replay may lack."""

from __future__ import annotations

from typing import Any

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


def replay_shortage(config: RunConfig, counts: RoundCounts) -> dict[str, Any] | None:
    """Why the replay stage would stop, for planning/feasibility.py; None where it has pairs enough."""
    if counts.replay >= counts.replay_requested or config.replay.on_shortfall != "error":
        return None
    return {
        "setting": "replay.gamma",
        "needed": counts.replay_requested,
        "available": counts.replay,
        "text": f"{counts.replay_requested} pairs are to be replayed, but only {counts.replay} are on prompts that the "
        "round does not sample",
        "remedy": "lower replay.gamma, add offline pairs, or set replay.on_shortfall=record",
    }
