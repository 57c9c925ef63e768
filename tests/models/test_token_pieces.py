"""Pieces of a response's text: together they are the text, and each is of as few tokens as a reader can tell apart."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from property_examples import examples
from tiny_models import make_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from dice_py.models.token_pieces import TokenPieces

BYTES = make_tokenizer()
PIECES = TokenPieces(BYTES)


def encoded(text: str) -> list[int]:
    ids: list[int] = BYTES(text, add_special_tokens=False).input_ids
    return ids


def assert_cover(ids: list[int], pieces: TokenPieces = PIECES) -> list[str]:
    """The pieces cover all tokens in order, and are the text; returns their texts."""
    found = pieces.of(ids)
    assert [token for piece in found for token in range(piece.first, piece.last)] == list(range(len(ids)))
    assert all(piece.first < piece.last for piece in found)
    texts = [piece.text for piece in found]
    assert "".join(texts) == pieces.text(ids)
    return texts


@pytest.mark.parametrize(
    "text", ["plain", "Größe", "漢字かな", "😀👩‍💻🇩🇪", "é\u0301 ẞ", "a\x1b[2Jb\u202e\x00", " \n\t"]
)
def test_a_character_of_several_tokens_is_one_piece(text: str) -> None:
    assert assert_cover(encoded(text)) == list(text)


def test_control_tokens_are_shown() -> None:
    stop = BYTES.convert_tokens_to_ids("<|im_end|>")
    assert assert_cover([*encoded("é"), stop]) == ["é", "<|im_end|>"]


def test_a_character_that_is_never_finished() -> None:
    """As where the token limit cuts a response off within a character."""
    assert assert_cover([*encoded("a"), *encoded("漢")[:2]]) == ["a", "\ufffd"]
    assert assert_cover([*encoded("漢")[:1], *encoded("b"), *encoded("漢")]) == ["\ufffd", "b", "漢"]


@settings(max_examples=examples(300), deadline=None)
@given(st.lists(st.integers(0, 261), max_size=60))
def test_any_tokens(ids: list[int]) -> None:
    assert_cover(ids)


@settings(max_examples=examples(100), deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_has_a_piece_for_each_character(text: str) -> None:
    texts = assert_cover(encoded(text))
    assert texts == list(text)


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2 decodes: the space before a word is part of its token, and the first one is dropped."""
    words = ["<unk>", "▁the", "▁cat", "s", "▁", "<0xE6>", "<0xBC>", "<0xA2>"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_the_first_space_is_dropped_and_others_are_kept() -> None:
    pieces = TokenPieces(sentencepiece())
    assert assert_cover([1, 2, 3, 5, 6, 7, 1], pieces) == ["the", " cat", "s", "漢", " the"]
    assert assert_cover([4, 1], pieces) == [" the"]  # a first token without text
    assert assert_cover([], pieces) == []
