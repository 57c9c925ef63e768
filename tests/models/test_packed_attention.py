"""The inputs of the GPU's flash kernel, checked with a plain substitute for it that runs on a CPU."""

from __future__ import annotations

import random
from pathlib import Path

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
from dice_py.models.packing import Packer
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
    enable_gqa: bool,
) -> torch.Tensor:
    """`varlen_attn` as torch documents it, one sequence at a time, with the causal mask aligned to the bottom right."""
    assert q_ends.dtype == k_ends.dtype == torch.int32
    assert longest_query == int(q_ends.diff().max())
    assert longest_key == int(k_ends.diff().max())
    assert int(q_ends[-1]) == len(query)
    assert int(k_ends[-1]) == len(key) == len(value)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    left, right = window_size
    assert right == 0
    out = torch.empty_like(query)
    for number in range(len(q_ends) - 1):
        q = query[q_ends[number] : q_ends[number + 1]].transpose(0, 1)
        k, v = (part[k_ends[number] : k_ends[number + 1]].transpose(0, 1) for part in (key, value))
        distance = (torch.arange(q.shape[1]) + k.shape[1] - q.shape[1])[:, None] - torch.arange(k.shape[1])
        mask = (distance >= 0) & (distance <= (left if left >= 0 else k.shape[1]))
        attended = torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, scale=scale, enable_gqa=enable_gqa
        )
        out[q_ends[number] : q_ends[number + 1]] = attended[0].transpose(0, 1)
    return out


def mistral() -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return MistralForCausalLM(
        MistralConfig(**shape, vocab_size=262, num_key_value_heads=2, sliding_window=5, initializer_range=0.2)
    ).eval()


@pytest.mark.parametrize("window", [False, True])
def test_flash_path_gives_the_sums_of_the_padded_one(
    monkeypatch: pytest.MonkeyPatch, llama: Path, window: bool
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
    calls = []

    def varlen(*args: torch.Tensor, **kwargs: object) -> torch.Tensor:
        calls.append(kwargs["window_size"])
        return plain_varlen(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    monkeypatch.setattr(packed_attention, "padded_attention", packed_attention.flash_attention)
    scorer = Scorer(model, ScoreConfig(token_budget=60))
    got = scorer.sums(prompts, responses)
    assert scorer.packs
    assert set(calls) == {(4, 0) if window else (-1, 0)}
    assert got == pytest.approx(want, abs=1e-4)


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
