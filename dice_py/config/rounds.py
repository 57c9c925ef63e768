"""Config sections of a run's rounds: how many, which policy is kept, when the run ends, and when it warns.

None of them is part of a stage's key: they change no result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dice_py.config.shared import ADDED, Positive, Section

GRACE_SECONDS = 20.0
"""Slurm kills 30 s after SIGTERM (its KillWait), and the end of the processes takes some of them."""

KeepModels = Literal["all", "best"] | Positive
"""Which models of a run are kept: all, the best one, or those of the last rounds; the last round's always."""

Limit = Annotated[float, Field(ge=0.0)]
ROUND_METRICS = (
    "oracle_win_rate",
    "oracle_accuracy",
    "oracle_score",
    "reward_model_win_rate",
    "implicit_win_rate",
    "openai_win_rate",
    "function_win_rate",
    "function_score",
    "implicit_reward_accuracy",
    "implicit_reward_accuracy_initial_reference",
)
"""Metrics of the evaluation by which rounds are compared; of each, more is better. The evaluation stores their values
by prompt or pair (evaluation/values.py). Beside them: command.NAME, a number that evaluate.command prints."""
COMMAND_PREFIX = "command."


class RoundsConfig(Section):
    """The rounds of a run. A number alone stands for `count`: `rounds: 3`, `--set rounds=3`."""

    count: Positive = Field(default=2, description="rounds of generate, score, mine, replay, train, evaluate")
    keep: Literal["last", "best"] = Field(
        default="last", description="the run's new policy: the last round's, or that of the round with the best metric"
    )
    stop_when: Literal["none", "worse"] = Field(
        default="none",
        description="worse: end the run after a round that is worse on the metric than the policy that it started "
        "from, beyond the 95 % interval of the difference",
    )
    metric: str | None = Field(
        default=None,
        description="metric of keep and stop_when: the win rate of a judge (oracle, reward_model, implicit, openai, "
        "function: as in openai_win_rate), oracle_accuracy, oracle_score, function_score, implicit_reward_accuracy, "
        "implicit_reward_accuracy_initial_reference, or command.NAME, a number of evaluate.command of which more is "
        "better (for keep alone: it has no interval). none: oracle_win_rate on the synthetic world, else "
        "implicit_reward_accuracy_initial_reference",
    )

    grace_seconds: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = Field(
        default=GRACE_SECONDS,
        json_schema_extra=ADDED,
        description="seconds after SIGTERM or SIGUSR1 in which a training ends its step and writes a checkpoint; then, "
        "or at a second signal, it is ended at once, and goes on from its last checkpoint",
    )

    keep_models: KeepModels = Field(
        default="all",
        json_schema_extra=ADDED,
        description="models that are kept of the rounds: all; best: of older rounds only the best by the metric; or a "
        "number: those of so many last rounds. The last round's, the best one's, the start's, and those that a later "
        "stage reads are always kept. Of the others the weights are removed when a round ends",
    )
    keep_samples: bool = Field(
        default=True,
        json_schema_extra=ADDED,
        description="whether generations and scores are kept; false: they are removed when a round ends, unless "
        "mine.pool_rounds still needs them. Pairs, training sets and metrics stay",
    )

    @field_validator("metric")
    @classmethod
    def _check_metric(cls, value: str | None) -> str | None:
        if value is None or value in ROUND_METRICS or (value.startswith(COMMAND_PREFIX) and value != COMMAND_PREFIX):
            return value
        raise ValueError(f"it should be one of {', '.join(map(repr, ROUND_METRICS))}, or command.NAME")

    @model_validator(mode="after")
    def _check_interval(self) -> RoundsConfig:
        if self.stop_when == "worse" and (self.metric or "").startswith(COMMAND_PREFIX):
            raise ValueError(
                f"stop_when is worse, but {self.metric} is one number a round, without an interval: set another "
                "metric, or stop_when to none"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _read_count(cls, value: Any) -> Any:
        return value if isinstance(value, Mapping | RoundsConfig) else {"count": value}

    @property
    def are_compared(self) -> bool:
        """Whether rounds are compared by a metric."""
        return "best" in (self.keep, self.keep_models) or self.stop_when == "worse" or self.metric is not None


class WarningsConfig(Section):
    """Limits above which a stage warns, with a remedy. None: no warning. What each value is: runs/warnings.py."""

    cut_off_share: Limit | None = Field(default=0.1, description="share of the responses that max_new_tokens cut off")
    duplicate_share: Limit | None = Field(
        default=0.2, description="share of the responses that repeat another response of their prompt"
    )
    rounding_share: Limit | None = Field(
        default=0.1, description="rounding of the log-probabilities, as a share of the reward's standard deviation"
    )
    no_pair_share: Limit | None = Field(default=0.2, description="share of the prompts that give no pair")
    length_correlation: Limit | None = Field(
        default=0.2, description="absolute correlation of score and length that is left after debiasing"
    )
    replay_shortfall: Limit | None = Field(
        default=0.05, description="share of the requested replay pairs that could not be had"
    )
    credit_difference: Limit | None = Field(
        default=0.5,
        description="largest difference of a mined response's reward summed by token from its stored reward, as a "
        "share of the rewards' standard deviation",
    )
    chosen_logps_fall: Limit | None = Field(
        default=0.1,
        description="fall of the chosen responses' log-probabilities in training, as a share of the reference's",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _read_none(cls, value: Any) -> Any:
        return None if value == "none" else value
