"""How many examples a property is tried on: a part of them in `make test`, all in `make test-slow`."""

from __future__ import annotations

import os

ALL = os.environ.get("DICE_EXAMPLES") == "all"
"""Whether every property gets all of its examples."""


def examples(count: int) -> int:
    """Of the examples that a property should have, a third; at least 20, or all of fewer."""
    return count if ALL or count <= 20 else max(20, count // 3)
