"""The one way of text to a terminal: nothing in it is obeyed, neither control characters nor Rich's markup."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from dice_py.reporting.foreign_text import visible

if TYPE_CHECKING:
    from rich.console import Console


def say(text: object = "", *, err: bool = False) -> None:
    """Prints a line on stdout, or on stderr."""
    typer.echo(visible(str(text)), err=err)


def console(*, err: bool = False) -> Console:
    """A Rich console whose texts, cells and titles are plain: markup and emoji codes are printed as they are."""
    from rich.console import Console

    class PlainConsole(Console):
        """Rich makes every string that it is given into a Text by this method."""

        def render_str(self, text: str, **options: Any) -> Any:
            """The text with its control characters visible."""
            return super().render_str(visible(text), **{**options, "markup": False, "emoji": False})

    return PlainConsole(stderr=err, highlight=False, markup=False, emoji=False)
