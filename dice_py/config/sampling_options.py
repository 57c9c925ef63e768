"""The options of `generate.sampling_params` that the transformers engine has, with vLLM's names and meaning."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, field_validator

from dice_py.config.shared import Probability, Section

TokenId = Annotated[int, Field(ge=0)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]


def _listed(value: Any) -> Any:
    """One stop string, or none, as a list."""
    return [value] if isinstance(value, str) else [] if value is None else value


class SamplingOptions(Section):
    """How logits become probabilities, and when a response ends, beyond temperature, top-k and top-p.

    The order is vLLM's (0.32): allowed_token_ids, min_tokens, logit_bias, penalties; then the temperature, min_p, top-k
    and top-p. Log-probabilities are of the logits before all of them.
    """

    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1)] | None = None
    """The only tokens that may be sampled."""
    min_tokens: Annotated[int, Field(ge=0)] = 0
    """Stop tokens are not sampled, and stop strings not looked for, among so many first tokens."""
    logit_bias: dict[TokenId, float] = Field(default_factory=dict)
    """Added to the logits of tokens."""
    repetition_penalty: Annotated[float, Field(gt=0.0)] = 1.0
    """Divides a positive logit of a token that the prompt or the response has, and multiplies a negative one."""
    frequency_penalty: Penalty = 0.0
    """Subtracted from a token's logit for each time that the response has it."""
    presence_penalty: Penalty = 0.0
    """Subtracted once from the logit of a token that the response has."""
    min_p: Probability = 0.0
    """Tokens of a probability below this share of the greatest one are not sampled."""
    stop_token_ids: list[TokenId] = Field(default_factory=list)
    """End a response, beside the model's own stop tokens."""
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_listed)] = Field(default_factory=list)
    """Texts that end a response. The token that completes one is the last."""
    skip_special_tokens: bool = True
    """Stop strings are looked for in the text without special tokens."""

    @field_validator("stop_token_ids", "logit_bias", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any, info: Any) -> Any:
        return ({} if info.field_name == "logit_bias" else []) if value is None else value

    @property
    def token_ids(self) -> list[int]:
        """All ids that are named, each of which a model's vocabulary must have."""
        return [*(self.allowed_token_ids or ()), *self.logit_bias, *self.stop_token_ids]

    @property
    def changes_logits(self) -> bool:
        """Whether any option but min_p changes logits."""
        others = {"min_p", "stop", "stop_token_ids", "skip_special_tokens"}
        return self.model_dump(exclude=others) != SamplingOptions().model_dump(exclude=others)


def lacks(names: Iterable[str]) -> str | None:
    """Why the transformers engine cannot do what some options ask for; None if it has all of them."""
    known = list(SamplingOptions.model_fields)
    unknown = [name for name in names if name not in known]
    if not unknown:
        return None
    near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.75)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"engine transformers has no {' and no '.join(unknown)}{hint}, but {', '.join(known)}"


def transformers_options(params: dict[str, Any], max_new_tokens: int) -> SamplingOptions:
    """`generate.sampling_params` as the transformers engine takes them.

    Raises:
        ValueError: an option that it does not have, or a value out of its range; the message has the remedy.
    """
    missing = lacks(params)
    if missing is not None:
        raise ValueError(f"{missing}; set generate.engine=vllm, or leave it out")
    try:
        options = SamplingOptions.model_validate(params)
    except ValidationError as error:
        first = error.errors()[0]
        where = str(first["loc"][0])
        raise ValueError(f"{where} is {params[where]!r}: {first['msg'].removeprefix('Value error, ')}") from None
    if options.min_tokens > max_new_tokens:
        raise ValueError(f"min_tokens is {options.min_tokens}, but generate.max_new_tokens is {max_new_tokens}")
    return options
