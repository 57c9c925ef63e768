"""Token ids of answers that are known as text: those of offline pairs, and those that were sampled elsewhere.

Most templates render a prompt as the beginning of what they render of prompt and answer together: what follows is the
answer. Where a template does not (its generation prompt opens or closes a thinking part that it leaves out of answers),
the answer's turn is taken as it is rendered after a neutral question, and joined to the prompt (`_in_two_parts`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dice_py.data import Message
from dice_py.errors import DataError
from dice_py.models.chat_template import ChatTemplate, Conversation, template_of
from dice_py.models.control_tokens import ControlTokens, Guard
from dice_py.models.thinking import find_delimiters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBES = ("y", "Q")
_QUESTIONS = ("x", "Why so?")


def encode_response(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[Message],
    response: list[Message],
    stops: list[int],
    where: str = "pair",
) -> list[int]:
    """Token ids of an offline response as the policy would have sampled it: up to and with its first stop token.

    What the template writes after the stop token (a line break, for example) is cut off, since it is never sampled. A
    stop token is appended if the template writes none. The response's tokens follow those of the prompt, as in
    sampling. The texts give no control tokens, so a stop token that is spelled in the response does not end it.

    Raises:
        DataError: the template refuses the messages, or leaves out a part of the response; it renders the prompt
            differently once a response follows, and no rule separates the two; or a stop token that is ordinary text
            stands in the response.
    """
    template = template_of(tokenizer)
    asked, answered = Conversation.of(prompt), Conversation.of([*prompt, *response])
    guard = template.controls.guard([answered.messages, answered.options])
    before = template.render(asked, where, prompt=True)
    full = template.render(answered, where)
    template.check_complete(answered, full, where, turns=len(response), prompt=False)
    is_prefix = full.startswith(before)
    if is_prefix:
        template.check_words(response, full[len(before) :], where)
    if guard is not None:
        before, full = (
            template.render(asked, where, prompt=True, guard=guard),
            template.render(answered, where, guard=guard),
        )
    if not is_prefix:
        full = before + _in_two_parts(template, asked, response, before, guard, where)
    elif not full.startswith(before):
        raise _inseparable(where)
    ids = _encode_rest(template.controls, before, full, guard, where)
    for index, token in enumerate(ids):
        if token in stops:
            rest = ids[index + 1 :]
            if token not in template.controls.ids and tokenizer.decode(rest, skip_special_tokens=True).strip():
                raise DataError(
                    f"{where}: the response has the stop token {tokenizer.decode([token])!r} in its text, so it would "
                    "end there; remove it from eos_token_id in the model's generation_config.json, or from the text"
                )
            return ids[: index + 1]
    return [*ids, int(tokenizer.eos_token_id)]


def _inseparable(where: str) -> DataError:
    return DataError(
        f"{where}: the chat template renders the prompt differently once a response follows it, so the tokens of "
        "the response cannot be separated; use a template whose generation prompt is a prefix of the conversation"
    )


def _in_two_parts(
    template: ChatTemplate, asked: Conversation, response: list[Message], before: str, guard: Guard | None, where: str
) -> str:
    """The answer's text, guarded, where the rendered prompt is no beginning of the rendered conversation.

    It is the answer's turn as rendered after a neutral question. Where the template leaves words of it out there, too,
    it is the content as it is, and the token that ends a turn. An opening delimiter of a thinking part that the
    generation prompt has written already is left out.

    Raises:
        DataError: neither can be done: the answer's turn depends on the question, or has fields beside its content.
    """
    turn = _answer_turn(template, asked.options, where)
    if turn is None or len(response) != 1:
        raise _inseparable(where)
    (answer,) = Conversation.of(response).messages
    text = None
    rendered = turn.render(answer, None, where)
    if rendered is not None:
        try:
            template.check_words(response, rendered, where)
            text = turn.render(answer, guard, where)
        except DataError:
            text = None
    if text is None:
        if answer.keys() - {"role", "content"}:
            raise _inseparable(where)
        (hidden,) = [answer] if guard is None else guard.hide([answer])
        text = hidden["content"] + turn.end
    template.in_two_parts += 1
    opened = find_delimiters(template.controls.tokenizer)[0]
    if before.rstrip().endswith(opened) and text.lstrip().startswith(opened):
        return text.lstrip().removeprefix(opened).lstrip()
    return text


@dataclass(frozen=True)
class _AnswerTurn:
    """How a template writes an answer after each neutral question."""

    template: ChatTemplate
    options: dict[str, Any]
    headers: tuple[str, ...]
    """The rendered text up to the answer's content, by question."""
    end: str
    """The spelling of the control token after the content; "" if there is none."""

    def render(self, answer: dict[str, Any], guard: Guard | None, where: str) -> str | None:
        """The rendered turn from its content on; None where it depends on the question."""
        found = set()
        for question, header in zip(_QUESTIONS, self.headers, strict=True):
            full = self.template.render(_conversation(question, answer, self.options), where, guard=guard)
            if not full.startswith(header):
                return None
            found.add(full[len(header) :])
        return found.pop() if len(found) == 1 else None


def _conversation(question: str, answer: dict[str, Any], options: dict[str, Any]) -> Conversation:
    return Conversation([{"role": "user", "content": question}, answer], options)


def _answer_turn(template: ChatTemplate, options: dict[str, Any], where: str) -> _AnswerTurn | None:
    """Where answers begin and how they end, by probes of one character; None where the template does not tell."""
    headers, ends = [], set()
    for question in _QUESTIONS:
        probes = [
            template.render(_conversation(question, {"role": "assistant", "content": content}, options), where)
            for content in _PROBES
        ]
        shared = next((at for at, pair in enumerate(zip(*probes, strict=False)) if len(set(pair)) > 1), 0)
        header = probes[0][:shared]
        ends |= {probe[len(header) + 1 :] for probe in probes}
        if any(probe[len(header) : len(header) + 1] != content for probe, content in zip(probes, _PROBES, strict=True)):
            return None
        headers.append(header)
    if len(ends) != 1:
        return None
    match = template.controls.pattern.search(ends.pop())
    return _AnswerTurn(template, options, tuple(headers), match[0] if match else "")


def answer_end(tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> int:
    """The stop token with which the template ends an answer; the end-of-sequence token where it writes none."""
    question: list[Message] = [{"role": "user", "content": "x"}]
    try:
        return encode_response(tokenizer, question, [{"role": "assistant", "content": "y"}], stops, "a turn")[-1]
    except DataError:  # a template that wants other turns; the prompts themselves will tell
        return int(tokenizer.eos_token_id)


def encode_sampled_text(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], text: str, delimiters: tuple[str, str], where: str
) -> list[int]:
    """Token ids of a response that was sampled elsewhere and is known as text alone, without a stop token.

    It is encoded as it stands, after the last control token of the prompt and what follows that; no template changes
    it. Its spellings of control tokens are text, but for the delimiters of thinking, which a model writes as tokens.

    Args:
        prompt: the token ids that the response answers.
        delimiters: of the thinking part (models/thinking.py).
    """
    controls = template_of(tokenizer).controls
    named = [name for name in delimiters if name in controls.by_spelling]
    pieces = _split_at(text, named)
    guard = controls.guard([{"content": piece} for piece in pieces if piece not in named])
    if guard is not None:
        pieces = [piece if piece in named else guard.hide([{"content": piece}])[0]["content"] for piece in pieces]
    start = max((at for at, token in enumerate(prompt) if token in controls.ids), default=len(prompt))
    context = tokenizer.decode(prompt[start:], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if controls.encode(context, None, where) != prompt[start:]:
        context = ""  # the tokens of the prompt are not those of its text: the response is encoded alone
    return _encode_rest(controls, context, context + "".join(pieces), guard, where)


def _split_at(text: str, names: list[str]) -> list[str]:
    pieces = [text]
    for name in names:
        cut: list[str] = []
        for piece in pieces:
            if piece in names:
                cut.append(piece)
                continue
            for at, part in enumerate(piece.split(name)):
                cut += [name, part] if at else [part]
        pieces = cut
    return [piece for piece in pieces if piece]


def _encode_rest(controls: ControlTokens, before: str, full: str, guard: Guard | None, where: str) -> list[int]:
    """Token ids of what follows `before` in `full`, as a model that has read the former would write them.

    SentencePiece puts a space before a text: encoded alone, " Yes" would begin with two, and "Yes" after a line break
    with one. Only where a token would reach over the border is the rest encoded alone.
    """
    # Tokenizers cut texts at control tokens, so that nothing before the last one matters, but that it is not the first.
    start = max((match.start() for match in controls.pattern.finditer(before)), default=0)
    whole, first = (controls.encode(text[start:], guard, where) for text in (full, before))
    if whole[: len(first)] == first:
        return whole[len(first) :]
    return controls.encode(full[len(before) :], guard, where)
