"""Config of the judges: what is refused, and that no secret is repeated."""

from __future__ import annotations

from typing import Any

import pytest

from dice_py.config.loading import dump, resolve
from dice_py.config.stages import EvaluateConfig
from dice_py.errors import UsageError

SERVER = {"base_url": "http://127.0.0.1:8000/v1/", "model": "m"}


def resolved(**openai: Any) -> Any:
    return resolve(overrides={"evaluate": {"judges": {"openai": {**SERVER, **openai}}}}, one_stage=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"base_url": "127.0.0.1:8000"}, "no URL of a server"),
        ({"base_url": "ftp://host/v1"}, "no URL of a server"),
        ({"base_url": "http://host:port/v1"}, "no URL of a server"),
        ({"base_url": "http://"}, "no URL of a server"),
        ({"budget_cost": 1.0}, "budget_cost needs the prices"),
        ({"input_price": 1.0}, "input_price and output_price belong together"),
        ({"request": {"messages": []}}, "openai.template"),
        ({"request": {"n": 2}}, "one answer is read"),
        ({"verdict": "vote"}, "verdict"),
        ({"concurrency": 0}, "concurrency"),
        ({"api_key": "x"}, "unknown key"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        resolved(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"base_url": "http://user:sk-secret@host/v1"},
        {"base_url": "http://host/v1?key=sk-secret"},
        {"api_key_env": "sk-secret"},
        {"request": {"api_key": "sk-secret"}},
        {"request": {"extra_headers": {"Authorization": "sk-secret"}}},
    ],
)
def test_a_secret_is_refused_and_not_repeated(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"environment variable|plain URL") as refused:
        resolved(**settings)
    assert "sk-secret" not in str(refused.value)


def test_it_is_stored_and_read_again() -> None:
    config = resolved(request={"seed": 7})
    assert config.evaluate.judges.openai.base_url == "http://127.0.0.1:8000/v1"
    assert "seed: 7" in dump(config)


def test_keys_of_runs_without_judges_are_as_they_were() -> None:
    assert EvaluateConfig().key_dump() == {"prompts": 256, "samples": 1, "pairs": 512}
