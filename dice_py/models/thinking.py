"""The thinking part of a response: what a reasoning model writes between two delimiters before it answers.

It is a part of the response: sampled, stored, scored and trained on like the rest. Only the length that mining compares
may leave it out (`mine.length=answer_tokens`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Delimiters = tuple[str, str]

THINK: Delimiters = ("<think>", "</think>")
KNOWN: tuple[Delimiters, ...] = (
    THINK,
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<thinking>", "</thinking>"),
)


def delimiter_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Token ids of the known delimiters that the vocabulary has as tokens."""
    vocabulary = tokenizer.get_vocab()
    return {name: vocabulary[name] for pair in KNOWN for name in pair if name in vocabulary}


def find_delimiters(tokenizer: PreTrainedTokenizerBase, given: Sequence[str] | None = None) -> Delimiters:
    """`given`; else the first known pair that are tokens of the vocabulary; else <think> and </think> as text."""
    if given is not None:
        return given[0], given[1]
    vocabulary = tokenizer.get_vocab()
    return next((pair for pair in KNOWN if all(name in vocabulary for name in pair)), THINK)


def decode_responses(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[list[int]], given: Sequence[str] | None = None
) -> list[str]:
    """The texts of responses, without special tokens, but with the delimiters of thinking where these are special."""
    if not token_ids:
        return []
    texts: list[str] = tokenizer.batch_decode(token_ids, skip_special_tokens=True)
    special = set(tokenizer.all_special_ids)
    special |= {int(number) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    kept = special & set(_single_ids(tokenizer, find_delimiters(tokenizer, given)) or ())
    if not kept:
        return texts
    return [
        tokenizer.decode([token for token in ids if token not in special or token in kept], skip_special_tokens=False)
        if kept & set(ids)
        else text
        for ids, text in zip(token_ids, texts, strict=True)
    ]


def _single_ids(tokenizer: PreTrainedTokenizerBase, delimiters: Delimiters) -> tuple[int, int] | None:
    vocabulary = tokenizer.get_vocab()
    first, last = (vocabulary.get(name) for name in delimiters)
    return None if first is None or last is None else (first, last)


class AnswerLength:
    """Counts the tokens of responses that are no thinking: those after it, its delimiters not among them.

    A response that closes a thinking part which it has not opened was begun inside of it. One that does not close what
    it, or the generation prompt, has opened is all thinking: its length is 0.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, given: Sequence[str] | None = None) -> None:
        self.tokenizer = tokenizer
        self.delimiters = find_delimiters(tokenizer, given)

    def of(self, prompt: list[int], response: list[int]) -> int:
        """Tokens of the answer in `response`, its stop token included.

        Args:
            prompt: token ids of the prompt, which may end with an opening delimiter.
        """
        begins_inside = self._text(prompt[-16:]).rstrip().endswith(self.delimiters[0])
        marks = self._marks_by_id(response) if self._ids is not None else self._marks_in_text(response)
        inside, count, start = begins_inside, 0, 0
        for is_opening, first, end in marks:
            if is_opening and not inside:
                count += first - start
                inside = True
            elif not is_opening:
                count = count if inside else 0
                inside, start = False, end
        return 0 if inside else count + len(response) - start

    @cached_property
    def _ids(self) -> tuple[int, int] | None:
        return _single_ids(self.tokenizer, self.delimiters)

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _marks_by_id(self, ids: list[int]) -> list[tuple[bool, int, int]]:
        """Delimiters in order: whether it opens, its first token, and the one after it."""
        assert self._ids is not None
        return [(token == self._ids[0], at, at + 1) for at, token in enumerate(ids) if token in self._ids]

    def _marks_in_text(self, ids: list[int]) -> list[tuple[bool, int, int]]:
        """The same where delimiters are text that several tokens spell, which may reach beyond them."""
        text = self._text(ids)
        found = []
        for name in self.delimiters:
            at = text.find(name)
            while at >= 0:
                found.append((name == self.delimiters[0], self._tokens(ids, at), self._tokens(ids, at + len(name))))
                at = text.find(name, at + len(name))
        return sorted(found, key=lambda mark: mark[1])

    def _tokens(self, ids: list[int], characters: int) -> int:
        """The fewest tokens whose text has at least so many characters."""
        low, high = 0, len(ids)
        while low < high:
            middle = (low + high) // 2
            if len(self._text(ids[:middle])) >= characters:
                high = middle
            else:
                low = middle + 1
        return low
