"""The table of judges. A judge is one file beside this one, a section in config/judges.py, and one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dice_py.config.judges import JudgesConfig
from dice_py.config.shared import ModelConfig
from dice_py.evaluation.judges.base import Judge
from dice_py.evaluation.judges.function import FunctionJudge
from dice_py.evaluation.judges.implicit import ImplicitJudge
from dice_py.evaluation.judges.openai_server import OpenAIJudge
from dice_py.evaluation.judges.oracle import OracleJudge
from dice_py.evaluation.judges.reward_model import RewardModelJudge

JUDGES: dict[str, Callable[[Any, ModelConfig], Judge]] = {
    "reward_model": RewardModelJudge.of,
    "implicit": ImplicitJudge.of,
    "openai": OpenAIJudge.of,
    "function": FunctionJudge.of,
}
"""By the name of the section in config `evaluate.judges`; each makes the judge of its section and of `model`."""


def build_judges(config: JudgesConfig, models: ModelConfig, is_world: bool) -> tuple[Judge, ...]:
    """The judges of an evaluation, in the order of the sections.

    Args:
        models: the device and dtype of judges that are models, and the time that chat templates print.
        is_world: the prompts are the synthetic world's, which its oracle judges too.

    Raises:
        DataError: a judge's model is not there, or its template cannot be read.
        UsageError: a package that a judge needs is not installed, or a function cannot be imported.
    """
    models = models.model_copy(update={"chat_template": None})  # that of the policy; a judge has its own
    asked = [(name, getattr(config, name)) for name in JudgesConfig.model_fields]
    judges = [JUDGES[name](section, models) for name, section in asked if section is not None]
    return (OracleJudge(), *judges) if is_world else tuple(judges)
