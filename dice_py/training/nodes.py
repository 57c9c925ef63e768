"""The nodes that a training over several machines can have: those of a Ray cluster, or of a Slurm allocation."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

from dice_py.compute.ray_cluster import connected, living_nodes
from dice_py.config.shared import DevicesConfig
from dice_py.errors import UsageError


def gpus_per_node(devices: DevicesConfig, nodes: int, *, cuda: bool) -> int:
    """GPUs that each of so many nodes of the Ray cluster has, the best equipped ones; on the CPU, 1.

    Raises:
        UsageError: the cluster has fewer nodes with GPUs (with cores).
    """
    with connected(devices):
        counts = sorted((node.gpus if cuda else min(1, node.cpus) for node in living_nodes()), reverse=True)
    able = [count for count in counts if count]
    if len(able) < nodes:
        kind = "GPUs" if cuda else "cores"
        raise UsageError(
            f"train.nodes is {nodes}, but the Ray cluster has {len(able)} node(s) with {kind}; lower it, or add nodes"
        )
    return able[nodes - 1]


def slurm_gpus(nodes: int, gpus: Sequence[str]) -> int:
    """GPUs of each node of a Slurm allocation: as many as this one has, which are `gpus`; on the CPU, 1.

    Raises:
        UsageError: this process runs in no allocation of so many nodes.
    """
    allocated = os.environ.get("SLURM_JOB_NUM_NODES", "")
    if not allocated.isdecimal() or shutil.which("srun") is None:
        raise UsageError(
            f"train.nodes is {nodes}, which needs a Ray cluster (devices.executor=ray) or an allocation of Slurm "
            "(SLURM_JOB_NUM_NODES, srun); start the run in one, or set train.nodes=1"
        )
    if int(allocated) < nodes:
        raise UsageError(
            f"train.nodes is {nodes}, but the Slurm allocation has {allocated} node(s); lower it, or ask for more with "
            "sbatch --nodes"
        )
    return max(1, len(gpus))
