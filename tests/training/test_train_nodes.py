"""Training over two nodes: by srun and torchrun, of which srun is a stand-in here, and by Ray Train on two raylets."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import rank_works
import sharded_on_cpu
from places import SUPPORT, child_environment
from tiny_sets import scored_pairs
from tiny_training import CONFIG, Stage

from dice_py.config.shared import DevicesConfig, ModelConfig
from dice_py.config.training import LoraConfig, TrainConfig
from dice_py.errors import DataError, UsageError
from dice_py.stages import train as stage
from dice_py.training import launcher, parallelism, ranks, ray_launcher
from dice_py.training.parallelism import ProcessLayout, lay_out
from dice_py.training.slurm import start_by_srun

NEAR = 2e-6
"""Sums in another order, after six steps of AdamW at 1e-3."""
CPU = ModelConfig(device="cpu")


@pytest.fixture
def run(llama: Path, pairs: pl.DataFrame, tmp_path: Path) -> Stage:
    return Stage(llama, pairs, tmp_path)


@pytest.fixture(scope="module")
def alone(llama: Path, pairs: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A stage that has trained in one process."""
    stage = Stage(llama, pairs, tmp_path_factory.mktemp("alone"))
    stage()
    return stage


@pytest.fixture
def allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Slurm allocation of two nodes; the arguments of srun, once it was called."""
    (tmp_path / "bin").mkdir()
    srun = tmp_path / "bin" / "srun"
    srun.write_text(f'#!/bin/sh\nexec {sys.executable} {SUPPORT / "fake_srun.py"} "$@"\n')
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{srun.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", child_environment()["PYTHONPATH"])
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SLURMD_NODENAME", "localhost")
    monkeypatch.setenv("FAKE_SRUN_LOG", str(tmp_path / "srun.txt"))
    return tmp_path / "srun.txt"


def max_abs_diff(one: Stage, other: Stage) -> float:
    weights, others = one.weights(), other.weights()
    assert weights.keys() == others.keys()
    return max((weights[name].float() - others[name].float()).abs().max().item() for name in weights)


@pytest.mark.slow
@pytest.mark.long
def test_two_nodes_of_slurm_train_the_same_model(run: Stage, alone: Stage, allocation: Path) -> None:
    counts = run(nodes=2)
    assert counts["steps"] == 6
    assert max_abs_diff(run, alone) < NEAR
    assert run.steps() == [1, 2, 3, 4, 5, 6]
    called = allocation.read_text().splitlines()
    assert called[:5] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--overlap"]
    assert "--nproc-per-node=1" in called
    assert any(argument.startswith("--rdzv-endpoint=localhost:") for argument in called)
    notes = [fields["text"] for event, fields in run.events if event == "note"]
    assert any("training runs on 2 nodes with 1 process each (ddp, " in note and "srun" in note for note in notes)
    assert sorted(file.name for file in run.out.iterdir()) == ["accelerate.yaml", "log.jsonl", "model"]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("allocation")
def test_two_nodes_of_slurm_shard_by_fsdp2(run: Stage, alone: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "lay_out", lambda *_: ProcessLayout(2, "fsdp2", nodes=2, by="slurm"))
    monkeypatch.setattr(ranks, "start_by_srun", lambda *rest, module: start_by_srun(*rest, module="sharded_on_cpu"))
    run(nodes=2)
    assert max_abs_diff(run, alone) < NEAR


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("allocation")
def test_an_error_of_a_rank_on_another_node_is_raised(run: Stage, llama: Path) -> None:
    wrong = scored_pairs(llama, 8).with_columns(pl.col("ref_chosen_logps") + 30.0)
    with pytest.raises(DataError, match="ln 2"):
        run(wrong, nodes=2)


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    """A Ray cluster of two nodes with one core each."""
    pytest.importorskip("ray", reason="Ray is not installed")
    from raylets import two_nodes

    with two_nodes() as cluster:
        yield cluster.address


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_nodes_of_ray_train_the_same_model(
    run: Stage, alone: Stage, ray_address: str, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    run.devices = DevicesConfig(executor="ray", ray_address=ray_address)
    if strategy == "fsdp2":
        monkeypatch.setattr(stage, "lay_out", lambda *_: ProcessLayout(2, "fsdp2", nodes=2, by="ray"))
        monkeypatch.setattr(ray_launcher, "rank_of_ray", sharded_on_cpu.rank_of_ray)
    counts = run(nodes=2)
    assert counts["steps"] == 6
    assert max_abs_diff(run, alone) < NEAR
    assert run.steps() == [1, 2, 3, 4, 5, 6]
    notes = [fields["text"] for event, fields in run.events if event == "note"]
    assert any("training runs on 2 nodes with 1 process each" in note and "Ray Train" in note for note in notes)
    assert sorted(file.name for file in run.out.iterdir()) == ["accelerate.yaml", "log.jsonl", "model"]


@pytest.mark.slow
@pytest.mark.long
def test_an_error_of_a_rank_on_a_node_of_ray_is_raised(run: Stage, llama: Path, ray_address: str) -> None:
    run.devices = DevicesConfig(executor="ray", ray_address=ray_address)
    wrong = scored_pairs(llama, 8).with_columns(pl.col("ref_chosen_logps") + 30.0)
    with pytest.raises(DataError, match="ln 2"):
        run(wrong, nodes=2)


# --- layouts ------------------------------------------------------------------------------------------------------


def config(**changed: Any) -> TrainConfig:
    return TrainConfig.model_validate({**CONFIG.model_dump(), "batch_size": 16, "nodes": 2, **changed})


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, allocation: Path) -> None:
    """Four GPUs on each node."""
    del allocation
    groups = [parallelism.find_groups(DevicesConfig(), CPU)[0].__class__(n + 1, (str(n),)) for n in range(4)]
    monkeypatch.setattr(parallelism, "find_groups", lambda *_, **__: groups)


@pytest.mark.usefixtures("gpus")
def test_processes_are_as_many_on_each_node() -> None:
    layout = lay_out(config(), ModelConfig(), DevicesConfig())
    assert layout == ProcessLayout(8, "fsdp2", "cuda", ("0", "1", "2", "3"), nodes=2, by="slurm")
    assert (layout.shards, layout.checkpoints) == (8, "fsdp2 of 8")
    assert lay_out(config(lora=LoraConfig()), ModelConfig(), DevicesConfig()).strategy == "ddp"
    assert lay_out(config(processes=4), ModelConfig(), DevicesConfig()).gpus == ("0", "1")
    notes: list[str] = []
    layout = lay_out(
        config(batch_size=8), ModelConfig(), DevicesConfig(), lambda _, **fields: notes.append(fields["text"])
    )
    assert layout.processes == 4
    assert notes == ["training uses 2 of 4 GPUs of each node: train.batch_size has no more shares"]


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 2}, "train.nodes=2 has one at least on each node"),
        ({"processes": 12, "batch_size": 24}, "nodes \\(train.nodes\\) with 4 GPU\\(s\\) each cannot share evenly"),
        ({"strategy": "zero3"}, "over several, set it to fsdp2"),
        ({"nodes": 3, "batch_size": 24}, "the Slurm allocation has 2 node\\(s\\)"),
    ],
    ids=str,
)
def test_layouts_that_are_rejected(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        lay_out(config(**changed), ModelConfig(), DevicesConfig())


def test_without_an_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)
    with pytest.raises(UsageError, match=r"needs a Ray cluster \(devices.executor=ray\) or an allocation of Slurm"):
        lay_out(config(), CPU, DevicesConfig())


def test_the_number_of_nodes_is_in_no_key(run: Stage) -> None:
    assert run.job(nodes=2).key() == run.job().key()


# --- the connection -------------------------------------------------------------------------------------------------


class Ranks(launcher.CommandLauncher):
    """A launcher of two ranks, of which the first was told another secret."""

    def __init__(self, address: str, secret: str) -> None:
        ranks = " & ".join(
            f"{launcher.SECRET}={told} {sys.executable} -m dice_py.training.launcher {address}"
            for told in ("x", secret)
        )
        super().__init__(["sh", "-c", f"{ranks}; code=$?; wait; exit $code"], child_environment(RANK="0"))


def test_only_who_knows_the_secret_is_let_in() -> None:
    events: list[tuple[str, dict[str, Any]]] = []

    def report(event: str, **fields: Any) -> None:
        events.append((event, fields))

    work = functools.partial(rank_works.answer, start=7)
    assert launcher.launch_by(Ranks, 1, work, host="localhost", report=report) == 7
    assert events == [("note", {"text": "rank 0"})]
