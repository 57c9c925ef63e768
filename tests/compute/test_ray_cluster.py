"""A Ray cluster of several raylets on this machine: who gets which shard, what a lost node loses, and the proof."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray_work

pytest.importorskip("ray", reason="Ray is not installed")
from ray.cluster_utils import Cluster
from raylets import NODE, two_nodes

from dice_py.compute import ray_executor
from dice_py.compute.dispatch import dispatch_shards, open_executor
from dice_py.compute.ray_cluster import Proof, ray_address
from dice_py.config.shared import DevicesConfig, ModelConfig
from dice_py.errors import DataError, InterruptedRunError, UsageError

pytestmark = pytest.mark.slow
CPU = ModelConfig(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with two_nodes() as cluster:
        yield cluster


class Dispatch:
    """Dispatches `ray_work.slow`, with the reported events; `on_shard` is called with the node of each shard."""

    def __init__(self, cluster: Cluster, folder: Path, **settings: Any) -> None:
        self.devices = DevicesConfig(executor="ray", ray_address=cluster.address, **settings)
        self.folder = folder
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.on_shard: Any = lambda node: None

    def __call__(self, items: int, needs: list[Path] | None = None, **arguments: Any) -> None:
        with open_executor(
            self.devices, CPU, folder=self.folder / "logs", needs=needs or [], report=self.report
        ) as executor:
            dispatch_shards(
                functools.partial(ray_work.slow, folder=self.folder, **arguments),
                shards=range(items),
                executor=executor,
                is_complete=lambda number: (self.folder / f"item-{number}").is_file(),
                devices=self.devices,
                logs=self.folder / "logs",
                report=self.report,
            )

    def report(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))
        if event == "shard":
            self.on_shard(fields["node"])

    def of(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.events if name == event]

    def tries(self, items: int) -> list[list[str]]:
        """For each item, the nodes that took it."""
        return [(self.folder / f"tries-{number}").read_text().splitlines() for number in range(items)]


def test_every_shard_is_made_once_and_events_name_its_node(cluster: Cluster, tmp_path: Path) -> None:
    dispatch = Dispatch(cluster, tmp_path)
    dispatch(6, seconds=0.2)
    assert [len(tried) for tried in dispatch.tries(6)] == [1] * 6
    nodes = {fields["name"] for fields in dispatch.of("node")}
    assert len(nodes) == 2
    assert {fields["node"] for fields in dispatch.of("shard")} <= nodes  # one of them may be slow to start
    assert {(fields["number"], fields["status"]) for fields in dispatch.of("group")} == {(1, "started"), (2, "started")}
    # As many threads as Ray has cores for the node, and the log where the others are.
    assert {(tmp_path / f"item-{n}").read_text() for n in range(6)} == {"1 thread"}
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {"group-1.log", "group-2.log"}
    assert "the worker works" in "".join(file.read_text() for file in (tmp_path / "logs").iterdir())


@pytest.mark.long
def test_a_lost_node_loses_its_open_shard_and_a_late_one_gets_work(cluster: Cluster, tmp_path: Path) -> None:
    dispatch = Dispatch(cluster, tmp_path, shard_attempts=1)  # a lost node is no failed attempt
    dying = cluster.add_node(**NODE)

    killer = threading.Timer(0.5, lambda: cluster.remove_node(dying, allow_graceful=False))

    def on_shard(node: str) -> None:
        if killer.finished.is_set():
            dispatch.on_shard = lambda _: None
            cluster.add_node(**NODE)
        elif dying.node_id[:8] in node:
            killer.start()  # in the middle of its next shard

    dispatch.on_shard = on_shard
    dispatch(30, seconds=1.0)
    killer.join()
    tried = dispatch.tries(30)
    lost = [fields for fields in dispatch.of("group") if fields["status"] == "dead"]
    assert len(lost) == 1
    assert "its node has left the cluster" in lost[0]["text"]
    # Only what it held is made again.
    again = [number for number, nodes in enumerate(tried) if len(nodes) > 1]
    assert len(again) == 1
    assert len(tried[again[0]]) == 2
    late = dispatch.of("node")[3]["name"]
    notes = [fields["text"] for fields in dispatch.of("note")]
    assert notes[0] == "3 node(s) of the Ray cluster, 3 group(s) of devices"
    assert f"node {late} has joined, with 1 group(s) of devices" in notes
    assert sum(fields["node"] == late for fields in dispatch.of("shard")) >= 1
    assert {fields["file"] for fields in dispatch.of("shard")} == {f"item-{number}" for number in range(30)}


def test_errors_of_the_work_are_raised_as_on_one_machine(cluster: Cluster, tmp_path: Path) -> None:
    dispatch = Dispatch(cluster, tmp_path)
    with pytest.raises(DataError, match="row 1 is bad"):
        dispatch(3, seconds=0.0, bad=1)


@pytest.mark.long
def test_a_killed_worker_is_out_of_memory_and_another_node_takes_over(cluster: Cluster, tmp_path: Path) -> None:
    dispatch = Dispatch(cluster, tmp_path)
    dispatch(4, seconds=0.2, killed=1)
    dead = [fields for fields in dispatch.of("group") if fields["status"] == "dead"]
    assert len(dead) == 1
    assert "signal 9" in dead[0]["text"]
    assert [len(tried) for tried in dispatch.tries(4)] == [1, 2, 1, 1]


def test_a_node_that_does_not_see_the_run_folder_stops_the_run(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Proof.of

    def of(folder: Path, needs: list[Path]) -> Proof:
        proof = made(folder, needs, patience=0.0)
        proof.question.unlink()  # as on a disk of the node's own
        return proof

    monkeypatch.setattr(Proof, "of", of)
    dispatch = Dispatch(cluster, tmp_path)
    with pytest.raises(
        UsageError, match=r"node 192.* of the Ray cluster does not see the run folder: .*logs"
    ) as raised:
        dispatch(1, seconds=0.0)
    assert "must lie on a file system that all nodes share" in str(raised.value)


def test_a_node_with_another_model_or_other_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    proof = Proof.of(tmp_path / "out", [model], patience=0.0)
    assert proof.problem_on("node") is None
    assert proof.is_answered("node")
    (model / "config.json").write_text("{ }")
    assert "does not see the model" in str(proof.problem_on("node"))
    other = Proof(**{**vars(proof), "versions": {**proof.versions, "polars": "0.1"}})
    assert "has other versions of libraries, which would make other results: polars" in str(other.problem_on("node"))
    proof.close()
    assert not list((tmp_path / "out").iterdir())


def test_without_a_node_that_can_work_the_run_waits_and_stops(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "living_nodes", list)
    dispatch = Dispatch(cluster, tmp_path, ray_wait=0.5)
    start = time.monotonic()
    with pytest.raises(InterruptedRunError, match=r"no node with cores for 0 s \(devices.ray_wait\).*dice resume"):
        dispatch(1, seconds=0.0)
    assert time.monotonic() - start < 30
    assert "waiting for one" in dispatch.of("note")[-1]["text"]


def test_no_cluster_at_the_address(tmp_path: Path) -> None:
    devices = DevicesConfig(executor="ray", ray_address="127.0.0.1:1")
    with (
        pytest.raises(UsageError, match=r"devices.ray_address: no Ray cluster can be used at '127.0.0.1:1'"),
        open_executor(devices, CPU, folder=tmp_path, needs=[], report=lambda *_, **__: None),
    ):
        pass


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert ray_address(DevicesConfig(executor="ray")) == "local"
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert ray_address(DevicesConfig(executor="ray")) == "head:6379"
    assert ray_address(DevicesConfig(executor="ray", ray_address="10.0.0.1:6379")) == "10.0.0.1:6379"
    for settings, message in (
        ({"executor": "ray", "ray_address": "ray://head:10001"}, "Ray Client"),
        ({"executor": "ray", "gpus": [0]}, "leave gpus out"),
        ({"ray_address": "head:6379"}, "set executor=ray"),
    ):
        with pytest.raises(ValueError, match=message):
            DevicesConfig(**settings)
