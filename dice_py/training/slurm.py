"""Starts the ranks of a training on the nodes of a Slurm allocation: `srun` starts `torchrun` on each node.

The nodes meet at this one (torchrun's c10d rendezvous). Variables for accelerate are set as `accelerate launch` would.
"""

from __future__ import annotations

import os
import socket
import sys

from dice_py.training.launcher import SECRET, CommandLauncher
from dice_py.training.parallelism import ProcessLayout


def this_host() -> str:
    """The name by which the other nodes of the allocation reach this one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


def start_by_srun(
    layout: ProcessLayout, environment: dict[str, str], address: str, secret: str, *, module: str
) -> CommandLauncher:
    """Starts the ranks.

    Args:
        environment: variables of every rank.
        address: of the stage.
        secret: which a rank needs to be let in. It is in the environment, which only this user can read.
        module: runs a rank; it gets the address as its argument.
    """
    command = [
        "srun", f"--nodes={layout.nodes}", f"--ntasks={layout.nodes}", "--ntasks-per-node=1",
        "--kill-on-bad-exit=1", "--overlap",
        sys.executable, "-m", "torch.distributed.run", f"--nnodes={layout.nodes}",
        f"--nproc-per-node={layout.processes // layout.nodes}", "--rdzv-backend=c10d",
        f"--rdzv-endpoint={this_host()}:{free_port()}", f"--rdzv-id={secret[:16]}", "--module", module, address,
    ]  # fmt: skip
    return CommandLauncher(command, {**environment, SECRET: secret})
