"""The transformers engine: what it draws, the log-probabilities that it returns, and that only a seed matters."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chi_square import chi_square
from engine_rig import Rig, of_prompt
from other_models import gemma2, gpt2, make_other, mamba, mistral
from tiny_models import (
    MAX_POSITIONS,
    OPINIONATED,
    make_llama,
    make_mistral,
    make_qwen2,
    set_generation_config,
)

from dice_py.config.stages import GenerateConfig, ScoreConfig
from dice_py.generation.engines import decoding
from dice_py.generation.engines.base import Request, sample_all
from dice_py.generation.engines.decoding import Rows, SeededSampling
from dice_py.scoring.scorer import Scorer
from dice_py.storage.keys import seed_for


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
    # The test can fail: the same counts do not fit a slightly different distribution.
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


def test_draw_by_hand() -> None:
    """The two races in plain Python. A third of the vocabulary and the second block have probability zero."""
    vocabulary, rows = 2 * decoding.BLOCK + 7, 200
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0)) * 2
    logits[:, ::3] = -torch.inf
    logits[:, decoding.BLOCK : 2 * decoding.BLOCK] = -torch.inf
    sampling = SeededSampling(range(rows), GenerateConfig(temperature=1.0), stops=[1, 2], device=torch.device("cpu"))
    drawn = sampling(torch.zeros(rows, 1, dtype=torch.long), logits)
    assert torch.isfinite(drawn).sum(dim=-1).tolist() == [1] * rows
    expected = []
    for row, scores in enumerate(logits.double().tolist()):
        numbers = [-math.log(1 - u) for u in np.random.Generator(np.random.Philox(key=row)).random(3 + decoding.BLOCK)]
        parts = [scores[start : start + decoding.BLOCK] for start in range(0, vocabulary, decoding.BLOCK)]
        masses = [sum(map(math.exp, part)) for part in parts]
        block = max(range(3), key=lambda at: masses[at] / numbers[at])
        inside = [math.exp(score) / number for score, number in zip(parts[block], numbers[3:], strict=False)]
        expected.append(block * decoding.BLOCK + inside.index(max(inside)))
    assert drawn.argmax(dim=-1).tolist() == expected
    assert len({token // decoding.BLOCK for token in expected}) == 2
    assert sampling.alive.tolist() == [token not in (1, 2) for token in expected]
    exact = logits.double().log_softmax(dim=-1).gather(1, torch.tensor(expected)[:, None]).squeeze(1)
    assert sampling.logp.tolist() == pytest.approx(exact.tolist(), abs=1e-5)


def test_draws_follow_the_distribution_across_blocks() -> None:
    scores = torch.randn(1, 1000, generator=torch.Generator().manual_seed(1)) * 2
    rows = 20_000
    sampling = SeededSampling(range(rows), GenerateConfig(temperature=1.0), stops=[0], device=torch.device("cpu"))
    tokens = sampling.draw(torch.zeros(rows, 1, dtype=torch.long), scores.expand(rows, -1)).squeeze(1)
    exact = scores[0].softmax(dim=-1)
    assert chi_square(torch.bincount(tokens, minlength=1000), exact) < 4
    assert chi_square(torch.bincount(tokens, minlength=1000), exact**1.1 / (exact**1.1).sum()) > 4


def test_the_last_bits_of_logits_change_no_draw() -> None:
    """With a large vocabulary too. The last bits of the logits differ between batches."""
    scores = torch.randn(2000, 32_000, generator=torch.Generator().manual_seed(2)) * 3
    noise = torch.randn(scores.shape, generator=torch.Generator().manual_seed(3)) * 1e-6
    tokens = []
    for logits in (scores, scores + noise):
        sampling = SeededSampling(range(2000), GenerateConfig(temperature=1.0), stops=[0], device=torch.device("cpu"))
        tokens.append(sampling.draw(torch.zeros(2000, 1, dtype=torch.long), logits))
    assert int((tokens[0] != tokens[1]).sum()) == 0


def test_sum_is_raw_and_equals_the_scorer(family: Path) -> None:
    rig = Rig(family, GenerateConfig(max_new_tokens=24, temperature=0.7, top_p=0.9, top_k=50))
    requests = rig.requests(48)
    samples = rig.sample(requests)
    scored = Scorer(rig.engine.model, ScoreConfig()).sums(
        [request.prompt_token_ids for request in requests], [sample.token_ids for sample in samples]
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
    set_generation_config(opinionated, **OPINIONATED, min_new_tokens=20, suppress_tokens=list(range(100)))
    requests = plain.requests(24)
    assert Rig(opinionated, config).sample(requests) == plain.sample(requests)


def test_every_response_is_reported_once(llama: Path) -> None:
    rig = Rig(llama, GenerateConfig(max_new_tokens=4, token_budget=400))
    counts: list[int] = []
    sample_all(rig.engine, rig.requests(50), counts.append)
    assert sum(counts) == 50
    assert len(counts) > 1
    assert rig.engine.unfinished == 0
    assert sample_all(rig.engine, [], counts.append) == []


def test_longest_first(llama: Path) -> None:
    """A batch that exceeds the memory fails at once, not after an hour."""
    rig = Rig(llama, GenerateConfig(max_new_tokens=4, token_budget=400))
    widths = [width for _, width in prefilled(rig, rig.requests(50))]
    assert len(widths) > 5
    assert all(one >= other for one, other in pairwise(widths))


def prefilled(rig: Rig, requests: list[Request]) -> list[tuple[int, int]]:
    """(rows, width) of every forward over more than one position while `requests` are sampled."""
    shapes: list[tuple[int, int]] = []
    forward = rig.engine.model.forward

    def spy(*arguments: Any, **named: Any) -> Any:
        if named["input_ids"].shape[1] > 1:
            shapes.append(tuple(named["input_ids"].shape))
        return forward(*arguments, **named)

    rig.engine.model.forward = spy
    rig.sample(requests)
    rig.engine.model.forward = forward
    return shapes


def test_samples_of_a_prompt_share_its_prefill(llama: Path) -> None:
    rig = Rig(llama, GenerateConfig(max_new_tokens=8, temperature=1.0))
    requests = of_prompt(rig, 6, 16)
    longest = max(len(request.prompt_token_ids) for request in requests)
    assert prefilled(rig, requests) == [(6, longest)]
    # 2 of the longest prompts fit whole, a part of a third takes the rest, and so on; never a prompt per sample.
    rig.engine.config = rig.engine.config.model_copy(update={"token_budget": 40 * (longest + 8)})
    shapes = prefilled(rig, requests)
    assert len(shapes) > 1
    assert 6 <= sum(rows for rows, _ in shapes) <= 12


def test_rows_stay_within_the_budget(llama: Path) -> None:
    config = GenerateConfig(max_new_tokens=24, temperature=1.0, token_budget=1500)
    rig = Rig(llama, config)
    requests = of_prompt(rig, 9, 8)
    seen: list[int] = []
    forward = rig.engine.model.forward

    def spy(*arguments: Any, **named: Any) -> Any:
        cache = named["past_key_values"]
        if named["input_ids"].shape[1] == 1:
            seen.append(len(named["input_ids"]) * (cache.get_seq_length() + 1))
        return forward(*arguments, **named)

    rig.engine.model.forward = spy
    rig.sample(requests)
    assert max(seen) <= 1500
    assert sum(seen) / len(seen) > 400  # and use it: rows that end make room for others


@pytest.mark.parametrize(
    ("make", "shares", "joins"),
    [
        (make_llama, True, True),
        (lambda folder: make_other(folder, mistral), True, False),
        pytest.param(lambda folder: make_other(folder, gemma2), True, False, marks=pytest.mark.long),
        pytest.param(lambda folder: make_other(folder, gpt2), True, True, marks=pytest.mark.long),
        (lambda folder: make_other(folder, mamba), False, False),
    ],
    ids=["llama", "mistral sliding", "gemma2", "gpt2", "mamba"],
)
def test_samples_are_those_of_whole_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Path], shares: bool, joins: bool
) -> None:
    """Shared prefills, rows that leave and rows that join, against plain `generate` on full prompts."""
    config = GenerateConfig(max_new_tokens=24, temperature=1.0, token_budget=900)
    rig = Rig(make(tmp_path / "model"), config)
    requests = of_prompt(rig, 6, 8)
    joined: list[int] = []
    join = Rows.join
    monkeypatch.setattr(Rows, "join", lambda self, other: (joined.append(len(other)), join(self, other)))
    ours = rig.sample(requests)
    assert rig.engine.shares_prefill == rig.engine.drops_finished_rows == shares
    assert bool(joined) == joins
    rig.engine.shares_prefill = False
    for budget in (900, 1):
        rig.engine.config = config.model_copy(update={"token_budget": budget})
        plain = rig.sample(requests)
        assert [s.token_ids for s in ours] == [s.token_ids for s in plain]
        assert [s.finish_reason for s in ours] == [s.finish_reason for s in plain]
        assert [s.logp for s in ours] == pytest.approx([s.logp for s in plain], abs=1e-4)
    assert {sample.finish_reason for sample in ours} == {"stop", "length"}


def test_no_row_goes_beyond_the_last_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that ended may stay for a while, but a row of GPT-2 not behind its 256th position."""
    monkeypatch.setattr(decoding, "COMPACT_BELOW", 0.0)  # they stay as long as they may
    folder = make_other(tmp_path / "model", gpt2)
    rig = Rig(folder, GenerateConfig(max_new_tokens=40, temperature=1.0, token_budget=8 * MAX_POSITIONS))
    prompt = (rig.prompts[2] * 5)[: MAX_POSITIONS - 40]
    samples = rig.sample([Request(prompt, seed_for(3, n)) for n in range(24)])
    assert max(len(sample.token_ids) for sample in samples) == 40


def test_responses_come_as_they_end(llama: Path) -> None:
    rig = Rig(llama, GenerateConfig(max_new_tokens=24, temperature=1.0))
    requests = of_prompt(rig, 2, 16)
    rig.engine.add([((7, row), request) for row, request in enumerate(requests)])
    assert rig.engine.unfinished == 32
    first = rig.engine.step()
    assert 0 < len(first) < 32
    assert rig.engine.unfinished == 32 - len(first)
    # Others that are added meanwhile join, and the samples are the same.
    rig.engine.add([((8, row), request) for row, request in enumerate(requests)])
    samples = dict(first)
    while rig.engine.unfinished:
        samples.update(rig.engine.step())
    assert set(samples) == {(shard, row) for shard in (7, 8) for row in range(32)}
    assert all(samples[7, row].token_ids == samples[8, row].token_ids for row in range(32))


def test_rows_that_fit_beside_the_longest_prompt(llama: Path) -> None:
    rig = Rig(llama, GenerateConfig(max_new_tokens=24, temperature=1.0, token_budget=700))
    longest = max(map(len, rig.prompts))
    assert rig.engine.max_rows == 700 // (longest + 24) > 1
    rig.engine.config = rig.engine.config.model_copy(update={"token_budget": longest})
    assert rig.engine.max_rows == 1


def test_room(llama: Path) -> None:
    rig = Rig(llama, GenerateConfig(max_new_tokens=24, temperature=1.0, token_budget=100))
    assert rig.engine.has_room
    rig.engine.add([((0, row), request) for row, request in enumerate(of_prompt(rig, 20, 4))])
    assert not rig.engine.has_room
    while rig.engine.unfinished:
        rig.engine.step()
    assert rig.engine.has_room
