"""docs/troubleshooting.md quotes messages that the engine really has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from places import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^\| (?:`` (.+?) ``|`([^`]+)`) \|", PAGE, re.MULTILINE)
MESSAGES = [one or other for one, other in QUOTED]
GAP = "…"


def text_of(node: ast.expr) -> str:
    """A message as the source has it, with a gap for each value; empty if it is none."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else GAP for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return ""


def texts() -> Iterator[str]:
    for folder in ("dice_py", "cli"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp):
                    yield text_of(node)


KNOWN = "\n".join(texts())


@pytest.mark.parametrize("message", MESSAGES)
def test_the_message_is_in_the_source(message: str) -> None:
    # A gap of the page stands for anything but the end of the message.
    pattern = "[^\n]*?".join(re.escape(part) for part in message.split(GAP))
    assert re.search(pattern, KNOWN), message


def test_the_page_has_messages_of_every_kind() -> None:
    assert len(MESSAGES) > 30
    assert not re.search("[^\n]*?".join(map(re.escape, ["no such message", "at all"])), KNOWN)
