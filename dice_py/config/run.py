"""The config of a run, and the defaults of a run on the synthetic world."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, model_validator

from dice_py.config.extrapolation import ExtrapolateConfig
from dice_py.config.loss import MINING_LABELS
from dice_py.config.mining import MineConfig
from dice_py.config.report import ReportConfig
from dice_py.config.rounds import COMMAND_PREFIX, ROUND_METRICS, RoundsConfig, WarningsConfig
from dice_py.config.shared import DataConfig, DevicesConfig, ModelConfig, Section
from dice_py.config.stages import (
    EvaluateConfig,
    GenerateConfig,
    ReplayConfig,
    RoundZeroConfig,
    ScoreConfig,
    WorldConfig,
)
from dice_py.config.training import TrainConfig

ONE_STAGE = {"one_stage": True}


class RunConfig(Section):
    """Every setting of a run; stored resolved as `config.yaml` in the run folder."""

    rounds: RoundsConfig = Field(default_factory=RoundsConfig)
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=0, description="all random numbers of the run are derived from it"
    )
    beta: Annotated[float, Field(gt=0.0)] = Field(default=0.1, description="β of the implicit reward and of DPO")
    reward_reference: Literal["previous", "initial"] = Field(
        default="previous",
        description="π_ref of the reward in round t > 1: the policy that round t−1 started from, or always the first "
        "reference",
    )
    model: ModelConfig = Field(default_factory=ModelConfig)
    devices: DevicesConfig = Field(default_factory=DevicesConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    round0: RoundZeroConfig = Field(default_factory=RoundZeroConfig)
    generate: GenerateConfig = Field(default_factory=GenerateConfig)
    score: ScoreConfig = Field(default_factory=ScoreConfig)
    mine: MineConfig = Field(default_factory=MineConfig)
    replay: ReplayConfig = Field(default_factory=ReplayConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    extrapolate: ExtrapolateConfig = Field(default_factory=ExtrapolateConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    report: ReportConfig = Field(default_factory=ReportConfig)
    warnings: WarningsConfig = Field(default_factory=WarningsConfig)
    world: WorldConfig = Field(default_factory=WorldConfig)

    @property
    def is_world(self) -> bool:
        """True when neither a policy nor an SFT model is named: the run is on the synthetic world."""
        return self.model.policy is None and self.model.sft is None

    @property
    def has_round_zero(self) -> bool:
        """True when π_1 is made first, from the SFT model."""
        return self.model.sft is not None

    @property
    def round_metric(self) -> str | None:
        """The metric by which rounds are compared; None where they are not."""
        if not self.rounds.are_compared:
            return None
        default = "oracle_win_rate" if self.is_world else "implicit_reward_accuracy_initial_reference"
        return self.rounds.metric or default

    def most_pairs_per_prompt(self) -> int:
        """The most pairs that the pairing makes of a prompt."""
        mine, samples = self.mine, self.generate.samples
        most = {"top_bottom": mine.top_k * mine.bottom_k, "all_pairs": samples * (samples - 1) // 2}
        pairs = most.get(mine.pairing, 1)
        return pairs if mine.pairs_per_prompt is None else min(pairs, mine.pairs_per_prompt)

    @model_validator(mode="before")
    @classmethod
    def _switch_on(cls, values: Any) -> Any:
        """What the training method needs of the stages before it, where it is off."""
        if not isinstance(values, Mapping):
            return values
        train, mine = (values.get(name, {}) for name in ("train", "mine"))
        method = train.get("method") if isinstance(train, Mapping) else None
        if not isinstance(method, str) or not isinstance(mine, Mapping):
            return values
        # A quantile of 0 is set, and is no False.
        off = {name for name, value in mine.items() if value is None or value is False}
        labels = {name: on for name, on in MINING_LABELS.get(method, {}).items() if name not in mine or name in off}
        changed = {**values, "mine": {**mine, **labels}} if labels else dict(values)
        if method == "spa":
            changed.setdefault("reward_reference", "initial")
        return changed

    @model_validator(mode="after")
    def _check_run(self, info: ValidationInfo) -> RunConfig:
        if info.context == ONE_STAGE:
            return self
        _check_method(self)
        is_sampled = self.generate.from_files is None or self.rounds.count > 1
        if is_sampled and self.mine.min_responses > self.generate.samples:
            raise ValueError(
                f"mine.min_responses is {self.mine.min_responses}, but generate.samples is "
                f"{self.generate.samples}: no prompt could give a pair"
            )
        if not self.has_round_zero and self.round0 != RoundZeroConfig():
            raise ValueError(
                "round0 sets the training of π_1 from an SFT model, which is not given: name it in model.sft (--sft), "
                "or leave round0 out"
            )
        if self.is_world:
            _check_world_run(self)
        elif self.has_round_zero:
            _check_round_zero(self)
        else:
            _check_own_run(self)
        problem = self.extrapolate.problem(
            is_world=self.is_world,
            prompts=self.evaluate.prompts,
            pairs=self.evaluate.pairs,
            has_pairs=self.is_world or self.data.replay is not None or self.data.eval_pairs is not None,
        )
        if problem is not None:
            raise ValueError(problem)
        _check_round_metric(self)
        return self


def _check_method(config: RunConfig) -> None:
    """Checks that the training method gets what it needs of the stages before it."""
    train, mine = config.train, config.mine
    if train.method == "rdpo" and train.length_weight == "auto" and (mine.debias, mine.length) != ("linear", "tokens"):
        raise ValueError(
            "train.length_weight is auto, the penalty per token that mining finds, but mine.debias is "
            f"{mine.debias} and mine.length is {mine.length}: set mine.debias=linear and mine.length=tokens, or "
            "train.length_weight to a number"
        )
    if train.method == "spa" and config.reward_reference != "initial":
        raise ValueError(
            "train.method is spa, whose rewards are against the first reference, but reward_reference is "
            f"{config.reward_reference}: set reward_reference=initial"
        )
    if train.method == "mpo":
        _check_mpo(config)
    if train.weight_column is not None and train.weight_column not in WEIGHT_COLUMNS:
        raise ValueError(
            f"train.weight_column is {train.weight_column!r}, which no stage of a run writes; it may be one of "
            f"{', '.join(WEIGHT_COLUMNS)}"
        )
    needed = WEIGHT_COLUMNS.get(train.weight_column or "margin")
    if needed is not None and not getattr(mine, needed):
        raise ValueError(
            f"train.weight_column is {train.weight_column!r}, a label that mining adds with mine.{needed}: set it"
        )


def _check_mpo(config: RunConfig) -> None:
    """Checks that stage 2 of train.method=mpo has its reward."""
    reward = config.train.mpo.reward
    if reward == "implicit" and config.mine.debias == "bucket":
        raise ValueError(
            "train.method is mpo, whose reward has the length penalty of mining, but mine.debias is bucket, which has "
            "none for new responses: set mine.debias=linear, per_token or none, or name a judge in train.mpo.reward"
        )
    if reward == "oracle" and not config.is_world:
        raise ValueError("train.mpo.reward is oracle, which judges only the synthetic world: name another reward")
    if reward not in ("implicit", "oracle") and getattr(config.evaluate.judges, reward) is None:
        raise ValueError(
            f"train.mpo.reward is {reward}, but the section evaluate.judges.{reward} is not set: set it, or "
            "train.mpo.reward=implicit"
        )


WEIGHT_COLUMNS = {
    "margin": None,
    "chosen_win_rate": "win_rates",
    "soft_label": "soft_labels",
    "consistency": "second_reward",
}
"""Columns of a run's training set that pairs can be weighed by, with the setting of `mine` that adds each."""


def _weights_offline_pairs(config: RunConfig) -> bool:
    return config.replay.margin_power > 0 or config.replay.half_life is not None


def _check_world_run(config: RunConfig) -> None:
    """Checks a run without a policy: it names no files, and asks for no columns that the world's pairs lack."""
    inputs = {
        "model.reference (--reference)": config.model.reference,
        "data.prompts (--prompts)": config.data.prompts,
        "generate.from_files (--generations)": config.generate.from_files,
        "data.replay (--replay)": config.data.replay,
        "data.system_prompt": config.data.system_prompt,
        "data.tools": config.data.tools,
        "model.chat_template": config.model.chat_template,
        "model.chat_template_kwargs": config.model.chat_template_kwargs or None,
        "data.eval_prompts": config.data.eval_prompts,
        "data.eval_pairs": config.data.eval_pairs,
        "replay.buffers": config.replay.buffers or None,
    }
    present = [name for name, value in inputs.items() if value is not None]
    if present:
        raise ValueError(
            f"{', '.join(present)} given without model.policy (--policy) or model.sft (--sft); name the policy, or the "
            "SFT model to make it from, or leave all of them out to run on the synthetic world"
        )
    if _weights_offline_pairs(config) or config.replay.stratify_by == "source":
        raise ValueError(
            "the synthetic world's offline pairs have no margin, round or source: leave out "
            "replay.margin_power, replay.half_life and replay.stratify_by=source (replay.buffer has its own "
            "margin_power and half_life)"
        )


def _check_round_zero(config: RunConfig) -> None:
    """Checks a run that makes its policy from the user's SFT model."""
    made = {"model.policy (--policy)": config.model.policy, "model.reference (--reference)": config.model.reference}
    both = [name for name, value in made.items() if value is not None]
    if both:
        raise ValueError(
            f"{' and '.join(both)} given together with model.sft (--sft): round 0 makes the policy from the SFT model, "
            "which is the reference. Leave out model.sft, or the others"
        )
    if config.data.replay is None:
        raise ValueError(
            "model.sft (--sft) is given without offline pairs: round 0 trains the policy on them; give data.replay "
            "(--replay FILE)"
        )


def _check_own_run(config: RunConfig) -> None:
    """Checks a run on the user's own model: reference, prompts, and offline pairs if it replays any."""
    inputs = {
        "model.reference (--reference)": config.model.reference,
        "data.prompts (--prompts), or generate.from_files (--generations)": config.data.prompts
        or config.generate.from_files,
    }
    missing = [name for name, value in inputs.items() if value is None]
    if missing:
        raise ValueError(f"a run on your own model also needs {' and '.join(missing)}")
    if config.data.replay is not None:
        return
    replay = config.replay
    if replay.gamma > 0 and not replay.buffers and replay.buffer is None:
        raise ValueError(
            f"replay.gamma is {replay.gamma}, but no offline pairs are named: give data.replay "
            "(--replay FILE), replay.buffers or replay.buffer, or set replay.gamma=0"
        )
    if _weights_offline_pairs(config):
        raise ValueError(
            "replay.margin_power and replay.half_life weight the pairs of data.replay, which is not given: set "
            "replay.buffers.NAME.… or replay.buffer.… instead"
        )


def _check_round_metric(config: RunConfig) -> None:
    """Checks that the evaluation measures what rounds are compared by."""
    metric = config.round_metric
    if metric is None or not (why := _lacking(config, metric)):
        return
    known = [name for name in ROUND_METRICS if not _lacking(config, name)]
    raise ValueError(
        f"rounds.metric is {metric}, which this run does not measure ({'; '.join(why)}). It measures: "
        f"{', '.join(known) or 'none'}"
    )


def _lacking(config: RunConfig, metric: str) -> list[str]:
    """What an evaluation lacks to measure a metric of the rounds."""
    evaluate = config.evaluate
    if metric.startswith(COMMAND_PREFIX):
        return [] if evaluate.command is not None else ["evaluate.command is not set"]
    if metric.startswith("implicit_reward"):
        has_pairs = config.is_world or config.data.replay is not None or config.data.eval_pairs is not None
        lacking = [] if has_pairs else ["no offline pairs are given: name data.eval_pairs"]
        return lacking if evaluate.pairs else [*lacking, "evaluate.pairs is 0"]
    lacking = []
    judge = metric.removesuffix("_win_rate").removesuffix("_score")
    if metric.startswith("oracle"):
        lacking += [] if config.is_world else ["only the synthetic world has an oracle"]
    elif getattr(evaluate.judges, judge, None) is None:
        lacking.append(f"evaluate.judges.{judge} is not set")
    return lacking if evaluate.prompts else [*lacking, "evaluate.prompts is 0"]


# Defaults of a run on the synthetic world, where they differ from RunConfig's. They were tuned on that world; a run on
# the user's own model never uses them.
WORLD_DEFAULTS: dict[str, Any] = {
    "beta": 1.0,
    "data": {"prompts_per_round": 800},
    "generate": {
        "samples": 8,
        "temperature": 1.0,
        "top_p": 0.9,
        "max_new_tokens": 24,
        "shard_prompts": 200,
    },
    "train": {
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "per_device_train_batch_size": 32,
        "sft_weight": 0.2,
        "processes": 1,
    },
    "evaluate": {"prompts": 400, "samples": 4, "pairs": 600, "kl_to_reference": True},
    "warnings": {"duplicate_share": None},  # its right answers are few and short
}
