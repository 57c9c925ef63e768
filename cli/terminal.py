"""The one way of text to a terminal: nothing in it is obeyed, neither control characters nor Rich's markup."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from dice_py.reporting.foreign_text import visible

if TYPE_CHECKING:
    from rich.console import Console

_READER_GONE = (errno.EPIPE, errno.EIO)
"""Errors of writing to a pipe that nobody reads, and to a terminal that was closed."""


def say(text: object = "", *, err: bool = False) -> None:
    """Prints a line on stdout, or on stderr."""
    stream = sys.stderr if err else sys.stdout
    with readers_may_leave(stream):
        print(visible(str(text)), file=stream, flush=True)


@contextlib.contextmanager
def readers_may_leave(stream: TextIO) -> Iterator[None]:
    """Work neither ends nor fails because nobody reads its output any more: the rest is discarded."""
    try:
        yield
    except OSError as error:
        # What is wrong with stderr cannot be said anywhere.
        if error.errno not in _READER_GONE and stream is not sys.stderr:
            raise
        # The null device takes the place of the stream, whose buffer is written again when the process ends.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def console(*, err: bool = False) -> Console:
    """A Rich console whose texts, cells and titles are plain: markup and emoji codes are printed as they are."""
    from rich.console import Console

    class PlainConsole(Console):
        """Rich makes every string that it is given into a Text by this method."""

        def render_str(self, text: str, **options: Any) -> Any:
            """The text with its control characters visible."""
            return super().render_str(visible(text), **{**options, "markup": False, "emoji": False})

    return PlainConsole(stderr=err, highlight=False, markup=False, emoji=False)


def prepare_streams() -> None:
    """Makes stdout and stderr fit for any text, and the warnings of libraries plain.

    A stream that is closed becomes the null device, so that no file that is opened later gets its number.
    """
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8
    warnings.showwarning = _show_warning


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    del file, line
    say(f"{category.__name__}: {message} ({filename}:{lineno})", err=True)
