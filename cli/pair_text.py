"""A pair as lines of text in the width of the terminal. Nothing in its texts is obeyed, and none is shown too long."""

from __future__ import annotations

from typing import Any

from rich.padding import Padding
from rich.text import Text

from cli.terminal import console, say
from dice_py.reporting.foreign_text import visible
from dice_py.reporting.formatting import number

MOST_CHARACTERS = 2000
"""Of a text, that are shown."""
_INDENT = 4


def print_pair(row: dict[str, Any]) -> None:
    """Prints a row of INSPECTED_PAIRS (storage/schemas.py) to stdout, and an empty line."""
    head = [row["source"], f"margin {number(row['margin'])}", row["labels"]]
    _print(f"{row['pair_id']}: {', '.join(part for part in head if part)}", 0)
    for turn in row["prompt"]:
        _print(f"{turn['role']}:", 2)
        _print(_cut(turn["content"]), _INDENT)
    for side in ("chosen", "rejected"):
        facts = [
            f"reward {number(row[f'{side}_reward'])}",
            f"ranked by {number(row[f'{side}_penalized_reward'])}",
            f"{number(row[f'{side}_tokens'])} tokens",
            row[f"{side}_finish_reason"],
        ]
        _print(f"{side} ({', '.join(part for part in facts if part and not part.endswith('–'))}):", 2)
        for turn in row[side]:
            _print(_cut(turn["content"]), _INDENT)
    say()


def _cut(text: str) -> str:
    if not text:
        return "(empty)"
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:MOST_CHARACTERS]}\n(… {len(text) - MOST_CHARACTERS:,} more characters; --json has all)"


def _print(text: str, indent: int) -> None:
    """Prints a text, wrapped by the width that its characters take in a terminal."""
    terminal = console()
    # As Text, which has no markup, and visible before it is measured: escapes are wider than what they stand for.
    with terminal.capture() as captured:
        terminal.print(Padding(Text(visible(text).expandtabs(8)), (0, 0, 0, indent)))
    for line in captured.get().splitlines():
        say(line.rstrip())
