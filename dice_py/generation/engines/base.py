"""What samples, as the generate stage sees it: requests go in while there is room, samples come out as they end.

Two engines have this interface: generation/engines/transformers.py and generation/engines/vllm.py. It knows nothing of
shards, so that the end of one, when few of its responses are left, runs beside the start of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

SampleId = tuple[int, int]
"""Which response: the number of its shard and its row there."""


@dataclass(frozen=True)
class Request:
    """One response to sample: the prompt's token ids and the seed of this (prompt, sample)."""

    prompt_token_ids: list[int]
    seed: int


@dataclass(frozen=True)
class Sample:
    """One sampled response.

    `token_ids` ends with the stop token when one was sampled (`finish_reason` "stop"); "length" means that
    the token limit cut it off. `logp` is Σ log π of the sampled tokens, raw: before temperature and top-p.
    """

    token_ids: list[int]
    finish_reason: str
    logp: float


class Engine(Protocol):
    """Holds the model from its creation on. Only the seed of a request decides its sample, not its neighbours."""

    @property
    def unfinished(self) -> int:
        """Requests that were added and whose samples have not come out."""
        ...

    @property
    def has_room(self) -> bool:
        """True while more requests would let it batch better; it takes them at any time all the same."""
        ...

    def add(self, requests: Sequence[tuple[SampleId, Request]]) -> None:
        """Queues requests, those of one prompt one after the other, so that they share its prefill."""
        ...

    def step(self) -> list[tuple[SampleId, Sample]]:
        """Works for a while; the samples that ended meanwhile, which may be none."""
        ...

    def close(self) -> None:
        """Gives the memory of the model back; nothing is sampled afterwards."""
        ...


def sample_all(
    engine: Engine, requests: Iterable[Request], on_done: Callable[[int], None] = lambda count: None
) -> list[Sample]:
    """One sample for each request, in order; `on_done` hears how many ended. For callers that have them all."""
    places = [((0, row), request) for row, request in enumerate(requests)]
    engine.add(places)
    samples: dict[SampleId, Sample] = {}
    while engine.unfinished:
        finished = engine.step()
        samples.update(finished)
        if finished:
            on_done(len(finished))
    return [samples[place] for place, _ in places]
