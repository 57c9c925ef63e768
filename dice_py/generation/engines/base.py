"""The interface of an engine: requests go in while it has room, and samples come out as they end.

An engine holds a model and samples from it. It knows nothing of shards, so that the last responses of one shard are
decoded beside the first of the next. generation/engines/factory.py has the table of engines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

SampleId = tuple[int, int]
"""Identifies a response: the number of its shard, and its row in the shard."""


@dataclass(frozen=True)
class Request:
    """One response to sample: the prompt's token ids and the seed of this (prompt, sample)."""

    prompt_token_ids: list[int]
    seed: int


@dataclass(frozen=True)
class Sample:
    """One sampled response.

    Attributes:
        token_ids: of the response; the stop token, or the token that completed a stop string, is the last.
        finish_reason: "stop", or "length" if the token limit (or vLLM's repetition_detection) cut the response off.
        logp: Σ log π of the sampled tokens in nats, from the raw logits: before temperature, penalties and masks.
    """

    token_ids: list[int]
    finish_reason: str
    logp: float


class Engine(Protocol):
    """Holds the model from its creation until `close`.

    A request's seed alone decides its random numbers, whatever other requests are in the batch.

    Attributes:
        max_new_tokens: most tokens of a response, from the config. `dice plan` lowers it while nothing is unfinished.
    """

    max_new_tokens: int

    @property
    def unfinished(self) -> int:
        """Requests that were added and whose samples have not come out."""
        ...

    @property
    def has_room(self) -> bool:
        """True while more requests would make better batches. `add` accepts requests at any time."""
        ...

    @property
    def max_rows(self) -> int:
        """The most responses that are decoded at one time if every prompt is as long as the longest."""
        ...

    @property
    def drops_finished_rows(self) -> bool:
        """True if a row that ends leaves its batch; False if a batch runs until its longest row ends."""
        ...

    def add(self, requests: Sequence[tuple[SampleId, Request]]) -> None:
        """Queues requests. Those of one prompt must be neighbors: they share its prefill."""
        ...

    def step(self) -> list[tuple[SampleId, Sample]]:
        """Decodes for a while; returns the samples that ended, possibly none."""
        ...

    def close(self) -> None:
        """Frees the model's memory. Nothing can be sampled afterwards."""
        ...


def sample_all(
    engine: Engine, requests: Iterable[Request], on_done: Callable[[int], None] = lambda count: None
) -> list[Sample]:
    """Samples a list of requests until all of them have ended.

    Args:
        on_done: called after each step in which samples ended, with their number.

    Returns:
        One sample for each request, in order.
    """
    queued = [((0, row), request) for row, request in enumerate(requests)]
    engine.add(queued)
    samples: dict[SampleId, Sample] = {}
    while engine.unfinished:
        finished = engine.step()
        samples.update(finished)
        if finished:
            on_done(len(finished))
    return [samples[sample_id] for sample_id, _ in queued]
