"""Asks a server with OpenAI's chat completions, by the official client.

The client repeats what may pass (no connection, time-outs, 408, 409, 429 and 5xx), with growing waits, and as long as
the server's Retry-After says. All other failures are sentences here. The key is read from the environment when it is
needed, and is in no message.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from dice_py.config.judges import OpenAIConfig
from dice_py.errors import DataError, DiceError, JudgeError, UsageError
from dice_py.evaluation.judges.served.answers import Answer

if TYPE_CHECKING:
    from openai import APIStatusError

_NO_KEY = "none"
"""Sent where there is no key, since the client insists on one. Servers of one's own mostly ask for none."""
_TOO_LONG = ("context_length_exceeded", "context length", "too long", "too large", "input tokens")


class ChatServer:
    """A model behind a server. Its methods may be called by several threads at a time.

    Raises:
        UsageError: the key in the environment is none that can be sent.
    """

    def __init__(self, config: OpenAIConfig) -> None:
        from openai import OpenAI

        self._config = config
        self._key = _key(config.api_key_env)
        self._client = OpenAI(
            api_key=self._key or _NO_KEY,
            base_url=config.base_url,
            timeout=config.timeout,
            max_retries=config.retries,
        )
        self._fields = request_fields(config)

    def close(self) -> None:
        """Ends the connections; requests in other threads fail."""
        self._client.close()

    def ask(self, messages: list[dict[str, str]]) -> Answer:
        """The model's answer.

        Raises:
            JudgeError: the server cannot be reached, or fails, also when asked again.
            UsageError: the server refuses the key, the model or a field of the request, or is no such server.
            DataError: the messages are too long for the model.
        """
        import openai

        try:
            completion = self._client.chat.completions.create(
                model=self._config.model, messages=messages, extra_body=self._fields
            )
        except UnicodeEncodeError:
            raise UsageError("the judge's request holds half of a surrogate pair, which is no valid text") from None
        except openai.APIStatusError as error:
            raise self._refused(error) from None
        except openai.APIError as error:  # no connection, a time-out, or an answer that is no JSON
            raise JudgeError(f"the judge's server {self._config.base_url} fails: {self._line(error)}") from None
        except ValueError as error:  # a body that is no JSON, although its header says so
            raise JudgeError(f"the judge's server {self._config.base_url} sends no JSON: {self._line(error)}") from None
        return self._answer(completion)

    def _answer(self, completion: Any) -> Answer:
        try:
            choice = completion.choices[0]
            text = choice.message.content or ""
            logprobs = choice.logprobs
            content = None if logprobs is None else logprobs.content
            tops = [(_plain(top.token), float(top.logprob)) for top in content[0].top_logprobs] if content else None
            usage = completion.usage
            counts = (None, None) if usage is None else (int(usage.prompt_tokens), int(usage.completion_tokens))
            return Answer(_plain(text), choice.finish_reason, tops, *counts)
        except (AttributeError, IndexError, TypeError, ValueError):
            raise UsageError(
                f"{self._config.base_url} answers with something else than a chat completion: check openai.base_url, "
                "which mostly ends in /v1"
            ) from None

    def _refused(self, error: APIStatusError) -> DiceError:
        """The error for a status that the client does not ask again for, or did in vain."""
        config, said = self._config, self._line(error)
        server = f"the judge's server {config.base_url}"
        if error.status_code in (401, 403):
            has = f"refuses the key in {config.api_key_env}" if self._key else f"wants a key: set {config.api_key_env}"
            return UsageError(f"{server} {has} ({said})")
        if error.status_code == 404:
            return UsageError(
                f"{server} has no model {config.model!r}, or no chat completions ({said}); check openai.model and "
                "openai.base_url, which mostly ends in /v1"
            )
        if error.status_code in (400, 413, 422):
            if any(words in said.lower() for words in _TOO_LONG):
                return DataError(f"{server} refuses a request that is too long: {said}; leave longer responses out")
            return UsageError(
                f"{server} refuses the request: {said}; change openai.request, openai.max_tokens, openai.temperature "
                "or openai.verdict (null: a field is not sent)"
            )
        return JudgeError(f"{server} fails with status {error.status_code}: {said}")

    def _line(self, error: Exception) -> str:
        """An error's message in one line, without the key."""
        text = " ".join(str(error).split()) or type(error).__name__
        return (text.replace(self._key, "[the key]") if self._key else text)[:400]


def request_fields(config: OpenAIConfig) -> dict[str, Any]:
    """The fields of a request beside model and messages. They are part of the key of its answer."""
    by_letter = config.verdict == "logprobs"
    fields = {
        "temperature": config.temperature,
        "max_tokens": 1 if by_letter else config.max_tokens,
        "logprobs": True if by_letter else None,
        "top_logprobs": config.top_logprobs if by_letter else None,
    }
    return {name: value for name, value in fields.items() if value is not None} | config.request


def _key(variable: str) -> str | None:
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(f"the environment variable {variable} holds no key: it has characters that no key has")
    return key or None


def _plain(text: str) -> str:
    """Text that can be stored: JSON may hold half of a surrogate pair."""
    return text.encode("utf-8", "replace").decode()
