"""Config sections that several stages read: models, devices, data."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Annotated, Any, Literal, LiteralString

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dice_py.rows.bad_rows import BadRowRule
from dice_py.rows.messages import check_variables

Positive = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]


ADDED: dict[str, Any] = {"added": True}
"""`json_schema_extra` of a field that came after runs were made, and whose default is what they did."""


SECRET: LiteralString = "secret"
"""The type of a `PydanticCustomError` about a value that errors must not repeat."""


class Section(BaseModel):
    """Base of every section. Unknown keys, NaN and infinities are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True, protected_namespaces=())

    def key_dump(self, *, exclude: Collection[str] = ()) -> dict[str, Any]:
        """The settings for a stage's key: as `model_dump`, without fields that are marked `ADDED` and at their default.

        So a run that was made before such a setting existed keeps its keys. Sections inside are dumped likewise.

        Args:
            exclude: names of further fields to leave out.
        """
        dumped = self.model_dump(exclude=set(exclude))
        for name, field in type(self).model_fields.items():
            if name not in dumped:
                continue
            value = getattr(self, name)
            if isinstance(value, Section):
                dumped[name] = value.key_dump()
            if field.json_schema_extra == ADDED and value == field.get_default(call_default_factory=True):
                del dumped[name]
        return dumped


class ModelConfig(Section):
    """The models and how they are loaded. Each is a folder, a GGUF file or a Hugging Face id."""

    policy: str | None = Field(
        default=None, description="π_1, the DPO-tuned model; neither it nor sft: a run on the synthetic world"
    )
    reference: str | None = Field(default=None, description="the model that the policy's DPO training started from")
    sft: str | None = Field(
        default=None,
        description="instead of policy and reference: the SFT model. Round 0 trains π_1 from it by DPO on data.replay, "
        "and it is the reference of round 1",
    )
    policy_revision: str | None = Field(
        default=None, description="branch, tag or commit of the policy on the Hugging Face hub"
    )
    reference_revision: str | None = Field(default=None, description="branch, tag or commit of the reference")
    sft_revision: str | None = Field(default=None, description="branch, tag or commit of the SFT model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: bfloat16 on a GPU that supports it, else float32"
    )
    device: str = Field(default="auto", description="auto: the first GPU, else the CPU")
    attn_implementation: str | None = Field(
        default=None, description="attention of transformers, such as sdpa or flash_attention_2; none: its choice"
    )
    trust_remote_code: bool = Field(
        default=False, description="run code that comes with a model; only for models whose code you trust"
    )
    template_time: str | None = Field(
        default=None,
        description="the time that a chat template prints (strftime_now), as 2026-01-31T12:00:00; none: when the "
        "run was made",
    )
    chat_template: str | None = Field(
        default=None,
        description="a chat template in place of the tokenizer's: a file with a Jinja template, or none for a base "
        "model without one, whose prompts are then plain text (docs/templates.md)",
        json_schema_extra=ADDED,
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="variables of the chat template for every prompt, such as {enable_thinking: false}; those of a "
        "row's column chat_template_kwargs win",
        json_schema_extra=ADDED,
    )

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_variables(cls, value: dict[str, Any]) -> dict[str, Any]:
        return check_variables(value)

    @field_validator("template_time")
    @classmethod
    def _check_time(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                datetime.fromisoformat(value)
            except ValueError:
                raise ValueError(f"{value!r} is no time; write it as 2026-01-31T12:00:00") from None
        return value


class DevicesConfig(Section):
    """The devices for the shards of generation and scoring, and what happens when a worker process fails.

    There is one worker process per group of devices. A group is one GPU, or generate.vllm.tensor_parallel_size GPUs.
    These settings do not change results, so no key depends on them.
    """

    gpus: Literal["all"] | list[Annotated[int, Field(ge=0)]] = Field(
        default="all", description="indices among the GPUs that CUDA_VISIBLE_DEVICES leaves visible"
    )
    cpu_processes: Positive = Field(
        default=1, description="worker processes where no GPU is used; they share the cores"
    )
    on_worker_failure: Literal["continue", "abort"] = Field(
        default="continue", description="when a worker process dies: continue with the others, or abort the run"
    )
    shard_attempts: Positive = Field(
        default=2, description="worker processes that may try a shard before the stage fails"
    )
    executor: Literal["local", "ray"] = Field(
        default="local",
        description="where shards are sampled and scored: this machine, or the nodes of a Ray cluster",
        json_schema_extra=ADDED,
    )
    ray_address: str | None = Field(
        default=None,
        description="address of the cluster's head, as 10.0.0.1:6379, or auto: the cluster that this machine belongs "
        "to; none: that of the variable RAY_ADDRESS, else a cluster of this machine alone is started",
        json_schema_extra=ADDED,
    )
    ray_wait: Annotated[float, Field(ge=0.0)] = Field(
        default=600.0,
        description="seconds to wait for a node of the cluster when none is left to work",
        json_schema_extra=ADDED,
    )

    @field_validator("ray_address")
    @classmethod
    def _check_address(cls, value: str | None) -> str | None:
        if value is not None and value.startswith("ray://"):
            raise ValueError(
                f"{value!r} is for Ray Client, which needs no shared file system; start the run on a node of the "
                "cluster, with the address of its head, as 10.0.0.1:6379"
            )
        return value

    @model_validator(mode="after")
    def _check_executor(self) -> DevicesConfig:
        if self.executor == "ray" and self.gpus != "all":
            raise ValueError(
                f"gpus is {self.gpus}, but with executor=ray it is Ray that gives out GPUs: leave gpus out"
            )
        if self.executor == "local" and self.ray_address is not None:
            raise ValueError("ray_address is set, but executor is local: set executor=ray, or leave ray_address out")
        return self


class DataConfig(Section):
    """Prompts for the rounds, offline preference pairs for replay, and held-out data."""

    prompts: str | None = Field(
        default=None,
        description="files, a folder, a pattern or owner/name:SPLIT of the Hugging Face hub; none with model.sft: the "
        "prompts of replay",
    )
    replay: str | None = Field(default=None, description="offline pairs: prompt, chosen, rejected")
    eval_prompts: str | None = Field(default=None, description="held-out prompts; none: a share of prompts")
    eval_pairs: str | None = Field(
        default=None,
        description="held-out offline pairs, on which the reward's accuracy is measured; none: a share of replay",
    )
    prompt_column: str = Field(
        default="prompt", description="name of the prompts' column; rows without `prompt` may have another"
    )
    chosen_column: str = Field(default="chosen", description="name of the column of chosen responses")
    rejected_column: str = Field(default="rejected", description="name of the column of rejected responses")
    weight_column: str | None = Field(default=None, description="sampling weights, in the replay file")
    margin_column: str = Field(
        default="margin",
        description="read if a replay.…margin_power is above 0; rows without `margin` may have score_chosen and "
        "score_rejected",
    )
    round_column: str = Field(default="round", description="read if a replay.…half_life is set")
    source_column: str = Field(default="source", description="read for replay.stratify_by=source")
    prompts_per_round: Positive | None = Field(
        default=None,
        description="a fresh slice of the shuffled prompts for each round; none: all of them each round",
    )
    max_prompt_tokens: Positive = Field(default=4096, description="longer prompts are dropped and counted")
    system_prompt: str | None = Field(
        default=None, description="a system turn for prompts that have none", json_schema_extra=ADDED
    )
    tools: str | list[dict[str, Any]] | None = Field(
        default=None,
        description="tools that every prompt offers, for prompts whose row has no column tools: a JSON file, or a list",
        json_schema_extra=ADDED,
    )
    on_bad_row: Literal["error", "skip"] = Field(
        default="error",
        description="when a row cannot be read or rendered: stop, or skip it; skipped rows are counted, and the first "
        "five are named",
    )
    max_bad_rows: Probability = Field(
        default=0.25, description="share of a file that on_bad_row=skip may skip; more is an error"
    )
    ignored_keys: list[str] = Field(
        default_factory=list,
        description="keys of messages, and columns beside the prompt (system, tools, chat_template_kwargs), to leave "
        "out; without this, one that the chat template does not render is an error",
    )

    @property
    def bad_rows(self) -> BadRowRule:
        """on_bad_row and max_bad_rows."""
        return BadRowRule(self.on_bad_row, self.max_bad_rows)
