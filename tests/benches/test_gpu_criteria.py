"""What each part of the GPU check must show, on figures made by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from gpu.criteria import CRITERIA, evaluate, is_met, lines
from gpu.part import PARTS

GOOD: dict[str, dict[str, Any]] = {
    "machine": {"float32_tflops": 50.0, "bfloat16_tflops": 700.0, "copy_tb_per_s": 3.0},
    "attention": {"cases": 9, "bad_forward": [], "bad_backward": []},
    "parity": {
        "packs": True,
        "packed_bf16": {"mean": 1.3},
        "one_at_a_time_bf16": {"mean": 1.2},
        "halved_from_packed": {"mean": 1.5},
        "halved": True,
    },
    "scoring": {"share_of_matmul_rate": 0.6, "speedup_over": {"authors": 8.5}},
    "training": {"largest_loss_difference": 0.01, "loss_tolerance": 0.02, "speedup_over_stock": {"ours": 0.9}},
    "lora": {"largest_loss_difference": 0.01, "loss_tolerance": 0.02, "speedup_over_stock": {"ours": 0.9}},
    "run": {"exit_code": 0},
    "fsdp": {"exit_code": 0},
    "gpu_tests": {"exit_code": 0, "passed": 10},
    "generation": {"speedup_over_generate": 0.9},
    "reinforcement": {"ratio": 1.1, "first_rms_difference": 0.02},
    "draw": {"64 rows, temperature 1.0": {"step_ms": 1.4}},
}
"""By part: figures that reach everything."""
MISSED: list[tuple[str, tuple[str, ...], Any]] = [
    ("attention", ("cases",), 0),
    ("attention", ("bad_forward",), [{"forward": 0.5}]),
    ("attention", ("bad_backward",), [{"backward": 0.5}]),
    ("parity", ("packs",), False),
    ("parity", ("packed_bf16", "mean"), 3.62),  # 0.01 + 3 × 1.2
    ("parity", ("packed_bf16", "mean"), math.nan),
    ("parity", ("halved_from_packed", "mean"), 9.6),
    ("parity", ("halved",), False),
    ("scoring", ("share_of_matmul_rate",), 0.549),
    ("scoring", ("speedup_over", "authors"), 7.9),
    ("training", ("largest_loss_difference",), 0.021),
    ("training", ("loss_tolerance",), 0.009),
    ("training", ("largest_loss_difference",), math.nan),
    ("lora", ("largest_loss_difference",), 0.5),
    ("run", ("exit_code",), 3),
    ("fsdp", ("exit_code",), 1),
    ("gpu_tests", ("exit_code",), 1),
    ("gpu_tests", ("passed",), 0),
    ("reinforcement", ("ratio",), 1.21),
]
NEEDS_GPU = {
    ("machine", "bfloat16_tflops"),
    ("machine", "copy_tb_per_s"),
    ("parity", "halved"),
    ("scoring", "share_of_matmul_rate"),
    ("scoring", "speedup_over"),
    ("fsdp", "exit_code"),
    ("gpu_tests", "passed"),
    ("reinforcement", "ratio"),
}
"""Part and figure: not counted in a dry run on a CPU."""


def judged(part: str, figures: dict[str, Any], **changed: Any) -> dict[str, Any]:
    return {"ok": True, "code": 0, "seconds": 1.0, "figures": figures, "criteria": evaluate(part, figures), **changed}


def test_every_part_has_criteria_and_figures_here() -> None:
    assert set(CRITERIA) == set(PARTS) == set(GOOD)


@pytest.mark.parametrize("part", PARTS)
def test_all_reached(part: str) -> None:
    result = judged(part, GOOD[part])
    assert result["criteria"]
    assert is_met(result, cpu=False)
    assert is_met(result, cpu=True)
    text = "\n".join(lines(part, result))
    assert text.count("reached: ") == len(result["criteria"])
    assert "NOT" not in text


@pytest.mark.parametrize(("part", "path", "value"), MISSED)
def test_one_missed(part: str, path: tuple[str, ...], value: Any) -> None:
    figures = copy.deepcopy(GOOD[part])
    place = figures
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    result = judged(part, figures)
    assert [criterion["reached"] for criterion in result["criteria"]].count(False) == 1
    assert not is_met(result, cpu=False)
    assert is_met(result, cpu=True) == ((part, path[0]) in NEEDS_GPU)
    assert "\n".join(lines(part, result)).count("NOT REACHED: ") == 1


@pytest.mark.parametrize(("part", "name"), [(part, name) for part, figures in GOOD.items() for name in figures])
def test_a_missing_figure_is_not_a_success(part: str, name: str) -> None:
    figures = {key: value for key, value in GOOD[part].items() if key != name}
    result = judged(part, figures)
    assert None in [criterion["reached"] for criterion in result["criteria"]]
    assert not is_met(result, cpu=False)
    assert is_met(result, cpu=True) == ((part, name) in NEEDS_GPU)
    assert "NOT MEASURED: " in "\n".join(lines(part, result))


@pytest.mark.parametrize("part", PARTS)
def test_a_part_without_figures_or_that_failed_is_not_met(part: str) -> None:
    nothing = judged(part, {})
    assert not is_met(nothing, cpu=False)
    assert is_met(nothing, cpu=True) == all(criterion["gpu_only"] for criterion in nothing["criteria"])
    stopped = judged(part, GOOD[part], ok=False, code="timeout", error="PartError: the last\nof it", notes=["a note"])
    assert not is_met(stopped, cpu=True)
    text = "\n".join(lines(part, stopped))
    assert "timeout" in text
    assert "error: PartError: the last" in text
    assert "note: a note" in text
