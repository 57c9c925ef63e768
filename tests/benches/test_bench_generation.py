"""`make bench-generation` on a small workload: the fields of its results, and that the ways agree. No timings."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapes
import torch

BENCHES = Path(shapes.__file__).parent
SMALL = [
    "--prompts=3",
    "--samples=4",
    "--prompt-median=20",
    "--mean-response=8",
    "--max-new-tokens=24",
    "--shard-prompts=2",
    "--max-num-seqs=4",
    "--token-budget=400",
    "--checked=6",
    "--device=cpu",
]


def bench(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHES / "generation.py"), *SMALL, "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=BENCHES.parent)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("bench")
    ways = "transformers,hf_generate,vllm_streaming"
    done = bench(out, f"--ways={ways}")
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout
    results: dict[str, Any] = json.loads((out / "generation.json").read_text())
    assert list(results["ways"]) == ways.split(",")
    return results


@pytest.mark.long
@pytest.mark.slow
def test_fields_and_agreement(results: dict[str, Any]) -> None:
    for name, way in results["ways"].items():
        if name.startswith("vllm") and importlib.util.find_spec("vllm") is None:
            assert way == {"skipped": "vLLM is not installed"}
            continue
        assert way["tokens"] > 12
        assert way["tokens_per_second"] == pytest.approx(way["tokens"] / way["seconds"])
        assert way["peak_memory_bytes"] > 10**8
        assert way["max_abs_difference"] < 1e-3
    assert results["ways"]["transformers"]["mismatches"] == 0
    assert results["ways"]["transformers"]["tokens"] == results["ways"]["hf_generate"]["tokens"]
    assert results["speedup_over_hf_generate"] > 0
    if "skipped" not in results["ways"]["vllm_streaming"]:
        # Its tokens against other layouts: tests/generation/test_engine_vllm.py.
        assert results["speedup_of_vllm_over_transformers"] > 0
    assert "speedup_of_prefix_caching" not in results  # not among the ways
    assert results["max_abs_difference"] < 1e-3


@pytest.mark.long
@pytest.mark.slow
def test_what_the_figures_depend_on(results: dict[str, Any]) -> None:
    parameters = results["parameters"]
    assert {name: parameters[name] for name in ("shape", "device", "dtype", "samples", "prompts", "token_budget")} == {
        "shape": "tiny",
        "device": "cpu",
        "dtype": "float32",
        "samples": 4,
        "prompts": 3,
        "token_budget": 400,
    }
    assert parameters["shape_dimensions"]["vocab_size"] == 32000
    assert 1 < parameters["response_tokens"]["mean"] <= parameters["response_tokens"]["longest"] <= 24
    assert {"cpu", "cores", "memory_gb", "gpus", "os", "python", "versions"} <= set(results["machine"])
    assert {"torch", "transformers", "dice-align"} <= set(results["machine"]["versions"])


@pytest.mark.long
@pytest.mark.slow
def test_unknown_way(tmp_path: Path) -> None:
    done = bench(tmp_path, "--ways=transformers,sglang")
    assert done.returncode == 2
    assert "--ways: sglang unknown; choose from transformers, hf_generate" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("shape", "parameters", "layers"),
    [("llama3-8b", 8_030_261_248, 32), ("zephyr-7b", 7_241_732_096, 32), ("tiny", 19_204_352, 4)],
)
def test_shapes_have_the_real_dimensions(shape: str, parameters: int, layers: int) -> None:
    model = shapes.make_model(shape, torch.bfloat16, "meta")
    assert model.num_parameters() == parameters
    assert model.config.num_hidden_layers == layers
    assert model.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32


def test_model_comes_from_its_seed() -> None:
    small = {"num_hidden_layers": 1, "vocab_size": 50}
    one, two = (shapes.make_model("tiny", seed=3, **small).state_dict() for _ in range(2))
    other = shapes.make_model("tiny", seed=4, **small).state_dict()
    assert all(bool((one[name] == two[name]).all()) for name in one)
    assert not all(bool((one[name] == other[name]).all()) for name in one)


def test_lengths_have_a_long_tail() -> None:
    lengths = shapes.long_tailed_lengths(4000, median=100, sigma=0.6, low=16, high=1000, seed=0)
    assert lengths.min() >= 16
    assert lengths.max() <= 1000
    assert 95 < np.median(lengths) < 105
    assert lengths.mean() > 1.1 * np.median(lengths)
    again = shapes.long_tailed_lengths(4000, median=100, sigma=0.6, low=16, high=1000, seed=0)
    assert (lengths == again).all()
