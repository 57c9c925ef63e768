"""How much there is to do in each round of a run: prompts, responses, tokens, pairs and steps. Arithmetic alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dice_py.config.run import RunConfig
from dice_py.planning.timeline import draw_lengths
from dice_py.replay.mix import requested_counts


@dataclass(frozen=True)
class Data:
    """What the plan knows of the data; token counts are of the policy's tokenizer."""

    rounds: list[list[int]]
    """Of each round, the prompt_ids."""
    tokens: dict[int, int]
    """Of each prompt, its tokens."""
    offline: list[int]
    """Of each round, the offline pairs on prompts that the round does not sample."""
    lengths: list[int]
    """Tokens of some responses, as they were sampled."""
    usable: float
    """Share of the prompts with enough usable responses."""
    pair_tokens: tuple[float, float, float] | None = None
    """Mean tokens of an offline pair's prompt, chosen and rejected; None: as sampled ones have."""
    eval_prompts: tuple[int, ...] = ()
    """Of each held-out prompt, its tokens."""
    eval_pairs: int = 0


@dataclass(frozen=True)
class RoundCounts:
    """Of one round; tokens of prompts count each prompt once."""

    prompts: int
    prompts_too_long: int
    shards: int
    responses: int
    prompt_tokens: int
    response_tokens: int
    lengths: list[int]
    """Of each response, drawn from those that were seen."""
    pool_responses: int
    """That are scored and mined: those of earlier rounds too, with mine.pool_rounds."""
    pool_tokens: int
    mined: int
    replay: int
    replay_wanted: int
    pairs: int
    """In the training set, those that are too long left out."""
    pair_tokens: float
    """Of a pair's two sequences, on average."""
    replay_tokens: int
    """Of the replayed pairs' sequences, which are scored."""
    steps: int


def training_steps(config: RunConfig, pairs: int, processes: int) -> int:
    """Optimizer steps, as transformers' Trainer counts them: its last step of an epoch may be a short one."""
    train = config.train
    if train.max_steps is not None:
        return train.max_steps
    batches = math.ceil(pairs / (train.per_device_train_batch_size * processes))
    accumulate = max(1, train.batch_size // (train.per_device_train_batch_size * processes))
    return math.ceil(train.num_train_epochs * max(1, math.ceil(batches / accumulate)))


def pairs_per_prompt(config: RunConfig) -> int:
    """At most, by the pairing."""
    mine, samples = config.mine, config.generate.samples
    found = {"top_bottom": mine.top_k * mine.bottom_k, "all_pairs": samples * (samples - 1) // 2}.get(mine.pairing, 1)
    return found if mine.pairs_per_prompt is None else min(found, mine.pairs_per_prompt)


def share_within(max_length: int | None, prompts: Sequence[int], lengths: Sequence[int]) -> float:
    """Share of pairs of which prompt and longer response have at most `max_length` tokens."""
    if max_length is None or not len(prompts):
        return 1.0
    longer = np.maximum(draw_lengths(lengths, 4096), draw_lengths(lengths[::-1], 4096))
    return float((np.resize(np.asarray(prompts), 4096) + longer <= max_length).mean())


def count_rounds(config: RunConfig, data: Data, processes: int = 1) -> list[RoundCounts]:
    """The counts of every round, in order.

    Args:
        processes: of the training.
    """
    found: list[RoundCounts] = []
    for at, ids in enumerate(data.rounds):
        kept = [data.tokens[number] for number in ids if data.tokens[number] <= config.data.max_prompt_tokens]
        responses = len(kept) * config.generate.samples
        lengths = draw_lengths(data.lengths, responses)
        first = max(0, at + 1 - config.mine.pool_rounds)
        earlier = found[first:at]
        asked = {number for ids in data.rounds[first : at + 1] for number in ids} & {
            number for number, tokens in data.tokens.items() if tokens <= config.data.max_prompt_tokens
        }
        mined = round(data.usable * len(asked)) * pairs_per_prompt(config)
        available = data.offline[at]
        gamma = config.replay.gamma
        buffer = config.replay.buffer
        if buffer is not None:
            available += min(buffer.capacity, sum(round_.mined for round_ in found))
            if not available and not at:
                gamma = 0.0  # nothing to replay from yet: the round trains on mined pairs alone
        want_mined, wanted = requested_counts(mined, gamma, config.replay.total)
        replay = min(wanted, available)
        mean_prompt, mean = sum(kept) / max(1, len(kept)), sum(lengths) / max(1, len(lengths))
        own = 2 * (mean_prompt + mean)
        prompt, chosen, rejected = data.pair_tokens or (mean_prompt, mean, mean)
        offline = 2 * prompt + chosen + rejected
        taken = min(want_mined, mined)
        total = taken + replay
        pairs = round(total * share_within(config.train.max_length, kept, data.lengths))
        found.append(
            RoundCounts(
                prompts=len(kept),
                prompts_too_long=len(ids) - len(kept),
                shards=math.ceil(len(kept) / config.generate.shard_prompts),
                responses=responses,
                prompt_tokens=sum(kept),
                response_tokens=sum(lengths),
                lengths=lengths,
                pool_responses=responses + sum(round_.responses for round_ in earlier),
                pool_tokens=sum(kept) + sum(lengths) + sum(r.prompt_tokens + r.response_tokens for r in earlier),
                mined=mined,
                replay=replay,
                replay_wanted=wanted,
                pairs=pairs,
                pair_tokens=(taken * own + replay * offline) / max(1, total),
                replay_tokens=round(replay * offline),
                steps=training_steps(config, pairs, processes),
            )
        )
    return found
