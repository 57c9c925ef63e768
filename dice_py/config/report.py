"""Settings of what a run keeps for people to read: the inspect stage and report.html."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dice_py.config.shared import Section

MOST_PAIRS = 2000
"""Pairs in a report, over all of its rounds."""


class ReportConfig(Section):
    """What of each round is kept for reading."""

    pairs: Annotated[int, Field(ge=0, le=MOST_PAIRS)] = Field(
        default=200, description="pairs of each round in the report, a stratified sample; 0: none"
    )
    token_credit: bool = Field(
        default=True,
        description="whether each token of these pairs gets its part of the reward: one pass of policy and reference",
    )
