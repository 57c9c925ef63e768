"""Renders conversations with a tokenizer's chat template, and checks that all they say is rendered.

What a conversation holds beside its turns' contents (tool_calls, tools, a name, …) must change the rendering; else the
template does not know it, and the model would be asked something else than the file says.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from dice_py.data import Message
from dice_py.errors import DataError
from dice_py.models.control_tokens import ControlTokens, Guard
from dice_py.rows.messages import TEMPLATE_COLUMN, TOOLS_COLUMN, fields_of, options_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORD, _TAG = re.compile(r"\w+"), re.compile(r"</?[\w|]+>")


def turn_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Token ids that the chat template puts around a turn, special or not: many tokenizers to which ChatML was added
    later have <|im_start|> as an ordinary added token.

    What else the template may write, such as <think> or <tool_call>, belongs to an answer, which may spell it.
    """
    added = {str(token): int(number) for number, token in tokenizer.added_tokens_decoder.items() if str(token)}
    pattern = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or r"(?!)")
    question, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    try:
        asked = str(tokenizer.apply_chat_template([question], tokenize=False))
        begun = str(tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True))
        answered = str(tokenizer.apply_chat_template([question, answer], tokenize=False))
    except Exception:  # a template is a program; the prompts themselves will tell
        return set()
    header = pattern.match(begun, len(asked)) if begun.startswith(asked) else None
    end = pattern.search(answered, answered.rfind("y") + 1)
    found = {*pattern.findall(asked), *(match[0] for match in (header, end) if match)}
    ids: list[int] = tokenizer(answered, add_special_tokens=False)["input_ids"]
    # A tokenizer's normalizer may change a spelling so that it gives no token.
    return {added[text] for text in found if ids.count(added[text]) == answered.count(text)}


@dataclass(frozen=True)
class Conversation:
    """A conversation as the template sees it."""

    messages: list[dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    """`tools` and `chat_template_kwargs`."""

    @staticmethod
    def of(messages: list[Message]) -> Conversation:
        """From the messages of an artifact."""
        return Conversation([fields_of(message) for message in messages], options_of(messages))

    def without(self, key: str) -> Conversation:
        """The conversation without a field of its messages, or without an option."""
        messages = [{name: value for name, value in message.items() if name != key} for message in self.messages]
        return Conversation(messages, {name: value for name, value in self.options.items() if name != key})


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        controls: the control tokens of the tokenizer, which has a template.
        time: what strftime_now prints; None: the present time.
    """

    def __init__(self, controls: ControlTokens, time: datetime | None) -> None:
        self.controls, self.time = controls, time
        self.in_two_parts = 0
        """Answers whose turn was rendered apart from their prompt (models/answer_tokens.py)."""
        self._complete: set[tuple[Any, ...]] = set()  # the forms of conversations of which each turn is rendered

    def render(
        self, conversation: Conversation, where: str, *, prompt: bool = False, guard: Guard | None = None
    ) -> str:
        """The rendered text; with `guard`, its texts have placeholders for spellings of control tokens.

        Args:
            prompt: whether the beginning of the answer follows.

        Raises:
            DataError: the template refuses the conversation, or changes a spelling of a control token in a text.
        """
        text = self._apply(conversation, where, prompt)
        if guard is None:
            return text
        hidden = Conversation(guard.hide(conversation.messages), guard.hide(conversation.options))
        guarded = self._apply(hidden, where, prompt)
        if guard.restore(guarded) != text:
            shown = ", ".join(map(repr, list(guard.placeholders)[:3]))
            raise DataError(
                f"{where}: the texts hold what spells a control token of the tokenizer ({shown}), and the chat "
                "template reads or changes it, so that it cannot be kept as text; remove it from the texts"
            )
        return guarded

    def _apply(self, conversation: Conversation, where: str, prompt: bool) -> str:
        options = dict(conversation.options.get(TEMPLATE_COLUMN, {}))
        if self.time is not None:
            options["strftime_now"] = self.time.strftime
        try:
            return str(
                self.controls.tokenizer.apply_chat_template(
                    conversation.messages,
                    tools=conversation.options.get(TOOLS_COLUMN),
                    tokenize=False,
                    add_generation_prompt=prompt,
                    **options,
                )
            )
        except Exception as error:  # a template is a program: it may raise anything
            from jinja2.exceptions import TemplateError

            kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"{where}: the chat template refuses these messages: {kind}{first_line}") from None

    def check_complete(self, conversation: Conversation, text: str, where: str, *, turns: int, prompt: bool) -> None:
        """Checks that the last `turns` turns, and with `prompt` the options, are in the rendered text.

        Raises:
            DataError: with the key that changes nothing, or the turn that is left out.
        """

        def changes(other: Conversation) -> bool:
            try:
                return self._apply(other, where, prompt) != text
            except DataError:
                return True  # without it, the template does not even render

        checked = conversation.messages[len(conversation.messages) - turns :]
        keys = dict.fromkeys(key for message in checked for key in message if key not in ("role", "content"))
        if prompt:
            keys |= dict.fromkeys(conversation.options)
        lost = [key for key in keys if key != TEMPLATE_COLUMN and not changes(conversation.without(key))]
        if lost:
            raise _not_rendered(where, *lost)
        if prompt:
            self._check_variables(conversation, changes, where)
        # Whether a turn is rendered depends on its place among the roles: that is tried once for each form, since a
        # content that is left out may stand elsewhere in the text.
        form = (turns, prompt, *((message["role"], *message, bool(message["content"])) for message in checked))
        known = form in self._complete
        for at, message in enumerate(checked, start=len(conversation.messages) - turns):
            content = message["content"].strip()
            if content and (not known or content not in text):
                other = [*conversation.messages]
                before = "x " if content in text else ""  # else it was trimmed inside, escaped, or cut
                other[at] = {**message, "content": f"{before}{message['content']} x"}
                if not changes(Conversation(other, conversation.options)):
                    raise DataError(
                        f"{where}: the chat template leaves out the content of turn {at} ({message['role']}): "
                        f"{message['content']!r:.60}; remove the turn, or use a template that renders it"
                    )
        self._complete.add(form)

    def check_words(self, response: list[Message], text: str, where: str) -> None:
        """Checks that every word of a response is in what was rendered of it, in this order.

        Templates of models that reason drop what stands before </think>: right for earlier turns, and a loss in an
        answer. They may write tags and white space in their own way.

        Raises:
            DataError: with the words that are left out.
        """
        if len(response) == 1 and response[0]["content"].strip() in text:
            return
        rendered, at = text.casefold(), 0
        for message in response:
            for word in _WORD.finditer(_TAG.sub(lambda tag: " " * len(tag[0]), message["content"])):
                found = rendered.find(word[0].casefold(), at)
                if found < 0:
                    raise DataError(
                        f"{where}: the chat template leaves out a part of the answer, from "
                        f"{message['content'][word.start() :]!r:.60} on; use a template that renders it, or remove it"
                    )
                at = found + len(word[0].casefold())

    def _check_variables(self, conversation: Conversation, changes: Callable[[Conversation], bool], where: str) -> None:
        """Each variable of the data is one that the template reads. A value that is its default changes nothing."""
        variables = conversation.options.get(TEMPLATE_COLUMN, {})
        for name in variables:
            left = {key: value for key, value in variables.items() if key != name}
            if not re.search(rf"\b{re.escape(name)}\b", str(self.controls.tokenizer.chat_template)) and not changes(
                Conversation(conversation.messages, {**conversation.options, TEMPLATE_COLUMN: left})
            ):
                raise _not_rendered(where, f"{TEMPLATE_COLUMN}.{name}")


_templates: WeakKeyDictionary[Any, ChatTemplate] = WeakKeyDictionary()


def keep_template(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
    """Makes `template` the one that `template_of` returns for a tokenizer."""
    _templates[tokenizer] = template


def template_of(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The template that was kept for a tokenizer; else one of its own, which prints the present time."""
    if tokenizer not in _templates:
        _templates[tokenizer] = ChatTemplate(ControlTokens.of(tokenizer, turn_tokens(tokenizer)), None)
    return _templates[tokenizer]


def _not_rendered(where: str, *keys: str) -> DataError:
    named, ignored = ", ".join(map(repr, keys)), ",".join(key.partition(".")[0] for key in keys)
    return DataError(
        f"{where}: the chat template does not render {named}, so the model would not see it; use a template that does, "
        f"or leave it out with data.ignored_keys=[{ignored}]"
    )
