"""The arms of an ablation: configs that differ from a base config in one thing each.

    arm       length penalty    replayed offline pairs
    neither   no                no
    length    yes               no
    replay    no                yes
    both      yes               yes

Two more are `both` with another training: mpo, whose second stage is reinforcement learning on the hard prompts, and
mpo-stage1, which leaves it out. With train.mpo.steps=auto, mpo trains on as many tokens as both.

Arms can be crossed with ways of taking the length out (`mine.debias`), with training methods (`train.method`) and with
TRL's loss types (`train.loss`).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from dice_py.config.loading import reassigned
from dice_py.config.loss import LossType, MethodName
from dice_py.config.run import RunConfig
from dice_py.errors import UsageError

ARMS: dict[str, tuple[bool, bool]] = {
    "neither": (False, False),
    "length": (True, False),
    "replay": (False, True),
    "both": (True, True),
    "mpo": (True, True),
    "mpo-stage1": (True, True),
}
"""By name: whether the arm takes the length out, and whether it replays offline pairs (as the base config does)."""

TRAININGS: dict[str, dict[str, Any]] = {
    "mpo": {"train.method": "mpo"},
    "mpo-stage1": {"train.method": "mpo", "train.mpo.steps": 0},
}
"""Arms with a training of their own, and its settings."""

DEBIASES = ("linear", "per_token", "bucket", "matched")
MATCHED_RATIO = 0.1
"""mine.length_ratio of debias=matched, where the base config sets no tolerance."""


@dataclass(frozen=True)
class Arm:
    """One arm: its name, which is that of its folder, and its settings by dotted name."""

    name: str
    kind: str
    """One of ARMS."""
    options: dict[str, str] = field(default_factory=dict)
    """Those of `debias`, `method` and `loss` by which it differs from other arms of its kind."""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def has_penalty(self) -> bool:
        """Whether the length is taken out."""
        return ARMS[self.kind][0]

    @property
    def label(self) -> str:
        """How tables name it."""
        text = {
            "neither": "neither",
            "length": "length penalty",
            "replay": "replay",
            "both": "length penalty and replay",
            "mpo": "MPO",
            "mpo-stage1": "MPO, stage 1 alone",
        }
        detail = ", ".join(self.options.values())
        return f"{text[self.kind]} ({detail})" if detail else text[self.kind]

    def config(self, base: RunConfig, seed: int) -> RunConfig:
        """The config of its run with a seed, which is that of the synthetic world too.

        Raises:
            UsageError: its settings do not go together with those of the base config.
        """
        settings = {**self.settings, "seed": seed, **({"world.seed": seed} if base.is_world else {})}
        try:
            return reassigned(base, [f"{name}={json.dumps(value)}" for name, value in settings.items()])
        except UsageError as error:
            raise UsageError(f"arm {self.name}: {error}") from None


def make_arms(
    base: RunConfig,
    names: Sequence[str],
    debiases: Sequence[str] = (),
    methods: Sequence[str] = (),
    losses: Sequence[str] = (),
) -> tuple[Arm, ...]:
    """The arms of an ablation, in order.

    Args:
        base: what all of them share.
        names: of ARMS.
        debiases: of the arms with a penalty; none: that of `base`, or linear if it has none.
        methods: training methods; none: that of `base`.
        losses: TRL's loss types; none: those of `base`.

    Raises:
        UsageError: a name is unknown, or is given twice, or an arm would be a copy of another one.
    """
    for what, given, known in (
        ("arm", names, ARMS),
        ("debias", debiases, DEBIASES),
        ("method", methods, get_args(MethodName)),
        ("loss", losses, get_args(LossType)),
    ):
        _check(what, given, tuple(known))
    if not names:
        raise UsageError(f"no arm is given; there are {', '.join(ARMS)}")
    own_training = [name for name in names if name in TRAININGS]
    if own_training and methods:
        raise UsageError(f"the arm {own_training[0]} has a training method of its own: leave it or --methods out")
    replaying = [name for name in names if ARMS[name][1] and name not in TRAININGS]
    if replaying and base.replay.gamma == 0:
        raise UsageError(
            f"replay.gamma is 0, so the arm {replaying[0]} would replay nothing and be a copy of the one without: give "
            "replay.gamma a share above 0, and offline pairs (--replay); or leave the arm out of --arms"
        )
    own = base.mine.debias if base.mine.debias in DEBIASES else "linear"
    arms = []
    for kind in names:
        has_penalty, has_replay = ARMS[kind]
        ways = (debiases or [own]) if has_penalty else ["none"]
        wanted: list[Sequence[str | None]] = [methods or [None], losses or [None]]
        for debias, (method, loss) in itertools.product(ways, itertools.product(*wanted)):
            options = {
                "debias": debias if has_penalty and len(debiases) > 1 else None,
                "method": method if len(methods) > 1 else None,
                "loss": loss if len(losses) > 1 else None,
            }
            shown = {name: value for name, value in options.items() if value is not None}
            settings = _settings(base, debias, has_replay, method, loss) | TRAININGS.get(kind, {})
            arms.append(Arm("-".join([kind, *shown.values()]), kind, shown, settings))
    return tuple(arms)


def _settings(base: RunConfig, debias: str, has_replay: bool, method: str | None, loss: str | None) -> dict[str, Any]:
    mine = base.mine
    settings: dict[str, Any] = {"mine.debias": debias}
    if debias != "matched":
        settings |= {"mine.length_tolerance": None, "mine.length_ratio": None}
    elif mine.length_tolerance is None and mine.length_ratio is None:
        settings["mine.length_ratio"] = MATCHED_RATIO
    if not has_replay:
        settings["replay.gamma"] = 0.0
    if method is not None:
        settings["train.method"] = method
        if method == "spa":  # whose rewards are against the first reference
            settings["reward_reference"] = "initial"
    if loss is not None:
        settings["train.loss"] = [{"type": loss}]
    return settings


def _check(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise UsageError(f"there is no {what} {unknown[0]!r:.80}; there are {', '.join(known)}")
    twice = [name for name in given if given.count(name) > 1]
    if twice:
        raise UsageError(f"the {what} {twice[0]} is given twice; leave one out")
