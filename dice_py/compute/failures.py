"""How a worker process failed, and how its error reaches the parent."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dice_py.errors import DataError, DiceError, InterruptedRunError, OutOfMemoryError, UsageError

if TYPE_CHECKING:
    pass


# --- errors that cross --------------------------------------------------------------------------------------


def _error_kind(name: str) -> type[DiceError]:
    from dice_py.errors import DiskFullError

    kinds = (DiceError, UsageError, DataError, OutOfMemoryError, DiskFullError, InterruptedRunError)
    return {kind.__name__: kind for kind in kinds}.get(name, DiceError)


@dataclass(frozen=True)
class Failure:
    """How a worker failed: by what its work raised, or (`died`) by an end without a word."""

    kind: str  # the name of a DiceError, or "bug"
    exit_code: int
    text: str  # of a bug that was raised: the traceback
    died: bool = False

    def error(self, text: str) -> Exception:
        """The error to raise in the parent, saying `text`; a bug is a RuntimeError."""
        if self.kind == "bug":
            return RuntimeError(text)
        error = _error_kind(self.kind)(text)
        error.exit_code = self.exit_code
        return error


def is_out_of_memory(error: BaseException | None) -> bool:
    """True for a MemoryError and for torch's out-of-memory errors, and for what was raised from one.

    torch is not imported for it: the names of its errors and the words of its CPU allocator tell.
    """
    while error is not None:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if kinds & {"MemoryError", "OutOfMemoryError"} or "DefaultCPUAllocator" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def failure_fields(error: BaseException) -> dict[str, Any]:
    """How an exception crosses to the parent: its kind, exit code and sentence ("bug": the traceback)."""
    if isinstance(error, OSError):
        from dice_py.storage.files import path_error

        error = path_error(error) or error
    text = str(error).strip()
    if isinstance(error, DiceError):
        return {"kind": type(error).__name__, "exit_code": error.exit_code, "text": text}
    if isinstance(error, KeyboardInterrupt):
        return {"kind": "InterruptedRunError", "exit_code": 5, "text": "interrupted"}
    from dice_py.storage.files import is_disk_full

    if is_disk_full(error):
        text = f"no room left on the disk ({text}); free some space, then `dice resume` the run"
        return {"kind": "DiskFullError", "exit_code": 5, "text": text}
    if is_out_of_memory(error):
        first = text.splitlines()[0] if text else type(error).__name__
        return {"kind": "OutOfMemoryError", "exit_code": 4, "text": first}
    return {"kind": "bug", "exit_code": 1, "text": "".join(traceback.format_exception(error))}
