"""The embedded engine: transformers' models, with a seed of its own for each response (generation/engines/decoding.py).

A prompt is prefilled once for its K samples: its key/value cache is copied to their rows. Rows that end leave the
batch, and when there is room for the next prompts under the token budget they join it, so that one long response
does not hold a batch's place. Both need a cache of known layers (`can_select_rows`, `can_join`); other models
(recurrent states, caches of their own) run whole batches by `generate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from dice_py.config.shared import ModelConfig
from dice_py.config.stages import GenerateConfig
from dice_py.generation.engines.base import Request, Sample, SampleId
from dice_py.generation.engines.decoding import Rows, SeededSampling, can_join, can_select_rows, select_state
from dice_py.models.loading import load_model, release

_WINDOW = 16
"""Batches' worth of requests that are sorted by length together: shorter and there is more padding."""


@dataclass
class _Prompt:
    """Requests with the same prompt, and the tokens that one of them may come to."""

    token_ids: list[int]
    requests: list[tuple[SampleId, Request]]
    limit: int


class TransformersEngine:
    """Prompts of like length together, under `generate.token_budget`; see the head of this file."""

    def __init__(
        self, policy: Path, config: GenerateConfig, models: ModelConfig, *, stops: list[int], pad: int
    ) -> None:
        self.config = config
        self.stops = stops
        self.pad = pad
        self.model = load_model(policy, models)
        # Explicit: what the model's own file says of sampling is not used, only what the run's config says.
        self.generation = GenerationConfig(
            do_sample=False,
            max_new_tokens=config.max_new_tokens,
            eos_token_id=stops,
            pad_token_id=pad,
            use_cache=True,
        )
        self.model.generation_config = self.generation
        self.shares_prefill = True
        """Until a first prefill shows a model whose rows cannot be copied."""
        self.unfinished = 0
        self._queued: list[_Prompt] = []
        self._sorted: list[_Prompt] = []  # the shortest first; taken from the end
        self._rows: Rows | None = None

    @property
    def has_room(self) -> bool:
        """True until enough is queued to sort prompts by length."""
        queued = sum(len(prompt.requests) * prompt.limit for prompt in (*self._queued, *self._sorted))
        return queued < _WINDOW * self.config.token_budget

    def add(self, requests: Sequence[tuple[SampleId, Request]]) -> None:
        """Queues requests; neighbours of the same prompt share its prefill."""
        for place, request in requests:
            ids = request.prompt_token_ids
            if not self._queued or self._queued[-1].token_ids != ids:
                self._queued.append(_Prompt(ids, [], len(ids) + self.config.max_new_tokens))
            self._queued[-1].requests.append((place, request))
        self.unfinished += len(requests)

    def step(self) -> list[tuple[SampleId, Sample]]:
        """Decodes until something ends."""
        finished: dict[SampleId, Sample] = {}
        with torch.inference_mode():
            while self.unfinished and not finished:
                prompts = self._next()
                if prompts:
                    self._start(prompts, finished)
                elif self._rows is not None:
                    self._rows.advance(self.model)
                    self._rows.take_finished(finished)
                    self._rows = self._rows if len(self._rows) else None
        self.unfinished -= len(finished)
        return list(finished.items())

    def close(self) -> None:
        """Gives the memory of the model back; nothing is sampled afterwards."""
        device = self.model.device
        self._rows = None
        del self.model
        release(device)

    def _next(self) -> list[_Prompt]:
        """Prompts that fit beside the rows there are, whole where one fits at all; the longest first.

        So what does not fit in memory fails in the first batch, not after an hour.
        """
        rows = self._rows
        if rows is not None and not can_join(rows.cache):
            return []
        if not self._sorted:
            self._sorted, self._queued = sorted(self._queued, key=lambda prompt: prompt.limit), []
        count = len(rows) if rows is not None else 0
        longest = max(rows.limits) if rows is not None else 0
        taken: list[_Prompt] = []
        while self._sorted:
            prompt = self._sorted[-1]
            fit = max(1, self.config.token_budget // max(longest, prompt.limit))
            room, wanted = fit - count, len(prompt.requests)
            if wanted > room:
                # In parts, each prefilled anew, where much of the budget would lie idle otherwise.
                if count and room < max(1, fit // 4):
                    break
                part = _Prompt(prompt.token_ids, prompt.requests[:room], prompt.limit)
                del prompt.requests[:room]
            else:
                part = self._sorted.pop()
            taken.append(part)
            count += len(part.requests)
            longest = max(longest, part.limit)
        return taken

    def _inputs(self, prompts: list[list[int]]) -> dict[str, Any]:
        longest = max(map(len, prompts))
        # Padded on the left, so that every row's next token stands in the last column.
        ids = torch.full((len(prompts), longest), self.pad)
        mask = torch.zeros((len(prompts), longest), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        device = self.model.device
        return {
            "input_ids": ids.to(device),
            "attention_mask": mask.to(device),
            "generation_config": self.generation,
        }

    def _sampling(self, requests: list[tuple[SampleId, Request]]) -> SeededSampling:
        seeds = [request.seed for _, request in requests]
        return SeededSampling(seeds, self.config, self.stops, self.model.device)

    def _start(self, prompts: list[_Prompt], finished: dict[SampleId, Sample]) -> None:
        """Prefills prompts and adds their rows to those being decoded."""
        requests = [request for prompt in prompts for request in prompt.requests]
        if self.shares_prefill:
            state: dict[str, Any] = {}

            def prefill(model: PreTrainedModel, input_ids: torch.Tensor, **given: Any) -> torch.Tensor:
                # What `generate` hands to its decoding beside what the model is called with.
                for name in ("logits_processor", "stopping_criteria", "generation_config", "synced_gpus"):
                    given.pop(name, None)
                inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **given)
                output = model(**inputs, return_dict=True)
                state.update(given, past_key_values=output.get("past_key_values"))
                return output.logits[:, -1]

            logits = self.model.generate(
                **self._inputs([prompt.token_ids for prompt in prompts]), custom_generate=prefill
            )
            self.shares_prefill = can_select_rows(self.model, state)
        if not self.shares_prefill:
            finished.update(self._whole_batch(requests))
            return
        of_rows = [number for number, prompt in enumerate(prompts) for _ in prompt.requests]
        index = torch.tensor(of_rows, device=logits.device)
        select_state(state, index)
        rows = Rows(
            [place for place, _ in requests],
            [prompt.limit for prompt in prompts for _ in prompt.requests],
            self._sampling(requests),
            state,
            torch.full((len(requests), self.config.max_new_tokens), self.pad, device=logits.device),
        )
        rows.draw(logits[index])
        rows.take_finished(finished)
        if self._rows is not None and len(rows):
            self._rows.join(rows)
        elif len(rows):
            self._rows = rows

    def _whole_batch(self, requests: list[tuple[SampleId, Request]]) -> list[tuple[SampleId, Sample]]:
        """Every row with its own prefill, to the end of the longest, by `generate` alone."""
        sampling = self._sampling(requests)
        inputs = self._inputs([request.prompt_token_ids for _, request in requests])
        output = self.model.generate(**inputs, logits_processor=LogitsProcessorList([sampling]))
        samples = []
        tokens_of_rows = output[:, inputs["input_ids"].shape[1] :].tolist()
        for (place, _), tokens, logp in zip(requests, tokens_of_rows, sampling.logp.tolist(), strict=True):
            end = next((at for at, token in enumerate(tokens) if token in self.stops), None)
            if end is None:
                samples.append((place, Sample(tokens, "length", logp)))
            else:
                samples.append((place, Sample(tokens[: end + 1], "stop", logp)))
        return samples
