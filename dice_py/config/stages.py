"""Config sections of the stages, except training (config/training.py) and mining (config/mining.py)."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dice_py.config.judges import JudgesConfig
from dice_py.config.passthrough import PassedOptions, passed_options, refuse_own
from dice_py.config.sampling_options import SamplingOptions, transformers_options
from dice_py.config.shared import ADDED, Positive, Probability, Section
from dice_py.config.training import TrainConfig, Warmup
from dice_py.config.vllm_options import OWN_ENGINE_ARGS, OWN_SAMPLING_PARAMS


class VllmConfig(Section):
    """vLLM's engine arguments, under vLLM's names; only kv_cache_gib is ours."""

    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.9, description="share of the GPU's memory that vLLM may use"
    )
    tensor_parallel_size: Positive = Field(default=1, description="GPUs that hold one copy of the model")
    enforce_eager: bool | None = Field(default=None, description="none: true on the CPU, false (CUDA graphs) on a GPU")
    max_num_seqs: Positive | None = Field(default=None, description="most sequences in one batch; none: vLLM's choice")
    max_model_len: Positive | None = Field(default=None, description="none: longest prompt + max_new_tokens")
    kv_cache_gib: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None,
        description="size of the key/value cache; none: 1 GiB on a CPU, else what gpu_memory_utilization leaves",
    )
    engine_args: PassedOptions = passed_options(
        "any further option of vLLM's LLM, such as quantization or max_num_batched_tokens"
    )

    @field_validator("engine_args")
    @classmethod
    def _refuse_own_args(cls, value: PassedOptions) -> PassedOptions:
        return refuse_own(value, OWN_ENGINE_ARGS)


class GenerateConfig(Section):
    """Sampling of K responses per prompt from the current policy."""

    engine: Literal["auto", "transformers", "vllm"] = Field(
        default="auto",
        description="auto: vllm if it is installed and a GPU is used, or on a CPU if it is faster for the model and "
        "the number and length of responses; else transformers",
    )
    samples: Annotated[int, Field(ge=2, le=65535)] = Field(default=16, description="K, responses per prompt")
    temperature: Annotated[float, Field(gt=0.0)] = Field(default=0.9, description="sampling temperature")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(default=1.0, description="nucleus sampling; 1: off")
    top_k: Annotated[int, Field(ge=0)] = Field(default=0, description="0: off")
    max_new_tokens: Positive = Field(default=2048, description="most tokens of a response")
    shard_prompts: Positive = Field(default=256, description="prompts per shard; a resume keeps completed shards")
    token_budget: Positive = Field(
        default=65536, description="transformers engine: prompt and response tokens of one batch, padding included"
    )
    sampling_params: PassedOptions = passed_options(
        "any further option of vLLM's SamplingParams, such as min_p, repetition_penalty or stop; engine transformers "
        "has some of them (docs/running.md)"
    )
    vllm: VllmConfig = Field(default_factory=VllmConfig)
    from_files: list[str] | None = Field(
        default=None,
        description="responses that were sampled elsewhere, in place of round 1's sampling: Parquet, JSONL or JSON "
        "files, or patterns of them (docs/generations.md)",
        json_schema_extra=ADDED,
    )
    thinking: list[str] | None = Field(
        default=None,
        description="what opens and closes the thinking part of a response; none: <think> and </think>, or another "
        "pair that the tokenizer has as tokens",
        json_schema_extra=ADDED,
    )

    def key_dump(self, *, exclude: Collection[str] = ()) -> dict[str, Any]:
        """As `Section.key_dump`, without the paths of `from_files`: what is in them is in the key of what they gave."""
        return super().key_dump(exclude=(*exclude, "from_files"))

    @field_validator("from_files", mode="before")
    @classmethod
    def _list_files(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("from_files")
    @classmethod
    def _check_files(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and not all(value):
            raise ValueError("it names no file; null: sample")
        return value or None

    @field_validator("thinking")
    @classmethod
    def _check_thinking(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and (len(value) != 2 or not all(value) or value[0] == value[1]):
            raise ValueError("give two different texts, such as ['<think>', '</think>']")
        return value

    @field_validator("sampling_params")
    @classmethod
    def _refuse_own_params(cls, value: PassedOptions) -> PassedOptions:
        return refuse_own(value, OWN_SAMPLING_PARAMS)

    @model_validator(mode="after")
    def _check_params(self) -> GenerateConfig:
        if self.engine == "transformers":  # vLLM judges its own, before a run begins
            try:
                self.transformers_options()
            except ValueError as error:
                raise ValueError(f"sampling_params: {error}") from None
        return self

    def transformers_options(self) -> SamplingOptions:
        """`sampling_params` as the transformers engine takes them.

        Raises:
            ValueError: it does not have one of them, or not in this range.
        """
        return transformers_options(self.sampling_params, self.max_new_tokens)


class ScoreConfig(Section):
    """Log-probabilities of policy and reference over the stored token ids."""

    token_budget: Literal["auto"] | Positive = Field(
        default="auto", description="tokens of one batch; auto: measured once per model and device, then cached"
    )
    allow_same_model: bool = Field(
        default=False,
        description="allow a policy and a reference with the same weights, so that every reward is 0; else refused",
    )
    logit_chunk: Positive = Field(default=1024, description="response positions whose logits are in memory at one time")
    policy_logps: Literal["reuse_if_equal", "recompute"] = Field(
        default="reuse_if_equal",
        description="reuse_if_equal: reuse the log-probabilities of sampling if they are measured to equal the "
        "scorer's; recompute: always run the policy's forward",
    )
    gate_responses: Positive = Field(
        default=256, description="policy_logps=reuse_if_equal: number of responses that are compared"
    )
    gate_tolerance: Annotated[float, Field(gt=0.0)] = Field(
        default=0.01,
        description="policy_logps=reuse_if_equal: largest mean |difference| of the reward, as a share of its "
        "standard deviation",
    )


Share = Annotated[float, Field(gt=0.0)]
MarginPower = Annotated[float, Field(ge=0.0)]
HalfLife = Annotated[float, Field(gt=0.0)]


class BufferConfig(Section):
    """One named file of offline pairs in addition to data.replay, with the columns that data.*_column name."""

    path: str = Field(description="offline pairs in TRL's format")
    share: Share = Field(default=1.0, description="share of the replayed pairs, relative to the other buffers' shares")
    weight_column: str | None = Field(default=None, description="sampling weights, in this file")
    margin_power: MarginPower = Field(default=0.0, description="w = max(margin, 0)^margin_power; 0: off")
    half_life: HalfLife | None = Field(default=None, description="rounds; w = 2^(−age / half_life); none: off")


class RoundsBufferConfig(Section):
    """The run's own buffer, `buffer/`: pairs that earlier rounds mined, capped by reservoir sampling."""

    capacity: Positive = Field(default=20000, description="pairs: a uniform sample of all pairs mined so far")
    share: Share = Field(default=1.0, description="share of the replayed pairs, relative to the other buffers' shares")
    margin_power: MarginPower = Field(default=0.0, description="w = max(margin, 0)^margin_power; 0: off")
    half_life: HalfLife | None = Field(default=None, description="rounds; w = 2^(−age / half_life); none: off")


class ReplayConfig(Section):
    """The share γ of replayed pairs in the training set, and how they are sampled (formulas: replay/weights.py)."""

    gamma: Probability = Field(default=0.5, description="γ, replayed pairs as a share of the training set")
    total: Positive | None = Field(default=None, description="pairs in the training set; none: keep all mined pairs")
    on_shortfall: Literal["error", "record"] = Field(
        default="record",
        description="too few offline pairs: stop, or use all of them and record the shortfall",
    )
    share: Share = Field(default=1.0, description="share of data.replay, relative to the shares of the buffers below")
    margin_power: MarginPower = Field(
        default=0.0, description="data.replay: w = max(margin, 0)^margin_power, of data.margin_column; 0: off"
    )
    half_life: HalfLife | None = Field(
        default=None, description="data.replay, in rounds: w = 2^(−age / half_life), of data.round_column; none: off"
    )
    stratify_by: Literal["none", "length", "source"] = Field(
        default="none",
        description="sample every buffer by strata: quantiles of the chosen length, or values of data.source_column",
    )
    allocation: Literal["proportional", "equal"] = Field(
        default="proportional", description="pairs per stratum: in proportion to its candidates, or equal"
    )
    length_buckets: Positive = Field(default=4, description="number of length quantiles of stratify_by=length")
    buffers: dict[str, BufferConfig] = Field(
        default_factory=dict, description="further files of offline pairs, by name"
    )
    buffer: RoundsBufferConfig | None = Field(
        default=None, description="keep mined pairs for later rounds; none: do not"
    )

    @model_validator(mode="after")
    def _check_buffer_names(self) -> ReplayConfig:
        for name in self.buffers:
            if re.fullmatch(r"[A-Za-z0-9_]+", name) is None or name in ("replay", "rounds"):
                raise ValueError(
                    f"a buffer is named {name!r}: use letters, digits and underscores, and neither 'replay' "
                    "(data.replay) nor 'rounds' (the run's own buffer)"
                )
        return self


class RoundZeroConfig(Section):
    """Round 0 (model.sft): DPO from the SFT model on all pairs of data.replay. Each setting: none is as in train."""

    learning_rate: Annotated[float, Field(gt=0.0)] | None = Field(default=None, description="peak learning rate")
    lr_scheduler_type: str | None = Field(default=None, description="a scheduler of transformers")
    warmup_steps: Warmup | None = Field(
        default=None, description="optimizer steps over which the learning rate rises; below 1: a share of the steps"
    )
    num_train_epochs: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None, description="passes over the pairs; train.max_steps then does not apply"
    )
    max_steps: Positive | None = Field(default=None, description="optimizer steps")
    sft_weight: Annotated[float, Field(ge=0.0)] | None = Field(
        default=None, description="weight of the NLL of the chosen response, added to the loss"
    )

    def training(self, train: TrainConfig) -> TrainConfig:
        """`train` with the settings that are given here, and DPO's loss: offline pairs have no mined labels."""
        update = {name: value for name, value in self.model_dump().items() if value is not None}
        plain = ("loss", "f_divergence_type", "label_smoothing", "use_weighting")
        update |= train.without_labels() | {name: TrainConfig.model_fields[name].get_default() for name in plain}
        if self.num_train_epochs is not None:
            update.setdefault("max_steps", None)
        return train.model_copy(update=update)


COMMAND_SETTINGS = ("command", "command_timeout", "command_folder")
"""Settings of `evaluate` that are the benchmark stage's."""


class EvaluateConfig(Section):
    """Evaluation after a round, on held-out prompts and pairs."""

    prompts: Annotated[int, Field(ge=0)] = Field(
        default=256, description="held-out prompts; 0: no responses are sampled"
    )
    samples: Positive = Field(default=1, description="responses per held-out prompt")
    pairs: Annotated[int, Field(ge=0)] = Field(default=512, description="held-out offline pairs")
    kl_to_start: bool = Field(
        default=True,
        description="measure the KL divergence from the policy that the run started from: one pass of that model over "
        "the samples, from round 2 on",
        json_schema_extra=ADDED,
    )
    kl_to_reference: bool = Field(
        default=False,
        description="measure the KL divergence from the first reference too, which is the SFT model of a run with "
        "model.sft: one pass of that model over the samples, where no other metric needs it",
        json_schema_extra=ADDED,
    )
    judges: JudgesConfig = Field(default_factory=JudgesConfig, json_schema_extra=ADDED)
    command: list[str] | None = Field(
        default=None,
        description="a benchmark of your own: a program with its arguments, of which {model} is the new policy's "
        "folder (without {model} it comes last). It prints a JSON object of numbers, which join the round's metrics "
        "as command.NAME",
        json_schema_extra=ADDED,
    )
    command_timeout: Annotated[float, Field(gt=0.0)] = Field(
        default=3600.0, description="seconds that the command may take", json_schema_extra=ADDED
    )
    command_folder: str | None = Field(
        default=None,
        description="the folder that the command runs in; none: the one that the run was started in",
        json_schema_extra=ADDED,
    )

    @field_validator("command", mode="before")
    @classmethod
    def _split_command(cls, value: Any) -> Any:
        """A text as a shell would split it; no shell runs it."""
        if not isinstance(value, str | list | None):
            raise ValueError(
                "write the program and its arguments as a text, or as a list of texts (YAML reads a text with a colon "
                "and a space in it as a mapping: put it in quotes)"
            )
        return shlex.split(value) if isinstance(value, str) else value

    @field_validator("command")
    @classmethod
    def _check_command(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and (not value or not value[0]):
            raise ValueError("it names no program; null: no command")
        if value is not None and any("\0" in part for part in value):
            raise ValueError("an argument cannot have a NUL character")
        return value


class WorldConfig(Section):
    """Sizes and seed of the synthetic world (synthetic/task.py)."""

    seed: int = Field(default=0, ge=0, lt=2**63, description="makes the task's data and models")
    sft_steps: Positive = Field(default=600, description="optimizer steps of the reference's training")
    offline_pairs: Positive = Field(
        default=3000, description="pairs of the noisy annotator, for the policy's training and for replay"
    )
    round_prompts: Positive = Field(default=4000, description="prompts for the rounds")
    eval_prompts: Positive = Field(default=400, description="held-out prompts")
    eval_pairs: Positive = Field(default=600, description="held-out pairs, labeled by the oracle")
    width: Annotated[int, Field(gt=0, multiple_of=4)] = Field(
        default=128, description="hidden size of the models", json_schema_extra=ADDED
    )
    dpo_learning_rate: Annotated[float, Field(gt=0.0)] = Field(
        default=3e-4, description="peak learning rate of the policy's DPO training", json_schema_extra=ADDED
    )
    dpo_epochs: Annotated[float, Field(gt=0.0)] = Field(
        default=2.0, description="passes of the policy's DPO training over the offline pairs", json_schema_extra=ADDED
    )
