"""Options that are passed on to vLLM: real vLLM on the CPU judges them, and samples with them.

As in test_engine_vllm.py, one spawned process has vLLM, and returns plain data.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from chi_square import chi_square
from sampling_rule import OPTIONS, changed_logits, kept_tokens
from tiny_models import make_llama
from vllm_config import PLAIN, changed_config

from dice_py.compute.stage_process import run_in_subprocess
from dice_py.config.sampling_options import SamplingOptions
from dice_py.config.shared import ModelConfig
from dice_py.config.stages import GenerateConfig, ScoreConfig
from dice_py.errors import UsageError
from dice_py.generation.engines.base import Request, Sample, sample_all
from dice_py.generation.engines.factory import check_options
from dice_py.generation.engines.vllm import VllmEngine
from dice_py.generation.engines.vllm_options import needs_tokenizer, sampling_options
from dice_py.models.loading import load_model
from dice_py.models.tokenization import encode_prompt, load_tokenizer, stop_token_ids
from dice_py.scoring.scorer import Scorer
from dice_py.storage.keys import seed_for

FLOAT32 = ModelConfig(device="cpu", dtype="float32")
LETTERS = "abcdefghijklmnop"
ENGINE_ARGS = {"max_num_batched_tokens": 8192, "additional_config": {"mine": 1}}
COMPARED = ("penalties", "min_tokens", "all")
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "unknown": ({"min_pp": 0.1}, {}),
    "range": ({"min_p": 1.5}, {}),
    "type": ({"min_p": "x", "stop_token_ids": ["y"]}, {}),
    "together": ({"min_tokens": 99}, {}),
    "vocabulary": ({"allowed_token_ids": [5, 9999]}, {}),
    "nested": ({"repetition_detection": {"max_pattern_size": 3, "min_count": 1}}, {}),
    "unknown argument": ({}, {"quantisation": "fp8"}),
    "value of an argument": ({}, {"quantization": "none-such"}),
    "type of an argument": ({}, {"max_num_batched_tokens": "many"}),
    "on a CPU": ({}, {"enable_chunked_prefill": True}),
}


def settings(params: dict[str, Any], engine_args: dict[str, Any] | None = None, **others: Any) -> GenerateConfig:
    vllm = {"kv_cache_gib": 0.25, "max_num_seqs": 64, "engine_args": engine_args or {}}
    return changed_config(PLAIN, vllm=vllm, sampling_params=params, **others)


@dataclass
class Seen:
    """Results of the process with vLLM."""

    stops: list[int] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    scored: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, list[int]] = field(default_factory=dict)
    exact: dict[str, list[float]] = field(default_factory=dict)
    converted: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, tuple[type[Exception], str]] = field(default_factory=dict)


def judge(folder: Path, report: Any) -> Seen:
    """Runs in a process of its own."""
    seen = Seen()
    tokenizer = load_tokenizer(folder, FLOAT32)
    seen.stops = stop_token_ids(folder, tokenizer)
    seen.prompt = encode_prompt(tokenizer, [{"role": "user", "content": "hello there"}])
    seen.requests = [Request(seen.prompt, seed_for(7, n)) for n in range(96)]
    seen.converted = sampling_options(settings({"logit_bias": {"13": 2}, "stop": "x", "bad_words": ["a"]}))
    for name, (params, engine_args) in REFUSED.items():
        try:
            check_options("vllm", settings(params, engine_args), FLOAT32, folder)
        except Exception as error:
            seen.errors[name] = (type(error), str(error))
    check_options("vllm", settings(SAMPLED["text"], ENGINE_ARGS), FLOAT32, folder)

    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in LETTERS]
    config = settings({"stop": ["e"]}, ENGINE_ARGS)
    engine = VllmEngine(folder, config, FLOAT32, stops=seen.stops, longest_prompt=len(seen.prompt))
    vllm_config = engine.llm.llm_engine.vllm_config
    seen.arguments = {
        "max_num_batched_tokens": vllm_config.scheduler_config.max_num_batched_tokens,
        "additional_config": vllm_config.additional_config,
    }
    model = load_model(folder, FLOAT32)
    scorer = Scorer(model, ScoreConfig())

    def sample(name: str, requests: list[Request], params: dict[str, Any], **others: Any) -> list[Sample]:
        engine.config = settings(params, ENGINE_ARGS, **others)
        engine.max_new_tokens = engine.config.max_new_tokens
        engine.sampling = sampling_options(engine.config)
        return sample_all(engine, requests)

    for name, params in SAMPLED.items():
        allowed = {"allowed_token_ids": [*letters, *seen.stops]}
        samples = seen.samples[name] = sample(name, seen.requests, {**allowed, **params})
        seen.scored[name] = scorer.sums([seen.prompt] * 96, [one.token_ids for one in samples])
    many = [Request(seen.prompt, seed_for(4, n)) for n in range(2400)]
    for name in COMPARED:
        params = OPTIONS[name]
        warped = {"temperature": 0.8, "top_p": 0.9, "max_new_tokens": 2}
        samples = sample(name, many, {**params, "min_p": 0.05}, **warped)
        firsts = torch.bincount(torch.tensor([s.token_ids[0] for s in samples if len(s.token_ids) == 2]))
        first = int(firsts.argmax())
        with torch.inference_mode():
            logits = model(torch.tensor([[*seen.prompt, first]])).logits[0, -1].double().tolist()
        changed = changed_logits(SamplingOptions.model_validate(params), seen.stops, seen.prompt, [first], logits)
        seen.exact[name] = kept_tokens([logit / 0.8 for logit in changed], min_p=0.05, top_p=0.9)
        seen.seconds[name] = [s.token_ids[1] for s in samples if s.token_ids[0] == first and len(s.token_ids) == 2]
    engine.close()
    return seen


SAMPLED: dict[str, dict[str, Any]] = {
    "free": {},
    "text": {"stop": ["e", "ab", "bcd"]},
    "late": {"stop": ["e", "ab", "bcd"], "min_tokens": 5},
    "ids": {"stop_token_ids": [70, 71], "bad_words": ["c", "fg"]},
    "repeats": {"repetition_detection": {"max_pattern_size": 2, "min_count": 2}},
    "penalties": {"repetition_penalty": 1.5, "presence_penalty": 0.5, "logit_bias": {"72": 1.0}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def seen(folder: Path) -> Seen:
    result = run_in_subprocess(
        partial(judge, folder), log=folder.parent / "worker.log", remedy="", report=lambda *_, **__: None
    )
    assert isinstance(result, Seen)
    return result


@pytest.mark.long
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="measured with vLLM's CPU build, and a GPU is here")
class TestOnTheCpu:
    """Checks of the results of the process with vLLM."""

    @pytest.mark.parametrize("name", SAMPLED)
    def test_log_probabilities_are_of_the_raw_logits(self, seen: Seen, name: str) -> None:
        assert [sample.logp for sample in seen.samples[name]] == pytest.approx(seen.scored[name], abs=1e-4)

    @pytest.mark.parametrize("name", COMPARED)
    def test_second_token_has_the_distribution_of_the_options(self, seen: Seen, name: str) -> None:
        seconds, exact = torch.tensor(seen.seconds[name]), torch.tensor(seen.exact[name], dtype=torch.float64)
        assert len(seconds) > 50
        assert chi_square(torch.bincount(seconds, minlength=len(exact)), exact) < 4

    @pytest.mark.parametrize("name", ["text", "late"])
    def test_a_response_ends_with_the_token_that_completes_a_stop_string(
        self, seen: Seen, folder: Path, name: str
    ) -> None:
        """The rule of test_sampling_options.py."""
        tokenizer = load_tokenizer(folder, FLOAT32)
        params = SAMPLED[name]
        least = params.get("min_tokens", 0)
        ended = 0
        for sample in seen.samples[name]:
            ids = sample.token_ids
            texts = [tokenizer.decode(ids[: n + 1], skip_special_tokens=True) for n in range(len(ids))]
            found = [
                any(texts[n].count(stop) > (texts[n - 1].count(stop) if n else 0) for stop in params["stop"])
                for n in range(len(texts))
            ]
            assert not any(found[least:-1])
            is_stop_token = ids[-1] in seen.stops
            by_string = found[-1] and len(found) > least
            assert sample.finish_reason == ("stop" if by_string or is_stop_token else "length")
            ended += by_string
        assert ended > 10

    def test_stop_token_ids_and_bad_words(self, seen: Seen, folder: Path) -> None:
        samples = seen.samples["ids"]
        assert {sample.token_ids[-1] for sample in samples if sample.finish_reason == "stop"} >= {70, 71}
        tokenizer = load_tokenizer(folder, FLOAT32)
        texts = [tokenizer.decode(sample.token_ids) for sample in samples]
        free = "".join(tokenizer.decode(sample.token_ids) for sample in seen.samples["free"])
        assert not any("c" in text or "fg" in text for text in texts)
        assert "c" in free

    def test_a_response_that_repeats_itself_counts_as_cut_off(self, seen: Seen) -> None:
        cut = [sample for sample in seen.samples["repeats"] if sample.finish_reason == "length"]
        short = [sample.token_ids for sample in cut if len(sample.token_ids) < PLAIN.max_new_tokens]
        assert short
        assert all(ids[-1] == ids[-2] or ids[-4:-2] == ids[-2:] for ids in short)

    def test_types_are_vllms(self, seen: Seen) -> None:
        assert seen.converted == {"logit_bias": {13: 2.0}, "stop": ["x"], "bad_words": ["a"]}

    def test_arguments_reach_the_engine(self, seen: Seen) -> None:
        assert seen.arguments == ENGINE_ARGS

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (
                "unknown",
                "generate.sampling_params: vLLM's SamplingParams refuses it: Unexpected keyword argument 'min_pp'; did "
                "you mean 'min_p'?",
            ),
            ("range", "refuses it: min_p must be in [0, 1], got 1.5"),
            (
                "type",
                "min_p is 'x': Input should be a valid number, unable to parse string as a number; stop_token_ids",
            ),
            ("together", "min_tokens must be less than or equal to max_tokens=24, got 99"),
            ("vocabulary", "generate.sampling_params names token 9999, but the vocabulary of "),
            ("nested", "min_count must be >= 2 to detect repetitive patterns"),
            (
                "unknown argument",
                "generate.vllm.engine_args: vLLM refuses it: EngineArgs.__init__() got an unexpected keyword argument "
                "'quantisation'; did you mean 'quantization'?",
            ),
            (
                "value of an argument",
                "generate.vllm.engine_args: vLLM refuses it: Unknown quantization method: none-such.",
            ),
            ("type of an argument", "generate.vllm.engine_args: vLLM refuses it: "),
            ("on a CPU", "enable_chunked_prefill cannot be set on a CPU"),
        ],
    )
    def test_refusals_are_vllms(self, seen: Seen, name: str, message: str) -> None:
        kind, text = seen.errors[name]
        assert kind is UsageError
        assert message in text


def test_only_options_of_texts_need_a_tokenizer() -> None:
    assert not needs_tokenizer(settings({"min_p": 0.1, "stop": [], "bad_words": None}))
    assert needs_tokenizer(settings({"stop": "a"}))
    assert needs_tokenizer(settings({"bad_words": ["a"]}))
