"""The rule by which the demo's pairs are labeled and its policies are compared: does an answer keep to its form?

Every prompt of the demo asks for a form that a program can check: one sentence, a list of three items, at most ten
words. An answer keeps the rule if

1. it ended by itself, before the limit of tokens,
2. it has the form that its prompt asks for,
3. it repeats neither itself (no four words in a row come twice) nor its prompt.

The rule says nothing of whether an answer is true, useful or well written.

    form            the answer
    sentences N     is one paragraph of exactly N sentences
    items N         has exactly N lines that begin with a number or a bullet
    words N         has at most N words
    yesno N         begins with yes or no, and has at most N words
    starts WORD     begins with this word
    contains A,B    has these words
    ends C          ends with this character
    parts N         is one line of exactly N parts between commas, of one to three words each
"""

from __future__ import annotations

import re
from collections.abc import Callable

_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_ITEM = re.compile(r"\s*(?:[-*•]|\d+[.)])\s+\S")
_SENTENCE_END = re.compile(r"(?<!\bSt)(?<!\bMr)(?<!\bMs)(?<!\bMrs)(?<!\bDr)[.!?]+[\"'”’)\]*]*(?:\s+|$)")
_QUOTES = " \n\"'“”‘’*"
_REPEATED = 4  # words in a row


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return [word.lower() for word in _WORD.findall(text)]


def sentences(text: str) -> int:
    """How many sentences a text has: parts with a word, between marks that end a sentence."""
    return sum(bool(words(part)) for part in _SENTENCE_END.split(text))


def _is_sentences(text: str, argument: str) -> bool:
    return "\n" not in text and sentences(text) == int(argument)


def _is_items(text: str, argument: str) -> bool:
    return sum(bool(_ITEM.match(line)) for line in text.splitlines()) == int(argument)


def _is_words(text: str, argument: str) -> bool:
    return len(words(text)) <= int(argument)


def _is_yesno(text: str, argument: str) -> bool:
    return words(text)[0] in ("yes", "no") and _is_words(text, argument)


def _starts(text: str, argument: str) -> bool:
    return words(text)[0] == argument.lower()


def _contains(text: str, argument: str) -> bool:
    return set(argument.lower().split(",")) <= set(words(text))


def _ends(text: str, argument: str) -> bool:
    return text.rstrip(_QUOTES).endswith(argument)


def _is_parts(text: str, argument: str) -> bool:
    parts = [words(re.sub(r"^\s*and\b", "", part)) for part in text.split(",")]
    return "\n" not in text and len(parts) == int(argument) and all(1 <= len(part) <= 3 for part in parts)


_FORMS: dict[str, Callable[[str, str], bool]] = {
    "sentences": _is_sentences,
    "items": _is_items,
    "words": _is_words,
    "yesno": _is_yesno,
    "starts": _starts,
    "contains": _contains,
    "ends": _ends,
    "parts": _is_parts,
}
KINDS = tuple(_FORMS)
"""The first word of every form."""


def repeats(prompt: str, answer: str) -> bool:
    """True if four words in a row come twice in the answer, or if it only says what the prompt says."""
    said = words(answer)
    runs = [tuple(said[at : at + _REPEATED]) for at in range(len(said) - _REPEATED + 1)]
    return len(set(runs)) < len(runs) or (bool(runs) and f" {' '.join(said)} " in f" {' '.join(words(prompt))} ")


def keeps_rule(form: str, prompt: str, answer: str, *, ended: bool) -> bool:
    """Whether an answer keeps the rule above.

    Args:
        form: a line of the table above, such as "sentences 2".
        ended: False if the limit of tokens cut the answer off.
    """
    kind, _, argument = form.partition(" ")
    answer = answer.strip()
    if not ended or not words(answer) or repeats(prompt, answer):
        return False
    return _FORMS[kind](answer, argument)
