"""The scorer on models that packed attention would score wrongly, and when memory runs out."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from logp_oracle import SAME, max_abs_diff, mixed, plain, scorer, shared
from tiny_families import SHAPE, WINDOW, build
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dice_py.models import packed_attention
from dice_py.scoring import forwards, packed_trial
from dice_py.scoring.lm_head import LogitHead
from dice_py.storage.cache import recall

pytestmark = pytest.mark.usefixtures("cache_folder")


# --- the trial of the packed attention ----------------------------------------------------------------------


def leaky_llama() -> PreTrainedModel:
    """Its second layer mixes each token with the one before it in the row, as a short convolution does."""

    def mix(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, *rest = inputs
        before = torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]
        return (hidden + 0.5 * before, *rest)

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    model.model.layers[1].register_forward_pre_hook(mix)
    return model


@pytest.mark.parametrize("rows", [shared, mixed])  # prompts with several responses, and with one
def test_model_that_mixes_the_sequences_of_a_row_is_detected(rows: Callable[[], Any]) -> None:
    model = leaky_llama()
    prompts, responses = rows()
    notes: list[str] = []
    ours = scorer(model, notes)
    assert max_abs_diff(ours.sums(prompts, responses), plain(model, prompts, responses)) < SAME
    assert not ours.packs
    (note,) = notes
    assert "with the packed attention LlamaForCausalLM scores a response of" in note
    assert "scored in padded rows" in note


def test_a_single_sequence_is_tried_too() -> None:
    """The next call may have a batch of many."""
    notes: list[str] = []
    scorer(leaky_llama(), notes).sums([[6, 7, 8]], [[9, 10, 11]])
    assert len(notes) == 1


@pytest.fixture
def no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed attention ignores the sliding window."""
    real = packed_attention.padded_attention
    monkeypatch.setattr(packed_attention, "padded_attention", lambda *args: real(*args[:-1], None))


def of_length(length: int, count: int = 3) -> tuple[list[list[int]], list[list[int]]]:
    """`count` sequences of `length` tokens, with one prompt."""
    prompt = [6 + at for at in range(length // 2)]
    return [prompt] * count, [[50 + 7 * row + at for at in range(length - len(prompt))] for row in range(count)]


@pytest.mark.usefixtures("no_window")
@pytest.mark.parametrize("rows", [shared, mixed])
def test_window_that_is_not_passed_on_is_detected(rows: Callable[[], Any]) -> None:
    prompts, responses = rows()
    notes: list[str] = []
    ours = scorer(build("Mistral"), notes)
    assert max_abs_diff(ours.sums(prompts, responses), plain(build("Mistral"), prompts, responses)) < SAME
    assert not ours.packs
    assert len(notes) == 1


@pytest.mark.usefixtures("no_window")
def test_window_shows_where_sequences_are_longer() -> None:
    """Sequences within the window are right without it; longer ones are tried again."""
    notes: list[str] = []
    ours = scorer(build("Mistral"), notes)
    prompts, responses = of_length(WINDOW)
    assert max_abs_diff(ours.sums(prompts, responses), plain(build("Mistral"), prompts, responses)) < SAME
    assert ours.packs
    assert notes == []
    prompts, responses = of_length(2 * WINDOW)
    assert max_abs_diff(ours.sums(prompts, responses), plain(build("Mistral"), prompts, responses)) < SAME
    assert not ours.packs
    assert len(notes) == 1


def test_the_trial_is_repeated_for_sequences_longer_by_half(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    real = forwards.padded_sums  # the packed forward is compared with it

    def padded(head: LogitHead, rows: list[int], prompts: Any, responses: Any) -> list[float]:
        tried.append(len(prompts[rows[0]]) + len(responses[rows[0]]))
        return real(head, rows, prompts, responses)

    monkeypatch.setattr(forwards, "padded_sums", padded)
    ours = scorer(build("Llama"))
    for length, again in ((20, True), (20, False), (30, False), (10, False), (31, True), (46, False), (47, True)):
        tried.clear()
        ours.sums(*of_length(length))
        assert tried == [length] * 3 * again
    assert ours.packs


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TypeError("forward() got an unexpected keyword\nargument"), "does not run with the packed attention (TypeErr"),
        (RuntimeError("head size 33 is not supported"), "(RuntimeError: head size 33 is not supported)"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory while the packed attention"),
    ],
)
def test_packed_forward_that_fails_at_once(monkeypatch: pytest.MonkeyPatch, error: Exception, words: str) -> None:
    def packed(*_: Any) -> list[float]:
        raise error

    monkeypatch.setattr(forwards, "packed_sums", packed)
    prompts, responses = shared()
    notes: list[str] = []
    ours = scorer(build("Llama"), notes)
    assert max_abs_diff(ours.sums(prompts, responses), plain(build("Llama"), prompts, responses)) < SAME
    (note,) = notes
    assert words in note
    assert "\n" not in note


def large_logits(model: PreTrainedModel) -> PreTrainedModel:
    """In bfloat16, with logits so large that rounding moves a sum by nats."""
    model = copy.deepcopy(model)  # built once for all tests
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30.0)
    return model.to(torch.bfloat16)


def test_rounding_of_large_logits_is_not_taken_for_a_wrong_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    # Any difference of two sums is looked at token by token.
    monkeypatch.setattr(packed_trial, "sum_tolerance", lambda *_: 0.0)
    notes: list[str] = []
    ours = scorer(large_logits(build("Llama")), notes)
    ours.sums(*mixed())
    assert ours.packs
    assert notes == []


def test_wrong_mask_is_not_taken_for_rounding() -> None:
    notes: list[str] = []
    ours = scorer(large_logits(leaky_llama()), notes)
    ours.sums(*mixed())
    assert not ours.packs
    assert len(notes) == 1


# --- out of memory ------------------------------------------------------------------------------------------

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


class Device:
    """Forwards fail with `error` on batches of more than `holds` tokens; `batches` are the sizes of all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, holds: int, error: Exception) -> None:
        self.holds, self.error, self.batches = holds, error, []  # type: ignore[var-annotated]
        packed, padded = forwards.packed_sums, forwards.padded_sums

        def run_packed(head: LogitHead, batch: Any) -> list[float]:
            self.run(len(batch.tokens))
            return packed(head, batch)

        def run_padded(head: LogitHead, rows: list[int], prompts: Any, responses: Any) -> list[float]:
            self.run(len(rows) * max(len(prompts[row]) + len(responses[row]) for row in rows))
            return padded(head, rows, prompts, responses)

        monkeypatch.setattr(forwards, "packed_sums", run_packed)
        monkeypatch.setattr(forwards, "padded_sums", run_padded)

    def run(self, tokens: int) -> None:
        self.batches.append(tokens)
        assert len(self.batches) < 200, "endless loop"
        if tokens > self.holds:
            raise self.error


def many() -> tuple[list[list[int]], list[list[int]]]:
    """Sixteen prompts of 10 tokens, each with four responses of 20: 1440 tokens, 1920 in sequences of their own."""
    prompts = [[6 + (7 * number + at) % 250 for at in range(10)] for number in range(16)]
    rows = [
        (prompt, [6 + (11 * p + 3 * r + at) % 250 for at in range(20)])
        for p, prompt in enumerate(prompts)
        for r in range(4)
    ]
    return [prompt for prompt, _ in rows], [response for _, response in rows]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(("name", "size"), [("Llama", 1440), ("Bloom", 1920)])
@pytest.mark.parametrize("token_budget", ["auto", 5000])
def test_out_of_memory_halves_the_budget(
    monkeypatch: pytest.MonkeyPatch, cache_folder: Path, name: str, size: int, token_budget: Any, error: Exception
) -> None:
    prompts, responses = many()
    want = plain(build(name), prompts, responses)
    device = Device(monkeypatch, 500, error)
    notes: list[str] = []
    ours = scorer(build(name), notes, token_budget=token_budget)
    seen: list[int] = []
    assert max_abs_diff(ours.sums(prompts, responses, seen.append), want) < SAME
    assert sum(seen) == len(prompts)
    # Eight prompts with their responses, or 32 sequences of 30 tokens, fill half the budget to the last token.
    failed = [tokens for tokens in device.batches if tokens > 500]
    assert failed == [size, size // 2]
    halved = [tokens // 2 for tokens in failed]
    assert [note for note in notes if "out of memory" in note] == [
        f"out of memory with {tokens} tokens in a batch; continuing with {half}"
        for tokens, half in zip(failed, halved, strict=True)
    ]
    assert ours.budget.tokens == halved[-1]
    if token_budget == "auto":
        (cached,) = json.loads((cache_folder / "remembered.json").read_text())["token budgets"].items()
        assert cached == (ours.budget.cache_key, halved[-1])
        assert recall("token budgets", ours.budget.cache_key) == scorer(build(name)).budget.tokens == halved[-1]
    else:
        assert not cache_folder.exists()  # a fixed number is not cached
    # Later batches stay within it.
    device.batches.clear()
    ours.sums(prompts, responses)
    assert max(device.batches) <= halved[-1]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("name", ["Llama", "Bloom"])
def test_out_of_memory_at_the_minimum_is_raised(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    device = Device(monkeypatch, 100, error)
    ours = scorer(build(name))
    with pytest.raises(type(error)) as caught:
        ours.sums(*many())
    assert caught.value is error
    assert device.batches[-1] <= ours.budget.tokens == ours.budget.minimum


@pytest.mark.parametrize("name", ["Llama", "Bloom"])
def test_a_single_sequence_that_does_not_fit_is_raised(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """No budget can make it smaller."""
    prompts, responses = [[6] * 10, [7] * 100], [[7] * 20, [8] * 500]
    ours = scorer(build(name))
    ours.sums(prompts, responses)  # the trial passes
    Device(monkeypatch, 550, OUT_OF_MEMORY[0])
    with pytest.raises(torch.OutOfMemoryError):
        ours.sums(prompts, responses)
    assert ours.budget.tokens >= ours.budget.minimum


@pytest.mark.parametrize("name", ["Llama", "Bloom"])
def test_other_errors_are_raised_untouched(monkeypatch: pytest.MonkeyPatch, cache_folder: Path, name: str) -> None:
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    Device(monkeypatch, 400, error)
    notes: list[str] = []
    ours = scorer(build(name), notes)
    before = ours.budget.tokens
    with pytest.raises(RuntimeError) as caught:
        ours.sums(*many())
    assert caught.value is error
    assert ours.budget.tokens == before
    assert not [note for note in notes if "memory" in note]
    assert not cache_folder.exists()
