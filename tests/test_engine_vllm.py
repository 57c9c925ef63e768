"""Real vLLM on the CPU: what it samples, what it says of it, and what decides it.

vLLM takes long to import and leaves state in its process (thread counts, torch.distributed, environment
variables), so one spawned process makes every engine that these tests need, one after the other, and sends home
plain data; the tests look at that.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import polars as pl
import pytest
import torch
from test_engine_transformers import chi_square
from tiny_models import make_llama, make_mistral, make_qwen2, set_generation_config

from dice_py.artefacts import parquet_key, seed_for
from dice_py.config import GenerateConfig, ModelConfig, ScoreConfig
from dice_py.engine_vllm import VllmEngine, _check_settings, _explain, max_model_len
from dice_py.errors import DataError, OutOfMemoryError, UsageError
from dice_py.generate import Request, Sample, generate
from dice_py.models import Placement, encode_prompt, load_model, load_tokenizer, stop_token_ids
from dice_py.score import sequence_logps
from dice_py.worker import run_stage

FLOAT32 = ModelConfig(device="cpu", dtype="float32")
MAX_NEW = 24
PLAIN = GenerateConfig.model_validate(
    {"engine": "vllm", "samples": 4, "temperature": 1.0, "max_new_tokens": MAX_NEW, "shard_prompts": 2}
)
# 128 tokens are a block of vLLM's cache on a CPU: the last one fills a block and shares it between samples.
QUESTIONS = ["hello there", "hi", "what is the tallest mountain on this planet? " * 4]

needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="measured with vLLM's CPU build, and a GPU is here"),
]


@dataclass
class Seen:
    """What the process with vLLM saw; plain data, since it is pickled."""

    start_seconds: float = 0.0
    tokens_per_second: float = 0.0
    prompts: list[list[int]] = field(default_factory=list)
    stops: list[int] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    scored: dict[str, list[float]] = field(default_factory=dict)
    told: list[int] = field(default_factory=list)
    prompts_at_vllm: list[list[int]] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)
    errors: dict[str, Exception] = field(default_factory=dict)
    connections: list[str] = field(default_factory=list)
    children: list[int] = field(default_factory=list)
    environment: dict[str, str | None] = field(default_factory=dict)


def _changed(config: GenerateConfig, **values: Any) -> GenerateConfig:
    return GenerateConfig.model_validate({**config.model_dump(), **values})


def _prompts(folder: Path) -> tuple[list[list[int]], list[int]]:
    tokenizer = load_tokenizer(folder, FLOAT32)
    ids = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in QUESTIONS]
    return ids, stop_token_ids(folder, tokenizer)


def _score(folder: Path, requests: list[Request], samples: list[Sample]) -> list[float]:
    prompts = [request.prompt_token_ids for request in requests]
    return sequence_logps(load_model(folder, FLOAT32), prompts, [s.token_ids for s in samples], ScoreConfig())


def _child_pids() -> list[int]:
    found = []
    for task in Path("/proc/self/task").iterdir():
        found += [int(pid) for pid in (task / "children").read_text().split()]
    return found


def _look(models: dict[str, Path], out: Path, report: Any) -> Seen:
    """Runs in a process of its own."""
    seen = Seen()
    connect = socket.socket.connect

    def watched(self: socket.socket, address: Any) -> None:
        seen.connections.append(f"{self.family.name} {address}")
        connect(self, address)

    socket.socket.connect = watched  # type: ignore[method-assign,assignment]
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "9999"  # what the config says counts

    llama = models["llama"]
    seen.prompts, seen.stops = _prompts(llama)
    longest = max(map(len, seen.prompts))
    config = _changed(PLAIN, vllm={"kv_cache_gib": 0.25})
    began = time.monotonic()
    engine = VllmEngine(llama, config, FLOAT32, stops=seen.stops, longest_prompt=longest)
    seen.start_seconds = time.monotonic() - began

    # More prompt tokens than a step of vLLM holds (4096), so that prompts wait for the next one.
    seen.requests = [Request(seen.prompts[n % 3], seed_for(7, n)) for n in range(96)]
    seen.samples["whole"] = engine.sample(seen.requests, seen.told.append)
    began = time.monotonic()
    seen.samples["again"] = engine.sample(seen.requests, lambda _: None)
    tokens = sum(len(sample.token_ids) for sample in seen.samples["again"])
    seen.tokens_per_second = tokens / (time.monotonic() - began)
    seen.samples["backwards"] = engine.sample(seen.requests[::-1], lambda _: None)[::-1]
    seen.samples["alone"] = [engine.sample([request], lambda _: None)[0] for request in seen.requests[:12]]
    seen.scored["whole"] = _score(llama, seen.requests, seen.samples["whole"])
    seen.children = _child_pids()

    step, arrived = engine.llm.llm_engine.step, {}

    def recording_step() -> Any:
        outputs = step()
        arrived.update({int(output.request_id): list(output.prompt_token_ids) for output in outputs})
        return outputs

    engine.llm.llm_engine.step = recording_step
    engine.sample(seen.requests[:6], lambda _: None)
    seen.prompts_at_vllm = [ids for _, ids in sorted(arrived.items())]

    engine.config = _changed(config, temperature=0.7, top_p=0.9, top_k=50)
    seen.samples["warped"] = engine.sample(seen.requests, lambda _: None)
    seen.scored["warped"] = _score(llama, seen.requests, seen.samples["warped"])
    engine.config = _changed(config, temperature=0.9, top_p=0.7, top_k=20, max_new_tokens=1)
    many = [Request(seen.prompts[0], seed_for(3, n)) for n in range(4000)]
    seen.firsts = [sample.token_ids[0] for sample in engine.sample(many, lambda _: None)]
    del engine, step

    # A key/value cache of a few blocks: requests are thrown out in the middle and taken up again.
    ends_in_two_blocks = encode_prompt(
        load_tokenizer(llama, FLOAT32), [{"role": "user", "content": "x" * (120 - len(seen.prompts[1]) + 2)}]
    )
    crossing = [Request(ends_in_two_blocks, seed_for(9, n)) for n in range(16)]
    for name, gib in (("roomy", 0.25), ("cramped", 0.001)):
        engine = VllmEngine(
            llama, _changed(PLAIN, vllm={"kv_cache_gib": gib}), FLOAT32, stops=seen.stops, longest_prompt=120
        )
        seen.samples[name] = engine.sample(crossing, lambda _: None)
        del engine

    opinionated = VllmEngine(
        models["opinionated"], config, FLOAT32, stops=seen.stops, longest_prompt=longest
    )
    seen.samples["opinionated"] = opinionated.sample(seen.requests, lambda _: None)
    del opinionated

    for name in ("mistral", "qwen2"):
        prompts, stops = _prompts(models[name])
        other = VllmEngine(models[name], config, FLOAT32, stops=stops, longest_prompt=max(map(len, prompts)))
        requests = [replace(request, prompt_token_ids=prompts[n % 3]) for n, request in enumerate(seen.requests)]
        seen.samples[name] = other.sample(requests, lambda _: None)
        seen.scored[name] = _score(models[name], requests, seen.samples[name])
        del other

    for call in ("first", "second"):
        generate(
            config,
            FLOAT32,
            policy=llama,
            prompts=pl.DataFrame(
                {
                    "prompt_id": [3, 1, 2],
                    "messages": [[{"role": "user", "content": text}] for text in QUESTIONS],
                }
            ),
            out=out,
            seed=5,
            round_number=1,
            max_prompt_tokens=400,
            report=lambda event, call=call, **fields: report(event, **fields, call=call),
        )

    def refused(name: str, **changed: Any) -> None:
        settings = _changed(PLAIN, vllm=changed.pop("vllm", {}))
        folder = changed.pop("folder", llama)
        try:
            VllmEngine(folder, settings, FLOAT32, stops=seen.stops, longest_prompt=changed.pop("longest", longest))
        except Exception as error:
            seen.errors[name] = error

    refused("small cache", vllm={"kv_cache_gib": 1e-5})
    refused("huge cache", vllm={"kv_cache_gib": 1e5})
    refused("adapter", folder=models["adapter"])
    refused("head", folder=models["head"])
    with mock.patch("vllm.platforms.current_platform", SimpleNamespace(device_type="cuda")):
        refused("platform")
    seen.environment = {
        name: os.environ.get(name)
        for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK", "VLLM_ENABLE_V1_MULTIPROCESSING")
    }
    return seen


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {
        "llama": make_llama(root / "llama"),
        "mistral": make_mistral(root / "mistral"),
        "qwen2": make_qwen2(root / "qwen2"),
        "opinionated": make_llama(root / "opinionated"),
        "head": make_llama(root / "head", head_dim=24),
        "adapter": root / "adapter",
    }
    set_generation_config(
        made["opinionated"],
        do_sample=True,
        temperature=0.1,
        top_k=1,
        top_p=0.1,
        repetition_penalty=5.0,
        max_new_tokens=2,
        eos_token_id=[5, 6, 7, 8, 9],
    )
    made["adapter"].mkdir()
    (made["adapter"] / "adapter_config.json").write_text("{}")
    return made


@pytest.fixture(scope="module")
def events() -> list[tuple[str, dict[str, Any]]]:
    return []


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("generate")


@pytest.fixture(scope="module")
def seen(folders: dict[str, Path], out: Path, events: list[tuple[str, dict[str, Any]]]) -> Seen:
    result = run_stage(
        _look,
        {"models": folders, "out": out},
        log=out.parent / "worker.log",
        remedy="",
        report=lambda event, **fields: events.append((event, fields)),
    )
    assert isinstance(result, Seen)
    return result
