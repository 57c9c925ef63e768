"""How a worker failed, and how its error reaches the parent.

This module imports nothing heavy: every worker imports it first.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Any

from dice_py.config.extras import missing_module
from dice_py.errors import (
    DamagedError,
    DataError,
    DiceError,
    DiskFullError,
    InterruptedRunError,
    JudgeError,
    OutOfMemoryError,
    RemovedError,
    StoppedTrainingError,
    UsageError,
)
from dice_py.storage.files import is_disk_full, path_error

# Words of errors that are no torch.OutOfMemoryError, in lower case.
_OUT_OF_MEMORY = (
    "defaultcpuallocator",  # torch on a CPU
    "cublas_status_alloc_failed",  # a library's workspace, for which the allocator left no room
    "cudnn_status_alloc_failed",
    "cusolver_status_alloc_failed",
    "no available memory for the cache blocks",  # vLLM
    "larger than the available kv cache memory",
    "less than desired gpu memory utilization",
)

_KINDS = (
    DiceError,
    UsageError,
    DataError,
    DamagedError,
    RemovedError,
    OutOfMemoryError,
    DiskFullError,
    InterruptedRunError,
    StoppedTrainingError,
    JudgeError,
)


@dataclass(frozen=True)
class Failure:
    """How a worker failed: by the error that its work raised, or (`died`) by an end without a result."""

    kind: str  # the name of a DiceError, or "bug"
    exit_code: int
    text: str  # of a bug that was raised: the traceback
    died: bool = False
    lost: bool = False
    """Its node is gone from the cluster, which says nothing about its work."""

    def error(self, text: str) -> Exception:
        """The error to raise in the parent with the message `text`; a bug is a RuntimeError."""
        if self.kind == "bug":
            return RuntimeError(text)
        error = {kind.__name__: kind for kind in _KINDS}.get(self.kind, DiceError)(text)
        error.exit_code = self.exit_code
        return error


def is_out_of_memory(error: BaseException | None) -> bool:
    """True for a lack of the host's or a device's memory, and for errors that were raised from one.

    So for a MemoryError, for torch's OutOfMemoryError, and for what CUDA, its libraries, NCCL and vLLM raise instead:
    a RuntimeError with the words "out of memory" (torch's AcceleratorError is one), or an error with a phrase of
    theirs. None of these libraries is imported for it.
    """
    while error is not None:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        text = str(error).lower()
        if (
            kinds & {"MemoryError", "OutOfMemoryError"}
            or ("out of memory" in text and isinstance(error, RuntimeError))
            or any(phrase in text for phrase in _OUT_OF_MEMORY)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def failure_fields(error: BaseException) -> dict[str, Any]:
    """The fields of a `Failure`, as a worker sends them: kind, exit code and sentence ("bug": the traceback)."""
    if isinstance(error, OSError):
        error = path_error(error) or error
    error = missing_module(error) or error
    text = str(error).strip()
    if isinstance(error, DiceError):
        return {"kind": type(error).__name__, "exit_code": error.exit_code, "text": text}
    if isinstance(error, KeyboardInterrupt):
        return {"kind": "InterruptedRunError", "exit_code": 5, "text": "interrupted"}
    if is_disk_full(error):
        text = f"no room left on the disk ({text}); free some space, then `dice resume` the run"
        return {"kind": "DiskFullError", "exit_code": 5, "text": text}
    if is_out_of_memory(error):
        first = text.splitlines()[0] if text else type(error).__name__
        return {"kind": "OutOfMemoryError", "exit_code": 4, "text": first}
    return {"kind": "bug", "exit_code": 1, "text": "".join(traceback.format_exception(error))}
