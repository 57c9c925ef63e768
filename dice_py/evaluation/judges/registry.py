"""The table of judges. A judge is one file beside this one, a section in config/judges.py, and one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dice_py.config.judges import JudgesConfig
from dice_py.evaluation.judges.base import Judge
from dice_py.evaluation.judges.oracle import OracleJudge

JUDGES: dict[str, Callable[[Any], Judge]] = {}
"""By the name of the section in config `evaluate.judges`; each makes the judge of its section."""


def build_judges(config: JudgesConfig, is_world: bool) -> tuple[Judge, ...]:
    """The judges of an evaluation, in the order of the sections.

    Args:
        is_world: the prompts are the synthetic world's, which its oracle judges too.
    """
    asked = [(name, getattr(config, name)) for name in JudgesConfig.model_fields]
    judges = [JUDGES[name](section) for name, section in asked if section is not None]
    return (OracleJudge(), *judges) if is_world else tuple(judges)
