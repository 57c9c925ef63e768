"""All that a conversation says reaches the chat template; a template may raise anything; its clock can be stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from notes import Notes
from tiny_models import make_tokenizer

from dice_py.config.shared import ModelConfig
from dice_py.data import pairs_frame, read_pairs, read_prompts
from dice_py.errors import DataError
from dice_py.models.tokenization import (
    encode_pairs,
    encode_prompt,
    encode_prompts,
    encode_response,
    load_tokenizer,
    stop_token_ids,
    turn_end_note,
)
from dice_py.rows.bad_rows import BadRowRule

CHATML = make_tokenizer().chat_template.replace("{{ bos_token }}", "")
RICH = (
    "{% for t in tools or [] %}<tool>{{ t.function.name }}</tool>{% endfor %}"
    "{% if mood is defined %}({{ mood }}){% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}: "
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "get_weather"}}
STOPS = [4]


def tokenizer(template: str = CHATML) -> Any:
    made = make_tokenizer()
    made.chat_template = template
    return made


def turn(role: str, content: str, **fields: Any) -> Any:
    extra = {"extra": json.dumps({"message": fields})} if fields else {}
    return {"role": role, "content": content, **extra}


def prompt(tmp_path: Path, **row: Any) -> Any:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(row))
    return read_prompts(path)["messages"].to_list()[0]


def test_fields_reach_a_template_that_knows_them(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "Is it cold?", "name": "Ada"},
        {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "Hm."},
        {"role": "tool", "content": "-3 C"},
    ]
    messages = prompt(tmp_path, prompt=turns, tools=[TOOL], chat_template_kwargs={"mood": "dry"})
    made = tokenizer(RICH)
    assert made.decode(encode_prompt(made, messages)) == (
        "<tool>get_weather</tool>(dry)<|im_start|>user Ada: Is it cold?<|im_end|>\n<|im_start|>assistant: "
        '<think>Hm.</think><call>{"city": "Oslo"}</call><|im_end|>\n<|im_start|>tool: -3 C<|im_end|>\n'
        "<|im_start|>assistant: "
    )
    answer = [turn("assistant", "Yes.", reasoning_content="-3 is cold.")]
    assert made.decode(encode_response(made, messages, answer, STOPS)) == "<think>-3 is cold.</think>Yes.<|im_end|>"


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"prompt": [turn("user", "hi"), {"role": "tool", "content": "x", "tool_call_id": "a"}]}, "tool_call_id"),
        ({"prompt": [{"role": "assistant", "content": "", "tool_calls": [CALL]}, turn("user", "hi")]}, "tool_calls"),
        ({"prompt": [{"role": "user", "content": "hi", "name": "Ada"}]}, "name"),
        ({"prompt": "hi", "tools": [TOOL]}, "tools"),
        ({"prompt": [{"role": "user", "content": "hi", "id": 3, "lang": "en"}]}, "id', 'lang"),
        ({"prompt": "hi", "chat_template_kwargs": {"mood": "dry"}}, "chat_template_kwargs.mood"),
    ],
)
def test_a_field_that_is_not_rendered_is_refused_by_name(tmp_path: Path, row: dict[str, Any], key: str) -> None:
    ignored = key.partition(".")[0].replace("', '", ",")
    message = rf"line 7: the chat template does not render '{key}', .*data\.ignored_keys=\[{ignored}\]"
    with pytest.raises(DataError, match=message):
        encode_prompt(tokenizer(), prompt(tmp_path, **row), "line 7")


def test_a_field_of_an_answer_that_is_not_rendered_is_refused() -> None:
    answer = [turn("assistant", "Yes.", reasoning_content="Hm.")]
    with pytest.raises(DataError, match="row 1, chosen: the chat template does not render 'reasoning_content'"):
        encode_response(tokenizer(), [turn("user", "hi")], answer, STOPS, "row 1, chosen")


def test_a_variable_at_its_default_is_no_error(tmp_path: Path) -> None:
    made = tokenizer("{% if mood | default('dry') == 'wet' %}wet{% endif %}" + CHATML)
    encode_prompt(made, prompt(tmp_path, prompt="hi", chat_template_kwargs={"mood": "dry"}))


def test_a_turn_that_the_template_leaves_out_is_refused() -> None:
    made = tokenizer(
        CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != 'system' %}")
    )
    with pytest.raises(
        DataError, match=r"p 3: the chat template leaves out the content of turn 0 \(system\): 'Be brief\.'"
    ):
        encode_prompt(made, [turn("system", "Be brief."), turn("user", "hi")], "p 3")


@pytest.mark.parametrize("other", ["Be brief.", "I say: Be brief. Or not."])
def test_a_turn_that_is_left_out_though_its_text_stands_elsewhere(other: str) -> None:
    made = tokenizer(CHATML.replace("in messages %}", "in messages if message.role != 'system' %}"))
    with pytest.raises(DataError, match=r"leaves out the content of turn 0 \(system\): 'Be brief\.'"):
        encode_prompt(made, [turn("system", "Be brief."), turn("user", other)])
    made = tokenizer(CHATML.replace("in messages %}", "in messages[-1:] %}"))
    with pytest.raises(DataError, match=r"leaves out the content of turn 0 \(user\): 'go on'"):
        encode_prompt(made, [turn("user", "go on"), turn("assistant", other), turn("user", "go on")])


def test_a_turn_without_content_need_not_be_rendered() -> None:
    """Some templates write a turn's calls and no content."""
    made = tokenizer(RICH.replace("{{ m.content }}", "{% if not m.tool_calls %}{{ m.content }}{% endif %}"))
    encode_prompt(made, [turn("user", "a"), turn("assistant", "", tool_calls=[CALL]), turn("user", "b")])
    with pytest.raises(DataError, match=r"leaves out the content of turn 1 \(assistant\): 'I call'"):
        encode_prompt(made, [turn("user", "a"), turn("assistant", "I call", tool_calls=[CALL]), turn("user", "b")])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content + 1 }}", "TypeError: can only concatenate"),
        ("{{ raise_exception('no system turn\nhere') }}", "no system turn"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{{ messages[5].content }}", "has no element 5"),
        ("{{ strftime_now(3) }}", "TypeError"),
        ("{% for %}", "Expected an expression|expected token"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ [1] | map('nope') | list }}", "No filter named 'nope'"),
    ],
)
def test_a_template_may_raise_anything(template: str, message: str) -> None:
    with pytest.raises(DataError, match=f"q.jsonl, line 4: the chat template refuses these messages: .*({message})"):
        encode_prompt(tokenizer(template), [turn("user", "hi")], "q.jsonl, line 4")


def test_a_template_that_writes_nothing() -> None:
    with pytest.raises(DataError, match="row 1: the chat template renders these messages as nothing"):
        encode_prompt(tokenizer("{% if messages[0].content == 'x' %}y{% endif %}"), [turn("user", "")], "row 1")


def test_prompts_that_the_template_refuses_are_skipped_on_request() -> None:
    made = tokenizer(
        CHATML.replace("{% endfor %}", "{% if message.content == 'b' %}{{ 1 / 0 }}{% endif %}{% endfor %}")
    )
    rows = {
        "prompt_id": [3, 4, 5],
        "messages": [[turn("user", text)] for text in "abc"],
        "where": ["l 1", "l 2", "l 3"],
    }
    prompts, notes = pl.DataFrame(rows), Notes()
    with pytest.raises(DataError, match=r"l 2: the chat template refuses .* --set data\.on_bad_row=skip"):
        encode_prompts(prompts, made)
    kept = encode_prompts(prompts, made, rule=BadRowRule("skip", 0.5), report=notes)
    assert [prompt_id for prompt_id, _ in kept] == [3, 5]
    assert "the prompts: 1 of 3 prompts skipped (data.on_bad_row=skip): l 2: " in notes.texts[0]


def test_prompts_that_were_rendered_already_are_told() -> None:
    notes = Notes()
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    rows = {"prompt_id": [0, 1], "messages": [[turn("user", text)] for text in ("hi", rendered)]}
    encode_prompts(pl.DataFrame(rows), tokenizer(), report=notes)
    (note,) = notes.texts
    assert note.startswith("1 of 2 prompts hold the spelling of a control token, which is encoded as plain text")
    assert "'<|im_start|>' in prompt 1" in note


def test_pairs_that_are_equal_or_too_long_are_left_out_and_counted() -> None:
    made, notes = tokenizer(CHATML.replace("message['content']", "message['content'] | trim")), Notes()
    texts = [("It is.", "It is.\n\n"), ("Yes.", "No."), ("long " * 40, "no")]
    pairs = pairs_frame(
        [
            {"prompt": [turn("user", "Is it?")], "chosen": [turn("assistant", a)], "rejected": [turn("assistant", b)]}
            for a, b in texts
        ]
    )
    encoded = encode_pairs(pairs, made, STOPS, positions=128, report=notes)
    assert encoded["chosen"].to_list() == [[turn("assistant", "Yes.")]]
    assert notes.texts == [
        "1 of 3 offline pairs left out: chosen and rejected are equal once tokenized",
        "1 of 3 offline pairs left out: longer than the model's 128 positions",
    ]


def test_a_pair_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path.write_text(f"{json.dumps(row)}\n\n{json.dumps(row | {'prompt': 'bad'})}\n")
    made = tokenizer("{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}" + CHATML)
    with pytest.raises(DataError, match=r"^q.jsonl, line 3: the chat template refuses"):
        encode_pairs(read_pairs(path), made, STOPS)


def test_a_stop_token_that_is_ordinary_text() -> None:
    made = tokenizer()
    line = made.convert_tokens_to_ids("Ċ")
    answer = [turn("assistant", "Yes.\nOf course.")]
    with pytest.raises(DataError, match=r"row 2: the response has the stop token '\\n' in its text, so it would end"):
        encode_response(made, [turn("user", "hi")], answer, [4, line], "row 2")
    assert encode_response(made, [turn("user", "hi")], [turn("assistant", "Yes.")], [4, line])[-1] == 4


# --- folders -----------------------------------------------------------------------------------------------


def saved(folder: Path, template: Any = CHATML, **config: Any) -> Path:
    made = make_tokenizer()
    made.chat_template = template
    made.save_pretrained(folder)
    for name, values in config.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def test_the_clock_of_a_template_stands_at_the_time_of_the_config(tmp_path: Path) -> None:
    folder = saved(tmp_path, "{{ strftime_now('%d %b %Y %H:%M:%S') }}{{ messages[0].content }}")
    then = ModelConfig(template_time="2026-01-31T12:00:05")
    made = load_tokenizer(folder, then)
    assert made.decode(encode_prompt(made, [turn("user", "hi")])) == "31 Jan 2026 12:00:05hi"
    with pytest.raises(ValueError, match="'noon' is no time"):
        ModelConfig(template_time="noon")


def test_templates_by_name_need_a_default(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="chat templates by the names rag, tool_use, but none is named default"):
        load_tokenizer(saved(tmp_path, {"tool_use": CHATML, "rag": CHATML}), ModelConfig())
    made = load_tokenizer(saved(tmp_path, {"tool_use": CHATML, "default": CHATML}), ModelConfig())
    assert encode_prompt(made, [turn("user", "hi")])


def test_a_tokenizer_that_cannot_be_read(tmp_path: Path) -> None:
    file = saved(tmp_path) / "tokenizer.json"
    whole = file.read_text()
    newer = json.loads(whole) | {"model": {"type": "Newer", "vocab": {}}}
    for text in (json.dumps(newer), whole[:100], ""):
        file.write_text(text)
        with pytest.raises(DataError, match=r"cannot load a tokenizer from it: .*its tokenizer's files are damaged"):
            load_tokenizer(tmp_path, ModelConfig())


@pytest.mark.parametrize("name", ["LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer"])
def test_a_tokenizer_without_its_vocabulary(tmp_path: Path, name: str) -> None:
    """transformers loads each of these from tokenizer_config.json alone, with a handful of tokens."""
    (saved(tmp_path) / "tokenizer.json").unlink()
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": name}))
    with pytest.raises(DataError, match=r"its tokenizer has no vocabulary, only \d tokens; a file such as"):
        load_tokenizer(tmp_path, ModelConfig())


def test_stop_tokens_of_either_config(tmp_path: Path) -> None:
    made = make_tokenizer()
    assert stop_token_ids(saved(tmp_path, config={"eos_token_id": [2, 4]}), made) == [2, 4]
    assert stop_token_ids(saved(tmp_path, config={"text_config": {"eos_token_id": 2}}), made) == [2, 4]
    assert stop_token_ids(saved(tmp_path, generation_config={"eos_token_id": 5}), made) == [4, 5]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2,')
    with pytest.raises(DataError, match=r"generation_config\.json cannot be read"):
        stop_token_ids(tmp_path, made)


@pytest.mark.parametrize("value", ["</s>", [4, "</s>"], 4.0, True, [[4]], {"a": 4}, 262, [4, 99999]])
@pytest.mark.parametrize("name", ["generation_config", "config"])
def test_stop_tokens_that_are_none(tmp_path: Path, value: Any, name: str) -> None:
    saved(tmp_path, config={"vocab_size": 262})
    (tmp_path / f"{name}.json").write_text(json.dumps({"vocab_size": 262, "eos_token_id": value}))
    with pytest.raises(DataError, match=rf"{name}\.json: eos_token_id is .* is no token id of the model; correct it"):
        load_tokenizer(tmp_path, ModelConfig())


def test_an_end_of_sequence_token_that_the_model_lacks(tmp_path: Path) -> None:
    """transformers adds a special token that the vocabulary does not have."""
    file = saved(tmp_path, config={"vocab_size": 262}) / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<end>"}))
    with pytest.raises(DataError, match=r"'<end>' has id 262, but the model's vocabulary has 262 entries"):
        load_tokenizer(tmp_path, ModelConfig())


def test_a_longest_sequence_that_is_no_number(tmp_path: Path) -> None:
    file = saved(tmp_path) / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": "long"}))
    with pytest.raises(DataError, match=r"tokenizer_config\.json: model_max_length is 'long', not a number"):
        load_tokenizer(tmp_path, ModelConfig())


@pytest.mark.parametrize("value", [None, -1, [], [4, 2], 5])
def test_stop_tokens_that_are_well(tmp_path: Path, value: Any) -> None:
    folder = saved(tmp_path, config={"vocab_size": 262}, generation_config={"eos_token_id": value})
    assert 4 in stop_token_ids(folder, make_tokenizer())


def test_a_turn_end_that_is_no_stop_token_is_told(tmp_path: Path) -> None:
    made = tokenizer()
    note = turn_end_note(made, [2], tmp_path)
    assert note is not None
    assert "ends an answer with '<|im_end|>' (token 4), which is no stop token (these are '</s>')" in note
    assert f"Add 4 to eos_token_id in {tmp_path / 'generation_config.json'}" in note
    assert turn_end_note(made, [2, 4], tmp_path) is None
    assert turn_end_note(tokenizer("{{ messages[-1].content }}"), [2], tmp_path) is None  # the template ends no turn
