"""The engine on transformers' models. Each response has random numbers of its own (generation/engines/decoding.py).

A prompt is prefilled once for its K samples: its key/value cache is copied to their rows. Rows that end leave the
batch. When the token budget has room for the next prompts, they join the batch, so that it stays full beside one long
response. Both need a cache of known layers (`can_select_rows`, `can_join`). Other models (recurrent states, caches of
their own) run complete batches through `generate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from dice_py.config.shared import ModelConfig
from dice_py.config.stages import GenerateConfig
from dice_py.generation.engines.base import Request, Sample, SampleId
from dice_py.generation.engines.cache import can_join, can_select_rows, grow_in_place, shared_heads_together
from dice_py.generation.engines.decoding import Rows, SeededSampling, select_state
from dice_py.generation.engines.random_numbers import numbers_for
from dice_py.generation.engines.transformers_options import check_options
from dice_py.models.head import use_float32_head
from dice_py.models.loading import load_model, release
from dice_py.models.tokenization import load_tokenizer
from dice_py.models.vocabulary import KnownTokens

_WINDOW = 16
"""Batches' worth of requests that are sorted by length together. Fewer would mean more padding."""


@dataclass
class _Prompt:
    """Requests with the same prompt; `limit` is the most tokens of the prompt and one response."""

    token_ids: list[int]
    requests: list[tuple[SampleId, Request]]
    limit: int


class TransformersEngine:
    """Batches prompts of similar length under `generate.token_budget`.

    Args:
        policy: a folder with a model or an adapter.
        config: sampling parameters and `token_budget`, in tokens: rows of a batch × its longest row.
        models: device, dtype and attention implementation.
        stops: token ids that end a response.
        pad: token id that fills shorter prompts of a batch.
        longest_prompt: tokens of the longest prompt that will be added.
        known: the ids that the tokenizer has; others are never sampled. None: all.

    Raises:
        DiceError: as `load_model` raises it.
    """

    def __init__(
        self,
        policy: Path,
        config: GenerateConfig,
        models: ModelConfig,
        *,
        stops: list[int],
        pad: int,
        longest_prompt: int,
        known: KnownTokens | None = None,
    ) -> None:
        self.config = config
        self.known = known
        self.max_new_tokens = config.max_new_tokens
        options = check_options(config, models, policy)
        self.stops = list(dict.fromkeys([*stops, *options.stop_token_ids]))
        self.tokenizer = load_tokenizer(policy, models) if options.stop else None
        self.pad = pad
        self.longest_prompt = longest_prompt
        self.model = load_model(policy, models)
        use_float32_head(self.model)  # as the scorer computes logits, so that its log-probabilities are the same
        # Explicit, so that the model's own generation_config.json has no effect.
        self.generation = GenerationConfig(
            do_sample=False,
            max_new_tokens=config.max_new_tokens,
            eos_token_id=self.stops,
            pad_token_id=pad,
            use_cache=True,
        )
        self.model.generation_config = self.generation
        self.shares_prefill = True
        """False once a first prefill shows that the model's rows cannot be copied."""
        self.numbers = numbers_for(self.model.device)
        """The random numbers of the rows."""
        self.unfinished = 0
        self._queued: list[_Prompt] = []
        self._sorted: list[_Prompt] = []  # by length; the next one is the last
        self._rows: Rows | None = None

    @property
    def has_room(self) -> bool:
        """True until enough is queued to sort prompts by length."""
        queued = sum(len(prompt.requests) * prompt.limit for prompt in (*self._queued, *self._sorted))
        return queued < _WINDOW * self.config.token_budget

    @property
    def max_rows(self) -> int:
        """Responses that fit into the token budget at one time beside the longest prompt."""
        return max(1, self.config.token_budget // (self.longest_prompt + self.config.max_new_tokens))

    @property
    def drops_finished_rows(self) -> bool:
        """True unless the model's batches run through `generate`."""
        return self.shares_prefill

    def add(self, requests: Sequence[tuple[SampleId, Request]]) -> None:
        """Queues requests; neighbors with the same prompt share its prefill."""
        for sample_id, request in requests:
            token_ids = request.prompt_token_ids
            if not self._queued or self._queued[-1].token_ids != token_ids:
                self._queued.append(_Prompt(token_ids, [], len(token_ids) + self.config.max_new_tokens))
            self._queued[-1].requests.append((sample_id, request))
        self.unfinished += len(requests)

    def step(self) -> list[tuple[SampleId, Sample]]:
        """Decodes until at least one response ends."""
        finished: dict[SampleId, Sample] = {}
        with torch.inference_mode(), shared_heads_together():
            while self.unfinished and not finished:
                prompts = self._next_prompts()
                if prompts:
                    self._start(prompts, finished)
                elif self._rows is not None:
                    self._rows.advance(self.model)
                    self._rows.move_finished(finished)
                    self._rows = self._rows if len(self._rows) else None
        self.unfinished -= len(finished)
        return list(finished.items())

    def close(self) -> None:
        """Frees the model's memory. Nothing can be sampled afterwards."""
        device = self.model.device
        self._rows = None
        del self.model
        release(device)

    def _next_prompts(self) -> list[_Prompt]:
        """Prompts that fit beside the current rows, with all of their requests where possible; the longest first.

        The longest come first so that a batch that exceeds the memory fails at once, not after an hour.
        """
        rows = self._rows
        if rows is not None and not can_join(rows.cache):
            return []
        if not self._sorted:
            self._sorted, self._queued = sorted(self._queued, key=lambda prompt: prompt.limit), []
        count = len(rows) if rows is not None else 0
        longest = max(rows.limits) if rows is not None else 0
        selected: list[_Prompt] = []
        while self._sorted:
            prompt = self._sorted[-1]
            fit = max(1, self.config.token_budget // max(longest, prompt.limit))
            room = fit - count
            if len(prompt.requests) > room:
                # A prompt is split, and each part prefilled, only if much of the budget would stay unused otherwise.
                if count and room < max(1, fit // 4):
                    break
                part = _Prompt(prompt.token_ids, prompt.requests[:room], prompt.limit)
                del prompt.requests[:room]
            else:
                part = self._sorted.pop()
            selected.append(part)
            count += len(part.requests)
            longest = max(longest, part.limit)
        return selected

    def _inputs(self, prompts: list[list[int]]) -> dict[str, Any]:
        """Arguments of `generate`; `input_ids` and `attention_mask` are (prompts, longest) int64."""
        longest = max(map(len, prompts))
        # Padded on the left, so that every row's next token is in the last column.
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
        return SeededSampling(
            [request.seed for _, request in requests],
            self.config,
            self.stops,
            self.model.device,
            self.numbers,
            self.known,
            prompts=[request.prompt_token_ids for _, request in requests],
            tokenizer=self.tokenizer,
        )

    def _start(self, prompts: list[_Prompt], finished: dict[SampleId, Sample]) -> None:
        """Prefills prompts, and adds their rows to those being decoded."""
        requests = [request for prompt in prompts for request in prompt.requests]
        if self.shares_prefill:
            logits, state = self._prefill(prompts)
            self.shares_prefill = can_select_rows(self.model, state)
        if not self.shares_prefill:
            finished.update(self._generate_batch(requests))
            return
        prompt_of_row = [number for number, prompt in enumerate(prompts) for _ in prompt.requests]
        index = torch.tensor(prompt_of_row, device=logits.device)
        grow_in_place(state["past_key_values"], max(prompt.limit for prompt in prompts))
        select_state(state, index)
        rows = Rows(
            [sample_id for sample_id, _ in requests],
            [prompt.limit for prompt in prompts for _ in prompt.requests],
            self._sampling(requests),
            state,
            torch.full((len(requests), self.max_new_tokens), self.pad, device=logits.device),
        )
        rows.draw(logits[index])
        rows.move_finished(finished)
        if self._rows is not None and len(rows):
            self._rows.join(rows)
        elif len(rows):
            self._rows = rows

    def _prefill(self, prompts: list[_Prompt]) -> tuple[torch.Tensor, dict[str, Any]]:
        """One forward over the prompts.

        Returns:
            (prompts, vocabulary) logits of the first tokens, and the model's inputs for the next forward.
        """
        state: dict[str, Any] = {}

        def prefill(model: PreTrainedModel, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            # These are for `generate`'s own decoding loop, not for the model.
            for name in ("logits_processor", "stopping_criteria", "generation_config", "synced_gpus"):
                kwargs.pop(name, None)
            inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs)
            output = model(**inputs, return_dict=True)
            state.update(kwargs, past_key_values=output.get("past_key_values"))
            return output.logits[:, -1]

        inputs = self._inputs([prompt.token_ids for prompt in prompts])
        logits: torch.Tensor = self.model.generate(**inputs, custom_generate=prefill)
        return logits, state

    def _generate_batch(self, requests: list[tuple[SampleId, Request]]) -> list[tuple[SampleId, Sample]]:
        """Samples through `generate`: every row with a prefill of its own, until the longest row ends."""
        sampling = self._sampling(requests)
        self.generation.max_new_tokens = self.max_new_tokens
        inputs = self._inputs([request.prompt_token_ids for _, request in requests])
        output = self.model.generate(
            **inputs,
            logits_processor=LogitsProcessorList([sampling]),
            # Rows that a stop string ended; `generate` sees stop tokens itself.
            stopping_criteria=StoppingCriteriaList([lambda *_, **__: ~sampling.alive]),
        )
        tokens_of_rows = output[:, inputs["input_ids"].shape[1] :].tolist()
        rows = zip(
            requests, tokens_of_rows, sampling.lengths.tolist(), sampling.alive.tolist(), sampling.logp.tolist(),
            strict=True,
        )  # fmt: skip
        return [
            (sample_id, Sample(tokens[:length], "length" if alive else "stop", logp))
            for (sample_id, _), tokens, length, alive, logp in rows
        ]
