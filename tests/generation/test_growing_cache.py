"""The cache of the transformers engine, which is written in place, and attention without repeated keys and values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device_traffic import Largest
from engine_rig import Rig, of_prompt
from other_models import gemma2, gpt2, make_other, mistral
from tiny_models import make_llama
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations import sdpa_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dice_py.config.stages import GenerateConfig
from dice_py.generation.engines import cache, decoding
from dice_py.generation.engines.cache import GrowingLayer, shared_heads_together
from dice_py.generation.engines.decoding import SeededSampling

CONFIG = GenerateConfig(max_new_tokens=24, temperature=1.0, token_budget=900)


def prefilled(window: int | None, rows: int, tokens: int) -> DynamicLayer:
    """transformers' layer with `tokens` random tokens of 2 heads of size 3."""
    layer = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
    layer.update(torch.randn(rows, 2, tokens, 3), torch.randn(rows, 2, tokens, 3))
    return layer


def storage(layer: GrowingLayer) -> tuple[int, int]:
    """Addresses of the memory of keys and values."""
    return layer.keys.untyped_storage().data_ptr(), layer.values.untyped_storage().data_ptr()


@pytest.mark.parametrize("window", [None, 4, 9], ids=["full", "window 4", "window 9"])
@pytest.mark.parametrize("tokens", [1, 7, 30])
def test_layer_equals_transformers(monkeypatch: pytest.MonkeyPatch, window: int | None, tokens: int) -> None:
    """Over several growths, and with rows that are copied and dropped on the way."""
    monkeypatch.setattr(cache, "GROWTH", 5)
    theirs = prefilled(window, 3, tokens)
    ours = GrowingLayer(theirs, limit=1000)
    for step in range(40):
        if step % 9 == 0:
            rows = torch.tensor([[0, 0, 1, 2, 2], [4, 1, 0], [1, 0, 2]][step // 9 % 3])
            theirs.reorder_cache(rows)
            ours.select(rows)
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.is_sliding == theirs.is_sliding
        new = torch.randn(2, len(theirs.keys), 2, 1, 3)
        for mine, other in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(mine, other)
        assert torch.equal(ours.keys, theirs.keys)


@pytest.mark.parametrize("window", [None, 6])
def test_tokens_are_written_in_place(window: int | None) -> None:
    layer = GrowingLayer(prefilled(window, 2, 10), limit=500)
    seen = set()
    for _ in range(2 * cache.GROWTH):
        layer.update(torch.zeros(2, 2, 1, 3), torch.zeros(2, 2, 1, 3))
        seen.add(storage(layer))
    assert len(seen) == 2
    layer.select(torch.tensor([1]))  # with room already
    place = storage(layer)
    layer.update(torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 3))
    assert storage(layer) == place


def test_storage_ends_at_the_limit() -> None:
    layer = GrowingLayer(prefilled(None, 2, 10), limit=14)
    for _ in range(4):
        layer.update(torch.zeros(2, 2, 1, 3), torch.zeros(2, 2, 1, 3))
    assert layer.keys.untyped_storage().nbytes() == 2 * 2 * 14 * 3 * 4
    layer.update(torch.zeros(2, 2, 1, 3), torch.zeros(2, 2, 1, 3))  # a limit bounds memory, not the tokens
    assert layer.keys.shape[-2] == 15


def test_joined_rows_are_right_aligned() -> None:
    parts = [GrowingLayer(prefilled(None, rows, tokens), limit=limit) for rows, tokens, limit in ((2, 5, 8), (1, 3, 9))]
    long, short = (part.keys.clone() for part in parts)
    parts[0].join(parts[1])
    assert parts[0].limit == 9
    assert parts[0].get_mask_sizes(1) == (6, 0)
    assert torch.equal(parts[0].keys[:2], long)
    assert torch.equal(parts[0].keys[2:, :, 2:], short)
    assert not parts[0].keys[2:, :, :2].any()
    parts[0].keep_last(3)
    assert parts[0].get_mask_sizes(1) == (4, 0)
    assert torch.equal(parts[0].keys, torch.cat([long[:, :, 2:], short]))


@pytest.mark.parametrize(
    "make",
    [make_llama, *(lambda folder, build=build: make_other(folder, build) for build in (mistral, gemma2, gpt2))],
    ids=["llama", "mistral sliding", "gemma2", "gpt2"],
)
def test_growth_changes_no_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Path]
) -> None:
    """Storage grows at every third token, and what is not written yet is NaN: none of it reaches a sample."""
    rig = Rig(make(tmp_path / "model"), CONFIG)
    requests = of_prompt(rig, 6, 8)
    expected = rig.sample(requests)
    new_empty = torch.Tensor.new_empty

    def new_nan(tensor: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        made = new_empty(tensor, *arguments, **named)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(cache, "GROWTH", 3)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_nan)
    samples = rig.sample(requests)
    assert [s.token_ids for s in samples] == [s.token_ids for s in expected]
    assert [s.logp for s in samples] == pytest.approx([s.logp for s in expected], abs=1e-4)


MASKS = {
    "none": None,
    "bool": torch.arange(7) >= torch.tensor([0, 2, 5])[:, None, None, None],
    "float": torch.where(torch.arange(7) >= torch.tensor([0, 2, 5])[:, None, None, None], 0.0, -torch.inf),
    "per head": torch.randn(3, 6, 1, 7),
}


@pytest.mark.parametrize("mask", MASKS, ids=MASKS.keys())
@pytest.mark.parametrize(("heads", "tokens"), [(6, 1), (2, 1), (1, 1), (2, 4)])
def test_attention_equals_transformers(monkeypatch: pytest.MonkeyPatch, mask: str, heads: int, tokens: int) -> None:
    query, key, value = torch.randn(3, 6, tokens, 8), torch.randn(3, heads, 7, 8), torch.randn(3, heads, 7, 8)
    module = SimpleNamespace(num_key_value_groups=6 // heads)
    arguments = (module, query, key, value, MASKS[mask])
    theirs = ALL_ATTENTION_FUNCTIONS["sdpa"]
    expected, _ = theirs(*arguments, scaling=0.3)
    repeated: list[int] = []
    repeat = sdpa_attention.repeat_kv
    monkeypatch.setattr(sdpa_attention, "repeat_kv", lambda kv, times: (repeated.append(times), repeat(kv, times))[1])
    with shared_heads_together():
        ours = ALL_ATTENTION_FUNCTIONS["sdpa"]
        attended, _ = ours(*arguments, scaling=0.3)
    assert attended.shape == (3, tokens, 6, 8)
    assert torch.allclose(attended, expected, atol=1e-6)
    assert ours is not theirs
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is theirs
    if tokens == 1 and mask != "per head":
        assert repeated in ([], [1, 1])


def test_decoding_repeats_no_keys(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a prefill does, where a prompt's queries are many."""
    rig = Rig(llama, CONFIG.model_copy(update={"token_budget": 65536}))
    repeated: list[int] = []
    repeat = sdpa_attention.repeat_kv
    monkeypatch.setattr(sdpa_attention, "repeat_kv", lambda kv, times: (repeated.append(times), repeat(kv, times))[1])
    rig.sample(of_prompt(rig, 6, 8))
    config = rig.engine.model.config
    assert config.num_attention_heads > config.num_key_value_heads
    assert len(repeated) == 2 * config.num_hidden_layers


def test_a_step_asks_the_device_once(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which rows are alive; and where some ended, their tokens and sums, and the rows that stay."""
    rig = Rig(llama, CONFIG.model_copy(update={"token_budget": 65536}))
    calls = {"advance": 0, "tolist": 0}

    def count(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*arguments: Any) -> Any:
            calls[name] += 1
            return original(*arguments)

        monkeypatch.setattr(owner, name, counted)

    count(decoding.Rows, "advance")
    count(torch.Tensor, "tolist")
    rig.engine.add([((0, row), request) for row, request in enumerate(of_prompt(rig, 2, 4))])
    ended = 0
    while rig.engine.unfinished:
        rig.engine.step()
        ended += 1
    assert calls["advance"] > 2 * ended > 0
    # One more for the tokens of the prefill.
    assert calls["advance"] + 1 <= calls["tolist"] <= calls["advance"] + 1 + 3 * ended


@pytest.mark.parametrize("sampling", [{"temperature": 0.7}, {"temperature": 0.9, "top_k": 30, "top_p": 0.8}])
def test_a_draw_copies_no_logits(monkeypatch: pytest.MonkeyPatch, sampling: dict[str, Any]) -> None:
    """Its intermediate results are of a few rows at a time, and neither they nor the logits change by that."""
    logits = torch.randn(64, 8192, generator=torch.Generator().manual_seed(0)) * 2
    original = logits.clone()
    tokens = []
    for at_once in (2**30, 2**15, 1):
        monkeypatch.setattr(decoding, "LOGITS_AT_ONCE", at_once)
        rows = SeededSampling(range(64), GenerateConfig(**sampling), [0], torch.device("cpu"))
        with Largest() as largest:
            tokens.append(rows.draw(torch.zeros(64, 1, dtype=torch.long), logits))
        assert largest.entries <= max(at_once, 64 * (8192 // decoding.BLOCK + decoding.BLOCK))
        assert (largest.entries >= logits.numel()) == (at_once > logits.numel())
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])
    assert torch.equal(logits, original)
