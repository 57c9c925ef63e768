"""The head of a packed forward, and attention one sequence at a time: values and gradients."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_sets import draw_ids
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from dice_py.models.packed_attention import DeviceLayout, padded_attention
from dice_py.models.packing import Batch, Group
from dice_py.models.sequence_attention import SequencePlan, sequence_attention
from dice_py.training.packed_forward import KeptLogits

CPU = torch.device("cpu")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_kept_logits_are_a_log_softmax(bias: bool, frozen: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=not frozen)
    offset = torch.randn(11, dtype=torch.float64, requires_grad=not frozen) if bias else None
    targets, upstream = torch.randint(11, (7,)), torch.randn(7)
    leaves = [part for part in (hidden, weight, offset) if part is not None and part.requires_grad]
    plain = torch.nn.functional.linear(hidden, weight, offset).log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
    wanted = torch.autograd.grad((plain * upstream).sum(), leaves)
    logps = KeptLogits.apply(hidden, weight, offset, targets, False)
    torch.testing.assert_close(logps, plain.float(), rtol=1e-6, atol=1e-6)
    found = torch.autograd.grad((logps * upstream).sum(), leaves)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_kept_logits_round_as_trls_tiles_under_autocast() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    targets = torch.randint(40, (9,))
    results = []
    for head in ("kept", "tiles"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if head == "kept":
                logps = KeptLogits.apply(hidden, weight, None, targets, False)
            else:
                logps = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 16, None, 1.0, ("log_probs",))[
                    0
                ]
        results.append((logps, *torch.autograd.grad(logps.sum(), [hidden, weight])))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("heads", "kv_heads", "value_size"), [(4, 4, 8), (6, 2, 8), (4, 2, 5)])
def test_one_sequence_at_a_time_is_padded_attention(heads: int, kv_heads: int, value_size: int) -> None:
    rng = random.Random(0)
    shapes = [(5, [9, 3, 1]), (1, [1]), (7, [4, 12])]
    groups, responses = [], []
    for prompt, lengths in shapes:
        rows = list(range(len(responses), len(responses) + len(lengths)))
        responses += [draw_ids(rng, length) for length in lengths]
        groups.append(Group(draw_ids(rng, prompt), rows))
    batch = Batch(groups, responses)
    torch.manual_seed(0)
    tokens = len(batch.tokens)
    parts = [
        torch.randn(1, count, tokens, size, dtype=torch.float64, requires_grad=True)
        for count, size in ((heads, 8), (kv_heads, 8), (kv_heads, value_size))
    ]
    upstream = torch.randn(1, tokens, heads, value_size, dtype=torch.float64)
    results = []
    for out in (
        sequence_attention(SequencePlan.of(batch.layout), *parts, 0.3),
        padded_attention(DeviceLayout(batch.layout, CPU), *parts, 0.3, None),
    ):
        results.append((out, *torch.autograd.grad((out * upstream).sum(), parts)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
