"""The text of a response cut into pieces of one token or of a few: what a reader sees of each token.

A token alone has no text of its own. In byte-level vocabularies several tokens make one character ("漢" is three
bytes), and SentencePiece drops the space before a token that is decoded first. So a piece is a run of tokens, as short
as the decoded text allows, and the pieces together are that text. Control tokens are shown by their spelling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no character, or not yet one
_PATIENCE = 8  # tokens of an unfinished piece after which the beginning of the response is decoded again


class Piece(NamedTuple):
    """A part of a response's text, of the tokens from `first` up to `last`, which is not one of them."""

    text: str
    first: int
    last: int


class TokenPieces:
    """Cuts responses of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._alone: dict[int, str] = {}
        """The text of tokens that were decoded alone: most occur again and again."""

    def of(self, ids: Sequence[int]) -> list[Piece]:
        """The pieces of a response: they cover all tokens, in order, and their texts are together `text(ids)`."""
        ids = [int(token) for token in ids]
        return _pieces(ids, self.text, self._text_alone)

    def text(self, ids: Sequence[int]) -> str:
        """The decoded tokens, with control tokens."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _text_alone(self, token: int) -> str:
        if token not in self._alone:
            self._alone[token] = self.text([token])
        return self._alone[token]


def _pieces(ids: list[int], decode: Callable[[Sequence[int]], str], alone: Callable[[int], str]) -> list[Piece]:
    full = decode(ids)
    pieces: list[Piece] = []
    at = first = before = 0  # in the text; the first token of the piece; the first of the piece before it
    for last in range(1, len(ids) + 1):
        text = alone(ids[first]) if last == first + 1 else ""
        if not text or _REPLACEMENT in text or not full.startswith(text, at):
            text = _added(decode(ids[before:first]), decode(ids[before:last]))
            if not full.startswith(text, at) and last - first >= _PATIENCE:
                # Where the window begins within a character, its text is another than in the response.
                text = _added(full[:at], decode(ids[:last]))
        if text and full.startswith(text, at):
            pieces.append(Piece(text, first, last))
            at, before, first = at + len(text), first, last
    if pieces and (at == len(full) or first == len(ids)):
        # Tokens without text, or text that the decoder writes only at the end, belong to the last piece.
        pieces[-1] = Piece(pieces[-1].text + full[at:], pieces[-1].first, len(ids))
    elif ids:
        pieces.append(Piece(full[at:], first, len(ids)))
    return pieces


def _added(before: str, after: str) -> str:
    """What `after` has beyond `before`; nothing if that is no beginning of it."""
    return after[len(before) :] if after.startswith(before) else ""
