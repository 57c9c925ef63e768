"""The flash path of packed attention, forward and backward, against padded attention in float32."""

from __future__ import annotations

from typing import Any

from gpu.context import Check, PartError, first_line, seconds_of

TOLERANCE = 1e-2
"""Relative, in the Frobenius norm: bfloat16 has 8 bits; a wrong mask gives far more."""
LENGTHS = {
    "long tail": ([3, 170, 40, 1], [[5, 300, 1], [64, 64, 900], [2], [1, 1, 7, 128]]),
    "single tokens": ([1, 1], [[1, 1], [1]]),
    "one sequence": ([17], [[33]]),
}
"""Lengths of prompts, and of each prompt's responses."""
HEADS = [(8, 2, 64, 64), (32, 8, 128, 128), (4, 4, 32, 32), (8, 8, 80, 80), (4, 2, 256, 256), (4, 4, 96, 64)]
"""Heads of queries, heads of keys, size of queries and keys, size of values."""


def attention(check: Check) -> None:
    """All lengths, heads and windows; then the kernel's rate on a batch such as an 8B model's."""
    import torch

    torch.manual_seed(0)
    cases: list[dict[str, Any]] = []
    for name, (prompts, responses) in LENGTHS.items():
        packed = packed_batch(prompts, responses)
        for heads in HEADS[:1] if check.cpu else HEADS:
            for window in (None, 1, 64):
                case = {"lengths": name, "heads": heads, "window": window}
                cases.append(case | compare(check, packed, heads, window))
    figures = check.figures
    for part in ("forward", "backward"):
        errors = [case[part] for case in cases if isinstance(case[part], float)]
        figures[f"worst_{part}"] = max(errors, default=None)
        figures[f"bad_{part}"] = [
            case for case in cases if not (isinstance(case[part], float) and case[part] < TOLERANCE)
        ]
    figures["cases"] = len(cases)
    check.save()
    if not check.cpu:
        figures["direct_kernel"] = kernel_without_repeats()
        figures |= kernel_rate(check)
    bad = figures["bad_forward"] or figures["bad_backward"]
    if bad:
        raise PartError(f"the flash path is off or refuses, first: {bad[0]}")


def packed_batch(prompts: list[int], responses: list[list[int]]) -> Any:
    """A packed batch of prompts and responses of these lengths."""
    import numpy as np

    from dice_py.models.packing import Batch, Group

    groups, rows = [], []
    for length, answers in zip(prompts, responses, strict=True):
        groups.append(Group(np.zeros(length, dtype=np.int64), list(range(len(rows), len(rows) + len(answers)))))
        rows += [np.zeros(answer, dtype=np.int64) for answer in answers]
    return Batch(groups, rows)


def compare(check: Check, batch: Any, heads: tuple[int, int, int, int], window: int | None) -> dict[str, Any]:
    """Relative errors of the output and of the gradients, or what refused to run."""
    import torch

    from dice_py.models import packed_attention
    from dice_py.models.packed_attention import DeviceLayout

    device = torch.device(check.device)
    queries, keys, size, value_size = heads
    count = len(batch.tokens)
    shapes = ((queries, size), (keys, size), (keys, value_size))
    inputs = [torch.randn(1, number, count, width, device=device).bfloat16() for number, width in shapes]
    layout = DeviceLayout(batch.layout, device)
    weights = torch.randn(1, count, queries, value_size, device=device)
    way = packed_attention.padded_attention if check.cpu else packed_attention.flash_attention
    expected, expected_gradients = _run(packed_attention.padded_attention, layout, inputs, weights, window, True)
    try:
        output, gradients = _run(way, layout, inputs, weights, window, False)
    except Exception as error:
        return {"forward": first_line(error), "backward": "not run"}
    found: dict[str, Any] = {"forward": _relative([output], [expected])}
    if isinstance(gradients, str):
        return found | {"backward": gradients}
    return found | {"backward": _relative(gradients, expected_gradients)}


def _run(way: Any, layout: Any, inputs: list[Any], weights: Any, window: int | None, exact: bool) -> tuple[Any, Any]:
    leaves = [(part.float() if exact else part).detach().requires_grad_() for part in inputs]
    output = way(layout, *leaves, None, window)
    try:
        (output.float() * weights).sum().backward()
    except Exception as error:
        if exact:
            raise
        return output.detach(), first_line(error)
    return output.detach(), [leaf.grad for leaf in leaves]


def _relative(found: Any, expected: Any) -> float:
    """The relative error of all tensors together: where a query sees one key alone, its own gradient is zero."""
    error = sum(((got.float() - want) ** 2).sum().item() for got, want in zip(found, expected, strict=True))
    return round((error / sum((want**2).sum().item() for want in expected)) ** 0.5, 6)


def kernel_without_repeats() -> dict[str, Any]:
    """Whether torch's kernel takes fewer heads of keys than of queries when nothing is said about it."""
    import torch
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, 40, 100], dtype=torch.int32, device="cuda")
    query = torch.randn(100, 8, 64, device="cuda").bfloat16().requires_grad_()
    key, value = (torch.randn(100, 2, 64, device="cuda").bfloat16().requires_grad_() for _ in range(2))
    found: dict[str, Any] = {}
    try:
        output = varlen_attn(query, key, value, ends, ends, 60, 60, window_size=(-1, 0))
        repeated = [part.repeat_interleave(4, dim=1) for part in (key, value)]
        want = varlen_attn(query, *repeated, ends, ends, 60, 60, window_size=(-1, 0))
        found["forward"] = (output - want).abs().max().item()
        found["backward_shape"] = [list(g.shape) for g in torch.autograd.grad(output.float().sum(), [query, key])]
    except Exception as error:
        found["error"] = first_line(error)
    return found


def kernel_rate(check: Check) -> dict[str, Any]:
    """Milliseconds and rate of one layer's attention on 119,520 packed tokens, with 32 heads over 8 of size 128."""
    import torch

    from dice_py.models import packed_attention
    from dice_py.models.packed_attention import DeviceLayout
    from dice_py.models.packing import seen_keys

    batch = packed_batch([240] * 18, [[400] * 16] * 18)
    inputs = [
        torch.randn(1, heads, len(batch.tokens), 128, device="cuda", dtype=torch.bfloat16) for heads in (32, 8, 8)
    ]
    layout = DeviceLayout(batch.layout, torch.device("cuda"))
    try:
        with torch.inference_mode():
            seconds = seconds_of(lambda: packed_attention.flash_attention(layout, *inputs, None, None), 20, check.cpu)
    except Exception as error:
        return {"rate_error": first_line(error)}
    return {
        "layer_tokens": len(batch.tokens),
        "layer_ms": round(1e3 * seconds, 3),
        "layer_tflops": round(4 * 32 * 128 * seen_keys(batch.layout) / seconds / 1e12, 1),
    }
