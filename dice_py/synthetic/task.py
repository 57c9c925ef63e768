"""The synthetic task: prompts, right answers, an oracle that scores responses, and a biased annotator.

A prompt names an operation and letters ("reverse : k b q"). A response is the answer, a full stop, and up to six
filler words. Fillers carry no information, and the oracle charges a little for each beyond the second. The annotator
prefers responses with more of them: that is the length bias.

The task is not a language task. It shows whether the loop works, not how well it works on language. The oracle labels
the held-out pairs and evaluates samples; no DICE round sees it. Offline pairs are labeled by the annotator, whose
preferences are noisy.

Everything here is plain Python. synthetic/pairs.py draws the data, synthetic/world.py names the files, and
stages/world.py trains the models.
"""

from __future__ import annotations

import math
import random

from dice_py.data import Message

LETTERS = "abcdefghijkl"
WORD_LENGTH = 3  # letters in a prompt
FILLERS = ("sure", "indeed", "so", "well", "fine", "okay")
FREE_FILLERS = 2  # the oracle charges for every further one
# Each operation is an order in which the letters of the prompt are written: the six orders of three letters.
OPERATIONS: dict[str, tuple[int, ...]] = {
    "copy": (0, 1, 2),
    "reverse": (2, 1, 0),
    "left": (1, 2, 0),
    "right": (2, 0, 1),
    "front": (1, 0, 2),
    "back": (0, 2, 1),
}

# The operations whose answers are the usual wrong ones. The other operations' answers occur too, more rarely: DPO on
# offline pairs then has seen every wrong answer that a policy may drift to.
CONFUSED: dict[str, tuple[str, str]] = {
    "copy": ("front", "back"),
    "reverse": ("left", "right"),
    "left": ("right", "reverse"),
    "right": ("reverse", "left"),
    "front": ("back", "copy"),
    "back": ("copy", "front"),
}


def answer(operation: str, letters: tuple[str, ...]) -> tuple[str, ...]:
    """The right answer to a prompt: its letters in the order of the operation."""
    return tuple(letters[at] for at in OPERATIONS[operation])


def prompt_messages(operation: str, letters: tuple[str, ...]) -> list[Message]:
    """The prompt as one user turn."""
    return [{"role": "user", "content": f"{operation} : {' '.join(letters)}"}]


def parse_prompt(messages: list[Message]) -> tuple[str, tuple[str, ...]]:
    """The operation and letters of a prompt: the inverse of `prompt_messages`."""
    operation, _, letters = messages[-1]["content"].partition(" : ")
    return operation, tuple(letters.split())


def is_prompt(messages: list[Message]) -> bool:
    """Whether messages are a prompt of this task, whose answer the oracle knows."""
    operation, letters = parse_prompt(messages)
    return operation in OPERATIONS and len(letters) == WORD_LENGTH and all(letter in LETTERS for letter in letters)


def oracle(messages: list[Message], response: str) -> tuple[float, bool]:
    """The oracle's score of a response's text, and whether its answer is right.

    The score is 1 for a right answer, and otherwise 0.3 × the share of letters at the right place. Each filler beyond
    the second costs 0.03, and a response not of the form answer, full stop, fillers costs 0.3.
    """
    operation, letters = parse_prompt(messages)
    expected = answer(operation, letters)
    words = response.split()
    stop = words.index(".") if "." in words else len(words)
    given, rest = tuple(words[:stop]), words[stop + 1 :]
    right = given == expected
    matching = sum(word == letter for word, letter in zip(given, expected, strict=False)) / len(expected)
    well_formed = "." in words and len(given) == len(expected) and all(word in FILLERS for word in rest)
    fillers = sum(word in FILLERS for word in words)
    score = (1.0 if right else 0.3 * matching) - 0.03 * max(0, fillers - FREE_FILLERS)
    return score - (0.0 if well_formed else 0.3), right


RIGHT, RANDOM = 0.38, 0.02
"""Shares of right and of random answers in the SFT data; the others are another operation's."""
WRONG = (0.30, 0.25, 0.15, 0.15, 0.15)
"""Shares of the other operations among those: the two of `CONFUSED`, then the three others, in order."""


def sft_response(rng: random.Random, operation: str, letters: tuple[str, ...]) -> str:
    """A response of the SFT data: the answer is right (38 %), another operation's (60 %) or random (2 %); then fillers.

    Each further filler has probability 0.4, up to all of `FILLERS`.
    """
    draw = rng.random()
    if draw < RIGHT:
        words = answer(operation, letters)
    elif draw < 1.0 - RANDOM:
        usual = CONFUSED[operation]
        others = [name for name in OPERATIONS if name != operation and name not in usual]
        words = answer(rng.choices([*usual, *others], WRONG)[0], letters)
    else:
        words = tuple(rng.choice(LETTERS) for _ in letters)
    fillers = 0
    while fillers < len(FILLERS) and rng.random() < 0.4:
        fillers += 1
    return " ".join([*words, ".", *FILLERS[:fillers]])


def annotate(rng: random.Random, messages: list[Message], left: str, right: str) -> bool:
    """Whether the annotator prefers `left` to `right`.

    The probability is Bradley-Terry with utility 4 × oracle score + 0.25 × fillers; 5 % of the choices are flipped.
    """

    def utility(text: str) -> float:
        return 4.0 * oracle(messages, text)[0] + 0.25 * sum(word in FILLERS for word in text.split())

    prefers = rng.random() < 1.0 / (1.0 + math.exp(utility(right) - utility(left)))
    return prefers != (rng.random() < 0.05)
