"""A run whose shards are made on nodes of a Ray cluster: byte for byte as on one machine, resumed after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from damage import prepare_nothing, results, run_inline
from own_run import own_config
from places import child_environment
from processes import left_in_session, wait_for
from tiny_models import make_llama

from cli.output import pages
from dice_py.compute.stage_process import WarmPool
from dice_py.config.loading import dump
from dice_py.config.run import RunConfig
from dice_py.events import no_report
from dice_py.runs import folder as run_folder
from dice_py.runs import loop
from dice_py.runs.event_log import read_events

pytest.importorskip("ray", reason="Ray is not installed")
from ray.cluster_utils import Cluster
from raylets import two_nodes

pytestmark = [pytest.mark.slow, pytest.mark.long]
SHARDS = ("round-01/generate/generations-*.parquet", "round-01/score/scores-*.parquet")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with two_nodes() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    # Sums that come with the samples are those of the engine, whatever else is in its batch.
    settings = ("generate.shard_prompts=4", "generate.max_new_tokens=48", "score.policy_logps=recompute")
    return own_config(tmp_path_factory.mktemp("own"), make_llama, *settings)


@pytest.fixture(scope="module")
def local(own: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on this machine, in two processes for the shards."""
    folder = tmp_path_factory.mktemp("local") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "run_in_subprocess", run_inline)
        patch.setattr(WarmPool, "prepare", prepare_nothing)
        config = own.model_copy(update={"devices": own.devices.model_copy(update={"cpu_processes": 2})})
        loop.run(config, folder, after_round=pages(no_report))
    return folder


def start(folder: Path, config: Path) -> subprocess.Popen[bytes]:
    begun = (folder / "config.yaml").exists()
    asked = ["resume", str(folder)] if begun else ["run", "-c", str(config), "--run-dir", str(folder)]
    with folder.with_suffix(".log").open("ab") as output:
        command = [sys.executable, "-m", "cli.main", *asked]
        return subprocess.Popen(command, stdout=output, stderr=output, env=child_environment(), start_new_session=True)


def shard_files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for each in SHARDS for file in sorted(folder.glob(each))}


def events_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in read_events(folder / "events.jsonl") if event["event"] == name]


def test_a_run_on_ray_is_killed_and_resumed(own: RunConfig, local: Path, cluster: Cluster, tmp_path: Path) -> None:
    devices = {"executor": "ray", "ray_address": cluster.address}
    config = tmp_path / "config.yaml"
    config.write_text(dump(RunConfig.model_validate({**own.model_dump(), "devices": devices})))
    folder = tmp_path / "run"
    killed = start(folder, config)
    assert wait_for(lambda: killed.poll() is not None or list(folder.glob(SHARDS[0])), 120)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert wait_for(lambda: not left_in_session(killed.pid))
    before = shard_files(folder)
    assert 0 < len(before) < len(shard_files(local))
    times = {name: (folder / name).stat().st_mtime_ns for name in before}
    resumed = start(folder, config)
    assert resumed.wait(300) == 0, folder.with_suffix(".log").read_text()
    # What was complete is as it was; the rest is what one machine makes.
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == times
    assert shard_files(folder) == shard_files(local)
    ours, theirs = results(folder), results(local)
    assert {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)} == {
        "config.yaml",
        "inputs/checked.json",  # its key has the whole config
    }
    nodes = {event["name"] for event in events_of(folder, "node")}
    assert len(nodes) == 2
    assert {event["node"] for event in events_of(folder, "shard")} <= nodes
