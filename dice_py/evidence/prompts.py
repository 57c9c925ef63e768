"""The prompts of the sentiment task: short reviews of everyday things, in our own words.

A prompt asks for two sentences, since a small model ends such an answer by itself. The things are neutral: their names
say nothing good or bad (no word of them is in the oracle's lexicon), so that the model chooses the tone. Each thing is
asked about once, so the sets for offline pairs, rounds and evaluation have no prompt in common. Their nouns recur: a
small kettle may be in one set, and a large kettle in another.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from dice_py.errors import UsageError
from dice_py.storage.keys import seed_for

PHRASINGS = (
    "Write a two-sentence review of {thing}.",
    "Review {thing} in two sentences.",
    "Give a two-sentence review of {thing}.",
)

_OBJECTS = (
    "kettle", "desk lamp", "umbrella", "backpack", "wristwatch", "frying pan", "office chair", "bookshelf", "suitcase",
    "toaster", "bicycle bell", "garden hose", "wall clock", "coffee grinder", "notebook", "pencil case", "bath towel",
    "ladder", "rain jacket", "pair of gloves", "tent", "sleeping bag", "flashlight", "power drill", "mattress",
    "keyboard", "pair of headphones", "printer", "microphone", "tripod", "water bottle", "door mat", "chopping board",
    "lunch box", "paper shredder", "shower curtain", "tape measure", "extension cord", "picture frame",
    "laundry basket",
)  # fmt: skip
_OBJECT_KINDS = ("a small {}", "a large {}", "a {} from a mail-order shop", "a second-hand {}", "a {} for travel",
                 "a {} for a student's room")  # fmt: skip
_PLACES = (
    "library", "bakery", "train station", "swimming pool", "museum", "bookshop", "barber shop", "campsite", "hostel",
    "post office", "bus line", "noodle bar", "ferry", "parking garage", "sandwich shop", "cinema",
    "pharmacy", "playground", "hardware store", "flower shop", "conference center", "tennis court", "car rental office",
    "coffee bar", "bowling alley", "skating rink", "launderette", "garden center", "photo studio", "shoe store",
    "tailor's shop",
)  # fmt: skip
_PLACE_KINDS = ("the {} near the river", "the {} in the old town", "the {} at the airport", "a {} in a small village",
                "a {} on a main road", "the {} by the university")  # fmt: skip
_WORKS = (
    "a picture book", "a film", "a radio series", "a documentary", "a podcast episode", "a comic book",
    "a television series", "a short story", "a board game", "a magazine article", "a travel book",
)  # fmt: skip
_TOPICS = (
    "about a lighthouse keeper", "about the history of maps", "set on a night train", "about two neighbors",
    "about a clockmaker", "set in a mountain village", "about a city without cars", "about the building of a bridge",
    "about a family's move to the coast", "set in a laboratory", "about the life of an ant colony",
    "about a mail carrier", "set during one winter", "about learning to sail", "about a small-town choir",
    "set in a harbor", "about the making of paper", "about four sisters", "set in an apartment house",
    "about an expedition to the north",
)  # fmt: skip


@dataclass(frozen=True)
class PromptSets:
    """Prompts as texts, without a common thing."""

    offline: list[str]
    rounds: list[str]
    evaluation: list[str]


def things() -> list[str]:
    """All things that may be reviewed, each once, in a fixed order."""
    objects = [kind.format(name) for name in _OBJECTS for kind in _OBJECT_KINDS]
    places = [kind.format(name) for name in _PLACES for kind in _PLACE_KINDS]
    works = [f"{work} {topic}" for work in _WORKS for topic in _TOPICS]
    return [_with_article(thing) for thing in (*objects, *places, *works)]


def _with_article(thing: str) -> str:
    """ "an" before a vowel, for things whose kind puts "a" before the name."""
    return f"an{thing[1:]}" if thing.startswith("a ") and thing[2] in "aeiou" else thing


def prompt_sets(offline: int, rounds: int, evaluation: int, seed: int) -> PromptSets:
    """Draws the sets: the things are shuffled, and each gets one phrasing.

    Args:
        offline, rounds, evaluation: how many prompts each set has.
        seed: decides which thing is in which set, and its phrasing. A larger set begins with a smaller one's prompts
            only if the sets before it have the same sizes.

    Raises:
        UsageError: there are fewer things than prompts.
    """
    total, found = offline + rounds + evaluation, things()
    if total > len(found):
        raise UsageError(
            f"{total} prompts are asked for ({offline} offline, {rounds} for the rounds, {evaluation} for the "
            f"evaluation), but there are {len(found)} things to review: ask for fewer"
        )
    draw = random.Random(seed_for(seed, "evidence prompts"))
    draw.shuffle(found)
    prompts = [draw.choice(PHRASINGS).format(thing=thing) for thing in found[:total]]
    return PromptSets(prompts[:offline], prompts[offline : offline + rounds], prompts[offline + rounds :])
