"""What the benches change in a stock DPOTrainer."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from typing import Any
from unittest import mock


@contextlib.contextmanager
def weights_not_hashed() -> Iterator[None]:
    """Within the block, a DPOTrainer that is built does not hash the weights of its reference.

    TRL names the cache of its reference pass by that hash. It is computed for each trainer, on the CPU, and takes
    minutes with 8B weights, which would count against TRL. The name here is a random one, so that no trainer takes its
    log-probabilities from the cache of another.
    """

    def random_name(module: Any) -> str:
        del module
        return uuid.uuid4().hex

    with mock.patch("trl.trainer.dpo_trainer.hash_module", random_name):
        yield
