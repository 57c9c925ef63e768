"""Config files and values of any kind end in a config or in one sentence: nothing hangs, grows or is executed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import yaml
from hostile_texts import HOSTILE
from hypothesis import example, given, settings
from hypothesis import strategies as st
from property_examples import examples

from dice_py.config.loading import dump, known_keys, load_resolved, resolve
from dice_py.config.run import ONE_STAGE
from dice_py.config.yaml_text import parse_yaml, read_yaml
from dice_py.errors import UsageError

BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + level)}: &{chr(98 + level)} [{','.join(['*' + chr(97 + level)] * 10)}]\n" for level in range(8)
)


def refused(tmp_path: Path, content: str | bytes) -> str:
    file = tmp_path / "my.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as raised:
        resolve([file])
    assert str(file) in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[" * 3000, "nested too deeply"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("a: " + "{b: " * 100 + "1" + "}" * 100, "nested too deeply"),
        (BOMB, "aliases expanded"),
        ("a: &a [*a]", "nested too deeply"),
        ("seed: 1\nseed: 2", "the key 'seed' is there twice (line 2, column 1)"),
        ("train: {optim: sgd, optim: adagrad}", "the key 'optim' is there twice"),
        ("1: x", "the key 1, which is not text"),
        ("train: {null: x}", "the key None, which is not text"),
        ("? [a]\n: b", "is not valid YAML"),
        ("seed: " + "9" * 5000, "cannot be read"),
        ("seed: 2026-99-99", "cannot be read"),
        ("x: !!python/object/apply:os.system ['touch executed']", "could not determine a constructor"),
        ("x: !!python/name:os.system", "could not determine a constructor"),
        ("- 1", "must hold a mapping"),
        (b"\xff\xfe\x00", "cannot be read"),
        ("a: 'x", "is not valid YAML"),
        ("# " + "x" * 2**20, "a config is smaller"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, content: str | bytes, said: str, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused(tmp_path, content)
    assert not Path("executed").exists()


def test_anchors_of_a_few_settings_are_fine(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("round0: &same {learning_rate: 1e-5}\ntrain: {<<: *same, warmup_steps: 3}\n")
    assert read_yaml(file) == {
        "round0": {"learning_rate": "1e-5"},
        "train": {"learning_rate": "1e-5", "warmup_steps": 3},
    }


@pytest.mark.parametrize("kind", ["fifo", "folder", "/dev/zero", "/dev/null", "link to a fifo"])
def test_what_is_no_regular_file_is_not_opened(tmp_path: Path, kind: str) -> None:
    file = Path(kind) if kind.startswith("/") else tmp_path / "config.yaml"
    if kind == "folder":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)  # opening it would wait for a writer
    elif kind == "link to a fifo":
        os.mkfifo(tmp_path / "pipe")
        file.symlink_to(tmp_path / "pipe")
    assert not stat.S_ISREG(file.stat().st_mode)
    with pytest.raises(UsageError, match="not a regular file"):
        resolve([file])


KEYS = st.sampled_from([*known_keys(), "train", "model", "data", "nothing", "train.nothing", ""]) | st.text(max_size=12)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=6)
    | st.dates()
    | st.sampled_from(["auto", "none", "linear", "quantum", "nan", "1e400", "0x10", "1_000", *HOSTILE.values()])
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


def resolved_or_refused(files: list[Path], assignments: list[str], one_stage: bool) -> None:
    try:
        config = resolve(files, assignments, one_stage=one_stage)
    except UsageError as error:
        assert 0 < len(str(error)) < 20_000  # noqa: PT017
        return
    stored = yaml.safe_load(dump(config))
    assert type(config).model_validate(stored, context=ONE_STAGE if one_stage else None) == config


@settings(max_examples=examples(150), deadline=None)
@given(st.lists(st.tuples(KEYS, VALUES), max_size=3), st.booleans())
@example([("train.learning_rate", float("nan"))], False)
@example([("beta", float("inf"))], False)
@example([("seed", -1)], False)
@example([("data.prompts", "a\0b")], True)
def test_any_tree_of_values(tmp_path_factory: pytest.TempPathFactory, items: list, one_stage: bool) -> None:
    tree: dict = {}
    for key, value in items:
        place, *parts = [tree, *key.split(".")]
        for part in parts[:-1]:
            place = place.setdefault(part, {}) if isinstance(place, dict) else {}
        if isinstance(place, dict):
            place[parts[-1]] = value
    file = tmp_path_factory.mktemp("fuzz") / "config.yaml"
    try:
        file.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    except UnicodeEncodeError:  # a surrogate, which a file in UTF-8 cannot hold
        return
    resolved_or_refused([file], [], one_stage)


@settings(max_examples=examples(150), deadline=None)
@given(st.lists(st.text(max_size=30) | st.builds("{}={}".format, KEYS, LEAVES | st.text(max_size=20)), max_size=3))
@example(["a.b.c.d.e.f.g.h.i.j.k.l.m=1"])
@example([".=1"])
@example(["train=1"])
@example(["train.lora={r: 0}"])
@example(["train.lora.target_modules=[[[[["])
def test_any_assignment(assignments: list[str]) -> None:
    resolved_or_refused([], assignments, one_stage=False)


@settings(max_examples=examples(150), deadline=None)
@given(st.text() | st.binary().map(lambda data: data.decode("latin-1")))
def test_any_text(text: str) -> None:
    try:
        parse_yaml(text, "it")
    except UsageError as error:
        assert str(error).startswith("it ")  # noqa: PT017


def test_a_stored_config_that_is_cut_off_is_one_sentence(tmp_path: Path) -> None:
    text = dump(resolve())
    file = tmp_path / "config.yaml"
    for end in range(0, len(text), 97):
        file.write_text(text[:end])
        try:
            load_resolved(file)
        except UsageError as error:
            assert str(file) in str(error)  # noqa: PT017
