"""Texts that a terminal or a page would obey, and what of them may never reach one."""

from __future__ import annotations

import unicodedata

HOSTILE = {
    "escape": "a\x1b[2Jb",
    "clipboard": "a\x1b]52;c;ZWNobyBo\x07b",
    "title": "\x1b]0;owned\x07",
    "c1": "a\x9b31mb",
    "carriage return": "good\rbad",
    "backspace": "abc\b\b\bxyz",
    "bell and delete": "a\x07\x7fb",
    "bidirectional": "a\u202egnp.exe",
    "isolate": "\u2066a\u2069",
    "invisible": "a\u200bb\ufeff",
    "line separator": "a\u2028b",
    "tags": "a\U000e0041b",
    "markup that closes": "[/foo]",
    "markup": "[bold red]x",
    "link": "[link=file:///etc/passwd]x[/link]",
    "emoji": ":skull:",
    "style that is none": "[not a style]x[/]",
    "html": "<script>alert(1)</script>",
    "attribute": "\"><img src=x onerror='alert(1)'>",
    "textarea": "</textarea></title></style><b>",
    "template": "{{ 7 * 7 }}{% raw %}",
    "format": "%s%n{0}{x!r}",
    "yaml": "!!python/object/apply:os.system [id]",
    "surrogate": "a\udcffb",
}
"""By what they try."""


def obeyed(text: str) -> list[str]:
    """The characters of a text that a terminal would obey, or that it cannot be sent. Line breaks and tabs may be."""
    return [
        repr(character)
        for character in text
        if character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    ]


def in_a_path(text: str) -> str:
    """The text as a name of a file or folder, which may hold neither slash nor NUL."""
    return text.replace("/", "∕")
