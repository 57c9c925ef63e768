"""Errors that a user can act on, each with the exit code of the command line.

Every message says what was wrong, where (file, row, key), and what to do. Any other exception is a bug: the command
line exits with 1 and a traceback.
"""


class DiceError(Exception):
    """A failure that the user can act on. `exit_code` is the exit code of `dice`."""

    exit_code: int = 1


class UsageError(DiceError):
    """A wrong option, config key or value, or a package that is not installed (exit code 2)."""

    exit_code = 2


class DataError(DiceError):
    """Input data, a model folder or an artifact that cannot be used (exit code 3)."""

    exit_code = 3


class DamagedError(DataError):
    """An artifact of this program that is not as it was written (exit code 3). A run makes it again."""


class RemovedError(DataError):
    """An artifact that was removed to free its space, and is needed after all (exit code 3)."""


class OutOfMemoryError(DiceError):
    """The device or the host ran out of memory (exit code 4)."""

    exit_code = 4


class InterruptedRunError(DiceError):
    """The run was stopped before its end. Completed work is kept, and `dice resume` continues (exit code 5)."""

    exit_code = 5


class StoppedTrainingError(InterruptedRunError):
    """A training was asked to stop, and has written a checkpoint of its last step, if it made one (exit code 5)."""


class DiskFullError(DiceError):
    """The disk is full. Completed files are kept, and `dice resume` continues (exit code 5)."""

    exit_code = 5


class JudgeError(DiceError):
    """A judge cannot be reached, or its budget is spent. Its verdicts are kept: repeat to go on (exit code 5)."""

    exit_code = 5
