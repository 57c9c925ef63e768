"""Sums of log-probabilities against a plain forward, for many architectures, batch sizes and tile sizes."""

from __future__ import annotations

import copy
import random
import statistics
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logp_oracle import SAME, max_abs_diff, mixed, plain, scorer, shared
from property_examples import examples
from tiny_families import NOT_PACKED, PACKED, build
from tiny_models import make_llama, make_mistral, make_qwen2
from tiny_sets import CPU, LAST, draw_ids
from transformers import LlamaForCausalLM, PreTrainedModel

from dice_py.errors import DataError
from dice_py.models.loading import load_model
from dice_py.scoring.lm_head import LogitHead

pytestmark = pytest.mark.usefixtures("cache_folder")


@cache
def of_name(name: str) -> tuple[list[list[int]], list[list[int]], list[float]]:
    """Rows with prompts that are shared and prompts that are not, and their sums under `build(name)`."""
    rows = [[*some, *others] for some, others in zip(shared(), mixed(), strict=True)]
    return rows[0], rows[1], plain(build(name), *rows)


@pytest.fixture
def model(llama: Path) -> PreTrainedModel:
    return load_model(llama, CPU)


# --- sums ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logit_chunk", [1, 7, 4096])
@pytest.mark.parametrize("token_budget", [1, 90, "auto"])
@pytest.mark.parametrize("name", PACKED)
def test_sums_are_those_of_a_plain_forward(name: str, token_budget: Any, logit_chunk: int) -> None:
    prompts, responses, want = of_name(name)
    notes: list[str] = []
    ours = scorer(build(name), notes, token_budget=token_budget, logit_chunk=logit_chunk)
    assert max_abs_diff(ours.sums(prompts, responses), want) < SAME
    assert ours.packs
    assert notes == []
    assert min(want) < -100.0  # so that the tolerance means something


@pytest.mark.parametrize("token_budget", [1, 90, "auto"])
@pytest.mark.parametrize("name", NOT_PACKED)
def test_models_without_packed_attention(name: str, token_budget: Any) -> None:
    prompts, responses, want = of_name(name)
    notes: list[str] = []
    ours = scorer(build(name), notes, token_budget=token_budget)
    assert max_abs_diff(ours.sums(prompts, responses), want) < SAME
    assert max_abs_diff(ours.sums(prompts[:3], responses[:3]), want[:3]) < SAME
    (note,) = notes  # once
    assert f"{name}ForCausalLM" in note
    assert note.endswith("scored in padded rows, each with its own prompt (slower)")
    assert ours.work.padded > 0 or token_budget == 1


@pytest.mark.parametrize("make", [make_llama, make_mistral, make_qwen2])
def test_models_from_folders(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    model = load_model(make(tmp_path / "model"), CPU)
    prompts, responses = mixed()
    assert (
        max_abs_diff(scorer(model, token_budget=90).sums(prompts, responses), plain(model, prompts, responses)) < SAME
    )


@settings(max_examples=examples(25), deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 20), st.lists(st.integers(1, 24), min_size=1, max_size=4)), min_size=1, max_size=5
    ),
    st.integers(1, 200),
    st.integers(1, 40),
    st.randoms(use_true_random=False),
)
def test_random_groups(
    groups: list[tuple[int, list[int]]], token_budget: int, logit_chunk: int, rng: random.Random
) -> None:
    rows = []
    for before, lengths in groups:
        prompt = draw_ids(rng, before)
        rows += [(prompt, draw_ids(rng, length)) for length in lengths]
    rng.shuffle(rows)
    prompts, responses = [prompt for prompt, _ in rows], [response for _, response in rows]
    ours = scorer(build("Mistral"), token_budget=token_budget, logit_chunk=logit_chunk)
    assert max_abs_diff(ours.sums(prompts, responses), plain(build("Mistral"), prompts, responses)) < SAME
    assert ours.packs


def test_the_model_is_left_as_it_was() -> None:
    model = build("Llama")
    prompts, responses, _ = of_name("Llama")
    before, was = model.config._attn_implementation, plain(model, prompts, responses)
    scorer(model).sums(prompts, responses)
    assert model.config._attn_implementation == before
    assert plain(model, prompts, responses) == was


def test_stop_token_is_in_the_sum(model: PreTrainedModel) -> None:
    stop = model.config.eos_token_id
    prompt, response = [6, 7, 8], [9, 10, 11]
    without, complete = scorer(model).sums([prompt] * 2, [response, [*response, stop]])
    (alone,) = scorer(model).sums([[*prompt, *response]], [[stop]])
    assert alone < -0.01
    assert complete == pytest.approx(without + alone, abs=SAME)


@pytest.mark.parametrize("name", ["Llama", "Bloom"])
def test_on_batch_counts_every_sequence(name: str) -> None:
    prompts, responses, _ = of_name(name)
    seen: list[int] = []
    scorer(build(name), token_budget=100).sums(prompts, responses, seen.append)
    assert sum(seen) == len(prompts)
    assert len(seen) > 1


def test_nothing_to_score(model: PreTrainedModel) -> None:
    assert scorer(model).sums([], []) == []


@pytest.mark.parametrize(
    ("prompt", "response", "sentence"),
    [
        ([], [7], "row 1: an empty prompt"),
        ([7], [], "row 1: an empty response"),
        ([7], [LAST + 1], "row 1: a token id lies outside the model's vocabulary of 262"),
        ([LAST + 1], [7], "row 1: a token id lies outside"),
        ([7], [-1], "row 1: a token id lies outside"),
    ],
)
def test_invalid_rows_are_refused(
    model: PreTrainedModel, prompt: list[int], response: list[int], sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        scorer(model).sums([[6], prompt], [[6], response])


# --- counts of the work --------------------------------------------------------------------------------


def test_work_of_packed_batches() -> None:
    prompts, responses = shared()
    ours = scorer(build("Llama"))
    ours.sums(prompts, responses)
    once = {tuple(prompt) for prompt in prompts}
    done = ours.take_work()
    assert done["sequences"] == len(prompts)
    assert done["tokens"] == sum(map(len, once)) + sum(map(len, responses))
    assert done["unshared_tokens"] == sum(map(len, prompts)) + sum(map(len, responses))
    assert done["padding_share"] == 0.0
    assert ours.take_work()["sequences"] == 0  # counted once


def test_work_of_padded_batches() -> None:
    prompts, responses = [[6] * 5, [7] * 3, [8]], [[9] * 5, [9] * 3, [9]]
    ours = scorer(build("Bloom"))
    ours.sums(prompts, responses)
    done = ours.take_work()
    assert done["tokens"] == done["unshared_tokens"] == 18
    assert done["padding_share"] == pytest.approx(12 / 30)


# --- the head -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Gemma2", "Granite", "Cohere"])
def test_logits_that_the_model_caps_or_scales(name: str) -> None:
    prompts, responses, _ = of_name(name)
    head = LogitHead(build(name), 8)
    assert head.scale != 1.0 or head.cap
    head.scale, head.cap = 1.0, None  # without the transformation the check refuses the model
    with pytest.raises(DataError, match="transforms its logits"):
        head.check([*prompts[2], *responses[2]])


class ScaledLlama(LlamaForCausalLM):
    """Scales its logits though its config does not say so."""

    def forward(self, *args: Any, **named: Any) -> Any:
        output = super().forward(*args, **named)
        output.logits = 1.01 * output.logits
        return output


def test_undeclared_transformation_of_logits_is_refused(llama: Path) -> None:
    model = ScaledLlama.from_pretrained(llama).eval()
    with pytest.raises(DataError, match="ScaledLlama transforms its logits in a way that the scorer does not support"):
        scorer(model).sums([[6, 7, 8]], [[9, 10]])


def test_logits_that_are_not_numbers_are_refused(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(DataError, match=r"logits are NaN or infinite in float32 on .* model\.dtype"):
        scorer(model).sums([[6, 7, 8]], [[9, 10]])


@pytest.mark.parametrize("name", ["Phi", "Gemma2", "Cohere"])  # a bias, a cap, a factor
@pytest.mark.parametrize("tile", [1, 5, 131, LAST, LAST + 1, 1000])
@torch.no_grad()
def test_tiles_of_the_vocabulary(name: str, tile: int) -> None:
    model = build(name)
    head = LogitHead(model, 3)
    head.tile = tile
    ids = torch.tensor([draw_ids(random.Random(0), 10)])
    hidden = head.backbone(input_ids=ids).last_hidden_state[0]
    tokens = torch.tensor([0, LAST, 1, 130, 131, 132, 4, 5, 6, 200])  # at both ends of tiles
    want = model(input_ids=ids).logits[0].log_softmax(dim=-1)[torch.arange(10), tokens]
    assert (head.token_logps(hidden, tokens) - want).abs().max() < 1e-5


def test_logits_of_a_batch_never_exist() -> None:
    """A tile and a chunk bound the logits that exist at one time, for any batch."""
    head = LogitHead(build("Llama"), 4096)
    assert head.tile < LAST + 1  # the tests above include tiles that do not divide the vocabulary
    shapes = []
    original = head.logits
    head.logits = lambda hidden, part: shapes.append(original(hidden, part).shape) or original(hidden, part)  # type: ignore[method-assign,func-returns-value]
    head.chunk, head.tile = 4, 100
    head.token_logps(torch.ones(10, 32), torch.arange(10))
    assert [tuple(shape) for shape in shapes] == [(n, v) for n in (4, 4, 2) for v in (100, 100, 62)]


# --- bfloat16 -----------------------------------------------------------------------------------------------


def bfloat16_llama() -> PreTrainedModel:
    """`build("Llama")` with its weights rounded."""
    return copy.deepcopy(build("Llama")).to(torch.bfloat16)


@pytest.mark.parametrize("token_budget", [1, 90, "auto"])
def test_bfloat16_is_near_its_own_plain_forward(token_budget: Any) -> None:
    prompts, responses, float32 = of_name("Llama")
    model = bfloat16_llama()
    want = plain(model, prompts, responses)
    ours = scorer(model, token_budget=token_budget)
    got = ours.sums(prompts, responses)
    assert ours.packs
    assert max_abs_diff(got, want) < 0.2  # nats; rounding moves the plain forward by about as much from float32's
    errors = [statistics.fmean((a - b) ** 2 for a, b in zip(sums, float32, strict=True)) for sums in (got, want)]
    assert errors[0] < 2 * errors[1]


@torch.no_grad()
def test_bfloat16_of_likely_tokens() -> None:
    """A likely token's log-probability must not show that logits are bfloat16 (steps of 1/16 from 8 on)."""
    generator = torch.Generator().manual_seed(0)
    head = LogitHead(bfloat16_llama(), 64)
    weight = head.head.weight
    tokens = torch.randint(LAST + 1, (200,), generator=generator)
    towards = torch.nn.functional.normalize(weight[tokens].float())
    hidden = (3 * torch.randn(200, 32, generator=generator) + 12 * towards).bfloat16()
    exact = (hidden.double() @ weight.double().T).log_softmax(dim=-1)[torch.arange(200), tokens]
    rounded = head.head(hidden).float().log_softmax(dim=-1)[torch.arange(200), tokens]
    ours = head.token_logps(hidden, tokens)
    assert -1.0 < exact.mean() < -0.1
    assert (rounded - exact).abs().max() > 0.01
    assert (ours - exact).abs().max() < 1e-4
    assert ours.max() < 1e-6
