"""The token ids that a tokenizer has. Most large models have more rows than that, padded to a round number."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KnownTokens:
    """The ids from 0 to `size` without `holes`. Any other id that a model has a row for means nothing."""

    size: int
    holes: tuple[int, ...] = ()

    @staticmethod
    def of(tokenizer: Any, stops: Collection[int] = ()) -> KnownTokens:
        """The ids of a tokenizer, and those of `stops`."""
        ids = {*tokenizer.get_vocab().values(), *stops}
        size = max(ids) + 1
        return KnownTokens(size, tuple(sorted(set(range(size)) - ids)))

    def unknown(self, rows: int) -> list[int]:
        """The ids below `rows` that are no token, ascending."""
        return [*(hole for hole in self.holes if hole < rows), *range(self.size, rows)]
