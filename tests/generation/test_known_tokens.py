"""A model with more rows than its tokenizer has tokens never samples an id that means nothing, in either engine."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_llama, make_tokenizer

from dice_py.compute.stage_process import run_in_subprocess
from dice_py.config.shared import ModelConfig
from dice_py.config.stages import GenerateConfig, ScoreConfig
from dice_py.data import prompts_frame
from dice_py.events import no_report
from dice_py.generation.engines.base import Request, Sample, sample_all
from dice_py.generation.engines.decoding import SeededSampling
from dice_py.generation.engines.factory import build_engine
from dice_py.models.loading import load_model
from dice_py.models.vocabulary import KnownTokens
from dice_py.scoring.scorer import Scorer
from dice_py.stages.generate import GenerateJob
from dice_py.storage.keys import seed_for
from dice_py.storage.parquet import read_parquet

FLOAT32 = ModelConfig(device="cpu", dtype="float32")
CONFIG = GenerateConfig(samples=2, max_new_tokens=12, temperature=1.0, vllm={"kv_cache_gib": 0.1, "max_num_seqs": 32})
ROWS = 512
KNOWN = KnownTokens(262, holes=(100, 101))
REQUESTS = [Request([1, 3, 80 + n % 7], seed_for(3, n)) for n in range(24)]


def test_the_ids_of_a_tokenizer() -> None:
    tokenizer = make_tokenizer()
    assert KnownTokens.of(tokenizer) == KnownTokens(262)
    assert KnownTokens(262).unknown(262) == []
    assert KnownTokens(5, (1, 3)).unknown(8) == [1, 3, 5, 6, 7]
    assert KnownTokens(5, (1, 3)).unknown(3) == [1]
    assert KnownTokens.of(tokenizer, stops=[265]) == KnownTokens(266, (262, 263, 264))


@pytest.mark.parametrize("changes", [{}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.3}])
def test_unknown_ids_are_not_drawn_and_the_log_probability_is_raw(changes: dict[str, Any]) -> None:
    config = CONFIG.model_copy(update=changes)
    logits = torch.zeros(64, 300)
    logits[:, 290:] = 5.0  # nearly all of the probability
    logits[:, 7] = 1.0
    sampling = SeededSampling(range(64), config, [2], torch.device("cpu"), known=KnownTokens(280, (9,)))
    tokens = sampling.draw(torch.zeros(64, 1, dtype=torch.long), logits)
    assert int(tokens.max()) < 280
    assert 9 not in tokens
    torch.testing.assert_close(sampling.logp, torch.log_softmax(logits, dim=-1).gather(1, tokens).squeeze(1))
    every = SeededSampling(range(64), config, [2], torch.device("cpu"), known=KnownTokens(300))
    same = SeededSampling(range(64), config, [2], torch.device("cpu"))
    drawn = [one.draw(torch.zeros(64, 1, dtype=torch.long), logits) for one in (every, same)]
    assert torch.equal(*drawn)
    assert int(drawn[0].max()) >= 290


def sampled(engine: str, folder: Path, report: Any = None) -> tuple[list[Sample], list[Sample], float]:
    """Samples with and without the known ids, and the largest difference of a sum from the scorer's."""
    del report
    results = []
    for known in (KNOWN, None):
        built = build_engine(engine, CONFIG, FLOAT32, folder, [2, 4], 8, 0, known)
        results.append(sample_all(built, REQUESTS))
        built.close()
    scorer = Scorer(load_model(folder, FLOAT32), ScoreConfig())
    sums = scorer.sums([one.prompt_token_ids for one in REQUESTS], [sample.token_ids for sample in results[0]])
    return *results, max(abs(sample.logp - total) for sample, total in zip(results[0], sums, strict=True))


def check(masked: list[Sample], free: list[Sample], difference: float) -> None:
    ids = {token for sample in masked for token in sample.token_ids}
    assert max(ids) < KNOWN.size
    assert not ids & set(KNOWN.holes)
    assert max(token for sample in free for token in sample.token_ids) >= KNOWN.size  # they would have been sampled
    assert difference < 1e-3


def test_the_transformers_engine(tmp_path: Path) -> None:
    check(*sampled("transformers", make_llama(tmp_path / "model", vocab_size=ROWS)))


def test_the_stage_passes_them_on(tmp_path: Path) -> None:
    prompts = prompts_frame([[{"role": "user", "content": text}] for text in ("hi", "ho")])
    job = GenerateJob(
        config=CONFIG.model_copy(update={"engine": "transformers", "samples": 8}), models=FLOAT32,
        policy=make_llama(tmp_path / "model", vocab_size=ROWS), prompts=prompts, prompts_key="k", out=tmp_path / "out",
        seed=0, round_number=1, max_prompt_tokens=64,
    )  # fmt: skip
    (file, _), *_ = job.run().files
    assert int(read_parquet(file)["token_ids"].explode().max()) < KNOWN.size  # type: ignore[arg-type]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
def test_the_vllm_engine(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model", vocab_size=ROWS)
    check(*run_in_subprocess(partial(sampled, "vllm", folder), log=tmp_path / "log", remedy="", report=no_report))
