"""Text is encoded as text: only the chat template makes control tokens, never a spelling in what somebody wrote.

Control tokens are the tokenizer's special tokens, those that end a response, and those that the chat template puts
around a turn (models/chat_template.py), whatever their spelling. A text that holds such a spelling ("</s>" in an answer
about HTML) would be encoded as the token itself: it would end the answer there, or open a turn. So each spelling in a
text is replaced by one private-use character before the template renders the conversation. The control tokens in the
rendered text are then the template's own. They become tokens of a copy of the tokenizer that is told to split special
tokens, the texts are put back, and one call encodes the whole. The texts beside a spelling are thus cut as in any other
text; only where the vocabulary itself has the spelling as a piece is it cut after its first character.

A spelling may also arise where two texts meet, or a text and the template: a text that ends with the beginning of a
spelling, or begins with the end of one, is treated in the same way.
"""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dice_py.errors import DataError
from dice_py.models.thinking import delimiter_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIRST_PLACEHOLDER, _LAST_PLACEHOLDER = 0xF0000, 0xFFFFD
_MARKS = "\U0010fffd\U0010fffc\U0010fffb\U0010fffa"
"""Private-use characters around a control token's number, in the copy of the tokenizer; one that no text has."""
_ROLE = re.compile(r"[\w .-]*")


@dataclass
class ControlTokens:
    """The control tokens of a tokenizer.

    Attributes:
        by_spelling: token ids.
        ids: those that text must not give. The token of unknown text is none of them, unless it has another part too.
        free: special tokens that texts may spell: delimiters of thinking, which a model writes in its answers.
    """

    tokenizer_ref: weakref.ref[PreTrainedTokenizerBase]
    by_spelling: dict[str, int]
    ids: frozenset[int]
    free: dict[str, int] = field(default_factory=dict)
    pattern: re.Pattern[str] = field(init=False)
    _tokens: dict[str, int] = field(init=False)
    _every: re.Pattern[str] = field(init=False)
    _prefixes: frozenset[str] = field(init=False)
    _suffixes: frozenset[str] = field(init=False)
    _copies: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        spellings = sorted(self.by_spelling, key=len, reverse=True)  # the longest wins, as in the tokenizer
        self.pattern = re.compile("|".join(map(re.escape, spellings)) or r"(?!)")
        self._tokens = self.by_spelling | self.free
        every = sorted(self._tokens, key=len, reverse=True)
        self._every = re.compile("|".join(map(re.escape, every)) or r"(?!)")
        self._prefixes = frozenset(text[:end] for text in spellings for end in range(1, len(text)))
        self._suffixes = frozenset(text[start:] for text in spellings for start in range(1, len(text)))

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase, stops: Iterable[int] = ()) -> ControlTokens:
        """The special tokens of a tokenizer, and those of `stops` that it splits from text before anything else.

        Args:
            stops: tokens that end a response or stand around a turn, special or not.
        """
        added = tokenizer.added_tokens_decoder
        stops = set(stops)
        by_spelling = {str(token): int(number) for number, token in added.items() if token.special or number in stops}
        special = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        by_spelling |= {str(token): int(number) for token, number in special}
        by_spelling.pop("", None)
        unknown = tokenizer.unk_token_id
        others = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, *stops}
        named = delimiter_tokens(tokenizer).items()
        free = {name: token for name, token in named if name in by_spelling and token not in others}
        by_spelling = {name: token for name, token in by_spelling.items() if name not in free}
        ids = set(by_spelling.values()) - ({unknown} - others)
        return ControlTokens(weakref.ref(tokenizer), by_spelling, frozenset(ids), free)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, which its user keeps alive."""
        tokenizer = self.tokenizer_ref()
        assert tokenizer is not None
        return tokenizer

    def spelled(self, conversation: Any) -> str | None:
        """The first spelling of a control token in a conversation's texts; None if there is none."""
        matches = (self.pattern.search(text) for text, is_key in _texts(conversation) if not is_key)
        return next((match[0] for match in matches if match), None)

    def guard(self, conversation: Iterable[Any]) -> Guard | None:
        """Placeholders for the spellings in a conversation's texts; None where it has none, as nearly all have.

        Args:
            conversation: messages as the template sees them, and its other arguments.
        """
        found: dict[str, None] = {}
        for text, is_role in _texts(conversation):
            if is_role and _ROLE.fullmatch(text):
                continue  # templates compare roles, and may write one as a part of a control token
            found.update(dict.fromkeys(self.pattern.findall(text)))
            if not is_role:
                found.update(dict.fromkeys(self._partial(text)))
        if not found:
            return None
        texts = "".join(text for text, _ in _texts(conversation)) + str(self.tokenizer.chat_template)
        free = (chr(code) for code in range(_FIRST_PLACEHOLDER, _LAST_PLACEHOLDER) if chr(code) not in texts)
        return Guard(self, dict(zip(found, free, strict=False)))

    def partial_ends(self, text: str) -> tuple[str, str]:
        """The longest end of a spelling that `text` begins with, and beginning of one that it ends with.

        White space around the text does not count, since templates trim it.
        """
        text = text.strip()
        longest = max(map(len, self.by_spelling), default=0)
        lengths = range(min(longest, len(text)), 0, -1)
        first = next((text[:length] for length in lengths if text[:length] in self._suffixes), "")
        last = next((text[-length:] for length in lengths if text[-length:] in self._prefixes), "")
        return first, last

    def _partial(self, text: str) -> Iterator[str]:
        yield from filter(None, self.partial_ends(text))

    def encode(self, text: str, guard: Guard | None, where: str) -> list[int]:
        """Token ids of a rendered text whose placeholders `guard` made.

        Raises:
            DataError: the tokenizer makes control tokens of text.
        """
        made = [self._tokens[match] for match in self._every.findall(text)]
        if guard is None:
            ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if self._count(ids) <= sum(token in self.ids for token in made):
                return ids
        for cut in (False, True):
            parts = self._split(text, guard, cut=cut) if self.tokenizer.is_fast else self._pieces(text, guard, cut=cut)
            if [token for token, is_text in parts if not is_text] != made:
                raise DataError(f"{where}: the tokenizer does not find the control tokens of the chat template again")
            if not any(token in self.ids for token, is_text in parts if is_text):
                return [token for token, _ in parts]
        raise DataError(
            f"{where}: the tokenizer encodes text as a control token ({self._first(parts)!r}), whichever way it is "
            "cut; remove it from the text"
        )

    def _count(self, ids: list[int]) -> int:
        return sum(map(self.ids.__contains__, ids))

    def _first(self, parts: list[tuple[int, bool]]) -> str:
        token = next(token for token, is_text in parts if is_text and token in self.ids)
        return str(self.tokenizer.convert_ids_to_tokens(token))

    def _split(self, text: str, guard: Guard | None, *, cut: bool) -> list[tuple[int, bool]]:
        """Token ids, each with whether it is text, by a fast tokenizer."""
        restored = text if guard is None else guard.restore(text)
        mark = _unused_mark(restored)
        if mark not in self._copies:
            self._copies[mark] = _copy_with_sentinels(self.tokenizer, self._tokens, mark)
        copied, sentinels = self._copies[mark]
        text = self._every.sub(lambda match: _sentinel(mark, self._tokens[match[0]]), text)
        if guard is not None:
            text = guard.restore(text, between=_sentinel(mark, _CUT) if cut else "")
        ids = copied(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        named = [(sentinels[token], False) if token in sentinels else (token, True) for token in ids]
        return [part for part in named if part[0] != _CUT]

    def _pieces(self, text: str, guard: Guard | None, *, cut: bool) -> list[tuple[int, bool]]:
        """As `_split`, by a tokenizer in Python, which encodes the text between two control tokens alone anyway."""
        parts: list[tuple[int, bool]] = []
        mark = _unused_mark(text if guard is None else guard.restore(text))
        start = 0
        for match in [*self._every.finditer(text), None]:
            piece = text[start : match.start() if match else len(text)]
            if guard is not None:
                piece = guard.restore(piece, between=mark if cut else "")
            for fragment in piece.split(mark):
                if fragment:
                    ids = self.tokenizer(fragment, add_special_tokens=False, split_special_tokens=True)["input_ids"]
                    parts += [(token, True) for token in ids]
            if match:
                parts.append((self._tokens[match[0]], False))
                start = match.end()
        return parts


_CUT = -1


def _unused_mark(text: str) -> str:
    return next((mark for mark in _MARKS if mark not in text), _MARKS[0])


def _sentinel(mark: str, number: int) -> str:
    return f"{mark}{number}{mark}"


def _copy_with_sentinels(
    tokenizer: PreTrainedTokenizerBase, by_spelling: dict[str, int], mark: str
) -> tuple[PreTrainedTokenizerBase, dict[int, int]]:
    """A copy with a token that is not special for each control token, and what the ids of these stand for."""
    from tokenizers import AddedToken

    copied = copy.deepcopy(tokenizer)
    added = tokenizer.added_tokens_decoder
    # A stop token that is not special would still be split from text.
    ordinary = [str(added[number]) for number in by_spelling.values() if number in added and not added[number].special]
    if ordinary:
        copied.add_tokens([AddedToken(text, special=True, normalized=False) for text in ordinary], special_tokens=True)
    numbers = {_sentinel(mark, _CUT): _CUT} | {_sentinel(mark, number): number for number in by_spelling.values()}
    tokens = []
    for text, number in numbers.items():
        like = added.get(number)
        strips = {} if like is None else {"lstrip": like.lstrip, "rstrip": like.rstrip, "single_word": like.single_word}
        tokens.append(AddedToken(text, special=False, normalized=False, **strips))
    copied.add_tokens(tokens)
    return copied, {int(copied.convert_tokens_to_ids(text)): number for text, number in numbers.items()}


@dataclass(frozen=True)
class Guard:
    """Placeholders by the texts that they stand for: spellings of control tokens, and parts of them at a text's end."""

    tokens: ControlTokens
    placeholders: dict[str, str]

    def hide(self, conversation: Any) -> Any:
        """The conversation with placeholders in its texts."""
        return _map_texts(conversation, self._hide)

    def _hide(self, text: str, is_role: bool) -> str:
        if is_role and _ROLE.fullmatch(text):
            return text
        hidden = self.tokens.pattern.sub(lambda match: self.placeholders[match[0]], text)
        if is_role:
            return hidden
        first, last = self.tokens.partial_ends(text)
        body = hidden.strip()
        if first and body.startswith(first):
            at = hidden.index(body)
            hidden = hidden[:at] + self.placeholders[first] + hidden[at + len(first) :]
        if last and hidden.rstrip().endswith(last):
            end = len(hidden.rstrip())
            hidden = hidden[: end - len(last)] + self.placeholders[last] + hidden[end:]
        return hidden

    def restore(self, text: str, between: str = "") -> str:
        """The text with what the placeholders stand for, cut by `between` after the first character."""
        for spelling, placeholder in self.placeholders.items():
            text = text.replace(placeholder, spelling[:1] + between + spelling[1:])
        return text


def _texts(value: Any, is_role: bool = False) -> Iterator[tuple[str, bool]]:
    """Every text in a JSON value, and whether it is a key or the role of a message."""
    if isinstance(value, str):
        yield value, is_role
    elif isinstance(value, dict):
        for name, item in value.items():
            yield str(name), True  # a key is compared, as a role is
            yield from _texts(item, name == "role")
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _map_texts(value: Any, change: Callable[[str, bool], str], is_role: bool = False) -> Any:
    if isinstance(value, str):
        return change(value, is_role)
    if isinstance(value, dict):
        return {change(str(name), True): _map_texts(item, change, name == "role") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_texts(item, change) for item in value]
    return value
