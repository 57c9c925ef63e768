"""What a judge's answers say, how they are kept, its templates, and its budget: no server is needed."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dice_py.config.judges import OpenAIConfig
from dice_py.config.shared import ModelConfig
from dice_py.data import Message
from dice_py.errors import DataError, UsageError
from dice_py.evaluation.judges.openai_server import OpenAIJudge
from dice_py.evaluation.judges.served.answers import Answer, AnswerCache, first_wins
from dice_py.evaluation.judges.served.template import boundary, read_template, render
from dice_py.evaluation.judges.served.usage import Usage

QUESTION: list[Message] = [{"role": "user", "content": "why?"}]
URL = "http://127.0.0.1:1/v1"


def answer(text: str = "", tops: list[tuple[str, float]] | None = None, tokens: tuple[int, int] = (7, 3)) -> Answer:
    return Answer(text, "stop", tops, *tokens)


# --- what answers say ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[[A]]", 1.0),
        ("It is hard to say.\n[[b]]", 0.0),
        ("[[ C ]]", 0.5),
        ("[[tie]]", 0.5),
        ("[[A]] at first, but then [[B]]", 0.0),  # the verdict is what it ends with
        ("My final verdict is: [[A>>B]]", 1.0),
        ("[[A>B]]", 1.0),
        ("[[A=B]]", 0.5),
        ("[[B>A]]", 0.0),
        ("[[B>>A]]", 0.0),
        ("B", 0.0),
        (" C\n", 0.5),
        ("a", None),
        ("", None),
        ("A is better", None),
        ("[A]", None),
        ("[[D]]", None),
        ("[[A]", None),
    ],
)
def test_verdicts_of_texts(text: str, value: float | None) -> None:
    assert first_wins(answer(text), "text") == value


@pytest.mark.parametrize(
    ("tops", "value"),
    [
        ([("A", math.log(0.6)), ("B", math.log(0.2))], 0.75),
        ([("A", math.log(0.3)), (" A", math.log(0.3)), ("B", math.log(0.2)), ("The", math.log(0.1))], 0.75),
        ([("B", math.log(0.9))], 0.0),
        ([("A", math.log(0.05)), ("B", math.log(0.04)), ("The", math.log(0.9))], None),  # it begins otherwise
        ([], None),
        (None, None),
    ],
)
def test_verdicts_of_log_probabilities(tops: list[tuple[str, float]] | None, value: float | None) -> None:
    found = first_wins(answer("A", tops), "logprobs")
    assert found == (None if value is None else pytest.approx(value))


# --- the cache -------------------------------------------------------------------------------------------------


@given(text=st.text(), key=st.text(min_size=1), tops=st.lists(st.tuples(st.text(), st.floats(-50, 0))))
def test_answers_come_back_as_they_were(
    text: str, key: str, tops: list[tuple[str, float]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("answers") / "answers.sqlite"
    given_answer = Answer(text, None, tops or None, None, 3)
    with AnswerCache(file) as cache:
        cache.add(key, given_answer)
        cache.add(key, answer("another"))
    with AnswerCache(file) as cache:
        assert cache.read([key, "absent"]) == {key: given_answer}


def add_answers(file: Path, name: str, count: int) -> None:
    """Runs in a process of its own; negative counts never end."""
    with AnswerCache(file) as cache:
        number = 0
        while number != count:
            cache.add(f"{name} {number}", answer(f"text {number}"))
            number += 1


def test_several_processes_and_a_kill(tmp_path: Path) -> None:
    file = tmp_path / "answers.sqlite"
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=add_answers, args=(file, name, 40)) for name in ("one", "two")]
    endless = spawn.Process(target=add_answers, args=(file, "killed", -1))
    for process in (endless, *writers):
        process.start()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if file.exists():
            with AnswerCache(file) as cache:
                if cache.read(["killed 5"]):
                    break
        time.sleep(0.01)
    assert endless.pid is not None
    os.kill(endless.pid, signal.SIGKILL)
    for process in (endless, *writers):
        process.join(120)
    assert [process.exitcode for process in writers] == [0, 0]
    with AnswerCache(file) as cache:
        kept = cache.read([f"{name} {number}" for name in ("one", "two") for number in range(40)])
        assert len(kept) == 80
        assert len(cache.read(f"killed {number}" for number in range(6))) == 6


def test_a_file_that_is_no_cache_stays_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "answers.sqlite"
    file.write_text("the user's own notes, which are longer than the header of a database " * 3)
    before = file.read_bytes()
    with pytest.raises(DataError, match=r"damaged, or no file of a judge's answers.*move it away"):
        AnswerCache(file)
    assert file.read_bytes() == before
    with sqlite3.connect(tmp_path / "other.sqlite") as database:
        database.execute("CREATE TABLE answers (key TEXT, answer TEXT)")
        database.execute("INSERT INTO answers VALUES ('k', '[1, 2]')")
    with AnswerCache(tmp_path / "other.sqlite") as cache, pytest.raises(DataError, match="damaged"):
        cache.read(["k"])


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="DICE_CACHE"):
        AnswerCache(tmp_path)


# --- templates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", ["text", "logprobs"])
def test_the_packages_own_templates(verdict: str) -> None:
    source = read_template(None, verdict)
    prompt: list[Message] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "what is {{ 7 * 7 }}?"},
        {"role": "assistant", "content": "", "extra": '{"message": {"tool_calls": [{"name": "add"}]}}'},
        {"role": "user", "content": "go on"},
    ]
    system, user = render(source, prompt, "the first <b>", "the second {% endblock %}")
    assert (system["role"], user["role"]) == ("system", "user")
    code = boundary([message["content"] for message in prompt] + ["the first <b>", "the second {% endblock %}"])
    assert code in system["content"]
    order = ["be brief", "what is {{ 7 * 7 }}?", '[{"name": "add"}]', "go on", "the first <b>", "the second {% e"]
    places = [user["content"].index(part) for part in order]
    assert places == sorted(places)
    assert user["content"].count(code) == 7  # four turns, two answers, the end


@given(st.lists(st.text(), min_size=1, max_size=4))
def test_no_text_holds_its_boundary(texts: list[str]) -> None:
    code = boundary(texts)
    assert code == boundary(texts)
    assert not any(code in text for text in texts)


def test_a_boundary_that_is_guessed_is_another() -> None:
    # The texts hold what would be the code of the attempt before: only a text of its own digest could keep it.
    code = boundary(["a"])
    assert boundary(["a", code]) != code


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ response_a }}", r"does not show \{\{ response_b \}\}"),
        ("{% block user %}{{ response_b }}{% endblock %} {{ response_a }}", r"does not show \{\{ response_a \}\}"),
        ("{{ response_a }} {{ response_b }} {{ answer }}", "'answer' is undefined; it knows messages, instruction"),
        ("{{ response_a }}\n{{ response_b", "not a Jinja template: line 2"),
        ("{{ response_a }} {{ response_b }} {{ ''.__class__.__mro__ }}", "cannot be rendered"),
        ("{{ response_a }} {{ response_b }} {{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% for n in range(10**9) %}{{ response_a }}{{ response_b }}{% endfor %}", "OverflowError"),
        ("", "does not show"),
    ],
)
def test_templates_that_cannot_be_used(source: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(source)
    with pytest.raises(DataError, match=words) as refused:
        read_template(file, "text")
    assert str(file) in str(refused.value)


def test_files_that_are_no_templates(tmp_path: Path) -> None:
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe\x00")
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("absent", "does not exist"), ("pipe", "regular file"), ("binary.jinja", "UTF-8"), ("", "reg")):
        with pytest.raises(DataError, match=words):
            read_template(tmp_path / name, "text")


def test_a_template_without_blocks_is_the_users_message(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_bytes("\ufeff{{ instruction }}|{{ response_a }}|{{ response_b }}\r\n".encode())
    rendered = render(read_template(file, "text"), QUESTION, "x", "y")
    assert [message["role"] for message in rendered] == ["user"]
    assert rendered[0]["content"].strip() == "why?|x|y"


# --- keys, budgets and settings --------------------------------------------------------------------------------


def judge_of(**settings: Any) -> OpenAIJudge:
    config = OpenAIConfig.model_validate({"base_url": URL, "model": "m", **settings})
    return OpenAIJudge.of(config, ModelConfig())


def test_the_key_has_what_decides_verdicts(tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{{ response_a }} {{ response_b }}")
    base = judge_of().key_fields()
    changes: list[dict[str, Any]] = [
        {"model": "n"},
        {"base_url": "http://127.0.0.1:2/v1"},
        {"temperature": 1.0},
        {"temperature": None},
        {"max_tokens": 5},
        {"verdict": "logprobs"},
        {"both_orders": False},
        {"template": str(template)},
        {"request": {"seed": 1}},
    ]
    keys = [judge_of(**change).key_fields() for change in changes]
    assert len({repr(key) for key in (base, *keys)}) == len(changes) + 1
    same: list[dict[str, Any]] = [
        {"concurrency": 1},
        {"retries": 0},
        {"timeout": 1.0},
        {"budget_tokens": 5},
        {"input_price": 1.0, "output_price": 2.0},
        {"max_unread": 0.5},
        {"api_key_env": "OTHER"},
        {"base_url": URL + "/"},
    ]
    assert all(judge_of(**change).key_fields() == base for change in same)
    moved = tmp_path / "moved.jinja"
    moved.write_text(template.read_text())
    assert judge_of(template=str(moved)).key_fields() == judge_of(template=str(template)).key_fields()
    assert str(tmp_path) not in repr(keys)


@given(
    st.lists(st.tuples(st.integers(1, 500), st.integers(0, 500)), min_size=1, max_size=60),
    st.integers(1, 20_000),
    st.integers(1, 8),
)
def test_a_budget_is_kept_up_to_the_growth_of_a_request(
    sizes: list[tuple[int, int]], budget: int, concurrency: int
) -> None:
    """Against a run of requests of these sizes: the excess is no more than what requests were larger than before."""
    usage = Usage(OpenAIConfig(base_url=URL, model="m", budget_tokens=budget))
    running: list[tuple[int, int]] = []
    waiting = list(sizes)
    largest = growth = 0
    while True:
        while waiting and len(running) < concurrency and usage.allows(len(running)):
            running.append(waiting.pop(0))
            assert usage.requests or len(running) == 1
        if not running:
            break
        size = running.pop(0)
        if usage.requests:
            growth += max(0, sum(size) - largest)
        largest = max(largest, sum(size))
        usage.add(answer(tokens=size))
    spent = usage.input_tokens + usage.output_tokens
    assert spent == sum(map(sum, sizes[: usage.requests]))
    assert spent <= max(budget, sum(sizes[0])) + growth * concurrency
    if waiting:  # it did not stop too early either
        assert spent + largest > budget


def test_a_server_that_does_not_count() -> None:
    plain = Usage(OpenAIConfig(base_url=URL, model="m", input_price=1.0, output_price=1.0))
    plain.add(Answer("[[A]]", None, None, None, None))
    plain.add(answer("[[A]]"))
    assert plain.counts()["cost"] is None
    assert plain.counts()["requests_not_counted"] == 1
    limited = Usage(OpenAIConfig(base_url=URL, model="m", budget_tokens=5))
    with pytest.raises(UsageError, match="does not say how many tokens"):
        limited.add(Answer("[[A]]", None, None, None, None))
