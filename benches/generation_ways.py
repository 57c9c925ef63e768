"""The ways that generation.py compares: each samples the same requests, and returns the seconds that it took."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import polars as pl
import torch

from dice_py.config.shared import ModelConfig
from dice_py.config.stages import GenerateConfig
from dice_py.generation import sampler
from dice_py.generation.engines.base import Engine, Request, sample_all
from dice_py.generation.engines.factory import build_engine
from dice_py.generation.shard import read_prompts
from dice_py.storage.keys import seed_for


class Way:
    """The workload of a way, the same for all, and the file of its responses."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.name = task["way"]
        self.folder = Path(task["folder"])
        self.model = self.folder / "model"
        self.config = GenerateConfig.model_validate(task["config"])
        self.models = ModelConfig(device=task["device"], dtype=task["dtype"])
        self.stops: list[int] = task["stops"]
        self.longest: int = task["longest"]
        self.seed: int = task["seed"]
        self.shards = range(task["shards"])
        self.file = self.folder / f"{self.name}.parquet"

    def prompts(self) -> list[tuple[int, list[int]]]:
        return [prompt for number in self.shards for prompt in read_prompts(self.folder / "prompts.parquet", number)]

    def requests(self) -> list[Request]:
        """The requests of all shards, with the seeds of the stage."""
        return [
            Request(ids, seed_for(self.seed, 1, prompt_id, sample))
            for prompt_id, ids in self.prompts()
            for sample in range(self.config.samples)
        ]

    def write(self, token_ids: list[list[int]], logps: list[float] | None) -> None:
        columns: dict[str, Any] = {"token_ids": token_ids}
        if logps is not None:
            columns["sampled_logp"] = logps
        pl.DataFrame(columns).write_parquet(self.file)

    def tokens(self) -> int:
        return int(pl.read_parquet(self.file)["token_ids"].list.len().sum())


def warmed(engine: Engine, way: Way) -> Engine:
    """Samples once, so that kernels are loaded and buffers allocated."""
    request = Request(way.prompts()[0][1], 0)
    sample_all(engine, [request] * 2)
    return engine


class ShardQueue:
    """All shards for one group of devices: the next as soon as the engine has room (`ahead`), or one at a time."""

    def __init__(self, numbers: range, *, ahead: bool) -> None:
        self.remaining = deque(numbers)
        self.ahead = ahead

    def receive(self, *, wait: bool) -> int | None:
        return self.remaining.popleft() if self.remaining and (wait or self.ahead) else None


def our_stage(way: Way, engine: str, *, ahead: bool = True, prefix_caching: bool = True) -> float:
    """The stage's work for one group; returns the seconds from the warm engine to the last shard's file."""

    def build(*arguments: Any) -> Engine:
        return warmed(vllm_engine(way, prefix_caching) if engine == "vllm" else build_engine(*arguments), way)

    seconds = 0.0

    def on_event(event: str, **fields: Any) -> None:
        nonlocal seconds
        seconds += fields["seconds"] if event == "throughput" else 0.0

    files = [way.folder / f"{way.name}-{number:05d}.parquet" for number in way.shards]
    work = sampler.SampleShards(
        config=way.config,
        models=way.models,
        engine=engine,
        policy=way.model,
        stops=way.stops,
        longest=way.longest,
        prompts=way.folder / "prompts.parquet",
        files=files,
        keys=[file.name for file in files],
        seed=way.seed,
        round_number=1,
    )
    with mock.patch.object(sampler, "build_engine", build):
        work(ShardQueue(way.shards, ahead=ahead), report=on_event)
    frame = pl.concat([pl.read_parquet(file) for file in files])
    way.write(frame["token_ids"].to_list(), frame["sampled_logp"].to_list())
    return seconds


def vllm_engine(way: Way, prefix_caching: bool = True) -> Any:
    from dice_py.generation.engines.vllm import VllmEngine

    return VllmEngine(
        way.model,
        way.config,
        way.models,
        stops=way.stops,
        longest_prompt=way.longest,
        prefix_caching=prefix_caching,
    )


def vllm_separate(way: Way) -> float:
    engine, requests = vllm_engine(way), way.requests()
    warmed(engine, way)
    began = time.perf_counter()
    samples = sample_all(engine, requests)
    seconds = time.perf_counter() - began
    way.write([sample.token_ids for sample in samples], [sample.logp for sample in samples])
    return seconds


def vllm_n(way: Way) -> float:
    engine = vllm_engine(way)
    warmed(engine, way)
    from vllm import SamplingParams

    config = way.config
    parameters = [
        SamplingParams(
            n=config.samples,
            seed=seed_for(way.seed, 1, prompt_id),
            temperature=config.temperature,
            max_tokens=config.max_new_tokens,
            ignore_eos=True,
            stop_token_ids=way.stops,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
        )
        for prompt_id, _ in way.prompts()
    ]
    prompts = [{"prompt_token_ids": ids} for _, ids in way.prompts()]
    began = time.perf_counter()
    outputs = engine.llm.generate(prompts, parameters, use_tqdm=False)
    seconds = time.perf_counter() - began
    completions = [completion for output in outputs for completion in output.outputs]
    way.write([list(one.token_ids) for one in completions], [float(one.cumulative_logprob) for one in completions])
    return seconds


def hf_generate(way: Way) -> float:
    """transformers' generate, sorted by length: every response has a prefill, and a batch ends with its longest row."""
    from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList

    from dice_py.generation.engines.decoding import SeededSampling

    config, requests = way.config, way.requests()
    dtype = getattr(torch, way.models.dtype)
    model = AutoModelForCausalLM.from_pretrained(way.model, dtype=dtype).to(way.models.device).eval()
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=config.max_new_tokens, eos_token_id=way.stops, pad_token_id=0
    )
    responses: list[list[int]] = [[] for _ in requests]
    logps = [0.0] * len(requests)

    def run(rows: list[int]) -> None:
        width = max(len(requests[row].prompt_token_ids) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for at, row in enumerate(rows):
            prompt = requests[row].prompt_token_ids
            ids[at, width - len(prompt) :] = torch.tensor(prompt)
            mask[at, width - len(prompt) :] = 1
        # Our draw, so that the tokens can be compared. It takes less time than `do_sample=True`.
        sampling = SeededSampling([requests[row].seed for row in rows], config, way.stops, model.device)
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids.to(way.models.device),
                attention_mask=mask.to(way.models.device),
                generation_config=settings,
                logits_processor=LogitsProcessorList([sampling]),
            )
        for at, row in enumerate(rows):
            tokens = output[at, width:].tolist()
            end = next((n for n, token in enumerate(tokens) if token in stops), len(tokens) - 1)
            responses[row], logps[row] = tokens[: end + 1], float(sampling.logp[at])

    stops = set(way.stops)
    run([0, 1])
    began = time.perf_counter()
    rows = sorted(range(len(requests)), key=lambda row: -len(requests[row].prompt_token_ids))
    while rows:
        size = max(1, config.token_budget // (len(requests[rows[0]].prompt_token_ids) + config.max_new_tokens))
        run(rows[:size])
        del rows[:size]
    seconds = time.perf_counter() - began
    way.write(responses, logps)
    return seconds


RUN: dict[str, Callable[[Way], float]] = {
    "transformers": partial(our_stage, engine="transformers"),
    "hf_generate": hf_generate,
    "vllm_streaming": partial(our_stage, engine="vllm"),
    "vllm_shard_by_shard": partial(our_stage, engine="vllm", ahead=False),
    "vllm_no_prefix_caching": partial(our_stage, engine="vllm", prefix_caching=False),
    "vllm_separate": vllm_separate,
    "vllm_n": vllm_n,
}


def check(task: dict[str, Any], ways: list[str]) -> dict[str, dict[str, float]]:
    """Compares each way's log-probabilities with a float32 forward over one response at a time.

    Returns:
        By way, `max` and `mean` of the absolute differences, in nats.
    """
    from transformers import AutoModelForCausalLM

    way = Way({**task, "way": "check"})
    model = AutoModelForCausalLM.from_pretrained(way.model, dtype=torch.float32).to(way.models.device).eval()
    prompts = way.prompts()
    differences = {}
    for name in ways:
        frame = pl.read_parquet(way.folder / f"{name}.parquet")
        rows = np.unique(np.linspace(0, frame.height - 1, task["checked"]).astype(int)).tolist()
        abs_diffs = []
        for row in rows:
            prompt, response = prompts[row // way.config.samples][1], frame["token_ids"][row].to_list()
            ids = torch.tensor([prompt + response], device=model.device)
            with torch.inference_mode():
                logits = model(ids, logits_to_keep=len(response) + 1).logits[0, :-1].float()
            exact = torch.log_softmax(logits, dim=-1).gather(1, ids[0, -len(response) :, None]).double().sum()
            abs_diffs.append(abs(float(exact) - frame["sampled_logp"][row]))
        differences[name] = {"max": max(abs_diffs), "mean": sum(abs_diffs) / len(abs_diffs)}
    return differences
