"""The options of the miner: names, types, defaults, descriptions and checks, each in one place.

`MiningOptions` holds the keywords of `dice_py.mine_pairs` and the options of `dice mine`; `MineConfig` is the section
`mine` of a run's config. What each option computes is explained in `help(dice_py.mine_pairs)`. Turning options into the
extension's keywords is the work of mining/options.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Literal, TypeAlias, TypedDict, get_args

from pydantic import Field, ModelWrapValidatorHandler, ValidationError, model_validator

from dice_py.config.shared import Positive, Section
from dice_py.errors import UsageError

Debias: TypeAlias = Literal["none", "linear", "per_token", "bucket", "matched"]
Pairing: TypeAlias = Literal["max_min", "max_random", "top_bottom", "max_sweet_spot", "all_pairs"]
PickFrom: TypeAlias = Literal["any", "newest", "oldest"]

PANELS = ("Columns", "Length", "Pairs", "Filters", "Labels")
"""Headings of `dice mine --help`, in order."""
MAX_LENGTH = 2**32 - 1
"""The greatest length that the miner counts (u32)."""
MAX_BUCKETS = 1_000_000


def _option(default: Any, panel: str, description: str) -> Any:
    """A field with its heading in `dice mine --help`. Backquotes in a description mark other options."""
    return Field(default=default, description=description, json_schema_extra={"panel": panel})


class ColumnOptions(Section):
    """Which columns of a table the miner reads."""

    prompt_column: str = _option("prompt_id", "Columns", "Column that names the prompt.")
    reward_column: str = _option("reward", "Columns", "Column of rewards.")
    length_column: str = _option("response_tokens", "Columns", "Column of lengths.")
    truncated_column: str | None = _option(
        "auto",
        "Columns",
        "Boolean column of cut-off responses, which are dropped. auto: finish_reason, if it exists; none: drop none.",
    )
    duplicate_column: str | None = _option(
        None, "Columns", "Text, token ids or hashes: equal responses of a prompt count once."
    )
    policy_column: str | None = _option(
        None, "Columns", "Policy or round that sampled the response; a greater value is newer."
    )
    second_reward_column: str | None = _option(
        None, "Columns", "Rewards of a second model: its agreement with the first is the column consistency."
    )

    @property
    def columns(self) -> dict[str, str]:
        """Required columns of the table by role: prompt, reward, length; duplicate, policy, second_reward if set."""
        columns = {"prompt": self.prompt_column, "reward": self.reward_column, "length": self.length_column}
        for role in ("duplicate", "policy", "second_reward"):
            name = getattr(self, f"{role}_column")
            if name is not None:
                columns[role] = name
        return columns


class PairOptions(Section):
    """How responses become pairs: the options that `MiningOptions` and the config section share."""

    debias: Debias = _option(
        "linear", "Length", "Length debiasing of the rewards: none, linear, per_token, bucket or matched."
    )
    alpha: float | Literal["auto"] = _option(
        "auto", "Length", "Length penalty of `debias=linear`: auto, or a number ≥ 0."
    )
    buckets: int = _option(10, "Length", "For `debias=bucket`: number of length quantiles.")
    bucket_scale: bool = _option(False, "Length", "For `debias=bucket`: divide by the bucket's standard deviation too.")
    length_tolerance: int | None = _option(
        None, "Length", "For `debias=matched`: largest difference of the two lengths."
    )
    length_ratio: float | None = _option(
        None, "Length", "For `debias=matched`: the same, as a share of the longer length."
    )
    pairing: Pairing = _option(
        "max_min",
        "Pairs",
        "Which responses form pairs: max_min, max_random, top_bottom, max_sweet_spot or all_pairs.",
    )
    top_k: int = _option(2, "Pairs", "For `pairing=top_bottom`: pair the K best responses.")
    bottom_k: int = _option(2, "Pairs", "For `pairing=top_bottom`: with the K worst.")
    pairs_per_prompt: int | None = _option(
        None, "Pairs", "For top_bottom and all_pairs: at most this many, greatest margins first."
    )
    sweet_spot_deviations: float = _option(
        2.0, "Pairs", "For max_sweet_spot: the rejected response is this many standard deviations below the mean."
    )
    chosen_from: PickFrom = _option(
        "any", "Pairs", "Policies of `policy_column` that the chosen response may be of: any, newest or oldest."
    )
    rejected_from: PickFrom = _option("any", "Pairs", "The same for the rejected response: any, newest or oldest.")
    min_responses: int = _option(2, "Filters", "Usable responses that a prompt needs.")
    min_length: int | None = _option(1, "Filters", "Shortest response to use, inclusive; 0: empty ones too.")
    max_length: int | None = _option(None, "Filters", "Longest response to use, inclusive.")
    min_margin: float | None = _option(None, "Filters", "Drop pairs of a smaller margin.")
    min_margin_quantile: float | None = _option(
        None, "Filters", "Then drop pairs below this quantile of the remaining margins."
    )
    win_rates: bool = _option(False, "Labels", "Add columns of SPPO's win rates.")
    soft_labels: bool = _option(False, "Labels", "Add a column soft_label: sigmoid(margin / `label_scale`).")
    label_scale: float = _option(1.0, "Labels", "Scale of win rates and soft labels, in units of reward.")
    difficulty_quantile: float | None = _option(
        None, "Labels", "Add a column difficulty: hard below this quantile of the margins (1: all), else easy."
    )


class MiningOptions(PairOptions, ColumnOptions):
    """The keywords of `dice_py.mine_pairs`, checked.

    Raises:
        UsageError: an option of the wrong type or out of its range, or options that contradict each other.
    """

    seed: int = _option(0, "Pairs", "Decides among responses of equal reward; for `pairing=max_random`, the draw.")

    @model_validator(mode="wrap")
    @classmethod
    def _checked(cls, values: Any, handler: ModelWrapValidatorHandler[MiningOptions]) -> MiningOptions:
        # Before pydantic, which would convert values: True to 1, for instance. UsageError passes through pydantic.
        if isinstance(values, Mapping):
            check_mining_options({name: field.default for name, field in cls.model_fields.items()} | dict(values))
        try:
            return handler(values)
        except ValidationError as error:
            first = error.errors()[0]
            raise UsageError(f"{first['loc'][0]} is {first['input']!r}: {first['msg']}") from None


class MiningKeywords(TypedDict, total=False):
    """The fields of `MiningOptions`, for type checkers and completion; tests/config/test_config.py compares the two."""

    prompt_column: str
    reward_column: str
    length_column: str
    truncated_column: str | None
    duplicate_column: str | None
    policy_column: str | None
    second_reward_column: str | None
    debias: Debias
    alpha: float | Literal["auto"]
    buckets: int
    bucket_scale: bool
    length_tolerance: int | None
    length_ratio: float | None
    pairing: Pairing
    top_k: int
    bottom_k: int
    pairs_per_prompt: int | None
    sweet_spot_deviations: float
    chosen_from: PickFrom
    rejected_from: PickFrom
    min_responses: int
    min_length: int | None
    max_length: int | None
    min_margin: float | None
    min_margin_quantile: float | None
    win_rates: bool
    soft_labels: bool
    label_scale: float
    difficulty_quantile: float | None
    seed: int


LENGTH_COLUMNS = {"tokens": "response_tokens", "chars": "response_chars", "answer_tokens": "answer_tokens"}
"""Columns of the mined table by `mine.length`; answer_tokens is counted when pairs are mined."""


class MineConfig(PairOptions):
    """Pair mining. A run knows its own columns and derives its seeds, so they are no options here."""

    min_length: int | None = _option(1, "Filters", "Shortest response to use, inclusive; an empty one has no reward.")
    length: Literal["tokens", "chars", "answer_tokens"] = Field(
        default="tokens",
        description="the unit of lengths; answer_tokens: tokens without the thinking part (generate.thinking), 0 where "
        "that is not closed",
    )
    drop_duplicates: bool = Field(default=False, description="responses of a prompt with equal token ids count once")
    second_reward: Literal["logp", "ref_logp", "previous"] | None = Field(
        default=None,
        description="a column of the scores, whose agreement with the reward is the column consistency; previous: the "
        "reward of the round before, and in round 1 ref_logp",
    )
    pool_rounds: Positive = Field(
        default=1, description="mine the responses of the last n rounds together, scored by the current policy"
    )

    def in_round(self, number: int) -> MineConfig:
        """The settings of one round: the first has no reward of a round before it."""
        first = self.second_reward == "previous" and number == 1
        return self.model_copy(update={"second_reward": "ref_logp"}) if first else self

    def options(self, seed: int = 0) -> MiningOptions:
        """The options to mine a run's generations and scores with.

        With `pool_rounds` above 1, the table has a column `round`: the round that sampled the response.

        Raises:
            UsageError: options that contradict each other.
        """
        return MiningOptions(
            **self.model_dump(include=set(PairOptions.model_fields)),
            length_column=LENGTH_COLUMNS[self.length],
            duplicate_column="token_ids" if self.drop_duplicates else None,
            policy_column="round" if self.pool_rounds > 1 else None,
            second_reward_column="previous_reward" if self.second_reward == "previous" else self.second_reward,
            seed=seed,
        )

    @model_validator(mode="after")
    def validate_mining_options(self) -> MineConfig:
        """Makes the miner's own checks when the config is read."""
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


_INTEGERS = (
    "min_responses", "min_length", "max_length", "length_tolerance", "buckets", "top_k", "bottom_k", "pairs_per_prompt",
    "seed",
)  # fmt: skip
_CHOICES = {"debias": Debias, "pairing": Pairing, "chosen_from": PickFrom, "rejected_from": PickFrom}
_LARGEST = {
    "buckets": MAX_BUCKETS,
    "min_responses": MAX_LENGTH,
    "top_k": MAX_LENGTH,
    "bottom_k": MAX_LENGTH,
    "pairs_per_prompt": MAX_LENGTH,
}


def check_mining_options(values: Mapping[str, Any]) -> None:
    """Checks every field of `MiningOptions`, each with a value as the caller wrote it.

    Raises:
        UsageError: the first option that is refused.
    """
    check_mining_values(values)
    _check_combinations(SimpleNamespace(**values))


def check_mining_values(values: Mapping[str, Any]) -> None:
    """The part of `check_mining_options` that looks at each option by itself: types, words and ranges.

    Raises:
        UsageError: the first option that is refused.
    """
    for name in _INTEGERS:
        value = values[name]
        optional = type(None) in get_args(MiningOptions.model_fields[name].annotation)
        if not (value is None and optional) and (not isinstance(value, int) or isinstance(value, bool)):
            raise UsageError(f"{name} is {value!r}, but must be an integer")
    for name, known in _CHOICES.items():
        if values[name] not in get_args(known):
            raise UsageError(f"{name} is {values[name]!r}, but must be one of {', '.join(get_args(known))}")
    options = SimpleNamespace(**values)
    _check_lengths(options)
    _check_counts(values)
    _check_numbers(options)


def _check_lengths(options: SimpleNamespace) -> None:
    for name in ("min_length", "max_length", "length_tolerance"):
        value = getattr(options, name)
        if value is not None and value < 0:
            raise UsageError(f"{name} is {value}, but must be zero or more: lengths are counts")
    shortest = options.min_length
    if shortest is not None and shortest > MAX_LENGTH:
        raise UsageError(f"min_length is {shortest}, but no length is above {MAX_LENGTH}")


def _check_counts(values: Mapping[str, Any]) -> None:
    if values["min_responses"] < 2:
        raise UsageError(f"min_responses is {values['min_responses']}, but must be 2 or more: a pair is two responses")
    for name, largest in _LARGEST.items():
        value = values[name]
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}, but must be 1 or more")
        if value is not None and value > largest:
            raise UsageError(f"{name} is {value}, but must be at most {largest}")
    if not 0 <= values["seed"] < 2**64:
        raise UsageError(f"seed is {values['seed']}, but must be an integer from 0 to 2**64 - 1")


def _check_numbers(options: SimpleNamespace) -> None:
    alpha = options.alpha
    if alpha != "auto" and not (_finite(alpha) and alpha >= 0):
        raise UsageError(f"alpha is {alpha!r}, but must be 'auto' or a finite number of zero or more")
    for name in ("min_margin_quantile", "difficulty_quantile", "length_ratio"):
        value = getattr(options, name)
        if value is not None and not (_finite(value) and 0 <= value <= 1):
            raise UsageError(f"{name} is {value}, but must be a number from 0 to 1")
    deviations, margin, scale = options.sweet_spot_deviations, options.min_margin, options.label_scale
    if not (_finite(deviations) and deviations >= 0):
        raise UsageError(f"sweet_spot_deviations is {deviations}, but must be a finite number of zero or more")
    if margin is not None and not _finite(margin):
        raise UsageError(f"min_margin is {margin}, but must be a finite number")
    if not (_finite(scale) and scale > 0):
        raise UsageError(f"label_scale is {scale}, but must be a finite number above zero")


def _check_combinations(options: SimpleNamespace) -> None:
    """Options that contradict each other, or have no meaning without another one."""
    shortest, longest = options.min_length, options.max_length
    if shortest is not None and longest is not None and shortest > longest:
        raise UsageError(f"min_length is {shortest} and max_length {longest}: no length can be both")
    tolerances = [name for name in ("length_tolerance", "length_ratio") if getattr(options, name) is not None]
    if options.debias == "matched":
        if len(tolerances) != 1:
            raise UsageError("debias 'matched' needs one of length_tolerance and length_ratio: set one of them")
        if options.pairing != "max_min":
            raise UsageError(
                f"pairing is '{options.pairing}', but debias 'matched' picks its own pairs: leave it at max_min"
            )
    elif tolerances:
        raise UsageError(f"{' and '.join(tolerances)} is for debias 'matched', but debias is '{options.debias}'")
    if options.pairs_per_prompt is not None and options.pairing not in ("top_bottom", "all_pairs"):
        raise UsageError(
            f"pairs_per_prompt is for pairing 'top_bottom' or 'all_pairs', but pairing is '{options.pairing}'"
        )
    if options.policy_column is None:
        for name in ("chosen_from", "rejected_from"):
            if getattr(options, name) != "any":
                raise UsageError(f"{name} is '{getattr(options, name)}', which needs policy_column: name it")


def _finite(value: object) -> bool:
    """Whether a value is a finite number in float64, and no bool."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond float64
        return False
