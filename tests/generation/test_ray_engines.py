"""The generation stage on a Ray cluster: with vLLM on two nodes, and on a cluster of this machine alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from places import child_environment
from tiny_generation import CPU, Stage, questions
from vllm_config import PLAIN, changed_config

from dice_py.config.shared import DevicesConfig

pytest.importorskip("ray", reason="Ray is not installed")
from raylets import two_nodes

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture
def _raylets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", child_environment()["PYTHONPATH"])
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def nodes_of(stage: Stage, event: str) -> list[Any]:
    return [fields.get("node") for name, fields in stage.events if name == event]


def samples(stage: Stage) -> pl.DataFrame:
    columns = ["prompt_id", "sample_id", "token_ids", "response", "finish_reason"]
    return pl.concat([pl.read_parquet(file, columns=columns) for file in stage.files()])


@pytest.mark.usefixtures("_raylets")
def test_without_an_address_a_cluster_of_this_machine_is_started(llama: Path, tmp_path: Path) -> None:
    local, ray = Stage(llama, tmp_path / "local"), Stage(llama, tmp_path / "ray")
    local()
    ray(devices=DevicesConfig(executor="ray"))
    # This process has one thread, and a node all cores: sums differ in their last digits.
    assert samples(ray).equals(samples(local))
    assert len(nodes_of(ray, "shard")) == 3
    assert None not in nodes_of(ray, "shard")
    assert {path.suffix for path in ray.out.iterdir()} == {".parquet", ".log"}


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="measured with vLLM's CPU build, and a GPU is here")
@pytest.mark.usefixtures("_raylets")
def test_vllm_on_two_nodes_samples_the_tokens_of_one_machine(llama: Path, tmp_path: Path) -> None:
    config = changed_config(PLAIN, vllm={"kv_cache_gib": 0.1})
    ray = Stage(llama, tmp_path / "ray")
    with two_nodes() as cluster:
        ray(config, prompts=questions(8), devices=DevicesConfig(executor="ray", ray_address=cluster.address))
    local = Stage(llama, tmp_path / "local")
    local(config, models=CPU, prompts=questions(8), devices=DevicesConfig(cpu_processes=2))
    assert samples(ray).equals(samples(local))
    assert samples(ray).height == 8 * PLAIN.samples
    assert None not in nodes_of(ray, "shard")
