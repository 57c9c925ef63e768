"""The prompt of a judge behind a server: a Jinja template that the user can replace.

A template has a block `user`, and perhaps a block `system`: the messages that the judge gets. Without blocks, the whole
is the user's message. It sees

    messages      the prompt: turns with role, content and what else they have
    instruction   the text of the last user turn
    tools         the functions that the assistants may call; an empty list mostly
    response_a    the response that is shown first
    response_b    the other
    boundary      a code that none of these texts holds, for lines between them

Templates run in Jinja's sandbox.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from dice_py.data import Message
from dice_py.errors import DataError
from dice_py.rows.messages import TOOLS_COLUMN, fields_of, options_of
from dice_py.storage.keys import digest

_PROBES = ("a response by the first", "a response by the second")
_NAMES = ("messages", "instruction", "tools", "response_a", "response_b", "boundary")


def read_template(file: Path | None, verdict: str) -> str:
    """The text of a template, checked: that of `file`, or for None the package's for a kind of verdict.

    Args:
        verdict: `openai.verdict`.

    Raises:
        DataError: the file cannot be read, is no template, or does not show both responses.
    """
    path = Path(__file__).with_name(f"{verdict}.jinja") if file is None else file
    try:
        # A folder, a pipe or a device would not end, or not begin.
        if not path.is_file():
            raise DataError(f"{path} does not exist (or is not a regular file); give the template of a judge's prompt")
        source = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a template ({error}); give a text file in UTF-8") from None
    try:
        rendered = render(source, [{"role": "user", "content": "a question"}], *_PROBES)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    text = "\n".join(message["content"] for message in rendered)
    for name, probe in zip(("response_a", "response_b"), _PROBES, strict=True):
        if probe not in text:
            raise DataError(f"{path} does not show {{{{ {name} }}}}, so that nothing could be compared; add it")
    return source


def render(source: str, prompt: list[Message], first: str, second: str) -> list[dict[str, str]]:
    """The messages for the judge.

    Args:
        source: the text of a template.
        prompt: the prompt that both responses answer.
        first, second: the responses, in the order in which they are shown.

    Raises:
        DataError: the template cannot be rendered; the message has its line.
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    asked = [message["content"] for message in prompt if message["role"] == "user"]
    values: dict[str, Any] = {
        "messages": [fields_of(message) for message in prompt],
        "instruction": asked[-1] if asked else "",
        "tools": options_of(prompt).get(TOOLS_COLUMN, []),
        "response_a": first,
        "response_b": second,
        "boundary": boundary([*(message["content"] for message in prompt), first, second]),
    }
    try:
        template = _compiled(source)
        if "user" not in template.blocks:
            return [{"role": "user", "content": template.render(values)}]
        context = template.new_context(values)
        parts = [(role, template.blocks[role]) for role in ("system", "user") if role in template.blocks]
        return [{"role": role, "content": "".join(block(context))} for role, block in parts]
    except TemplateSyntaxError as error:
        raise DataError(f"not a Jinja template: line {error.lineno}: {error.message}") from None
    except TemplateError as error:
        raise DataError(f"the template cannot be rendered: {error}; it knows {', '.join(_NAMES)}") from None
    except Exception as error:  # a template is a program
        raise DataError(f"the template cannot be rendered: {type(error).__name__}: {error}") from None


def boundary(texts: list[str]) -> str:
    """A code that is in none of the texts, the same each time. A text cannot foresee it, since it depends on them."""
    attempt = 0
    while any((code := digest("boundary", attempt, texts)[:12]) in text for text in texts):
        attempt += 1
    return code


@cache
def _compiled(source: str) -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string(source)
