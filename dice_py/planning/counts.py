"""Counts of each round of a run: prompts, responses, tokens, pairs and steps. Arithmetic only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dice_py.config.run import RunConfig
from dice_py.planning.decoding import draw_lengths
from dice_py.replay.mix import requested_counts
from dice_py.training.schedule import training_steps


@dataclass(frozen=True)
class Data:
    """The data of a run; tokens are those of the policy's tokenizer."""

    rounds: list[list[int]]
    """By round: the prompt_ids."""
    tokens: dict[int, int]
    """By prompt_id: the prompt's tokens."""
    offline: list[int]
    """By round: offline pairs on prompts that the round does not sample."""
    lengths: list[int]
    """Tokens of some sampled responses."""
    usable: float
    """Share of the prompts with enough usable responses."""
    pair_tokens: tuple[float, float, float] | None = None
    """Mean tokens of an offline pair's prompt, chosen and rejected; None: the same as those of sampled ones."""
    eval_prompts: tuple[int, ...] = ()
    """Tokens of each held-out prompt."""
    eval_pairs: int = 0
    round_zero_pairs: int = 0
    """Offline pairs that round 0 trains on, if the run has a round 0."""
    given: int | None = None
    """Responses that take the place of round 1's sampling, if there are any."""


@dataclass(frozen=True)
class RoundCounts:
    """Counts of one round; `prompt_tokens` counts each prompt once."""

    prompts: int
    prompts_too_long: int
    shards: int
    responses: int
    prompt_tokens: int
    response_tokens: int
    lengths: list[int]
    """Tokens of each response that is sampled, drawn from `Data.lengths`."""
    pool_responses: int
    """Responses that are scored and mined; with mine.pool_rounds, also those of earlier rounds."""
    pool_tokens: int
    mined: int
    replay: int
    replay_requested: int
    pairs: int
    """Pairs of the training set, without those that are too long."""
    pair_tokens: float
    """Mean tokens of a pair's two sequences together."""
    replay_tokens: int
    """Tokens of the replayed pairs' sequences, which are scored."""
    steps: int
    trained: int
    """The pairs that DPO trains on: all but the hard ones of train.method=mpo."""
    hard_prompts: int = 0
    """Prompts of its second stage."""

    def sampled(self, engine: str) -> dict[str, Any]:
        """The counts of the generate stage."""
        names = ("shards", "prompts", "prompts_too_long", "responses", "prompt_tokens", "response_tokens")
        return {**{name: getattr(self, name) for name in names}, "engine": engine}


def share_within(max_length: int | None, prompts: Sequence[int], lengths: Sequence[int]) -> float:
    """Share of pairs whose prompt and longer response have at most `max_length` tokens together.

    Args:
        prompts: tokens of prompts.
        lengths: tokens of responses.
    """
    if max_length is None or not len(prompts):
        return 1.0
    longer = np.maximum(draw_lengths(lengths, 4096), draw_lengths(lengths[::-1], 4096))
    return float((np.resize(np.asarray(prompts), 4096) + longer <= max_length).mean())


def count_rounds(config: RunConfig, data: Data, processes: int = 1) -> list[RoundCounts]:
    """The counts of every round, in order.

    Args:
        processes: processes of the training.
    """
    rounds: list[RoundCounts] = []
    for number in range(len(data.rounds)):
        rounds.append(_count_round(config, data, processes, number, rounds))
    return rounds


def count_round_zero(config: RunConfig, data: Data, processes: int = 1) -> RoundCounts:
    """The counts of round 0, which samples nothing: all offline pairs are replayed.

    Args:
        config: with the training of round 0 as `train`.
        processes: processes of the training.
    """
    pairs = data.round_zero_pairs
    prompt, chosen, rejected = data.pair_tokens or (0.0, 0.0, 0.0)
    pair_tokens = 2 * prompt + chosen + rejected
    return RoundCounts(
        prompts=0,
        prompts_too_long=0,
        shards=0,
        responses=0,
        prompt_tokens=0,
        response_tokens=0,
        lengths=[],
        pool_responses=0,
        pool_tokens=0,
        mined=0,
        replay=pairs,
        replay_requested=pairs,
        pairs=pairs,
        pair_tokens=pair_tokens,
        replay_tokens=round(pairs * pair_tokens),
        steps=training_steps(config.train, pairs, processes),
        trained=pairs,
    )


def _count_round(
    config: RunConfig, data: Data, processes: int, number: int, before: Sequence[RoundCounts]
) -> RoundCounts:
    """The counts of round `number`, from 0. `before`: those of all rounds before it."""
    ids = data.rounds[number]
    limit = config.data.max_prompt_tokens
    kept = [data.tokens[prompt] for prompt in ids if data.tokens[prompt] <= limit]
    is_given = number == 0 and data.given is not None
    responses = data.given if is_given and data.given is not None else len(kept) * config.generate.samples
    lengths = draw_lengths(data.lengths, responses)
    first = max(0, number + 1 - config.mine.pool_rounds)
    pooled = before[first:number]
    prompts = {prompt for ids in data.rounds[first : number + 1] for prompt in ids if data.tokens[prompt] <= limit}
    mined = round(data.usable * len(prompts)) * config.most_pairs_per_prompt()
    mined_requested, replay_requested, available = _replay_counts(config, mined, data.offline[number], before)
    mined_used, replay = min(mined_requested, mined), min(replay_requested, available)
    mean_prompt, mean_response = sum(kept) / max(1, len(kept)), sum(lengths) / max(1, len(lengths))
    prompt, chosen, rejected = data.pair_tokens or (mean_prompt, mean_response, mean_response)
    mined_tokens, replay_tokens = 2 * (mean_prompt + mean_response), 2 * prompt + chosen + rejected
    total = mined_used + replay
    pairs = round(total * share_within(config.train.max_length, kept, data.lengths))
    hard = hard_share(config)
    trained = pairs - round(pairs * mined_used / max(1, total) * hard) if hard < 1 else 0
    return RoundCounts(
        prompts=len(kept),
        prompts_too_long=len(ids) - len(kept),
        shards=math.ceil(len(kept) / config.generate.shard_prompts),
        responses=responses,
        prompt_tokens=sum(kept),
        response_tokens=sum(lengths),
        lengths=[] if is_given else lengths,
        pool_responses=responses + sum(other.responses for other in pooled),
        pool_tokens=sum(kept) + sum(lengths) + sum(other.prompt_tokens + other.response_tokens for other in pooled),
        mined=mined,
        replay=replay,
        replay_requested=replay_requested,
        pairs=pairs,
        pair_tokens=(mined_used * mined_tokens + replay * replay_tokens) / max(1, total),
        replay_tokens=round(replay * replay_tokens),
        steps=training_steps(config.train, trained, processes) if trained or not pairs else 0,
        trained=trained,
        hard_prompts=round(hard * mined_used / config.most_pairs_per_prompt()),
    )


def hard_share(config: RunConfig) -> float:
    """The share of the mined prompts that train.method=mpo leaves to its second stage; 0 with other methods."""
    return (config.mine.difficulty_quantile or 0.0) if config.train.method == "mpo" else 0.0


def _replay_counts(config: RunConfig, mined: int, offline: int, before: Sequence[RoundCounts]) -> tuple[int, int, int]:
    """(mined pairs requested, replayed pairs requested, pairs that can be replayed) of a round."""
    gamma, buffer = config.replay.gamma, config.replay.buffer
    available = offline
    if buffer is not None:
        available += min(buffer.capacity, sum(other.mined for other in before))
        if not available and not before:
            gamma = 0.0  # nothing to replay yet: the round trains on mined pairs alone
    mined_requested, replay_requested = requested_counts(mined, gamma, config.replay.total)
    return mined_requested, replay_requested, available
