"""The resolved configuration of a run: pydantic models, YAML files and `--set a.b=c`.

Parsed before anything heavy is imported. Unknown keys are refused with the nearest known name. The paper's
settings are in configs/*.yaml; the defaults here are those of a first run on a model of one's own.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from dice_py.errors import UsageError
from dice_py.mine_options import Debias, MineOptions, Pairing, PickFrom

Positive = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, and so are NaN and infinities."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True, protected_namespaces=())


class ModelConfig(Section):
    """Which models, and how they are held. A name is a folder or a Hugging Face id; none means the world."""

    policy: str | None = Field(default=None, description="π_1, the DPO-tuned model; none: the synthetic world's")
    reference: str | None = Field(default=None, description="the model that the policy's DPO training started from")
    policy_revision: str | None = None
    reference_revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: bfloat16 on a GPU that has it, float32 elsewhere"
    )
    device: str = Field(default="auto", description="auto: the first GPU, else the CPU")
    attn_implementation: str | None = None
    trust_remote_code: bool = False


class DevicesConfig(Section):
    """Which devices work on the shards of generation and scoring, and what becomes of a group that fails.

    One process per group of devices; a group is one GPU, or generate.vllm.tensor_parallel_size of them. None of it
    changes a result, so none of it is part of a key.
    """

    gpus: Literal["all"] | list[Annotated[int, Field(ge=0)]] = Field(
        default="all", description="by number, among those that CUDA_VISIBLE_DEVICES leaves visible"
    )
    cpu_processes: Positive = Field(default=1, description="groups where no GPU is used; they share the cores")
    on_dead_group: Literal["go_on", "stop"] = Field(
        default="go_on", description="a group's process that dies: go on with the other groups, or stop the run"
    )
    shard_attempts: Positive = Field(default=2, description="groups that may try a shard before the stage fails")


class DataConfig(Section):
    """Prompts for the rounds, offline preference pairs for the replay, and what is held out."""

    prompts: str | None = Field(default=None, description="JSONL, JSON or Parquet with a prompt column")
    replay: str | None = Field(default=None, description="offline pairs in TRL's format: prompt, chosen, rejected")
    eval_prompts: str | None = Field(default=None, description="held-out prompts; none: a share of `prompts`")
    eval_pairs: str | None = Field(default=None, description="held-out offline pairs for the reward's accuracy")
    prompt_column: str = "prompt"
    chosen_column: str = "chosen"
    rejected_column: str = "rejected"
    weight_column: str | None = Field(default=None, description="weights of the replay draw, in the replay file")
    margin_column: str = Field(default="margin", description="read where a replay.…margin_power is above 0")
    round_column: str = Field(default="round", description="read where a replay.…half_life is given")
    source_column: str = Field(default="source", description="read for replay.stratify_by=source")
    prompts_per_round: Positive | None = Field(
        default=None,
        description="a fresh slice of the shuffled prompts for each round; none: all of them each round",
    )
    max_prompt_tokens: Positive = Field(default=4096, description="longer prompts are left out, and counted")


class VllmConfig(Section):
    """What vLLM's engine is told beyond the sampling parameters."""

    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    tensor_parallel_size: Positive = 1
    enforce_eager: bool | None = Field(default=None, description="none: eager on the CPU, CUDA graphs on a GPU")
    max_num_seqs: Positive | None = None
    max_model_len: Positive | None = Field(default=None, description="none: longest prompt + max_new_tokens")
    kv_cache_gib: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None, description="size of the key/value cache; on a CPU 1 GiB unless told"
    )


class GenerateConfig(Section):
    """Sampling K responses per prompt from the current policy."""

    engine: Literal["auto", "transformers", "vllm"] = "auto"
    samples: Annotated[int, Field(ge=2, le=65535)] = Field(default=16, description="K, responses per prompt")
    temperature: Annotated[float, Field(gt=0.0)] = 0.9
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = Field(default=0, description="0: off")
    max_new_tokens: Positive = 2048
    shard_prompts: Positive = Field(default=256, description="prompts per shard, the unit that a resume keeps")
    token_budget: Positive = Field(
        default=65536, description="transformers engine: padded prompt and response tokens of one batch"
    )
    vllm: VllmConfig = Field(default_factory=VllmConfig)


class ScoreConfig(Section):
    """Log-probabilities of policy and reference over the stored token ids."""

    token_budget: Literal["auto"] | Positive = Field(
        default="auto", description="tokens of one batch; auto: found, and remembered for the model and the device"
    )
    logit_chunk: Positive = Field(default=1024, description="response positions whose logits exist at one time")
    policy_logps: Literal["gate", "scored"] = Field(
        default="gate",
        description="scored: the policy's own forward, always; gate: those that came with the samples, where they are "
        "measured to be the same",
    )
    gate_responses: Positive = Field(default=256, description="policy_logps=gate: responses that are compared")
    gate_tolerance: Annotated[float, Field(gt=0.0)] = Field(
        default=0.01,
        description="policy_logps=gate: largest mean |difference| of the reward, as a share of its standard deviation",
    )


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


Share = Annotated[float, Field(gt=0.0)]
MarginPower = Annotated[float, Field(ge=0.0)]
HalfLife = Annotated[float, Field(gt=0.0)]


class BufferConfig(Section):
    """One named buffer of offline pairs beside data.replay, with the columns that data.*_column name."""

    path: str = Field(description="offline pairs in TRL's format")
    share: Share = Field(default=1.0, description="of the replayed pairs, relative to the other buffers' shares")
    weight_column: str | None = Field(default=None, description="weights of the draw, in this file")
    margin_power: MarginPower = Field(default=0.0, description="w = max(margin, 0)^margin_power; 0: off")
    half_life: HalfLife | None = Field(default=None, description="rounds; w = 2^(−age / half_life); none: off")


class RoundsBufferConfig(Section):
    """The run's own buffer, `buffer/`: what earlier rounds mined, capped by a reservoir."""

    capacity: Positive = Field(default=20000, description="pairs: a uniform sample of all that were mined")
    share: Share = Field(default=1.0, description="of the replayed pairs, relative to the other buffers' shares")
    margin_power: MarginPower = Field(default=0.0, description="w = max(margin, 0)^margin_power; 0: off")
    half_life: HalfLife | None = Field(default=None, description="rounds; w = 2^(−age / half_life); none: off")


class ReplayConfig(Section):
    """The share γ of replayed pairs in the training set, and which ones (dice_py/replay_weights.py: formulas)."""

    gamma: Probability = 0.5
    total: Positive | None = Field(default=None, description="pairs in the training set; none: keep all mined pairs")
    on_shortfall: Literal["error", "record"] = Field(
        default="record",
        description="too few offline pairs: stop, or take what there is and record the shortfall",
    )
    share: Share = Field(default=1.0, description="of data.replay, relative to the shares of the buffers below")
    margin_power: MarginPower = Field(
        default=0.0, description="data.replay: w = max(margin, 0)^margin_power, of data.margin_column; 0: off"
    )
    half_life: HalfLife | None = Field(
        default=None, description="data.replay, in rounds: w = 2^(−age / half_life), of data.round_column; none: off"
    )
    stratify_by: Literal["none", "length", "source"] = Field(
        default="none",
        description="draw every buffer by strata: quantiles of the chosen's length, or values of data.source_column",
    )
    allocation: Literal["proportional", "equal"] = Field(
        default="proportional", description="counts of the strata: by their candidates, or the same for each"
    )
    length_buckets: Positive = Field(default=4, description="length quantiles of stratify_by=length")
    buffers: dict[str, BufferConfig] = Field(default_factory=dict, description="further files of pairs, by name")
    buffer: RoundsBufferConfig | None = Field(default=None, description="keep what rounds mine; none: do not")

    @model_validator(mode="after")
    def _names(self) -> ReplayConfig:
        for name in self.buffers:
            if re.fullmatch(r"[A-Za-z0-9_]+", name) is None or name in ("replay", "rounds"):
                raise ValueError(
                    f"a buffer is named {name!r}: use letters, digits and underscores, and neither 'replay' "
                    "(data.replay) nor 'rounds' (the run's own buffer)"
                )
        return self


class LoraConfig(Section):
    """LoRA adapters, merged into the policy after the round so that every round ends in a whole model."""

    r: Positive = 16
    alpha: Positive = 32
    dropout: Probability = 0.0
    target_modules: list[str] | Literal["all-linear"] = "all-linear"


class TrainConfig(Section):
    """One DPO run from the policy, with the policy itself as the reference."""

    learning_rate: Annotated[float, Field(gt=0.0)] = 5e-7
    lr_scheduler: str = Field(default="constant_with_warmup", description="a name that transformers knows")
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    max_steps: Positive | None = Field(default=None, description="optimizer steps; none: `epochs` over the pairs")
    epochs: Annotated[float, Field(gt=0.0)] = 1.0
    batch_size: Positive = Field(default=32, description="pairs per optimizer step")
    micro_batch_size: Positive = Field(default=4, description="pairs per forward and device")
    sft_weight: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0, description="weight of the NLL of the chosen, added to the loss (TRL's `sft`)"
    )
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    optim: str = "adamw_torch"
    adam_beta2: Probability = 0.999
    lora: LoraConfig | None = None
    gradient_checkpointing: bool = Field(
        default=False, description="activations of a layer are computed again in the backward pass, not kept"
    )
    max_length: Positive | None = Field(default=None, description="longer pairs are left out, and counted")
    save_steps: Positive | None = Field(default=100, description="checkpoints that a resume goes on from")
    logging_steps: Positive = 10
    report_to: list[str] = Field(default_factory=list, description="TRL's trackers: wandb, tensorboard, …")
    step0_pairs: Positive = Field(default=64, description="pairs on which the loss at step 0 is checked")
    step0_tolerance: Annotated[float, Field(gt=0.0)] = Field(
        default=1e-3, description="largest |loss − ln 2| at step 0"
    )
    processes: Literal["auto"] | Positive = Field(
        default="auto",
        description="auto: one per GPU of devices.gpus, as many as batch_size divides among; one on the CPU",
    )
    strategy: Literal["auto", "ddp", "fsdp2", "zero3"] = Field(
        default="auto", description="of several processes; auto: fsdp2 on GPUs, ddp on the CPU and with lora"
    )
    accelerate_config: str | None = Field(
        default=None, description="a YAML file of accelerate's, used as it is in place of processes and strategy"
    )

    def decisive(self) -> dict[str, Any]:
        """What decides the trained weights, for keys: all but how the work is spread over processes."""
        return self.model_dump(exclude={"processes", "strategy", "accelerate_config"})

    @model_validator(mode="after")
    def _spread(self) -> TrainConfig:
        if self.accelerate_config is not None and (self.processes != "auto" or self.strategy != "auto"):
            raise ValueError("accelerate_config says how many processes, and how: leave out processes and strategy")
        if self.lora is not None and self.strategy in ("fsdp2", "zero3"):
            raise ValueError(
                f"strategy is {self.strategy}, but adapters are small and their base is frozen: with lora, take ddp"
            )
        several = 1 if self.processes == "auto" else self.processes
        if several > 1 and self.batch_size % (self.micro_batch_size * several):
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of micro_batch_size × processes "
                f"({self.micro_batch_size} × {self.processes})"
            )
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> TrainConfig:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of micro_batch_size "
                f"({self.micro_batch_size}), which it reaches by gradient accumulation"
            )
        return self


class EvaluateConfig(Section):
    """What is measured after a round, always on prompts that no round trains on."""

    prompts: Annotated[int, Field(ge=0)] = Field(default=256, description="held-out prompts; 0: no samples drawn")
    samples: Positive = Field(default=1, description="responses per held-out prompt")
    pairs: Annotated[int, Field(ge=0)] = Field(default=512, description="held-out offline pairs")


class WorldConfig(Section):
    """The synthetic world (dice_py/world.py): sizes and the seed that makes it."""

    seed: int = 0
    sft_steps: Positive = 600
    offline_pairs: Positive = 3000
    round_prompts: Positive = 4000
    eval_prompts: Positive = 400
    eval_pairs: Positive = 600


_ONE_STAGE = {"one_stage": True}


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
        if info.context == _ONE_STAGE:
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
        "lr_scheduler": "cosine",
        "warmup_steps": 0,
        "micro_batch_size": 32,
        "sft_weight": 0.2,
        "processes": 1,
    },
    "evaluate": {"prompts": 400, "samples": 4, "pairs": 600},
}


def _merge(into: dict[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in update.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = _merge({}, value) if isinstance(value, Mapping) else value
    return into


def known_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Dotted names of every key, in order of definition; `*` where the user gives a name."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        # In a mapping of sections the user gives the names: * stands for any.
        below = f"{prefix}{name}.*." if getattr(field.annotation, "__origin__", None) is dict else f"{prefix}{name}."
        for option in options:
            if isinstance(option, type) and issubclass(option, BaseModel):
                names.extend(known_keys(option, below))
    return names


def _nearest(unknown: str) -> str:
    """The end of a sentence about an unknown key: the known ones that it may have meant."""
    section, _, last = unknown.rpartition(".")
    # (section, key) of every known name
    known = [(name.rpartition(".")[0], name.rpartition(".")[2]) for name in known_keys()]
    siblings = [key for place, key in known if fnmatch.fnmatchcase(section, place)]
    near = [(section, key) for key in difflib.get_close_matches(last, siblings, n=1, cutoff=0.75)]
    near = near or [(place, key) for place, key in known if key == last]
    if not near:
        close = difflib.get_close_matches(last, [key for _, key in known], n=1, cutoff=0.7)
        near = [(place, key) for place, key in known if key in close]
    names = [f"'{place}.{key}'" if place else f"'{key}'" for place, key in near]
    if names:
        return f"did you mean {' or '.join(names)}?"
    return f"the keys {f'of {section!r} ' if section else ''}are {', '.join(siblings)}"


def _explain(error: ValidationError, source: str) -> UsageError:
    lines = []
    for item in error.errors():
        parts = [str(part) for part in item["loc"]]
        if item["type"] == "extra_forbidden":
            where = ".".join(parts)
            lines.append(f"unknown key '{where}'; {_nearest(where)}")
            continue
        # Beside keys, a place names the branch of a union that was tried: "literal['auto']", "float".
        where = ".".join(part for part in parts if part.replace("_", "").isalnum() and part != "float")
        text = item["msg"].removeprefix("Value error, ")
        got = "" if isinstance(item["input"], Section | dict) else f" (got {item['input']!r})"
        lines.append(f"{where}: {text}{got}" if where else text)
    return UsageError(f"{source}: " + "; ".join(dict.fromkeys(lines)))


def _yaml_problem(error: yaml.YAMLError) -> str:
    """In one line; PyYAML's own text takes several."""
    mark = getattr(error, "problem_mark", None)
    said = getattr(error, "problem", None) or str(error)
    return f"{said} (line {mark.line + 1}, column {mark.column + 1})" if mark else said


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"config file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"config file {path} is not valid YAML: {_yaml_problem(error)}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UsageError(f"config file {path} must hold a mapping of keys, not a {type(loaded).__name__}")
    return loaded


def _parse_set(assignment: str) -> dict[str, Any]:
    name, equals, text = assignment.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--set {assignment}: write it as --set section.key=value")
    try:
        value = yaml.safe_load(text) if text.strip() else None
    except yaml.YAMLError as error:
        raise UsageError(f"--set {assignment}: the value is not valid YAML: {_yaml_problem(error)}") from None
    nested: Any = value
    for part in reversed(name.strip().split(".")):
        nested = {part: nested}
    result: dict[str, Any] = nested
    return result


def resolve(
    files: Iterable[Path] = (),
    assignments: Iterable[str] = (),
    overrides: Mapping[str, Any] | None = None,
    *,
    one_stage: bool = False,
) -> RunConfig:
    """Files in order, then `overrides` (from options such as --policy), then `--set` assignments.

    With `one_stage` the config is for a stage called alone: the world's defaults are not added, and nothing
    is asked for that only a whole run needs.

    Raises:
        UsageError: an unknown key (with the nearest known one), or a value out of its range.
    """
    given: dict[str, Any] = {}
    for path in files:
        _merge(given, _read_yaml(path))
    _merge(given, dict(overrides or {}))
    for assignment in assignments:
        _merge(given, _parse_set(assignment))
    model = given.get("model")
    named = isinstance(model, Mapping) and model.get("policy") is not None
    base: dict[str, Any] = {} if named or one_stage else _merge({}, WORLD_DEFAULTS)
    try:
        return RunConfig.model_validate(_merge(base, given), context=_ONE_STAGE if one_stage else None)
    except ValidationError as error:
        raise _explain(error, "config") from None


def dump(config: RunConfig) -> str:
    """The resolved config as YAML, every key present."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def load_resolved(path: Path) -> RunConfig:
    """A `config.yaml` written by `dump`: nothing is added to it, not even the world's defaults."""
    try:
        return RunConfig.model_validate(_read_yaml(path))
    except ValidationError as error:
        raise _explain(error, str(path)) from None
