"""Text that is not ours, shown but never obeyed: paths, keys, prompts, model names, messages of libraries.

A control character in a name can move the cursor, rewrite what is above, or put something into the clipboard; a
bidirectional mark can turn a line around; a lone surrogate cannot be written at all. All text goes to a terminal
through `visible` (cli/terminal.py), and to a page through `html_text`.
"""

from __future__ import annotations

import html
import re
import unicodedata

_NOT_PLAIN = re.compile(r"[^\n\t\x20-\x7e]")
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of controls, format characters, surrogates, and separators of lines and paragraphs."""
_MARKDOWN = re.compile(r"([\\`*_\[\]#!|~$])")
_JOINERS = "\u200c\u200d"  # Persian words and emoji need them.


def visible(text: str) -> str:
    """The text with controls, format characters and surrogates as escapes (`\\x1b`); line breaks and tabs stay."""
    return _NOT_PLAIN.sub(lambda match: _shown(match[0]), text)


def html_text(value: object) -> str:
    """A value as text of an HTML page, with quotes escaped too, so that it can be an attribute's."""
    return html.escape(visible(str(value)))


def markdown_text(text: str, longest: int) -> str:
    """A text in one line, cut to `longest` characters, that Markdown shows as it is, also in a cell of a table."""
    cut = text[:longest] + ("…" if len(text) > longest else "")
    line = _MARKDOWN.sub(r"\\\1", " ".join(visible(cut).split()))
    return html.escape(line, quote=False)


def _shown(character: str) -> str:
    if character in _JOINERS or unicodedata.category(character) not in _HIDDEN:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
