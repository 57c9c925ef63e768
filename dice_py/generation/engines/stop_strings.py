"""Stop strings in responses that are decoded token by token, as vLLM's FastIncrementalDetokenizer finds them (0.32).

Token ids are what is scored and trained on, so a response keeps the token that completes a stop string, and all of that
token's text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from dice_py.config.sampling_options import SamplingOptions
from dice_py.errors import UsageError

_INVALID_PREFIX = "Invalid prefix encountered"


class _Text:
    """The end of one row's text."""

    def __init__(self, prompt: list[int], skip_special_tokens: bool) -> None:
        self.skip_special_tokens = skip_special_tokens
        # The prompt comes first, since the text of a token depends on the one before it (a leading space).
        self.stream = DecodeStream(ids=prompt, skip_special_tokens=skip_special_tokens)
        self.end = ""
        self.tokens = 0

    def add(self, backend: Any, token: int) -> str:
        """The text that a token adds; "" while a character is not complete."""
        self.tokens += 1
        try:
            return self.stream.step(backend, token) or ""
        except Exception as error:
            if not str(error).startswith(_INVALID_PREFIX):
                raise
            # Bytes that are not UTF-8 may change what was decoded before, which the stream refuses.
            self.stream = DecodeStream(skip_special_tokens=self.skip_special_tokens)
            return self.stream.step(backend, token) or ""


class StopStrings:
    """Looks for stop strings in the rows of a batch.

    Args:
        options: `stop` is not empty.
        tokenizer: of transformers, on the tokenizers library.
        prompts: token ids of each row's prompt.

    Raises:
        UsageError: the tokenizer is not of that library.
    """

    def __init__(self, options: SamplingOptions, tokenizer: Any, prompts: Sequence[list[int]]) -> None:
        self.backend = getattr(tokenizer, "backend_tokenizer", None)
        if self.backend is None:
            raise UsageError(
                f"generate.sampling_params.stop: the policy's tokenizer ({type(tokenizer).__name__}) cannot decode "
                "token by token; set generate.engine=vllm, or leave it out"
            )
        self.stop, self.min_tokens = options.stop, options.min_tokens
        self.kept = max(map(len, self.stop)) - 1
        """Characters of the earlier text that a stop string may begin with."""
        self.rows = [_Text(prompt, options.skip_special_tokens) for prompt in prompts]

    def add(self, tokens: Sequence[int], watched: Sequence[bool]) -> list[bool]:
        """Adds a token to each row that is watched; whether it completes a stop string, for each row."""
        completed = []
        for row, token, is_watched in zip(self.rows, tokens, watched, strict=True):
            if not is_watched:
                completed.append(False)
                continue
            new = row.add(self.backend, token)
            text = row.end + new
            row.end = text[max(0, len(text) - self.kept) :]
            # A string that was complete before this token was complete within min_tokens, and is no stop.
            is_looked_for = bool(new) and row.tokens > self.min_tokens
            completed.append(is_looked_for and any(self._ends_in(text, new, stop) for stop in self.stop))
        return completed

    @staticmethod
    def _ends_in(text: str, new: str, stop: str) -> bool:
        """Whether `text` has `stop` with at least its last character in `new`, the end of `text`."""
        return text.find(stop, max(0, len(text) - len(new) - len(stop) + 1)) >= 0

    def select(self, rows: Sequence[int]) -> None:
        """Keeps the given rows, without duplicates."""
        self.rows = [self.rows[row] for row in rows]

    def join(self, other: StopStrings) -> None:
        """Appends the rows of `other`."""
        self.rows += other.rows
