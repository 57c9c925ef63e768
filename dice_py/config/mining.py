"""What can be asked of the miner: the keywords of `mine_pairs`, checked in one place.

`dice mine` and the config section `mine` have the same names and the same defaults.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import Field, model_validator

from dice_py.config.shared import Positive, Section
from dice_py.errors import UsageError


class MineConfig(Section):
    """Pair mining: the keywords of `dice_py.mine_pairs`, where each is explained, but for columns and the seed.

    A run knows its columns, and seeds come from its own.
    """

    length: Literal["tokens", "chars"] = Field(default="tokens", description="what the penalty counts")
    debias: Debias = "linear"
    alpha: Literal["auto"] | Annotated[float, Field(ge=0.0)] = "auto"
    min_responses: Annotated[int, Field(ge=2)] = 2
    min_length: Annotated[int, Field(ge=0)] | None = Field(default=1, description="inclusive")
    max_length: Annotated[int, Field(ge=0)] | None = Field(default=None, description="inclusive")
    buckets: Positive = 10
    bucket_scale: bool = False
    length_tolerance: int | None = Field(default=None, description="debias=matched: this or length_ratio")
    length_ratio: float | None = Field(default=None, description="debias=matched: of the longer response's length")
    pairing: Pairing = "max_min"
    top_k: int = Field(default=2, description="pairing=top_bottom")
    bottom_k: int = Field(default=2, description="pairing=top_bottom")
    pairs_per_prompt: int | None = Field(default=None, description="pairing=top_bottom or all_pairs: at most")
    sweet_spot_deviations: float = Field(default=2.0, description="pairing=max_sweet_spot")
    min_margin: float | None = Field(default=None, description="drops pairs of a smaller margin")
    min_margin_quantile: float | None = Field(default=None, description="drops pairs below this quantile of margins")
    chosen_from: PickFrom = Field(default="any", description="newest or oldest: of the rounds in the pool")
    rejected_from: PickFrom = Field(default="any", description="newest or oldest: of the rounds in the pool")
    win_rates: bool = False
    soft_labels: bool = False
    label_scale: float = Field(default=1.0, description="win_rates and soft_labels: sigmoid(difference / label_scale)")
    difficulty_quantile: float | None = None
    drop_duplicates: bool = Field(default=False, description="equal token ids of a prompt count once")
    second_reward: Literal["logp", "ref_logp"] | None = Field(
        default=None, description="a column of the scores: agreement with the reward as the column consistency"
    )
    pool_rounds: Positive = Field(
        default=1, description="the candidates of the last n rounds in one pool, scored by the current policy"
    )

    def options(self, seed: int = 0) -> MineOptions:
        """The keywords of `dice_py.mine_pairs` on a round's generations and scores.

        The round that sampled a response is in a column `round` where there is a pool.

        Raises:
            UsageError: options that contradict each other.
        """
        own = {"length", "drop_duplicates", "second_reward", "pool_rounds"}
        return MineOptions(
            **self.model_dump(exclude=own),
            length_column="response_tokens" if self.length == "tokens" else "response_chars",
            duplicate_column="token_ids" if self.drop_duplicates else None,
            policy_column="round" if self.pool_rounds > 1 else None,
            second_reward_column=self.second_reward,
            seed=seed,
        )

    @model_validator(mode="after")
    def _as_the_miner_checks(self) -> MineConfig:
        for name in ("chosen_from", "rejected_from"):
            if getattr(self, name) != "any" and self.pool_rounds == 1:
                raise ValueError(
                    f"{name} is '{getattr(self, name)}', but the candidates are those of one round: "
                    "set pool_rounds to 2 or more"
                )
        try:
            self.options()
        except UsageError as error:
            raise ValueError(str(error)) from None
        return self


MAX_LENGTH = 2**32 - 1
MAX_BUCKETS = 1_000_000

Debias: TypeAlias = Literal["none", "linear", "per_token", "bucket", "matched"]
Pairing: TypeAlias = Literal["max_min", "max_random", "top_bottom", "max_sweet_spot", "all_pairs"]
_WHOLE = (
    "min_responses", "min_length", "max_length", "length_tolerance", "buckets", "top_k", "bottom_k", "pairs_per_prompt",
    "seed",
)  # fmt: skip
PickFrom: TypeAlias = Literal["any", "newest", "oldest"]


@dataclass(frozen=True, kw_only=True)
class MineOptions:
    """The keywords of `dice_py.mine_pairs`, where each is explained."""

    prompt_column: str = "prompt_id"
    reward_column: str = "reward"
    length_column: str = "response_tokens"
    truncated_column: str | None = "auto"
    debias: Debias = "linear"
    alpha: float | Literal["auto"] = "auto"
    buckets: int = 10
    bucket_scale: bool = False
    length_tolerance: int | None = None
    length_ratio: float | None = None
    pairing: Pairing = "max_min"
    top_k: int = 2
    bottom_k: int = 2
    pairs_per_prompt: int | None = None
    sweet_spot_deviations: float = 2.0
    seed: int = 0
    min_margin: float | None = None
    min_margin_quantile: float | None = None
    min_responses: int = 2
    min_length: int | None = None
    max_length: int | None = None
    duplicate_column: str | None = None
    policy_column: str | None = None
    chosen_from: PickFrom = "any"
    rejected_from: PickFrom = "any"
    second_reward_column: str | None = None
    win_rates: bool = False
    soft_labels: bool = False
    label_scale: float = 1.0
    difficulty_quantile: float | None = None

    def __post_init__(self) -> None:
        self._whole_numbers()
        _one_of("debias", self.debias, get_args(Debias))
        _one_of("pairing", self.pairing, get_args(Pairing))
        _one_of("chosen_from", self.chosen_from, get_args(PickFrom))
        _one_of("rejected_from", self.rejected_from, get_args(PickFrom))
        if self.alpha != "auto" and not (_number(self.alpha) and self.alpha >= 0):
            raise UsageError(f"alpha is {self.alpha!r}, but must be 'auto' or a finite number of zero or more")
        if self.min_responses < 2:
            raise UsageError(f"min_responses is {self.min_responses}, but a pair takes two responses: give 2 or more")
        for name in ("min_length", "max_length", "length_tolerance"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UsageError(f"{name} is {value}, but lengths are counts: give zero or more, or nothing")
        if self.min_length is not None and self.min_length > MAX_LENGTH:
            raise UsageError(f"min_length is {self.min_length}, but no length is above {MAX_LENGTH}")
        most = MAX_LENGTH if self.max_length is None else self.max_length
        if self.min_length is not None and self.min_length > most:
            raise UsageError(f"min_length is {self.min_length} and max_length {self.max_length}: no length can be both")
        for name in ("buckets", "top_k", "bottom_k", "pairs_per_prompt"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}: give 1 or more")
        for name, most in (
            ("buckets", MAX_BUCKETS),
            *((name, MAX_LENGTH) for name in ("min_responses", "top_k", "bottom_k", "pairs_per_prompt")),
        ):
            value = getattr(self, name)
            if value is not None and value > most:
                raise UsageError(f"{name} is {value}: give at most {most}")
        for name in ("min_margin_quantile", "difficulty_quantile", "length_ratio"):
            value = getattr(self, name)
            if value is not None and not (_number(value) and 0 <= value <= 1):
                raise UsageError(f"{name} is {value}: give a number from 0 to 1")
        if not (_number(self.sweet_spot_deviations) and self.sweet_spot_deviations >= 0):
            raise UsageError(
                f"sweet_spot_deviations is {self.sweet_spot_deviations}: give a finite number of zero or more"
            )
        if self.min_margin is not None and not _number(self.min_margin):
            raise UsageError(f"min_margin is {self.min_margin}: give a finite number, or nothing")
        if not (_number(self.label_scale) and self.label_scale > 0):
            raise UsageError(f"label_scale is {self.label_scale}: give a finite number above zero")
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"seed is {self.seed}: give a whole number from 0 to 2**64 - 1")
        self._fitting()

    def _whole_numbers(self) -> None:
        for name in _WHOLE:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise UsageError(f"{name} is {value!r}, but must be a whole number")

    def _fitting(self) -> None:
        """Options that mean nothing without another."""
        tolerances = [n for n in ("length_tolerance", "length_ratio") if getattr(self, n) is not None]
        if self.debias == "matched":
            if len(tolerances) != 1:
                raise UsageError("debias 'matched' needs one of length_tolerance and length_ratio: give one of them")
            if self.pairing != "max_min":
                raise UsageError(
                    f"pairing is '{self.pairing}', but debias 'matched' picks its own pairs: leave it at max_min"
                )
        elif tolerances:
            raise UsageError(f"{' and '.join(tolerances)} is for debias 'matched', but debias is '{self.debias}'")
        if self.pairs_per_prompt is not None and self.pairing not in ("top_bottom", "all_pairs"):
            raise UsageError(
                f"pairs_per_prompt is for pairing 'top_bottom' or 'all_pairs', but pairing is '{self.pairing}'"
            )
        if self.policy_column is None:
            for name in ("chosen_from", "rejected_from"):
                if getattr(self, name) != "any":
                    raise UsageError(f"{name} is '{getattr(self, name)}', which needs policy_column: name it")

    @property
    def columns(self) -> dict[str, str]:
        """Columns of the frame by their role, those that must be there."""
        named = {"prompt": self.prompt_column, "reward": self.reward_column, "length": self.length_column}
        for role in ("duplicate", "policy", "second_reward"):
            name = getattr(self, f"{role}_column")
            if name is not None:
                named[role] = name
        return named

    def native(self) -> dict[str, Any]:
        """The keywords of the extension."""

        def length(value: int | None) -> int | None:
            # No length is above this one.
            return None if value is None else min(value, MAX_LENGTH)

        return {
            "debias": self.debias,
            "alpha": None if self.alpha == "auto" else float(self.alpha),
            "min_responses": self.min_responses,
            "min_length": self.min_length,
            "max_length": length(self.max_length),
            "buckets": self.buckets,
            "bucket_scale": self.bucket_scale,
            "length_tolerance": length(self.length_tolerance),
            "length_ratio": self.length_ratio,
            "pairing": self.pairing,
            "top_k": self.top_k,
            "bottom_k": self.bottom_k,
            "pairs_per_prompt": self.pairs_per_prompt,
            "sweet_spot_deviations": float(self.sweet_spot_deviations),
            "seed": self.seed,
            "chosen_from": self.chosen_from,
            "rejected_from": self.rejected_from,
            "win_rates": float(self.label_scale) if self.win_rates else None,
        }


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{name} is {value!r}, but must be one of {', '.join(known)}")


def _number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond float64
        return False
