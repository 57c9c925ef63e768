"""Real vLLM on the CPU: its samples and their log-probabilities, and that only a seed matters.

vLLM is slow to import and leaves state in its process (thread counts, torch.distributed, environment variables). So one
spawned process builds all engines of these tests, one after the other, and returns plain data that the tests check.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import re
import socket
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import polars as pl
import pytest
import torch
from chi_square import chi_square
from tiny_models import MAX_POSITIONS, OPINIONATED, make_llama, make_mistral, set_generation_config
from vllm_config import MAX_NEW, PLAIN, changed_config

from dice_py.compute.stage_process import run_in_subprocess
from dice_py.config.shared import ModelConfig
from dice_py.config.stages import ScoreConfig
from dice_py.errors import DataError, OutOfMemoryError, UsageError
from dice_py.generation.engines.base import Request, Sample, sample_all
from dice_py.generation.engines.vllm import VllmEngine
from dice_py.models.loading import load_model
from dice_py.models.tokenization import encode_prompt, load_tokenizer, stop_token_ids
from dice_py.scoring.scorer import Scorer
from dice_py.stages.generate import GenerateJob
from dice_py.storage.keys import seed_for
from dice_py.storage.parquet import parquet_key
from dice_py.timing import timed_seconds

FLOAT32 = ModelConfig(device="cpu", dtype="float32")
# 128 tokens are a block of vLLM's cache on a CPU: the last one fills a block and shares it between samples.
QUESTIONS = ["hello there", "hi", "what is the tallest mountain on this planet? " * 4]


@dataclass
class Seen:
    """Results of the process with vLLM; plain data, since it is pickled."""

    start_seconds: float = 0.0
    tokens_per_second: float = 0.0
    prompts: list[list[int]] = field(default_factory=list)
    stops: list[int] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    scored: dict[str, list[float]] = field(default_factory=dict)
    done_counts: list[int] = field(default_factory=list)
    prompts_at_vllm: list[list[int]] = field(default_factory=list)
    preemptions: int = 0
    cached: list[int] = field(default_factory=list)
    room: list[tuple[int, bool]] = field(default_factory=list)
    streamed: dict[tuple[int, int], Sample] = field(default_factory=dict)
    load_seconds: float = 0.0
    models_left: int = -1
    firsts: list[int] = field(default_factory=list)
    errors: dict[str, tuple[type[Exception], str]] = field(default_factory=dict)
    connections: list[str] = field(default_factory=list)
    children: list[int] = field(default_factory=list)
    environment: dict[str, str | None] = field(default_factory=dict)


def _prompts(folder: Path) -> tuple[list[list[int]], list[int]]:
    tokenizer = load_tokenizer(folder, FLOAT32)
    ids = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in QUESTIONS]
    return ids, stop_token_ids(folder, tokenizer)


def _score(folder: Path, requests: list[Request], samples: list[Sample]) -> list[float]:
    prompts = [request.prompt_token_ids for request in requests]
    return Scorer(load_model(folder, FLOAT32), ScoreConfig()).sums(prompts, [s.token_ids for s in samples])


def _child_pids() -> list[int]:
    found = []
    for task in Path("/proc/self/task").iterdir():
        found += [int(pid) for pid in (task / "children").read_text().split()]
    return found


def sample_and_score(models: dict[str, Path], out: Path, report: Any) -> Seen:
    """Runs in a process of its own."""
    seen = Seen()
    connect = socket.socket.connect

    def watched(self: socket.socket, address: Any) -> None:
        seen.connections.append(f"{self.family.name} {address}")
        connect(self, address)

    socket.socket.connect = watched  # type: ignore[method-assign,assignment]
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "9999"  # The config overrides it.

    llama = models["llama"]
    seen.prompts, seen.stops = _prompts(llama)
    longest = max(map(len, seen.prompts))
    config = changed_config(PLAIN, vllm={"kv_cache_gib": 0.25, "max_num_seqs": 32})
    began = time.monotonic()
    engine = VllmEngine(llama, config, FLOAT32, stops=seen.stops, longest_prompt=longest)
    seen.start_seconds = time.monotonic() - began
    seen.load_seconds = timed_seconds()["load"]

    # More prompt tokens than one step of vLLM takes (4096), so that prompts wait for the next step.
    seen.requests = [Request(seen.prompts[n % 3], seed_for(7, n)) for n in range(96)]
    seen.samples["whole"] = sample_all(engine, seen.requests, seen.done_counts.append)
    began = time.monotonic()
    seen.samples["again"] = sample_all(engine, seen.requests)
    tokens = sum(len(sample.token_ids) for sample in seen.samples["again"])
    seen.tokens_per_second = tokens / (time.monotonic() - began)
    seen.samples["backwards"] = sample_all(engine, seen.requests[::-1])[::-1]
    seen.samples["alone"] = [sample_all(engine, [request])[0] for request in seen.requests[:12]]
    seen.scored["whole"] = _score(llama, seen.requests, seen.samples["whole"])
    seen.children = _child_pids()

    step, arrived = engine.llm.llm_engine.step, {}

    def recording_step() -> Any:
        outputs = step()
        arrived.update({int(output.request_id): list(output.prompt_token_ids) for output in outputs})
        return outputs

    engine.llm.llm_engine.step = recording_step
    sample_all(engine, seen.requests[:6])
    seen.prompts_at_vllm = [ids for _, ids in sorted(arrived.items())]

    engine.config = changed_config(config, temperature=0.7, top_p=0.9, top_k=50)
    seen.samples["warped"] = sample_all(engine, seen.requests)
    seen.scored["warped"] = _score(llama, seen.requests, seen.samples["warped"])
    engine.config = changed_config(config, temperature=0.9, top_p=0.7, top_k=20, max_new_tokens=1)
    many = [Request(seen.prompts[0], seed_for(3, n)) for n in range(4000)]
    seen.firsts = [sample.token_ids[0] for sample in sample_all(engine, many)]
    crossing = [Request(seen.prompts[2][:120], seed_for(9, n)) for n in range(16)]
    engine.config = config
    seen.samples["roomy"] = sample_all(engine, crossing)

    # 16 samples of a prompt that fills a block of the cache and more, all prefilled in one step.
    finish, hits = engine.llm.llm_engine.step, {}

    def counting_step() -> Any:
        outputs = finish()
        hits.update({int(output.request_id): output.num_cached_tokens for output in outputs})
        return outputs

    engine.llm.llm_engine.step = counting_step
    fresh = [*seen.prompts[2][:100], *seen.prompts[1], *seen.prompts[0], *seen.prompts[2][:60]]
    sample_all(engine, [Request(fresh, seed_for(2, n)) for n in range(16)])
    seen.cached = [count for _, count in sorted(hits.items())]
    engine.llm.llm_engine.step = finish

    # Requests that are added while others run.
    waiting = [((1, row), request) for row, request in enumerate(seen.requests)]
    while waiting or engine.unfinished:
        engine.add(waiting[:7])
        del waiting[:7]
        seen.room.append((engine.unfinished, engine.has_room))
        seen.streamed.update(engine.step())
    engine.close()

    # A key/value cache of a few blocks: requests are preempted and resumed.
    cramped = changed_config(PLAIN, vllm={"kv_cache_gib": 0.001})
    engine = VllmEngine(llama, cramped, FLOAT32, stops=seen.stops, longest_prompt=120)
    scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
    preempt = scheduler._preempt_request

    def counting_preempt(*arguments: Any, **named: Any) -> Any:
        seen.preemptions += 1
        return preempt(*arguments, **named)

    scheduler._preempt_request = counting_preempt
    seen.samples["cramped"] = sample_all(engine, crossing)
    engine.close()

    opinionated = VllmEngine(models["opinionated"], config, FLOAT32, stops=seen.stops, longest_prompt=longest)
    seen.samples["opinionated"] = sample_all(opinionated, seen.requests)
    opinionated.close()

    prompts, stops = _prompts(models["mistral"])
    other = VllmEngine(models["mistral"], config, FLOAT32, stops=stops, longest_prompt=max(map(len, prompts)))
    requests = [Request(prompts[n % 3], request.seed) for n, request in enumerate(seen.requests)]
    seen.samples["mistral"] = sample_all(other, requests)
    seen.scored["mistral"] = _score(models["mistral"], requests, seen.samples["mistral"])
    other.close()

    for call in ("first", "second"):
        job = GenerateJob(
            config,
            FLOAT32,
            policy=llama,
            prompts=pl.DataFrame(
                {
                    "prompt_id": [3, 1, 2],
                    "messages": [[{"role": "user", "content": text}] for text in QUESTIONS],
                }
            ),
            prompts_key="questions",
            out=out,
            seed=5,
            round_number=1,
            max_prompt_tokens=400,
        )
        job.run(lambda event, call=call, **fields: report(event, **fields, call=call))

    gc.collect()
    seen.models_left = [type(thing).__name__ for thing in gc.get_objects()].count("LlamaForCausalLM")

    def refused(name: str, folder: Path = llama, **vllm: Any) -> None:
        settings = changed_config(PLAIN, vllm=vllm)
        try:
            engine = VllmEngine(folder, settings, FLOAT32, stops=seen.stops, longest_prompt=longest)
            try:
                sample_all(engine, seen.requests[:1])
            finally:
                engine.close()
        except Exception as error:
            seen.errors[name] = (type(error), str(error))

    refused("small cache", kv_cache_gib=1e-5)
    refused("huge cache", kv_cache_gib=1e5)
    refused("context", max_model_len=MAX_POSITIONS + 1)
    refused("adapter", models["adapter"])
    refused("head", models["head"])
    with mock.patch("vllm.platforms.current_platform", SimpleNamespace(device_type="cuda")):
        refused("platform")
    gc.collect()
    seen.environment = {
        name: os.environ.get(name) for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK")
    }
    return seen


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {
        "llama": make_llama(root / "llama"),
        "mistral": make_mistral(root / "mistral"),
        "opinionated": make_llama(root / "opinionated"),
        "head": make_llama(root / "head", head_dim=24),
        "adapter": root / "adapter",
    }
    set_generation_config(made["opinionated"], **OPINIONATED, eos_token_id=[5, 6, 7, 8, 9])
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
    result = run_in_subprocess(
        partial(sample_and_score, folders, out),
        log=out.parent / "worker.log",
        remedy="",
        report=lambda event, **fields: events.append((event, fields)),
    )
    assert isinstance(result, Seen)
    return result


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="measured with vLLM's CPU build, and a GPU is here")
class TestOnTheCpu:
    """Checks of the results of the process with vLLM."""

    def test_token_ids_and_finish_reasons(self, seen: Seen) -> None:
        samples = seen.samples["whole"]
        assert {sample.finish_reason for sample in samples} == {"stop", "length"}
        for sample in samples:
            stops_in_it = [token for token in sample.token_ids if token in seen.stops]
            if sample.finish_reason == "stop":
                assert stops_in_it == [sample.token_ids[-1]]
                assert len(sample.token_ids) <= MAX_NEW
            else:
                assert stops_in_it == []
                assert len(sample.token_ids) == MAX_NEW
        ended_by = {sample.token_ids[-1] for sample in samples if sample.finish_reason == "stop"}
        assert ended_by == set(seen.stops)
        assert len({tuple(sample.token_ids) for sample in samples}) > 90

    @pytest.mark.parametrize("name", ["whole", "warped", "mistral"])
    def test_sum_is_raw_and_equals_transformers(self, seen: Seen, name: str) -> None:
        ours = [sample.logp for sample in seen.samples[name]]
        abs_diff = max(abs(one - other) for one, other in zip(ours, seen.scored[name], strict=True))
        print(f"{name}: largest difference of a response's sum {abs_diff:.3g}")
        assert abs_diff < 1e-4

    @pytest.mark.parametrize("layout", ["again", "backwards", "alone"])
    def test_layout_changes_nothing(self, seen: Seen, layout: str) -> None:
        other = seen.samples[layout]
        whole = seen.samples["whole"][: len(other)]
        assert [s.token_ids for s in other] == [s.token_ids for s in whole]
        assert [s.finish_reason for s in other] == [s.finish_reason for s in whole]
        assert [s.logp for s in other] == pytest.approx([s.logp for s in whole], abs=1e-4)

    def test_samples_of_a_prompt_share_its_prefill(self, seen: Seen) -> None:
        """Also if all are prefilled in one step. A block on a CPU has 128 tokens."""
        assert len(seen.cached) == 16
        assert seen.cached == [0] + [128] * 15

    def test_requests_that_are_added_while_others_run_change_nothing(self, seen: Seen) -> None:
        assert sorted(seen.streamed) == [(1, row) for row in range(96)]
        ours = [seen.streamed[1, row] for row in range(96)]
        assert [s.token_ids for s in ours] == [s.token_ids for s in seen.samples["whole"]]

    def test_room_is_for_twice_what_runs(self, seen: Seen) -> None:
        assert [room for _, room in seen.room] == [open_ < 64 for open_, _ in seen.room]
        assert {room for _, room in seen.room} == {True, False}

    def test_loading_is_timed(self, seen: Seen) -> None:
        assert 0 < seen.load_seconds <= seen.start_seconds

    def test_preemption_changes_nothing(self, seen: Seen) -> None:
        assert seen.preemptions > 0
        roomy, cramped = seen.samples["roomy"], seen.samples["cramped"]
        assert [s.token_ids for s in cramped] == [s.token_ids for s in roomy]
        assert [s.logp for s in cramped] == pytest.approx([s.logp for s in roomy], abs=1e-4)

    def test_model_generation_config_is_ignored(self, seen: Seen) -> None:
        assert [s.token_ids for s in seen.samples["opinionated"]] == [s.token_ids for s in seen.samples["whole"]]

    def test_prompt_reaches_vllm_unchanged(self, seen: Seen) -> None:
        assert seen.prompts_at_vllm == [seen.prompts[n % 3] for n in range(6)]
        assert [ids.count(1) for ids in seen.prompts_at_vllm] == [1] * 6  # one BOS

    def test_first_token_follows_transformers_distribution(self, seen: Seen, folders: dict[str, Path]) -> None:
        model = load_model(folders["llama"], FLOAT32)
        prompt = torch.tensor([seen.prompts[0]])
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=1,
            do_sample=True,
            temperature=0.9,
            top_p=0.7,
            top_k=20,
            output_scores=True,
            return_dict_in_generate=True,
        )
        exact = output.scores[0][0].softmax(dim=-1)
        counts = torch.bincount(torch.tensor(seen.firsts), minlength=len(exact))
        assert chi_square(counts, exact) < 4
        assert bool((counts[exact > 5e-3] > 0).all())

    def test_every_response_is_reported_once_and_early(self, seen: Seen) -> None:
        assert sum(seen.done_counts) == len(seen.requests)
        assert len(seen.done_counts) > 3

    def test_stage_writes_shards_and_keeps_them(
        self, seen: Seen, out: Path, events: list[tuple[str, dict[str, Any]]]
    ) -> None:
        files = sorted(out.glob("*.parquet"))
        assert [file.name for file in files] == ["generations-00000.parquet", "generations-00001.parquet"]
        written = [fields for event, fields in events if event == "shard"]
        assert [fields["key"] for fields in written] == [parquet_key(file) for file in files]
        assert {fields["call"] for fields in written} == {"first"}
        frame = pl.concat([pl.read_parquet(file) for file in files])
        assert frame["prompt_id"].to_list() == [n for n in (3, 1, 2) for _ in range(4)]
        assert frame["prompt_token_ids"].to_list() == [ids for ids in seen.prompts for _ in range(4)]
        assert frame["token_ids"].n_unique() == 12
        notes = [fields["text"] for event, fields in events if event == "note"]
        assert "engine: vllm (as configured)" in notes

    def test_nothing_reaches_the_network_or_is_left_behind(self, seen: Seen) -> None:
        assert [where for where in seen.connections if not where.startswith("AF_UNIX")] == []
        assert seen.children == []
        assert seen.models_left == 0
        assert seen.environment == {
            "VLLM_CPU_KVCACHE_SPACE": None,
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
        }

    @pytest.mark.parametrize(
        ("name", "kind", "says"),
        [
            ("small cache", OutOfMemoryError, r"raise generate\.vllm\.kv_cache_gib \(now 1e-05\)"),
            ("huge cache", OutOfMemoryError, r"lower generate\.vllm\.kv_cache_gib \(now 100000\)"),
            ("context", UsageError, r"max_position_embeddings=256.*; lower generate\.vllm\.max_model_len"),
            ("adapter", DataError, r"has no config\.json \(an adapter\?\)"),
            ("head", DataError, r"vLLM cannot run the model in .*generate\.engine=transformers"),
            ("platform", UsageError, r"runs on cuda, but the model is to run on cpu"),
        ],
    )
    def test_errors_of_settings_and_models(self, seen: Seen, name: str, kind: type[Exception], says: str) -> None:
        raised, text = seen.errors[name]
        assert raised is kind
        assert re.search(says, text)

    def test_figures(self, seen: Seen) -> None:
        print(f"start {seen.start_seconds:.1f} s, {seen.tokens_per_second:.0f} tokens/s")
        assert seen.tokens_per_second > 0
