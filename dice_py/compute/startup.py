"""Imports of a worker: without what its work never uses, and without garbage collection, which finds nothing then.

Every stage is a process of its own, and importing torch, transformers and TRL takes most of a short stage's time.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

_FOREIGN = {
    "transformers.generation.candidate_generator": ("sklearn", "is_sklearn_available"),
    "transformers.loss.loss_for_object_detection": ("scipy", "is_scipy_available"),
}
"""Modules that every causal language model imports, and what they import if it is installed: for assisted decoding, and
for losses of object detection."""


class _WithoutForeign(MetaPathFinder):
    """Makes transformers take packages for absent that no causal language model needs; others import them as ever.

    transformers asks once whether a package is there, and keeps the answer.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name in _FOREIGN:
            package, question = _FOREIGN[name]
            if package not in sys.modules:
                sys.modules[package] = None  # type: ignore[assignment]  # as if it were not installed
                try:
                    with contextlib.suppress(ImportError, AttributeError):  # of another version of transformers
                        ask = getattr(importlib.import_module("transformers.utils.import_utils"), question)
                        ask.cache_clear()
                        ask()
                finally:
                    del sys.modules[package]


def leave_out_foreign() -> None:
    """Of this process: transformers imports no package that only other tasks use."""
    sys.meta_path.insert(0, _WithoutForeign())


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around imports of many modules: they make much that stays, which is not searched for garbage meanwhile."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def keep_imported() -> None:
    """What there is now, in a process that has only imported, stays: no later search for garbage looks at it."""
    gc.freeze()
