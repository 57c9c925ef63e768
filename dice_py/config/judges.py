"""Config sections of the judges of an evaluation (evaluation/judges/). Each is off by default."""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from dice_py.config.passthrough import PassedOptions, passed_options, refuse_own
from dice_py.config.shared import ADDED, SECRET, Positive, Probability, Section

_Money = Annotated[float, Field(ge=0.0)]
_OWN_REQUEST = {
    "model": "it is openai.model",
    "messages": "they are what openai.template renders",
    "temperature": "it is openai.temperature",
    "max_tokens": "it is openai.max_tokens",
    "logprobs": "it is openai.verdict=logprobs",
    "top_logprobs": "it is openai.verdict=logprobs",
    "n": "one answer is read",
    "stream": "answers are read whole",
    **dict.fromkeys(("api_key", "extra_headers"), "keys belong into the environment variable of openai.api_key_env"),
}


class RewardModelConfig(Section):
    """A reward model: a sequence classifier of transformers with one label, whose score is the better response's."""

    model: str = Field(description="a folder or a Hugging Face id")
    revision: str | None = Field(default=None, description="branch, tag or commit on the Hugging Face hub")
    token_budget: Positive = Field(default=8192, description="tokens of one batch, padding included")


class ImplicitConfig(Section):
    """The implicit reward β·(log π − log π_ref) of any model that DPO trained, and the model that it started from."""

    policy: str = Field(description="the DPO-tuned model: a folder, a GGUF file or a Hugging Face id")
    reference: str = Field(description="the model that its DPO training started from")
    policy_revision: str | None = Field(default=None, description="branch, tag or commit of the policy")
    reference_revision: str | None = Field(default=None, description="branch, tag or commit of the reference")
    beta: Annotated[float, Field(gt=0.0)] = Field(default=0.1, description="β; it scales the scores, and decides none")
    per_token: bool = Field(default=False, description="divide each reward by the response's number of tokens")
    token_budget: Literal["auto"] | Positive = Field(default="auto", description="as score.token_budget")


class OpenAIConfig(Section):
    """A model behind a server that has OpenAI's chat completions, asked which of two responses is better."""

    base_url: str = Field(description="the server, such as http://127.0.0.1:8000/v1")
    model: str = Field(description="the model's name at the server")
    api_key_env: str = Field(
        default="OPENAI_API_KEY",
        description="the environment variable that holds the key; a server that asks for none needs none",
    )
    verdict: Literal["text", "logprobs"] = Field(
        default="text",
        description="text: the last [[A]], [[B]] or [[C]] (a tie) of the answer; logprobs: the probabilities of A and "
        "B as the answer's first token, as AlpacaEval 2 weighs its preferences",
    )
    template: str | None = Field(
        default=None, description="file of the judge's prompt, a Jinja template; none: the package's (docs/judges.md)"
    )
    both_orders: bool = Field(
        default=True, description="ask twice, with the responses exchanged, and average; else one order, by the content"
    )
    temperature: Annotated[float, Field(ge=0.0)] | None = Field(
        default=0.0, description="of the judge's answers; none: the server's default"
    )
    max_tokens: Positive | None = Field(
        default=512, description="most tokens of an answer; one with verdict=logprobs; none: not sent"
    )
    top_logprobs: Annotated[int, Field(ge=2)] = Field(
        default=20, description="verdict=logprobs: the most probable tokens that the server is asked for"
    )
    request: PassedOptions = passed_options(
        "any further field of the request, such as seed, max_completion_tokens, reasoning_effort or vLLM's "
        "structured_outputs"
    )
    max_unread: Probability = Field(
        default=0.1, description="share of the pairs that may be left without a verdict; more is an error"
    )
    concurrency: Annotated[int, Field(ge=1, le=1024)] = Field(default=8, description="requests at one time")
    timeout: Annotated[float, Field(gt=0.0)] = Field(default=120.0, description="seconds that a request may take")
    retries: Annotated[int, Field(ge=0, le=100)] = Field(
        default=5, description="further tries, with growing waits, where the server is busy or fails"
    )
    budget_tokens: Positive | None = Field(
        default=None, description="stop before the judge has read and written more tokens than this; none: no limit"
    )
    budget_cost: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None, description="stop before it has cost more than this, in the unit of the prices; none: no limit"
    )
    input_price: _Money | None = Field(default=None, description="price of a million tokens of the judge's input")
    output_price: _Money | None = Field(default=None, description="price of a million tokens of its output")

    @field_validator("base_url")
    @classmethod
    def _check_url(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port)
        except ValueError:  # a port that is no number
            parts, valid = None, False
        if parts is not None and (parts.username is not None or parts.query or parts.fragment):
            raise PydanticCustomError(
                SECRET, "must be a plain URL: keys and passwords belong into the variable of api_key_env"
            )
        if not valid:
            raise ValueError(f"{value!r:.80} is no URL of a server; write it as http://127.0.0.1:8000/v1")
        return value.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _check_variable(cls, value: str) -> str:
        if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value) is None:
            raise PydanticCustomError(  # the key itself may stand here
                SECRET, "is the name of an environment variable (letters, digits, underscores), not the key"
            )
        return value

    @field_validator("request")
    @classmethod
    def _refuse_own_fields(cls, value: PassedOptions) -> PassedOptions:
        return refuse_own(value, _OWN_REQUEST)

    @model_validator(mode="after")
    def _check_budget(self) -> OpenAIConfig:
        if (self.input_price is None) != (self.output_price is None):
            raise ValueError("input_price and output_price belong together: give both, or neither")
        if self.budget_cost is not None and self.input_price is None:
            raise ValueError("budget_cost needs the prices of a million tokens: input_price and output_price")
        return self


class FunctionConfig(Section):
    """A function of your own: from the texts of a prompt and a response to a number, of which more is better."""

    call: str = Field(
        description="its name, as package.module:name; Python must find the module (PYTHONPATH). Its code is run"
    )

    @field_validator("call")
    @classmethod
    def _check_call(cls, value: str) -> str:
        module, colon, name = value.partition(":")
        if not colon or not all(part.isidentifier() for text in (module, name) for part in text.split(".")):
            raise ValueError(f"{value!r:.80} names no function; write it as package.module:name")
        return value


class JudgesConfig(Section):
    """Judges that compare the new policy with the start and with the policy of the round before."""

    reward_model: RewardModelConfig | None = Field(
        default=None, description="a reward model; none: off", json_schema_extra=ADDED
    )
    implicit: ImplicitConfig | None = Field(
        default=None, description="the implicit reward of another pair of models; none: off", json_schema_extra=ADDED
    )
    openai: OpenAIConfig | None = Field(
        default=None, description="a model behind a server with OpenAI's interface; none: off", json_schema_extra=ADDED
    )
    function: FunctionConfig | None = Field(
        default=None, description="a function of your own; none: off", json_schema_extra=ADDED
    )
