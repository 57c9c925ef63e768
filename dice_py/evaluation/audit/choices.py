"""The rewards that a user can choose from: the reference, per token or summed, with and without a length penalty.

All come from the same log-probabilities: each model is run over each response once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl

from dice_py.evaluation.audit.data import AuditData
from dice_py.mining.pairs import mine_pairs

Form = Literal["sum", "penalized", "per token"]
FORMS: tuple[Form, ...] = ("sum", "penalized", "per token")
"""As mining has them: `mine.debias` none, linear, and per_token."""
LENGTH_ONLY = "length alone"
NO_REFERENCE = "none"
Reference = Literal["previous", "initial", "sft", "none"]


@dataclass(frozen=True)
class Choice:
    """One reward."""

    reference: str
    """The role of π_ref; `NO_REFERENCE`: log π alone."""
    form: Form

    @property
    def name(self) -> str:
        """How tables and files call it: "previous, sum"."""
        return f"{self.reference}, {self.form}"


@dataclass(frozen=True)
class Reward:
    """A choice with the rewards of the responses."""

    choice: Choice
    values: np.ndarray
    """(responses,) float64."""
    alpha: float | None
    """Of the penalty, in reward per token; None: there is none."""


def choices(references: Sequence[str]) -> list[Choice]:
    """All choices that the given references allow; log π alone comes last."""
    return [Choice(reference, form) for reference in (*references, NO_REFERENCE) for form in FORMS]


def rewards_of(
    data: AuditData,
    logps: Mapping[str, np.ndarray],
    wanted: Sequence[Choice],
    beta: float,
    alpha: float | Literal["auto"],
) -> list[Reward]:
    """The rewards of each choice.

    r = β·(log π(y|x) − log π_ref(y|x)) (Rafailov et al., arXiv 2305.18290, equation 5, without its term of the prompt);
    with the penalty r − α·|y|, and per token r / |y|. Without a reference r = β·log π(y|x).

    Args:
        logps: (responses,) float64 by role: "policy", and the references.
        alpha: "auto": that of `penalty`, for each reference its own.
    """
    found = []
    for choice in wanted:
        of_reference = logps[choice.reference] if choice.reference != NO_REFERENCE else 0.0
        values = beta * (logps["policy"] - of_reference)
        penalty_of = None
        if choice.form == "penalized":
            penalty_of = penalty(data, values) if alpha == "auto" else float(alpha)
            values = values - penalty_of * data.tokens
        elif choice.form == "per token":
            values = values / data.tokens
        found.append(Reward(choice, values, penalty_of))
    return found


def penalty(data: AuditData, rewards: np.ndarray) -> float:
    """The α that mining (`debias=linear`, `alpha=auto`) finds: the length gap of best and worst response nearest zero.

    Of a scored set these are the best and worst of a prompt's responses by reward, as in a round. Of preference pairs
    they are the two responses of each pair. Which of them was chosen is not looked at: α is fitted to the rewards and
    the lengths, never to the labels that the reward is measured on.
    """
    if data.is_scored:
        rows, group = np.arange(len(rewards)), data.prompt
    else:
        rows = np.stack([data.comparisons.better, data.comparisons.worse], axis=1).reshape(-1)
        group = np.repeat(np.arange(len(data.comparisons)), 2)
    frame = pl.DataFrame({"prompt_id": group, "reward": rewards[rows], "response_tokens": data.tokens[rows]})
    found = mine_pairs(frame, debias="linear", alpha="auto", min_length=None, truncated_column=None).alpha
    return 0.0 if found is None else found
