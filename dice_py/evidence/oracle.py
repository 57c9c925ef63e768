"""The oracle of the sentiment task: how positive a text is, by VADER's lexicon and rules.

VADER (Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", 2014) is
the package vaderSentiment. It needs neither a network nor a model, and gives a text the same score each time.

The task is that of Rafailov et al., arXiv 2305.18290, section 6.1, where a classifier says how positive the end of a
film review is.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from dice_py.errors import UsageError

CALL = f"{__name__}:sentiment"
"""The oracle's name, for `evaluate.judges.function.call`."""


def sentiment(prompt: str, response: str) -> float:
    """VADER's compound score of the response, from −1 (negative) to 1 (positive); 0 is neutral.

    Args:
        prompt: not looked at: what is asked about has no tone of its own (evidence/prompts.py).

    Raises:
        UsageError: the package is not installed.
    """
    del prompt
    return float(_analyzer().polarity_scores(response)["compound"])


def require_oracle() -> None:
    """Checks that the oracle's package is there.

    Raises:
        UsageError: it is not installed.
    """
    _analyzer()


@cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise UsageError(
            "the oracle of the sentiment task is in the package vaderSentiment, which is not installed. In a clone: "
            "make evidence-real. Elsewhere: pip install --no-deps vaderSentiment==3.3.2"
        ) from None
    return SentimentIntensityAnalyzer()
