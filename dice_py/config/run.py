"""The whole config of a run, and the embedded default."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, model_validator

from dice_py.config.mining import MineConfig
from dice_py.config.shared import DataConfig, DevicesConfig, ModelConfig, Positive, Section
from dice_py.config.stages import EvaluateConfig, GenerateConfig, ReplayConfig, ScoreConfig, WorldConfig
from dice_py.config.training import TrainConfig

ONE_STAGE = {"one_stage": True}


class RunConfig(Section):
    """Everything that decides a run's result; stored resolved as `config.yaml` in the run folder."""

    rounds: Positive = 2
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    beta: Annotated[float, Field(gt=0.0)] = Field(default=0.1, description="β of the implicit reward and of DPO")
    reward_reference: Literal["previous", "initial"] = Field(
        default="previous",
        description="π_ref of round t > 1: what round t−1 started from, or always the first one",
    )
    model: ModelConfig = Field(default_factory=ModelConfig)
    devices: DevicesConfig = Field(default_factory=DevicesConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    generate: GenerateConfig = Field(default_factory=GenerateConfig)
    score: ScoreConfig = Field(default_factory=ScoreConfig)
    mine: MineConfig = Field(default_factory=MineConfig)
    replay: ReplayConfig = Field(default_factory=ReplayConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    world: WorldConfig = Field(default_factory=WorldConfig)

    @property
    def is_world(self) -> bool:
        """True when no model is named, so that the run is on the synthetic world."""
        return self.model.policy is None

    @model_validator(mode="after")
    def _whole_run(self, info: ValidationInfo) -> RunConfig:
        if info.context == ONE_STAGE:
            return self
        if self.mine.min_responses > self.generate.samples:
            raise ValueError(
                f"mine.min_responses is {self.mine.min_responses}, but generate.samples is "
                f"{self.generate.samples}: no prompt could give a pair"
            )
        if self.is_world:
            given = [
                name
                for name, value in (
                    ("model.reference (--reference)", self.model.reference),
                    ("data.prompts (--prompts)", self.data.prompts),
                    ("data.replay (--replay)", self.data.replay),
                    ("data.eval_prompts", self.data.eval_prompts),
                    ("data.eval_pairs", self.data.eval_pairs),
                    ("replay.buffers", self.replay.buffers or None),
                )
                if value is not None
            ]
            if given:
                raise ValueError(
                    f"{', '.join(given)} given without model.policy (--policy); name the policy, "
                    "or leave all of them out to run on the synthetic world"
                )
            if self._weighs_offline or self.replay.stratify_by == "source":
                raise ValueError(
                    "the synthetic world's offline pairs have no margin, round or source: leave out "
                    "replay.margin_power, replay.half_life and replay.stratify_by=source (replay.buffer has its own "
                    "margin_power and half_life)"
                )
            return self
        missing = [
            name
            for name, value in (
                ("model.reference (--reference)", self.model.reference),
                ("data.prompts (--prompts)", self.data.prompts),
            )
            if value is None
        ]
        if missing:
            raise ValueError(f"a run on your own model also needs {' and '.join(missing)}")
        if self.data.replay is None:
            if self.replay.gamma > 0 and not self.replay.buffers and self.replay.buffer is None:
                raise ValueError(
                    f"replay.gamma is {self.replay.gamma}, but no offline pairs are named: give data.replay "
                    "(--replay FILE), replay.buffers or replay.buffer, or set replay.gamma=0"
                )
            if self._weighs_offline:
                raise ValueError(
                    "replay.margin_power and replay.half_life weigh the pairs of data.replay, which is not given: set "
                    "replay.buffers.NAME.… or replay.buffer.… instead"
                )
        return self

    @property
    def _weighs_offline(self) -> bool:
        return self.replay.margin_power > 0 or self.replay.half_life is not None


# The embedded default: every value that differs from RunConfig's own, and nothing else. Measured on the
# world; a run of one's own model starts from RunConfig and never sees these.
WORLD_DEFAULTS: dict[str, Any] = {
    "beta": 1.0,
    "data": {"prompts_per_round": 600},
    "generate": {
        "samples": 8,
        "temperature": 0.7,
        "top_p": 0.9,
        "max_new_tokens": 24,
        "shard_prompts": 200,
    },
    "replay": {"gamma": 0.3},
    "train": {
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "per_device_train_batch_size": 32,
        "sft_weight": 0.2,
        "processes": 1,
    },
    "evaluate": {"prompts": 400, "samples": 4, "pairs": 600},
}
