"""The prompts of the sentiment task: neutral things, each asked about once, in disjoint sets."""

from __future__ import annotations

import pytest

from dice_py.errors import UsageError
from dice_py.evidence.prompts import PHRASINGS, prompt_sets, things
from dice_py.evidence.settings import FULL


def thing_of(prompt: str) -> str:
    """The thing that a prompt asks about."""
    for phrasing in PHRASINGS:
        before, after = phrasing.split("{thing}")
        if prompt.startswith(before) and prompt.endswith(after):
            return prompt.removeprefix(before).removesuffix(after)
    raise AssertionError(prompt)


def test_there_are_enough_things_for_the_full_task() -> None:
    found = things()
    assert len(set(found)) == len(found)
    assert len(found) >= FULL.offline_prompts + FULL.rounds * FULL.round_prompts + FULL.evaluation_prompts
    assert not [thing for thing in found if thing.startswith(tuple(f"a {vowel}" for vowel in "aeiou"))]
    assert not [thing for thing in found if not thing.startswith(("a ", "an ", "the "))]


def test_no_set_has_a_thing_of_another() -> None:
    sets = prompt_sets(200, 240, 100, 7)
    parts = [sets.offline, sets.rounds, sets.evaluation]
    assert list(map(len, parts)) == [200, 240, 100]
    asked = [thing_of(prompt) for part in parts for prompt in part]
    assert len(set(asked)) == 540
    assert set(asked) <= set(things())
    for part in parts:  # every phrasing and every kind of thing is in each
        assert all(any(prompt.startswith(phrasing.split("{")[0]) for prompt in part) for phrasing in PHRASINGS)
        assert all(any(word in prompt for prompt in part) for word in ("travel", "river", "about"))


def test_the_seed_decides_all() -> None:
    sets = prompt_sets(20, 20, 20, 1)
    assert prompt_sets(20, 20, 20, 1) == sets
    assert prompt_sets(20, 20, 20, 2).offline != sets.offline
    # As it is drawn on every machine.
    assert sets.offline[0] == "Give a two-sentence review of a picture book about a lighthouse keeper."


def test_more_prompts_than_things() -> None:
    with pytest.raises(UsageError, match=rf"9999 prompts.*{len(things())} things"):
        prompt_sets(9000, 900, 99, 0)


def test_things_have_no_tone_of_their_own() -> None:
    pytest.importorskip("vaderSentiment", reason="the oracle's package is not installed")
    from dice_py.evidence.oracle import sentiment

    assert [thing for thing in things() if sentiment("", thing) != 0.0] == []
