"""FLOPs by hand, pairs of query and key by counting them, and rates by arithmetic."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from property_examples import examples
from tiny_families import SHAPE, build

from dice_py.models.flops import Work, device_name, matmul_rate, shape_of
from dice_py.models.packing import Batch, Packer, seen_keys

# Weights of a layer of SHAPE: queries and output 32 × 32 each, keys and values (one head of 16) 32 × 16 each.
ATTENTION = 2 * 32 * 32 + 2 * 32 * 16
FEED_FORWARD = 3 * 32 * 48
NORMS = 2 * 32
FINAL_NORM = 32


def test_flops_of_a_llama() -> None:
    shape = shape_of(build("Llama"))
    assert shape.layer_weights == 2 * (ATTENTION + FEED_FORWARD + NORMS) + FINAL_NORM == 15520
    assert shape.head_weights == 262 * 32 == 8384
    assert shape.vocabulary == 262
    assert shape.attention == 2 * 2 * 16
    assert (shape.hidden, shape.widest) == (32, 48)
    assert shape.name == "llama 2x32, 262 tokens"
    # 10 tokens in one causal sequence, 4 of them predicted: 55 pairs of query and key.
    assert shape.flops(10, 4, 55) == 2 * 15520 * 10 + 2 * 8384 * 4 + 4 * 64 * 55 == 391552
    assert shape.flops(0, 0, 0) == 0


def test_a_tied_head_is_the_head_only() -> None:
    shape = shape_of(build("Qwen2"))
    biases = 32 + 16 + 16
    assert shape.layer_weights == 2 * (ATTENTION + FEED_FORWARD + NORMS + biases) + FINAL_NORM
    assert shape.head_weights == 262 * 32


def test_of_a_mixture_the_active_experts_count() -> None:
    shape = shape_of(build("Mixtral"))
    router = 4 * 32
    assert shape.layer_weights == 2 * (ATTENTION + 2 * FEED_FORWARD + router + NORMS) + FINAL_NORM
    model = build("Mixtral")
    everything = sum(weight.numel() for weight in model.parameters()) - 2 * 262 * 32
    assert everything - shape.layer_weights == 2 * 2 * FEED_FORWARD  # two idle experts of four, in each layer


def test_of_a_mixture_with_experts_that_are_shared() -> None:
    config = transformers.DeepseekV3Config(
        **{
            **SHAPE,
            "num_key_value_heads": 2,
            "q_lora_rank": None,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        }
    )
    model = transformers.DeepseekV3ForCausalLM(config)
    everything = sum(weight.numel() for weight in model.parameters()) - 2 * 262 * 32
    assert everything - shape_of(model).layer_weights == 6 * 3 * 32 * 24  # six idle experts, in the one such layer


def test_heads_of_a_size_of_their_own() -> None:
    shape = shape_of(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SHAPE, head_dim=64)))
    assert shape.attention == 2 * 2 * 64
    assert shape.widest == 2 * 64


def count_pairs(batch: Batch) -> int:
    """Every query and every key, one by one."""
    pairs = 0
    for group in batch.groups:
        before = len(group.prompt)
        for query in range(before):
            pairs += sum(key <= query for key in range(before))
        for row in group.rows:
            length = before + len(batch.responses[row])
            for query in range(before, length):
                pairs += sum(key <= query for key in range(length))
    return pairs


_TOKENS = st.lists(st.integers(0, 9), min_size=1, max_size=9)


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(_TOKENS, min_size=1, max_size=4), st.data(), st.integers(1, 80))
def test_seen_keys_are_counted(few: list[list[int]], data: st.DataObject, budget: int) -> None:
    rows = data.draw(st.lists(st.tuples(st.sampled_from(few), _TOKENS), min_size=1, max_size=12))
    packer = Packer([prompt for prompt, _ in rows], [response for _, response in rows])
    while packer:
        batch = packer.next_batch(budget)
        assert seen_keys(batch.layout) == count_pairs(batch)


def test_rates() -> None:
    work = Work(sequences=3, tokens=300, padded=100, unshared=450, flops=8_000_000, seconds=2.0)
    assert work.rates(peak=16_000_000.0) == {
        "sequences": 3,
        "tokens": 300,
        "unshared_tokens": 450,
        "padding_share": 0.25,
        "flops": 8_000_000,
        "seconds": 2.0,
        "tokens_per_second": 150.0,
        "flops_per_second": 4_000_000,
        "matmul_flops_per_second": 16_000_000,
        "mfu": 0.25,
    }


def test_rates_of_no_work() -> None:
    rates = Work().rates(peak=1e9)
    assert (rates["sequences"], rates["tokens"], rates["padding_share"], rates["mfu"]) == (0, 0, 0.0, 0.0)
    assert rates["tokens_per_second"] is None


def test_matmul_rate_is_measured_once_and_changes_no_draw() -> None:
    matmul_rate.cache_clear()
    state = torch.random.get_rng_state()
    rate = matmul_rate(torch.device("cpu"), torch.float32)
    assert rate > 0
    assert torch.equal(torch.random.get_rng_state(), state)
    assert matmul_rate(torch.device("cpu"), torch.float32) == rate
    assert matmul_rate.cache_info().hits == 1


def test_name_of_a_cpu_says_how_many_threads() -> None:
    assert device_name(torch.device("cpu")).endswith(f"CPU, {torch.get_num_threads()} threads")


GEMMA = {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}


@pytest.mark.skipif(not hasattr(transformers, "Gemma4TextConfig"), reason="transformers is older than Gemma 4")
def test_layers_whose_heads_have_several_sizes() -> None:
    """Gemma 4's config raises where it is asked for one size of all."""
    config = transformers.Gemma4TextConfig(
        **{**SHAPE, **GEMMA, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 262, "global_head_dim": 32}
    )
    shape = shape_of(transformers.Gemma4ForCausalLM(config))
    assert shape.attention == 2 * 16 + 2 * 32
    assert shape.widest == 64


def test_a_feed_forward_size_by_layer() -> None:
    config = transformers.Gemma3nTextConfig(
        **{**SHAPE, **GEMMA, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 262},
        **{"laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0, 0.0]},
    )
    config.intermediate_size = [48, 80]
    shape = shape_of(transformers.Gemma3nForCausalLM(config))
    assert (shape.attention, shape.widest) == (2 * 2 * 16, 80)


def test_a_model_without_attention() -> None:
    config = transformers.MambaConfig(vocab_size=262, hidden_size=32, num_hidden_layers=2, state_size=8)
    shape = shape_of(transformers.MambaForCausalLM(config))
    assert shape.attention == 0
    assert shape.widest >= 32
