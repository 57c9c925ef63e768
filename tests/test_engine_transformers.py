"""The embedded engine: what it draws, what it says of it, and that only a seed decides."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny_models import make_llama, make_mistral, make_qwen2, set_generation_config

from dice_py.artefacts import seed_for
from dice_py.config import GenerateConfig, ModelConfig, ScoreConfig
from dice_py.engine_transformers import SeededSampling, TransformersEngine
from dice_py.generate import Request, Sample
from dice_py.models import encode_prompt, load_tokenizer, stop_token_ids
from dice_py.score import sequence_logps

CPU = ModelConfig(device="cpu")
QUESTIONS = ["hello there", "hi", "what is the tallest mountain on this planet, and who climbed it first?"]


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's statistic in standard deviations above its mean: (χ² − df) / √(2·df).

    `counts` and `probabilities` are (vocabulary,); entries expected fewer than five times are pooled.
    """
    expected = probabilities.double() * counts.sum()
    rare = expected < 5
    observed = torch.cat([counts[~rare].double(), counts[rare].sum().double()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    kept = expected > 0
    assert observed[~kept].sum() == 0, "a token of probability zero was drawn"
    freedom = int(kept.sum()) - 1
    statistic = ((observed - expected)[kept] ** 2 / expected[kept]).sum().item()
    return (statistic - freedom) / (2 * freedom) ** 0.5


class Rig:
    """An engine on a tiny model, and the prompts' token ids."""

    def __init__(self, folder: Path, config: GenerateConfig) -> None:
        tokenizer = load_tokenizer(folder, CPU)
        self.stops = stop_token_ids(folder, tokenizer)
        self.engine = TransformersEngine(folder, config, CPU, stops=self.stops, pad=tokenizer.pad_token_id)
        self.prompts = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in QUESTIONS]

    def requests(self, count: int) -> list[Request]:
        return [Request(self.prompts[n % len(self.prompts)], seed_for(7, n)) for n in range(count)]

    def sample(self, requests: list[Request]) -> list[Sample]:
        return self.engine.sample(requests, lambda _: None)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(params=[make_llama, make_mistral, make_qwen2], ids=["llama", "mistral", "qwen2"])
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    make: Callable[[Path], Path] = request.param
    return make(tmp_path / "model")


def transformers_distribution(rig: Rig, prompt: list[int], **sampling: float) -> torch.Tensor:
    """(vocabulary,) probabilities of the first token as transformers' own sampling has them."""
    output = rig.engine.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=1,
        do_sample=True,
        output_scores=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        **sampling,
    )
    return output.scores[0][0].softmax(dim=-1)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0, "top_p": 1.0, "top_k": 0},
        {"temperature": 0.7, "top_p": 1.0, "top_k": 0},
        {"temperature": 1.3, "top_p": 0.8, "top_k": 0},
        {"temperature": 1.0, "top_p": 1.0, "top_k": 9},
        {"temperature": 0.9, "top_p": 0.7, "top_k": 20},
    ],
    ids=["plain", "temperature", "top_p", "top_k", "all"],
)
def test_first_token_follows_transformers_distribution(llama: Path, sampling: dict[str, float]) -> None:
    rig = Rig(llama, GenerateConfig(max_new_tokens=1, token_budget=2**20, **sampling))
    prompt = rig.prompts[0][:3]  # short, since only the distribution after it matters
    exact = transformers_distribution(rig, prompt, **sampling)
    samples = rig.sample([Request(prompt, seed_for(3, n)) for n in range(8_000)])
    counts = torch.bincount(torch.tensor([s.token_ids[0] for s in samples]), minlength=len(exact))
    assert chi_square(counts, exact) < 4
    # The same numbers refuse a distribution that is slightly another one: the test can fail.
    assert chi_square(counts[exact > 0], (exact[exact > 0] ** 1.2) / (exact[exact > 0] ** 1.2).sum()) > 4
    likely = exact > 2e-3
    assert bool((counts[likely] > 0).all()), "a token of the filtered support was never drawn"
    assert int(counts[exact == 0].sum()) == 0


def test_second_token_follows_the_model(llama: Path) -> None:
    rig = Rig(llama, GenerateConfig(max_new_tokens=2, temperature=1.0, token_budget=2**20))
    prompt = rig.prompts[0][:3]
    samples = rig.sample([Request(prompt, seed_for(4, n)) for n in range(8_000)])
    firsts = torch.tensor([s.token_ids[0] for s in samples])
    commonest = int(torch.bincount(firsts).argmax())
    exact = transformers_distribution(rig, [*prompt, commonest], temperature=1.0, top_p=1.0, top_k=0)
    seconds = [s.token_ids[1] for s in samples if s.token_ids[0] == commonest]
    assert len(seconds) > 500
    assert chi_square(torch.bincount(torch.tensor(seconds), minlength=len(exact)), exact) < 4


def test_inverse_cumulative_by_hand() -> None:
    uniforms = torch.tensor([[0.0], [0.1999], [0.2001], [0.6999], [0.7001], [1 - 2**-53]], dtype=torch.float64)
    sampling = SeededSampling(uniforms, GenerateConfig(temperature=1.0), stops=[3])
    # Token 1 has no probability: neither end of the line nor the gap may give it.
    scores = torch.log(torch.tensor([0.2, 0.0, 0.5, 0.3])).expand(len(uniforms), 4)
    drawn = sampling(torch.zeros(len(uniforms), 1, dtype=torch.long), scores)
    assert drawn.argmax(dim=-1).tolist() == [0, 0, 2, 2, 3, 3]
    assert sampling.alive.tolist() == [True, True, True, True, False, False]
    assert torch.isfinite(drawn).sum(dim=-1).tolist() == [1] * len(uniforms)
    assert sampling.logp.tolist() == pytest.approx(
        [-1.6094379, -1.6094379, -0.6931472, -0.6931472, -1.2039728, -1.2039728], abs=1e-6
    )


def test_sum_is_raw_and_equals_the_scorer(family: Path) -> None:
    rig = Rig(family, GenerateConfig(max_new_tokens=24, temperature=0.7, top_p=0.9, top_k=50))
    requests = rig.requests(48)
    samples = rig.sample(requests)
    scored = sequence_logps(
        rig.engine.model,
        [request.prompt_token_ids for request in requests],
        [sample.token_ids for sample in samples],
        ScoreConfig(),
    )
    assert [sample.logp for sample in samples] == pytest.approx(scored, abs=1e-4)


def test_finish_reasons(family: Path) -> None:
    rig = Rig(family, GenerateConfig(max_new_tokens=24, temperature=1.0))
    samples = rig.sample(rig.requests(192))
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    for sample in samples:
        stops_in_it = [token for token in sample.token_ids if token in rig.stops]
        if sample.finish_reason == "stop":
            assert stops_in_it == [sample.token_ids[-1]]
            assert len(sample.token_ids) <= 24
        else:
            assert stops_in_it == []
            assert len(sample.token_ids) == 24
    ended_by = {sample.token_ids[-1] for sample in samples if sample.finish_reason == "stop"}
    assert ended_by == set(rig.stops)


def test_layout_changes_nothing(llama: Path) -> None:
    config = GenerateConfig(max_new_tokens=24, temperature=1.0)
    rig = Rig(llama, config)
    requests = rig.requests(24)
    whole = rig.sample(requests)
    rig.engine.config = config.model_copy(update={"token_budget": 1})
    alone = rig.sample(requests)
    rig.engine.config = config.model_copy(update={"token_budget": 700})
    backwards = rig.sample(requests[::-1])[::-1]
    for other in (alone, backwards):
        assert [s.token_ids for s in other] == [s.token_ids for s in whole]
        assert [s.finish_reason for s in other] == [s.finish_reason for s in whole]
        assert [s.logp for s in other] == pytest.approx([s.logp for s in whole], abs=1e-4)


def test_seed_decides_and_nothing_else(llama: Path) -> None:
    config = GenerateConfig(max_new_tokens=24, temperature=1.0)
    rig = Rig(llama, config)
    requests = [Request(rig.prompts[0], seed_for(0, n)) for n in range(16)]
    torch.manual_seed(1)
    first = rig.sample(requests)
    torch.manual_seed(2)
    assert rig.sample(requests) == first
    assert len({tuple(sample.token_ids) for sample in first}) == 16
    twins = rig.sample([requests[0], requests[0]])
    assert twins[0].token_ids == twins[1].token_ids == first[0].token_ids


def test_model_generation_config_is_ignored(llama: Path, tmp_path: Path) -> None:
    config = GenerateConfig(max_new_tokens=24, temperature=1.0)
    plain = Rig(llama, config)
    opinionated = make_llama(tmp_path / "model")
    set_generation_config(
        opinionated,
        do_sample=True,
        temperature=0.1,
        top_k=1,
        top_p=0.1,
        repetition_penalty=5.0,
        max_new_tokens=2,
        min_new_tokens=20,
        suppress_tokens=list(range(100)),
    )
    requests = plain.requests(24)
    assert Rig(opinionated, config).sample(requests) == plain.sample(requests)


def test_every_response_is_reported_once(llama: Path) -> None:
    rig = Rig(llama, GenerateConfig(max_new_tokens=4, token_budget=400))
    told: list[int] = []
    rig.engine.sample(rig.requests(50), told.append)
    assert sum(told) == 50
    assert len(told) > 1
    assert rig.engine.sample([], told.append) == []


def test_longest_first(llama: Path) -> None:
    """What does not fit in memory fails in the first batch, not after an hour."""
    rig = Rig(llama, GenerateConfig(max_new_tokens=4, token_budget=400))
    widths: list[int] = []
    batch = rig.engine._batch

    def spy(requests: list[Request]) -> list[Sample]:
        widths.append(max(len(request.prompt_token_ids) for request in requests))
        return batch(requests)

    rig.engine._batch = spy  # type: ignore[method-assign]
    rig.sample(rig.requests(50))
    assert all(one >= other for one, other in pairwise(widths))
