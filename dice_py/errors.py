"""Errors a user can act on, each with the exit code of the command line.

Every message says what was wrong, where (file, row, key), and what to do. Anything that is not a
`DiceError` is a bug of ours: it exits with 1 and a traceback.
"""


class DiceError(Exception):
    """A failure that the user can act on. `exit_code` is what `dice` exits with."""

    exit_code: int = 1


class UsageError(DiceError):
    """A wrong option, config key or value, or something that is not installed (exit code 2)."""

    exit_code = 2


class DataError(DiceError):
    """Input data, a model folder or an artefact that cannot be used as it is (exit code 3)."""

    exit_code = 3


class OutOfMemoryError(DiceError):
    """The device or the host ran out of memory (exit code 4)."""

    exit_code = 4


class InterruptedRunError(DiceError):
    """Stopped before the end, with everything that was whole kept: `dice resume` goes on (exit code 5)."""

    exit_code = 5


class DiskFullError(DiceError):
    """No room left: nothing that was whole is lost, and a resume goes on from it (exit code 5)."""

    exit_code = 5
