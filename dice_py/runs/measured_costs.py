"""Measured costs of the stages, for one model shape on one device: their types, and how the cache keeps them.

`dice plan` multiplies them with a run's counts (planning/costs.py). They come from a calibration
(planning/calibration.py) or from the rounds of a run (runs/throughput.py). Seconds are wall clock.

A calibration separates fixed costs from costs per unit. A run does not: its `warm_up` is 0, generate has
`per_prompt`, and tokenization is part of the stages that do it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from dice_py.storage.cache import recall, remember

COSTS = "stage costs, 2"
"""The cache's name for `StageCosts`. Change it when a field gets another meaning."""
LENGTHS = "response lengths"
"""The cache's name for `ResponseLengths`."""


class _Costs(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GenerateCosts(_Costs):
    """Costs of sampling, in seconds unless another unit is named."""

    load: float
    """For the weights."""
    warm_up: float
    """Extra time of the first batch, over a later one."""
    per_prompt: float | None = None
    """From a run: all but the decoding. From a calibration: None, since each plan measures the tokenization."""
    per_prompt_token: float = 0.0
    """For the prefill of a prompt. 0: it is part of `per_token`."""
    per_step: float
    """For a decoding step, whatever its batch."""
    per_token: float
    per_response: float
    """For writing it."""
    rows: int
    """Responses decoded at the same time."""
    continuous: bool
    """Whether a response that ends makes room for the next one at once (continuous batching)."""
    bytes_per_response: float
    """On the disk."""
    peak_bytes: int
    """Peak memory of the device; 0: not measured."""


class ScoreCosts(_Costs):
    """Costs of scoring, and of tokenizing and scoring offline pairs, in seconds unless another unit is named."""

    load: float
    """For the weights of one model."""
    warm_up: float
    fixed: float
    """For each stage, whatever its size."""
    per_token: float
    per_response: float
    token_ratio: float
    """Tokens that the scorer runs over tokens in which each prompt counts once."""
    gate_passed: bool | None
    """Whether the sampler's log-probabilities equaled the scorer's; None: not compared."""
    bytes_per_response: float
    bytes_per_pair: float
    per_pair: float
    """For tokenizing an offline pair."""
    pair_tokens: tuple[float, float, float] | None
    """Mean tokens of an offline pair's prompt, chosen and rejected; None: there were no offline pairs."""
    peak_bytes: int


class TrainCosts(_Costs):
    """Costs of training, in seconds unless another unit is named."""

    load: float
    fixed: float
    """For each stage, whatever its size. From a calibration: without the check at step 0, which has the pairs' size."""
    per_token: float
    """For forward and backward of a token of a pair's two sequences."""
    per_update: float
    """For each optimizer step, whatever its tokens: clipping, and the update of the weights. From a run: 0."""
    check_per_token: float
    """For a token of the pairs that are checked at step 0. From a run: 0, part of `fixed`."""
    save: float
    """For a checkpoint."""
    checkpoint_bytes: int
    """0: not measured."""
    peak_bytes: int


class EvaluateCosts(_Costs):
    """Seconds of a run's own evaluations."""

    workload: tuple[int, int, int]
    """Held-out prompts, samples of each, held-out pairs: the seconds hold for these counts only."""
    work: list[float]
    """Of each round."""
    load: list[float]
    """Of each round."""


class StageCosts(_Costs):
    """All of them, for one model shape, device and setting (`costs_key` in runs/throughput.py)."""

    source: Literal["calibration", "run"]
    when: float
    """Unix time of the measurement."""
    startup: dict[str, float]
    """By stage: seconds until its process has imported what it needs."""
    generate: GenerateCosts
    score: ScoreCosts
    train: TrainCosts
    evaluate: EvaluateCosts | None
    """None: not measured, so that it is estimated from generate and score."""


class ResponseLengths(_Costs):
    """How long a policy's responses to some prompts are."""

    lengths: list[int]
    """Tokens of some of the responses."""
    usable: float
    """Share of the prompts with enough usable responses (mine.min_responses)."""
    cut_off: float
    """Share of the responses that the token limit cut off."""
    extrapolated: int = 0
    """Responses of `lengths` that a calibration cut before the token limit, and whose lengths are extrapolated."""
    cut_at: int | None = None
    """Their tokens before that; None: none was cut."""


def recall_costs(key: str) -> StageCosts | None:
    """The costs kept under `key`; None where there are none, or where another version wrote them."""
    stored = recall(COSTS, key)
    try:
        return None if stored is None else StageCosts.model_validate(stored)
    except ValidationError:
        return None


def remember_costs(key: str, costs: StageCosts) -> None:
    """Keeps `costs` under `key`."""
    remember(COSTS, key, costs.model_dump(mode="json"))


def recall_lengths(key: str) -> ResponseLengths | None:
    """The lengths kept under `key`; None where there are none, or where another version wrote them."""
    stored = recall(LENGTHS, key)
    try:
        return None if stored is None else ResponseLengths.model_validate(stored)
    except ValidationError:
        return None


def remember_lengths(key: str, lengths: ResponseLengths) -> None:
    """Keeps `lengths` under `key`."""
    remember(LENGTHS, key, lengths.model_dump(mode="json"))
