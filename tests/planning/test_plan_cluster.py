"""A plan for a cluster: shards over the groups of all nodes, what they share, and what is idle."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from plan_data import COSTS, MACHINE, SIZE, estimated, small

from dice_py.errors import UsageError
from dice_py.planning.cluster import find_cluster, local_config, on_cluster, summary
from dice_py.planning.machine import Cluster

GPUS = replace(MACHINE, cuda=True, groups=1, gpus=1, gpu_bytes=2**40)
FAST = {"network": 1e9, "filesystem": 1e9}


def test_shards_are_shared_by_the_groups_of_all_nodes() -> None:
    config, run_data = small("generate.shard_prompts=1")
    alone = estimated(config, run_data, machine=GPUS)
    machine = on_cluster(GPUS, config, Cluster(2, 2, **FAST))
    assert (machine.groups, machine.gpus, machine.processes) == (4, 4, 1)
    found = estimated(config, run_data, machine=machine)
    # One prompt of 10 tokens for each of the four groups, whose processes are not started ahead.
    generate = found["round-01/generate"]
    assert generate["work_seconds"] < alone["round-01/generate"]["work_seconds"] + COSTS.startup["generate"]
    assert generate["gpu_hours"] == pytest.approx(4 * generate["seconds"] / 3600)
    # The work is even; waiting and loading is what is idle.
    assert generate["idle_gpu_hours"] == pytest.approx(4 * generate["startup_seconds"] / 3600)
    # All but the run's own process are idle while it mines.
    mine = found["round-01/mine"]
    assert mine["idle_gpu_hours"] == pytest.approx(4 * mine["seconds"] / 3600)
    assert mine["network_bytes"] == 0
    # One GPU of four replays.
    replay = found["round-01/replay"]
    assert replay["idle_gpu_hours"] == pytest.approx((4 * replay["seconds"] - replay["work_seconds"]) / 3600)


def test_shards_that_cannot_be_shared_evenly_leave_groups_idle() -> None:
    config, run_data = small("generate.shard_prompts=1")  # four shards
    machine = on_cluster(GPUS, config, Cluster(3, 1, **FAST))
    generate = estimated(config, run_data, machine=machine)["round-01/generate"]
    # A group has two shards, the two others one each.
    busy = 3 * generate["work_seconds"] * 4 / 6
    assert generate["idle_gpu_hours"] == pytest.approx((3 * generate["seconds"] - busy) / 3600)


def test_every_group_reads_the_weights_from_one_file_system() -> None:
    config, run_data = small("generate.shard_prompts=1")
    slow = Cluster(4, 1, network=1e9, filesystem=1e-6)  # a KB a second
    found = estimated(config, run_data, machine=on_cluster(GPUS, config, slow))
    reading = 4 * SIZE.stored_bytes / 1000
    assert found["round-01/generate"]["startup_seconds"] == pytest.approx(reading + COSTS.startup["generate"], abs=1.1)
    assert found["round-01/generate"]["filesystem_bytes"] == 4 * SIZE.stored_bytes + 80
    # The reference and the policy of the gate.
    assert found["round-01/score"]["filesystem_bytes"] >= 2 * 4 * SIZE.stored_bytes


def test_training_over_nodes_waits_for_the_network_only_where_it_is_slower() -> None:
    config, run_data = small("train.batch_size=8", "train.nodes=2", "train.per_device_train_batch_size=1")
    fast = on_cluster(GPUS, config, Cluster(2, 4, **FAST))
    assert (fast.processes, fast.shards, fast.speed_up) == (8, 8, 8.0)
    alone = estimated(config, run_data, machine=replace(GPUS, processes=8))["round-01/train"]
    train = estimated(config, run_data, machine=fast)["round-01/train"]
    computing = COSTS.train.per_token * train["tokens"]
    assert alone["work_seconds"] - train["work_seconds"] == pytest.approx(computing * 7 / 8)
    # Gathered twice in 16 bits, reduced once in 32: 8 bytes a weight and pass, one pass a step.
    slow = on_cluster(GPUS, config, Cluster(2, 4, network=8 * SIZE.parameters / 5e9, filesystem=1e9))
    waiting = estimated(config, run_data, machine=slow)["round-01/train"]
    exchanged = 5.0 * train["steps"]
    assert waiting["work_seconds"] - train["work_seconds"] == pytest.approx(exchanged - computing / 8)
    assert waiting["network_bytes"] == 8 * SIZE.parameters * train["steps"] * 2
    assert train["idle_gpu_hours"] == pytest.approx((8 * train["seconds"] - computing) / 3600)


def test_summary() -> None:
    config, run_data = small("generate.shard_prompts=1")
    cluster = Cluster(2, 2)
    stages = estimated(config, run_data, machine=on_cluster(GPUS, config, cluster))
    seconds = sum(stage["seconds"] for stage in stages.values())
    found = summary(cluster, stages, seconds)
    assert (found["nodes"], found["gpus"]) == (2, 4)
    assert found["reserved_gpu_hours"] == pytest.approx(4 * seconds / 3600)
    assert 0.5 < found["idle_share"] < 1.0
    assert found["idle_gpu_hours"] == pytest.approx(sum(found["idle_by_stage"].values()))
    json.dumps(found)


def test_what_cannot_be_planned() -> None:
    config, _ = small("train.nodes=3", "train.batch_size=12")
    with pytest.raises(UsageError, match=r"train.nodes is 3, but the cluster has 2 node"):
        on_cluster(GPUS, config, Cluster(2, 1))
    with pytest.raises(UsageError, match="this machine has no GPU, but the nodes are to have some"):
        find_cluster(config, Cluster(2, 8), cuda=False)
    config, _ = small("generate.engine=vllm", "generate.vllm.tensor_parallel_size=4")
    with pytest.raises(UsageError, match="tensor_parallel_size is 4, but a node has 2 GPU"):
        on_cluster(replace(GPUS, engine="vllm"), config, Cluster(2, 2))


def test_costs_are_measured_on_this_machine() -> None:
    config, _ = small("devices.executor=ray", "devices.ray_address=head:6379", "train.nodes=2")
    local = local_config(config)
    assert (local.devices.executor, local.devices.ray_address, local.train.nodes) == ("local", None, 1)
    assert find_cluster(local, None, cuda=False) is None
