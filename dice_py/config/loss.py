"""The settings of `train` that choose the loss: the method, TRL's loss types, and what fits together.

The methods themselves are in training/methods/. Here is what the config must know of them: their names, the loss types
that each can be combined with, and the mining labels that each needs.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, model_validator

from dice_py.config.shared import ADDED, Probability, Section

MethodName: TypeAlias = Literal["dpo", "rdpo", "sppo", "cream", "spa", "soft", "mpo"]
LossType: TypeAlias = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
"""TRL's; tests/training/test_method_terms.py compares."""

MINING_LABELS: dict[str, dict[str, Any]] = {
    "sppo": {"win_rates": True},
    "soft": {"soft_labels": True},
    "spa": {"difficulty_quantile": 0.1},
    "cream": {"second_reward": "previous"},
    "mpo": {"difficulty_quantile": 0.5},
}
"""Settings of `mine` that a method switches on, where they are off."""

_SORTED = {"aot", "aot_unpaired"}
_SMOOTHED = {"robust", "exo_pair", *_SORTED}
"""Types that read TRL's label_smoothing."""
_OF_THE_SUMMED_DIFFERENCE = {"sigmoid", "hinge", "robust", "exo_pair", "discopop"}
"""Types of β·(difference of the summed log-ratios): those that a length term can be added to."""


class LossTerm(Section):
    """One of TRL's loss types, with its weight in the sum."""

    type: LossType = Field(description="a loss type of TRL's DPOTrainer")
    weight: Annotated[float, Field(gt=0.0)] = Field(default=1.0, description="factor of this type's mean loss")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str) else value


def _added(default: Any, description: str) -> Any:
    """A setting that version 0.2 did not have, and did as the default says."""
    return Field(default=default, description=description, json_schema_extra=ADDED)


class LossConfig(Section):
    """The settings of `train` that set the loss. Names are TRL's where TRL has the setting."""

    method: MethodName = _added(
        "dpo",
        "what the loss makes of the mined labels (docs/methods.md); it switches on those of mine that it needs",
    )
    length_weight: Literal["auto"] | Annotated[float, Field(ge=0.0)] = _added(
        "auto",
        "method=rdpo: α, reward per token; auto: the penalty that mining found this round; 0: DPO",
    )
    consistency: Literal["round", "prompt"] = _added(
        "round", "method=cream: C is the mean over the round's prompts, or each prompt's own"
    )
    loss: list[LossTerm] | None = _added(
        None,
        "TRL's loss types with their weights, [{type: sigmoid, weight: 1.0}, …]; none: the method's own",
    )
    ld_alpha: Probability | None = _added(
        None, "LD-DPO's α, the weight of a response's tokens beyond the shorter one's length"
    )
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = _added(
        "reverse_kl", "f-DPO's divergence"
    )
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] | None = _added(
        None,
        "share of wrong labels, for the losses robust, exo_pair, aot and aot_unpaired (none: 0), and for "
        "the pairs of low confidence of method=spa (none: 0.1)",
    )
    use_weighting: bool = _added(False, "WPO: weigh pairs by the policy's probability of them")
    weight_column: str | None = _added(
        None,
        "a column of the training set, such as margin: weights of the pairs, divided by their mean; a pair "
        "without one counts 1",
    )
    reference: Literal["policy", "initial"] = _added(
        "policy",
        "π_ref of the loss: the policy that the round starts from, or always the first reference",
    )
    sft_weight: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0, description="weight of the NLL of the chosen response, added to the loss (TRL's sft loss)"
    )

    def without_labels(self) -> dict[str, Any]:
        """DPO's values, by name, of the settings that need more of pairs than tokens and reference sums."""
        names = ("method", "length_weight", "weight_column", "ld_alpha", "reference")
        plain = {name: type(self).model_fields[name].get_default() for name in names}
        # With spa the smoothing is of its pairs of low confidence; DPO's loss would not read it.
        return plain if self.method != "spa" else plain | {"label_smoothing": None}

    @model_validator(mode="after")
    def _check_loss(self) -> LossConfig:
        _check_loss(self)
        return self


def loss_terms(train: LossConfig) -> list[LossTerm]:
    """The loss types of a training, with the SFT term of `sft_weight`."""
    default = LossTerm(type="sppo_hard" if train.method == "sppo" else "sigmoid")
    terms = [default] if train.loss is None else list(train.loss)
    if train.sft_weight > 0:
        terms.append(LossTerm(type="sft", weight=train.sft_weight))
    return terms


def smoothing_of_spa(train: LossConfig) -> float:
    """The ε of SPA's low-confidence pairs; the paper's 0.1 unless it is set."""
    return 0.1 if train.label_smoothing is None else train.label_smoothing


def _check_loss(train: LossConfig) -> None:
    """Checks that the settings of the loss fit together.

    Raises:
        ValueError: the sentence names the settings and the remedy.
    """
    types = [term.type for term in loss_terms(train)]
    repeated = sorted({name for name in types if types.count(name) > 1})
    if repeated:
        raise ValueError(
            f"the loss has {repeated[0]} more than once: name each type once in train.loss, with its weight "
            "(train.sft_weight adds sft)"
        )
    if set(types) == {"sft"}:
        raise ValueError("train.loss is sft alone, which learns nothing from the rejected responses: add a second type")
    if train.use_weighting and ({"sft", *_SORTED} & set(types)):
        bad = sorted({"sft", *_SORTED} & set(types))
        raise ValueError(
            f"use_weighting (WPO) weighs the loss of each pair, which {', '.join(bad)} has not: leave out one of them"
        )
    if train.f_divergence_type != "reverse_kl" and train.method in ("rdpo", "sppo"):
        raise ValueError(
            f"method {train.method} adds to the log-ratio, which f_divergence_type={train.f_divergence_type} "
            "transforms: set f_divergence_type=reverse_kl"
        )
    _check_smoothing(train, set(types))
    _check_method(train, set(types))


def _check_smoothing(train: LossConfig, types: set[LossType]) -> None:
    smoothing = train.label_smoothing
    if "exo_pair" in types and not smoothing:
        raise ValueError("the loss exo_pair needs label_smoothing above 0 (its paper recommends 1e-3): set it")
    if train.method == "spa":
        if types & _SMOOTHED:
            raise ValueError(
                f"label_smoothing is that of spa's low-confidence pairs, but {', '.join(sorted(types & _SMOOTHED))} "
                "reads it too: use another loss type"
            )
    elif smoothing and not types & _SMOOTHED:
        raise ValueError(
            f"label_smoothing is {smoothing}, but it is for the loss types {', '.join(sorted(_SMOOTHED))} and for "
            f"method spa, and the loss is {', '.join(sorted(types))}: TRL would ignore it. Choose one of these, or "
            "leave it out"
        )


def _check_method(train: LossConfig, types: set[LossType]) -> None:
    method = train.method
    if method != "rdpo" and train.length_weight != "auto":
        raise ValueError(f"length_weight is for method rdpo, but method is {method}: set method=rdpo or leave it out")
    if (method not in ("dpo", "mpo") or train.weight_column is not None) and types & _SORTED:
        setting = f"method {method}" if method not in ("dpo", "mpo") else "weight_column"
        raise ValueError(
            f"{setting} says something of each pair, but the loss {', '.join(sorted(types & _SORTED))} sorts the "
            "responses of a batch, so that pairs are lost: use another loss type"
        )
    if method == "rdpo" and (other := types - _OF_THE_SUMMED_DIFFERENCE - {"sft"}):
        raise ValueError(
            f"method rdpo adds α(|y_w| − |y_l|) to β·Δ, which the loss {', '.join(sorted(other))} is no function of: "
            f"use {', '.join(sorted(_OF_THE_SUMMED_DIFFERENCE))}"
        )
    if method == "sppo" and (other := types - {"sppo_hard", "sft"}):
        raise ValueError(
            f"method sppo has its own squared loss, but train.loss names {', '.join(sorted(other))}: leave train.loss "
            "out, or set method=dpo"
        )
