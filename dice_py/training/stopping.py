"""Whether a training stops at a step, which all of its ranks decide together."""

from __future__ import annotations

from typing import Any

from dice_py.compute.stopping import is_asked_to_stop


class StopVote:
    """Called by every rank at the same steps: True on all of them once one of them was asked to stop.

    A rank that stopped alone would leave the others in a collective operation. The vote is taken among the processes,
    not the GPUs, so that no step waits for its GPU because of it.
    """

    def __init__(self) -> None:
        self._group: Any = None

    def __call__(self) -> bool:
        """Whether the training stops here."""
        import torch
        from torch import distributed

        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            return is_asked_to_stop()
        if self._group is None:
            self._group = distributed.new_group(backend="gloo")
        vote = torch.tensor([is_asked_to_stop()], dtype=torch.int32)
        distributed.all_reduce(vote, distributed.ReduceOp.MAX, group=self._group)
        return bool(vote.item())
