"""What a plan knows of a cluster: its nodes, what they share, and what of it is idle.

The costs of a plan are measured on the devices of one machine. On a cluster, shards are spread over the groups of all
nodes, training over those of `train.nodes`. Two things are shared, and bound how far a round scales: the file system,
from which every group reads the weights that it runs, and the network between nodes, over which a training gathers its
weights and reduces its gradients at each forward and backward pass.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from dice_py.compute.ray_cluster import connected, living_nodes
from dice_py.config.run import RunConfig
from dice_py.errors import UsageError
from dice_py.models.sizes import ModelSize
from dice_py.planning.estimate import Estimate
from dice_py.planning.machine import Cluster, Machine
from dice_py.runs.measured_costs import StageCosts
from dice_py.training.parallelism import even_share

_GATHERED, _REDUCED = 2 * 2, 4  # bytes of a weight: gathered in 16 bits forward and backward, gradients reduced in 32


def local_config(config: RunConfig) -> RunConfig:
    """The config for the measurements on this machine."""
    devices = config.devices.model_copy(update={"executor": "local", "ray_address": None})
    return config.model_copy(update={"devices": devices, "train": config.train.model_copy(update={"nodes": 1})})


def find_cluster(config: RunConfig, on_paper: Cluster | None, *, cuda: bool) -> Cluster | None:
    """The cluster of a plan: the one that was given, or that of `devices.ray_address`; None: this machine alone.

    Raises:
        UsageError: the cluster does not answer, or has no node with the devices.
    """
    if on_paper is not None:
        if bool(on_paper.gpus) != cuda:
            here, there = ("GPUs", "none") if cuda else ("no GPU", "some")
            raise UsageError(
                f"the costs of a plan are measured here, and this machine has {here}, but the nodes are to have "
                f"{there} (--gpus-per-node): plan on a machine with the devices of the nodes"
            )
        return on_paper
    if config.devices.executor != "ray":
        return None
    with connected(config.devices):
        counts = [node.gpus if cuda else node.cpus for node in living_nodes()]
    able = [count for count in counts if count]
    if not able:
        raise UsageError(
            f"the Ray cluster has no node with {'GPUs' if cuda else 'cores'}, so nothing can be planned for it"
        )
    return Cluster(len(able), sum(able) // len(able) if cuda else 0)


def on_cluster(machine: Machine, config: RunConfig, cluster: Cluster) -> Machine:
    """The machine of a plan, with the groups of all nodes and the processes of `train.nodes` of them."""
    size = config.generate.vllm.tensor_parallel_size if machine.engine == "vllm" else 1
    groups = cluster.gpus // size if machine.cuda else config.devices.cpu_processes
    if not groups:
        raise UsageError(
            f"generate.vllm.tensor_parallel_size is {size}, but a node has {cluster.gpus} GPU(s); lower it"
        )
    nodes = config.train.nodes
    if nodes > cluster.nodes:
        raise UsageError(f"train.nodes is {nodes}, but the cluster has {cluster.nodes} node(s); lower it")
    each = even_share(config.train, nodes, max(1, cluster.gpus))
    processes = each * nodes if machine.cuda or nodes > 1 else machine.processes
    shards = processes if machine.cuda and config.train.lora is None and config.train.strategy != "ddp" else 1
    return replace(
        machine,
        groups=groups * cluster.nodes,
        gpus=cluster.all_gpus,
        processes=processes,
        shards=shards,
        speed_up=processes / machine.processes,
        cluster=cluster,
    )


def spread(
    kind: str, stage: Estimate, config: RunConfig, costs: StageCosts, machine: Machine, policy: ModelSize
) -> None:
    """Adds to the estimate of a stage what a cluster changes: reading by all groups, the network, and who is idle.

    Args:
        stage: as estimated with the groups and processes of `machine`; it is changed.
        policy: its size; all models of a run have it.
    """
    cluster = machine.cluster
    assert cluster is not None
    if kind in ("generate", "score"):
        groups = max(1, min(machine.groups, stage.counts["shards"]))
        of_a_model = costs.generate.load if kind == "generate" else costs.score.load
        models = round(stage.load / of_a_model) if of_a_model else 1
        reading = models * groups * policy.stored_bytes
        stage.load = max(stage.load, reading / (1e9 * cluster.filesystem))
        written = stage.disk + (stage.counts["responses"] * costs.generate.bytes_per_response if kind == "score" else 0)
        stage.filesystem = reading + written
        if machine.cuda:
            stage.devices = groups * (machine.gpus // machine.groups)
            even = stage.counts["shards"] / (groups * math.ceil(stage.counts["shards"] / groups))
            stage.busy = stage.devices * stage.work * even
    elif kind == "train" and stage.counts["steps"]:
        steps, tokens = stage.counts["steps"], stage.tokens / stage.counts["steps"]
        computing = costs.train.per_token * tokens
        shared = computing / machine.speed_up
        passes = max(1, math.ceil(tokens / machine.processes / config.train.row_tokens(cuda=machine.cuda)))
        exchanged = 0.0
        if config.train.nodes > 1:
            of_a_weight = _GATHERED + _REDUCED if machine.shards > 1 else 2 * _REDUCED / passes
            exchanged = policy.parameters * of_a_weight * passes
        # The network works beside the GPUs: what takes longer counts.
        stage.work += steps * (max(shared, exchanged / (1e9 * cluster.network)) - computing)
        stage.busy = machine.processes * shared * steps
        stage.network = exchanged * steps * config.train.nodes
        stage.filesystem = policy.stored_bytes * (1 if machine.shards > 1 else machine.processes) + stage.disk
    else:
        stage.filesystem = stage.disk + (policy.stored_bytes if stage.load else 0)


def summary(cluster: Cluster, stages: dict[str, dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The cluster in a plan: `nodes`, `gpus`, `reserved_gpu_hours` (all GPUs, from start to end), `idle_gpu_hours` and
    `idle_share` of them, `idle_by_stage` (GPU hours), `network_bytes` and `filesystem_bytes`, and what was assumed."""
    idle = {name: stage["idle_gpu_hours"] for name, stage in stages.items()}
    reserved = cluster.all_gpus * seconds / 3600
    return {
        "nodes": cluster.nodes,
        "gpus": cluster.all_gpus,
        "node_hours": cluster.nodes * seconds / 3600,
        "reserved_gpu_hours": reserved,
        "idle_gpu_hours": sum(idle.values()),
        "idle_share": sum(idle.values()) / reserved if reserved else None,
        "idle_by_stage": idle,
        "network_bytes": sum(stage["network_bytes"] for stage in stages.values()),
        "filesystem_bytes": sum(stage["filesystem_bytes"] for stage in stages.values()),
        "assumed_network_gb_per_s": cluster.network,
        "assumed_filesystem_gb_per_s": cluster.filesystem,
    }
