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
    margin = None if row["margin"] is None else f"margin {number(row['margin'])}"
    head = [row["source"], margin, row["labels"]]
    _print(f"{row['pair_id']}: {', '.join(part for part in head if part)}", 0)
    for turn in row["prompt"]:
        _print(f"{turn['role']}:", 2)
        _print(_cut(turn["content"]), _INDENT)
    for side in ("chosen", "rejected"):
        _print(f"{side}{_facts(row, side)}:", 2)
        for turn in row[side]:
            _print(_cut(turn["content"]), _INDENT)
    say()


def _facts(row: dict[str, Any], side: str) -> str:
    """What is known of a response, in brackets."""
    words = {"reward": "reward {}", "penalized_reward": "ranked by {}", "tokens": "{} tokens"}
    known = {name: row[f"{side}_{name}"] for name in (*words, "finish_reason")}
    facts = [words[name].format(number(known[name])) for name in words if known[name] is not None]
    facts += [known["finish_reason"]] if known["finish_reason"] else []
    return f" ({', '.join(facts)})" if facts else ""


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
