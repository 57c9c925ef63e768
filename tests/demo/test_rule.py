"""The demo's rule, form by form, on answers written for it."""

from __future__ import annotations

import pytest

from dice_py.demo.rule import KINDS, keeps_rule, repeats, sentences, words

PROMPT = "Tell me about boats."


@pytest.mark.parametrize(
    ("form", "kept", "broken"),
    [
        ("sentences 1", "A boat floats.", "A boat floats. It is wet."),
        ("sentences 2", 'He said "Stop!" It worked.', "A boat floats on water"),
        ("sentences 2", "Boats float... Ships do, too!", "Boats float.\n\nShips do, too."),
        ("items 3", "1. Oars\n2. Sails\n3. Rope", "1. Oars\n2. Sails"),
        ("items 3", "Here is a list:\n\n- oars\n* sails\n• rope", "oars\nsails\nrope"),
        ("items 2", "1) Oars\n2) Sails", "1)Oars\n2)Sails"),
        ("words 3", "A boat floats.", "A small boat floats."),
        ("words 2", "Well-made boats.", "Well made boats."),
        ("yesno 4", "Yes, boats float well.", "Boats float: yes."),
        ("yesno 4", "No.", "No, a boat never sinks here."),
        ("starts Because", '"Because they float."', "It is because they float."),
        ("contains oar,sail", "The Sail and the oar.", "The sails and the oar."),
        ("ends ?", 'She asks: "Do boats float?"', "Do boats float? Yes."),
        ("ends !", "Set sail now!", "Set sail now."),
        ("parts 3", "Oars, sails, and some rope.", "Oars, sails and rope"),
        ("parts 2", "Red boats, blue boats", "They are: many red boats, blue boats"),
        ("parts 2", "oars, sails", "oars,\nsails"),
    ],
)
def test_each_form(form: str, kept: str, broken: str) -> None:
    assert keeps_rule(form, PROMPT, kept, ended=True)
    assert not keeps_rule(form, PROMPT, broken, ended=True)


def test_every_form_is_tested_above() -> None:
    tested = {row.split()[0] for row, *_ in test_each_form.pytestmark[0].args[1]}  # type: ignore[attr-defined]
    assert tested == set(KINDS)


def test_an_answer_that_was_cut_off_keeps_nothing() -> None:
    assert not keeps_rule("sentences 1", PROMPT, "A boat floats.", ended=False)


@pytest.mark.parametrize("answer", ["", "  \n", "...", "!"])
def test_an_answer_without_words_keeps_nothing(answer: str) -> None:
    for form in ("words 3", "ends !", "yesno 3", "starts Once", "sentences 0", "items 0"):
        assert not keeps_rule(form, PROMPT, answer, ended=True)


def test_an_answer_that_repeats_itself_keeps_nothing() -> None:
    said = "A boat of hope: a boat of hope"
    assert repeats(PROMPT, said)
    assert not keeps_rule("words 10", PROMPT, said, ended=True)
    assert not repeats(PROMPT, "A boat of hope, a boat of fear, a boat of joy")


def test_an_answer_that_only_repeats_the_prompt_keeps_nothing() -> None:
    assert repeats(PROMPT, "tell me about boats")
    assert not repeats(PROMPT, "Tell me about boats and ships")
    assert not repeats("Is it red or blue? One word.", "Blue")


def test_words_and_sentences() -> None:
    assert words("It's a well-known “fact”: 3.5 boats") == ["it's", "a", "well-known", "fact", "3", "5", "boats"]
    assert sentences("One. Two! Three?") == 3
    assert sentences("No mark at the end") == 1
    assert sentences("It costs 3.50 today.") == 1
    assert sentences("Dr. Reed and Mrs. Poe met at St. Mary's. They talked.") == 2
