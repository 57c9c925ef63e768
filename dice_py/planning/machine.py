"""What a plan knows of the machine that a run will have."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """The engine and devices of the run, and the costs that every plan measures anew."""

    engine: str
    dtype: str
    cuda: bool
    cores: int
    groups: int
    """Groups of devices that share the shards of generate and score."""
    gpus: int
    """GPUs of all groups."""
    processes: int
    """Processes of the training."""
    shards: int
    """Processes that the training's states are split over."""
    gpu_bytes: int | None
    """Memory of one GPU; None on the CPU."""
    base_memory: int
    """Bytes of host memory that a process with its libraries takes."""
    encode_seconds: float
    """For tokenizing one prompt."""
    tokenizer_seconds: float
    """For loading the tokenizer."""
    mine_seconds: float
    """For mining one response."""
    bootstrap_seconds: float
    """For one confidence interval of the evaluation."""
    cluster: Cluster | None = None
    """Of which `groups`, `gpus` and `processes` are; None: this machine alone."""
    speed_up: float = 1.0
    """Processes of the training over those that its costs were measured with."""


NETWORK = 50.0
"""GB/s between a node and the others, where a plan is told no other: 400 Gbit/s."""
FILESYSTEM = 20.0
"""GB/s that the shared file system gives to all nodes together, where a plan is told no other."""


@dataclass(frozen=True)
class Cluster:
    """Nodes that are alike."""

    nodes: int
    gpus: int
    """Of each node; 0: its cores are used."""
    network: float = NETWORK
    filesystem: float = FILESYSTEM

    @property
    def all_gpus(self) -> int:
        """GPUs of all nodes."""
        return self.nodes * self.gpus
