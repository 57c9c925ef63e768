"""Config section `extrapolate`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from dice_py.config.shared import Section


class ExtrapolateConfig(Section):
    """The optional end of a round: θ₁ + α·(θ₁ − θ₀) of its training (ExPO), with α picked on held-out data."""

    alphas: list[Annotated[float, Field(gt=-1.0)]] | None = Field(
        default=None,
        description="values of α that are tried beside 0, the trained policy itself; none or empty: no extrapolation",
    )
    metric: Literal["accuracy", "win_rate"] = Field(
        default="accuracy",
        description="what the best α has most of: accuracy of the implicit reward on held-out pairs, or the oracle's "
        "win rate against the run's start on held-out prompts (synthetic world only)",
    )
    max_length_growth: Annotated[float, Field(ge=0.0)] | None = Field(
        default=0.2,
        description="an α is refused if its mean response on held-out prompts is longer than the trained policy's by "
        "more than this share; none: lengths do not count",
    )

    @property
    def tried(self) -> tuple[float, ...]:
        """The values of α without 0, each once, the nearest to 0 first."""
        return tuple(sorted({alpha for alpha in self.alphas or () if alpha}, key=lambda alpha: (abs(alpha), alpha)))

    def problem(self, *, is_world: bool, prompts: int, pairs: int, has_pairs: bool) -> str | None:
        """Why α cannot be picked, as a sentence; None: it can, or there is nothing to pick.

        Args:
            is_world: whether the run is on the synthetic world.
            prompts, pairs: evaluate.prompts and evaluate.pairs.
            has_pairs: whether the run has pairs of which some can be held out.
        """
        if not self.tried:
            return None
        if self.metric == "win_rate" and not is_world:
            return (
                "extrapolate.metric is win_rate, but only the synthetic world has a judge (its oracle): set "
                "extrapolate.metric=accuracy"
            )
        if self.metric == "win_rate" and not prompts:
            return "extrapolate.metric is win_rate, but evaluate.prompts is 0, so that nothing is sampled to be judged"
        if self.metric == "accuracy" and not (pairs and has_pairs):
            return (
                "extrapolate.metric is accuracy, but there are no held-out pairs to measure it on: name some in "
                "data.eval_pairs, with evaluate.pairs above 0"
            )
        if self.max_length_growth is not None and not prompts:
            return (
                "extrapolate.max_length_growth limits the length of held-out responses, but evaluate.prompts is 0, so "
                "that none is sampled: raise it, or set extrapolate.max_length_growth= (none)"
            )
        return None

    def key_fields(self) -> dict[str, Any]:
        """The settings that decide which α is picked."""
        return {"alphas": list(self.tried), "metric": self.metric, "max_length_growth": self.max_length_growth}
