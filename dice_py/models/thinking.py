"""The thinking part of a response: what a reasoning model writes between two delimiters before it answers.

It is a part of the response: sampled, stored, scored and trained on like the rest. Only the length that mining compares
may leave it out (`mine.length=answer_tokens`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from dice_py.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Delimiters = tuple[str, str]

_TAIL = 16  # tokens of a prompt that may spell an opening delimiter and white space

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
    return _found(tokenizer.get_vocab(), given)


def _found(vocabulary: Mapping[str, int], given: Sequence[str] | None) -> Delimiters:
    if given is not None:
        return given[0], given[1]
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

    Args:
        tokenizer: of the library tokenizers, which the process of a run imports without transformers.
        given: the delimiters; None: as in `find_delimiters`.
    """

    def __init__(self, tokenizer: Tokenizer, given: Sequence[str] | None = None) -> None:
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        self.delimiters = _found(vocabulary, given)
        first, last = (vocabulary.get(name) for name in self.delimiters)
        self.ids = None if first is None or last is None else (first, last)
        """Their token ids; None where several tokens spell one."""

    @staticmethod
    def of_folder(folder: Path, given: Sequence[str] | None = None) -> AnswerLength:
        """Of the tokenizer of a model folder.

        Raises:
            DataError: it has no tokenizer.json.
        """
        from tokenizers import Tokenizer

        file = folder / "tokenizer.json"
        try:
            return AnswerLength(Tokenizer.from_file(str(file)), given)
        except Exception as error:  # the library raises Exception itself
            raise DataError(
                f"mine.length=answer_tokens needs {file}, which cannot be read ({error}); save the tokenizer with "
                "AutoTokenizer.from_pretrained(…).save_pretrained(…), or set mine.length=tokens"
            ) from None

    def of_shard(self, responses: pl.DataFrame) -> pl.Series:
        """The lengths of a shard's responses, `answer_tokens` (u32).

        Args:
            responses: `prompt_id`, `prompt_token_ids` and `token_ids`.
        """
        opened: dict[int, bool] = {}
        counts = responses["token_ids"].list.len().to_list()
        ids, delimiters = responses["token_ids"], self.ids
        if delimiters is None:
            thinks = [True] * len(counts)
        else:
            thinks = (ids.list.contains(delimiters[0]) | ids.list.contains(delimiters[1])).to_list()
        for row, (prompt_id, prompt) in enumerate(responses.select("prompt_id", "prompt_token_ids").iter_rows()):
            if prompt_id not in opened:
                opened[prompt_id] = self.is_opened_by(prompt)
            if thinks[row] or opened[prompt_id]:
                counts[row] = self.of(ids[row].to_list(), is_opened=opened[prompt_id])
        return pl.Series("answer_tokens", counts, dtype=pl.UInt32)

    def is_opened_by(self, prompt: list[int]) -> bool:
        """Whether a prompt ends with an opening delimiter, as the generation prompts of some templates do."""
        return self._text(prompt[-_TAIL:]).rstrip().endswith(self.delimiters[0])

    def of(self, response: list[int], *, is_opened: bool = False) -> int:
        """Tokens of the answer in a response, its stop token included.

        Args:
            is_opened: the prompt has opened a thinking part.
        """
        marks = self._marks_in_text(response) if self.ids is None else self._marks_by_id(response, *self.ids)
        inside, count, start = is_opened, 0, 0
        for is_opening, first, end in marks:
            if is_opening and not inside:
                count += first - start
                inside = True
            elif not is_opening:
                count = count if inside else 0
                inside, start = False, end
        return 0 if inside else count + len(response) - start

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def _marks_by_id(self, ids: list[int], opening: int, closing: int) -> list[tuple[bool, int, int]]:
        """Delimiters in order: whether it opens, its first token, and the one after it."""
        return [(token == opening, at, at + 1) for at, token in enumerate(ids) if token in (opening, closing)]

    def _marks_in_text(self, ids: list[int]) -> list[tuple[bool, int, int]]:
        """The same where delimiters are text, whose last token may hold a part of the answer too."""
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
