"""A `Report` that keeps the notes that it receives."""

from __future__ import annotations

from typing import Any


class Notes:
    """`texts` has the texts of all notes, in order."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, event: str, **fields: Any) -> None:
        if event == "note":
            self.texts.append(fields["text"])
