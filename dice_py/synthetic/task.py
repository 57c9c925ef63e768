"""The embedded default: a small synthetic world with an oracle, in which the whole loop can be measured.

Made on first use in the cache folder, from nothing but a seed: a tokenizer and chat template, a tiny Llama
trained from scratch (SFT), offline preference pairs of a noisy, length-biased annotator, DPO on them (the
policy that a run starts from), prompts for the rounds, and held-out prompts and pairs. The oracle labels the
offline set's annotator and the evaluation; no DICE round ever sees it.

A prompt names an operation and letters ("reverse : k b q"). A response is the answer, a full stop, and up to
six filler words. Fillers say nothing, and more than two cost a little; the annotator likes every one: that is
the length bias.
It is not a language model's world: it shows whether the loop does what it should, not how well on language.
"""

from __future__ import annotations

import random

from dice_py.data import Message

LETTERS = "abcdefghijkl"
WORD = 3  # letters in a prompt
FILLERS = ("sure", "indeed", "so", "well", "fine", "okay")
FREE_FILLERS = 2  # courtesy; what comes beyond costs
# Each operation is an order in which the prompt's letters are written: the six orders of three letters.
OPERATIONS: dict[str, tuple[int, ...]] = {
    "copy": (0, 1, 2),
    "reverse": (2, 1, 0),
    "left": (1, 2, 0),
    "right": (2, 0, 1),
    "front": (1, 0, 2),
    "back": (0, 2, 1),
}
# The two outputs that a wrong answer to each operation usually is: (the likelier 65 %, the other).
CONFUSED: dict[str, tuple[str, str]] = {
    "copy": ("front", "back"),
    "reverse": ("left", "right"),
    "left": ("right", "reverse"),
    "right": ("reverse", "left"),
    "front": ("back", "copy"),
    "back": ("copy", "front"),
}


def answer(operation: str, letters: tuple[str, ...]) -> tuple[str, ...]:
    """The right answer."""
    return tuple(letters[at] for at in OPERATIONS[operation])


def prompt_messages(operation: str, letters: tuple[str, ...]) -> list[Message]:
    """One user turn."""
    return [{"role": "user", "content": f"{operation} : {' '.join(letters)}"}]


def parse_prompt(messages: list[Message]) -> tuple[str, tuple[str, ...]]:
    """The operation and letters of a prompt of this world."""
    operation, _, letters = messages[-1]["content"].partition(" : ")
    return operation, tuple(letters.split())


def oracle(messages: list[Message], response: str) -> tuple[float, bool]:
    """(score, right) of a response's text.

    Score: 1 if the answer is right, else 0.3 × the share of matching letters; −0.03 for each filler beyond the
    second; −0.3 if the response is not of the form answer, full stop, fillers.
    """
    operation, letters = parse_prompt(messages)
    want = answer(operation, letters)
    words = response.split()
    stop = words.index(".") if "." in words else len(words)
    got, rest = tuple(words[:stop]), words[stop + 1 :]
    right = got == want
    matching = sum(left == right_ for left, right_ in zip(got, want, strict=False)) / len(want)
    formed = "." in words and len(got) == len(want) and all(word in FILLERS for word in rest)
    fillers = sum(word in FILLERS for word in words)
    score = (1.0 if right else 0.3 * matching) - 0.03 * max(0, fillers - FREE_FILLERS)
    return score - (0.0 if formed else 0.3), right


def sft_response(rng: random.Random, operation: str, letters: tuple[str, ...]) -> str:
    """What the SFT data answers: right 40 %, another operation's output 58 %, noise 2 %; then fillers."""
    draw = rng.random()
    if draw < 0.40:
        got = answer(operation, letters)
    elif draw < 0.98:
        likely, other = CONFUSED[operation]
        got = answer(likely if rng.random() < 0.65 else other, letters)
    else:
        got = tuple(rng.choice(LETTERS) for _ in letters)
    fillers = 0
    while fillers < len(FILLERS) and rng.random() < 0.4:
        fillers += 1
    return " ".join([*got, ".", *FILLERS[:fillers]])


def annotate(rng: random.Random, messages: list[Message], left: str, right: str) -> bool:
    """True when the annotator prefers `left`: Bradley-Terry on 4 × oracle + 0.25 × fillers, 5 % flipped."""

    def utility(text: str) -> float:
        return 4.0 * oracle(messages, text)[0] + 0.25 * sum(word in FILLERS for word in text.split())

    import math

    prefers = rng.random() < 1.0 / (1.0 + math.exp(utility(right) - utility(left)))
    return prefers != (rng.random() < 0.05)
