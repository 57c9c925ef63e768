"""Options that the config passes on to a library: which values are taken, whose names are refused, and the keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError, field_validator

from dice_py.config.loading import dump, load_resolved, resolve
from dice_py.config.passthrough import PassedOptions, passed_options, refuse_own, refused_by
from dice_py.config.shared import Section
from dice_py.errors import UsageError

SAMPLING = "generate.sampling_params"


def refused(*assignments: str) -> str:
    with pytest.raises(UsageError) as caught:
        resolve([], assignments)
    return str(caught.value)


def test_options_of_files_and_assignments_are_merged_by_name(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("generate: {sampling_params: {min_p: 0.1, stop: [a, b]}, vllm: {engine_args: {a: {b: [1, null]}}}}")
    config = resolve([file], [f"{SAMPLING}.min_p=0.05", f"{SAMPLING}.logit_bias.13=-2"])
    assert config.generate.sampling_params == {"min_p": 0.05, "stop": ["a", "b"], "logit_bias": {"13": -2}}
    assert config.generate.vllm.engine_args == {"a": {"b": [1, None]}}
    stored = tmp_path / "stored.yaml"
    stored.write_text(dump(config))
    assert load_resolved(stored) == config


@pytest.mark.parametrize("empty", ["", "null", "{}"])
def test_no_options(empty: str) -> None:
    assert resolve([], [f"{SAMPLING}={empty}"]) == resolve()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (f"{SAMPLING}=3", f"{SAMPLING}: Input should be a valid dictionary"),
        (f"{SAMPLING}.since=2020-01-01", f"{SAMPLING}: since has a date"),
        (f"{SAMPLING}.min_p=.inf", f"{SAMPLING}: min_p has inf, but must hold finite numbers"),
        (f"{SAMPLING}.a={{b: [1, .nan]}}", f"{SAMPLING}: a has nan"),
        (f"{SAMPLING}.a={{b: !!set {{c}}}}", f"{SAMPLING}: a has a set"),
        (f"{SAMPLING}.min-p=1", f"{SAMPLING}: 'min-p' is no name of an option"),
        (f"{SAMPLING}.temperature=1", f"{SAMPLING}: temperature cannot be passed on: it is generate.temperature"),
        (f"{SAMPLING}.max_tokens=1", f"{SAMPLING}: max_tokens cannot be passed on: it is generate.max_new_tokens"),
        ("generate.vllm.engine_args.dtype=half", "generate.vllm.engine_args: dtype cannot be passed on: it is model."),
        ("generate.min_p=0.1", "unknown key 'generate.min_p'; set generate.sampling_params.min_p"),
        ("generate.vllm.quantization=fp8", "set generate.vllm.engine_args.quantization"),
        ("generate.sampling_param.min_p=0.1", "did you mean 'generate.sampling_params'?"),
    ],
)
def test_what_is_refused(assignment: str, message: str) -> None:
    assert message in refused(assignment)


class Inside(Section):
    """A section with options for a library."""

    number: int = 1
    passed: PassedOptions = passed_options("options")


class Outside(Section):
    """A section that holds another."""

    inside: Inside = Inside()
    passed: PassedOptions = passed_options("options")
    name: str = "a"

    @field_validator("passed")
    @classmethod
    def _own(cls, value: PassedOptions) -> PassedOptions:
        return refuse_own(value, {"name": "it is name"})


def test_an_empty_mapping_is_in_no_key_and_a_set_one_is() -> None:
    assert Outside().key_dump() == {"inside": {"number": 1}, "name": "a"}
    assert Outside().key_dump(exclude={"name"}) == {"inside": {"number": 1}}
    assert Outside().key_dump(exclude=["inside"]) == {"name": "a"}
    given = Outside(inside=Inside(passed={"a": 1}), passed={"b": [2]})
    assert given.key_dump() == {"inside": {"number": 1, "passed": {"a": 1}}, "name": "a", "passed": {"b": [2]}}
    with pytest.raises(ValidationError, match="name cannot be passed on: it is name"):
        Outside(passed={"name": 1})


class Library(BaseModel, extra="forbid"):
    """A library's options."""

    min_p: float = 0.0
    top_a: int = 0


def library_error(**options: Any) -> Exception:
    try:
        Library(**options)
    except ValidationError as error:
        return error
    raise AssertionError


def test_the_librarys_message_is_one_line() -> None:
    error = library_error(min_p="x", mnp=1)
    assert str(refused_by("Library", SAMPLING, error)) == (
        f"{SAMPLING}: Library refuses it: min_p: Input should be a valid number, unable to parse string as a number; "
        "mnp: Extra inputs are not permitted"
    )
    unknown = TypeError("Unexpected keyword argument 'min_pp'")
    message = f"{SAMPLING}: Library refuses it: Unexpected keyword argument 'min_pp'; did you mean 'min_p'?"
    assert str(refused_by("Library", SAMPLING, unknown, Library.model_fields)) == message
    assert str(refused_by("Library", SAMPLING, ValueError("no\n  such\nthing."))).endswith("refuses it: no such thing")
    assert str(refused_by("Library", SAMPLING, ValueError())).endswith("refuses it: ValueError")
