"""The inputs of the GPU's flash kernel, checked with a plain substitute for it that runs on a CPU."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from logp_oracle import shared
from tiny_sets import CPU, draw_ids
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from dice_py.config.stages import ScoreConfig
from dice_py.models import packed_attention
from dice_py.models.loading import load_model
from dice_py.models.packed_attention import DeviceLayout
from dice_py.models.packing import PackedLayout, Packer
from dice_py.scoring.scorer import Scorer


def plain_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    q_ends: torch.Tensor,
    k_ends: torch.Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """torch 2.11's `varlen_attn`, one sequence at a time, with the causal mask aligned to the bottom right."""
    assert q_ends.dtype == k_ends.dtype == torch.int32
    assert longest_query == int(q_ends.diff().max())
    assert longest_key == int(k_ends.diff().max())
    assert int(q_ends[-1]) == len(query)
    assert int(k_ends[-1]) == len(key) == len(value)
    assert query.shape[2] == key.shape[2] == value.shape[2]  # as the kernel asks
    assert query.shape[2] % 8 == 0
    left, right = window_size
    assert right == 0
    outs = []
    for number in range(len(q_ends) - 1):
        q = query[q_ends[number] : q_ends[number + 1]].transpose(0, 1)
        k, v = (part[k_ends[number] : k_ends[number + 1]].transpose(0, 1) for part in (key, value))
        distance = (torch.arange(q.shape[1]) + k.shape[1] - q.shape[1])[:, None] - torch.arange(k.shape[1])
        mask = (distance >= 0) & (distance <= (left if left >= 0 else k.shape[1]))
        outs.append(
            torch.nn.functional.scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=mask, scale=scale, enable_gqa=True
            )[0].transpose(0, 1)
        )
    return torch.cat(outs)


def varlen_with_enable_gqa(*args: Any, enable_gqa: bool = False, **kwargs: Any) -> torch.Tensor:
    """`varlen_attn` of torch 2.12 and later."""
    assert enable_gqa == (args[0].shape[1] != args[1].shape[1])
    return plain_varlen(*args, **kwargs)


@pytest.fixture(params=[plain_varlen, varlen_with_enable_gqa], ids=["torch 2.11", "torch 2.12"])
def varlen_calls(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """The keywords of each call of the kernel, for which a substitute with torch's signature stands in."""
    calls = []

    @functools.wraps(request.param)
    def varlen(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(kwargs)
        out: torch.Tensor = request.param(*args, **kwargs)
        return out

    packed_attention.takes_enable_gqa.cache_clear()
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    yield calls
    packed_attention.takes_enable_gqa.cache_clear()


def mistral() -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return MistralForCausalLM(
        MistralConfig(**shape, vocab_size=262, num_key_value_heads=2, sliding_window=5, initializer_range=0.2)
    ).eval()


@pytest.mark.parametrize("window", [False, True])
def test_flash_path_gives_the_sums_of_the_padded_one(
    monkeypatch: pytest.MonkeyPatch, varlen_calls: list[dict[str, Any]], llama: Path, window: bool
) -> None:
    rng = random.Random(0)
    model = mistral() if window else load_model(llama, CPU)
    prompts, responses = [], []
    for _ in range(6):
        prompt = draw_ids(rng, rng.randint(1, 15))
        for _ in range(rng.randint(1, 4)):
            prompts.append(prompt)
            responses.append(draw_ids(rng, rng.randint(1, 20)))
    want = Scorer(model, ScoreConfig()).sums(prompts, responses)
    monkeypatch.setattr(packed_attention, "padded_attention", packed_attention.flash_attention)
    scorer = Scorer(model, ScoreConfig(token_budget=60))
    got = scorer.sums(prompts, responses)
    assert scorer.packs
    assert {call["window_size"] for call in varlen_calls} == {(4, 0) if window else (-1, 0)}
    assert got == pytest.approx(want, abs=1e-4)


# --- gradients ----------------------------------------------------------------------------------------------

LAYOUT = PackedLayout(np.array([[0, 3], [9, 1]]), np.array([[3, 2, 0, 3], [5, 4, 0, 3], [10, 2, 9, 1], [12, 1, 9, 1]]))
"""Two prompts, of three tokens and of one, with two responses each: 13 tokens."""


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int | None
) -> torch.Tensor:
    """Softmax over the keys that each token of `LAYOUT` attends to, for one token after the other."""
    seen: dict[int, list[int]] = {}
    for start, length, prefix_start, prefix in [*np.pad(LAYOUT.prompts, ((0, 0), (0, 2))), *LAYOUT.responses]:
        sequence = [*range(prefix_start, prefix_start + prefix), *range(start, start + length)]
        for at in range(length):
            seen[start + at] = sequence[: prefix + at + 1][-(window or len(sequence)) :]
    key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for part in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    outs = []
    for token in range(query.shape[2]):
        scores = torch.einsum("hd,hkd->hk", query[0, :, token], key[0][:, seen[token]]) * scale
        outs.append(torch.einsum("hk,hkd->hd", scores.softmax(dim=-1), value[0][:, seen[token]]))
    return torch.stack(outs)[None]


def heads(key_heads: int, sizes: tuple[int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries of four heads, keys and values, for the tokens of `LAYOUT`."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, sizes[0]), (key_heads, sizes[0]), (key_heads, sizes[1])]
    return [
        torch.randn(1, count, 13, size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for count, size in shapes
    ]


@pytest.mark.usefixtures("varlen_calls")
@pytest.mark.parametrize("attention", ["padded_attention", "flash_attention"])
@pytest.mark.parametrize(("key_heads", "sizes"), [(4, (8, 8)), (2, (8, 8)), (2, (6, 6)), (1, (8, 5)), (2, (3, 12))])
@pytest.mark.parametrize(("scaling", "window"), [(None, None), (0.3, 2), (None, 1)])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_outputs_and_gradients_are_those_of_plain_attention(
    attention: str,
    key_heads: int,
    sizes: tuple[int, int],
    scaling: float | None,
    window: int | None,
    dtype: torch.dtype,
    close: float,
) -> None:
    inputs = heads(key_heads, sizes, dtype)
    want = plain_attention(*inputs, scaling, window)
    got = getattr(packed_attention, attention)(DeviceLayout(LAYOUT, torch.device("cpu")), *inputs, scaling, window)
    torch.testing.assert_close(got, want, atol=close, rtol=close)
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    gradients, wanted = (torch.autograd.grad((out * weights).sum(), inputs) for out in (got, want))
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=close, rtol=close)


def test_gradients_of_the_padded_path_are_its_derivatives() -> None:
    layout = DeviceLayout(LAYOUT, torch.device("cpu"))
    inputs = heads(2, (4, 3), torch.float64)
    assert torch.autograd.gradcheck(lambda *parts: packed_attention.padded_attention(layout, *parts, None, 3), inputs)


def test_under_autocast_all_inputs_have_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else queries and keys, which rotary embeddings make float32, would not reach the flash kernel on a GPU."""
    real, dtypes = packed_attention.padded_attention, set()

    def padded_attention(layout: DeviceLayout, *inputs: Any) -> torch.Tensor:
        dtypes.update(part.dtype for part in inputs[:3])
        return real(layout, *inputs)

    monkeypatch.setattr(packed_attention, "padded_attention", padded_attention)
    query, key, value = (part.detach() for part in heads(2, (8, 8), torch.float32))
    model = mistral()
    with packed_attention.use_packed_attention(model, LAYOUT), torch.autocast("cpu", torch.bfloat16):
        out, _ = packed_attention.attend(model, query, key, value.bfloat16(), None)
    assert dtypes == {torch.bfloat16}
    torch.testing.assert_close(out.float(), plain_attention(query, key, value, None, None), atol=0.03, rtol=0.03)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("key_heads", "sizes"), [(4, (64, 64)), (2, (64, 64)), (1, (12, 12)), (2, (128, 96))])
@pytest.mark.parametrize("window", [None, 2])
def test_gradients_of_the_flash_kernel_are_those_of_padded_rows(
    key_heads: int, sizes: tuple[int, int], window: int | None
) -> None:
    inputs = [part.detach().to("cuda").requires_grad_() for part in heads(key_heads, sizes, torch.bfloat16)]
    floats = [part.detach().float().requires_grad_() for part in inputs]
    layout = DeviceLayout(LAYOUT, torch.device("cuda"))
    got = packed_attention.flash_attention(layout, *inputs, None, window)
    want = packed_attention.padded_attention(layout, *floats, None, window)
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to("cuda")
    gradients = torch.autograd.grad((got.float() * weights).sum(), inputs)
    wanted = torch.autograd.grad((want * weights).sum(), floats)
    for ours, theirs in zip([got, *gradients], [want, *wanted], strict=True):
        assert ((ours.float() - theirs).norm() / theirs.norm()).item() < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_flash_kernel_gives_the_sums_of_padded_rows(llama: Path) -> None:
    model = load_model(llama, CPU).to("cuda", torch.bfloat16)
    prompts, responses = shared()
    packed, padded = Scorer(model, ScoreConfig()), Scorer(model, ScoreConfig())
    padded.packs = False
    sums = packed.sums(prompts, responses)
    assert packed.packs  # else the first batch differed from padded rows
    assert sums == pytest.approx(padded.sums(prompts, responses), abs=1.0)  # bfloat16, over up to 40 tokens


def test_keys_of_a_response_are_its_prompt_s_and_its_own() -> None:
    prompts, responses = [[1, 2, 3]] * 2 + [[4]], [[5, 6], [7], [8, 9, 10]]
    packer = Packer(prompts, responses)
    batch = packer.next_batch(100)
    assert not packer
    assert batch.tokens.tolist() == [4, 8, 9, 10, 1, 2, 3, 5, 6, 7]
    keys, q_ends, k_ends, longest_query, longest_key = DeviceLayout(batch.layout, torch.device("cpu")).varlen()
    assert q_ends.tolist() == np.cumsum([0, 1, 3, 3, 2, 1]).tolist()
    assert k_ends.tolist() == np.cumsum([0, 1, 4, 3, 5, 4]).tolist()
    assert batch.tokens[keys].tolist() == [4, *[4, 8, 9, 10], 1, 2, 3, *[1, 2, 3, 5, 6], *[1, 2, 3, 7]]
    assert (longest_query, longest_key) == (3, 5)
