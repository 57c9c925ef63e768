"""A function of the user's own as a judge: what it gets, its key, and what is refused."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from own_config import refused as config_refused
from places import ROOT

from dice_py.config.judges import FunctionConfig, JudgesConfig
from dice_py.config.shared import ModelConfig
from dice_py.data import prompts_frame
from dice_py.errors import DataError, UsageError
from dice_py.evaluation.judges.function import FunctionJudge
from dice_py.evaluation.judges.registry import build_judges

MODULE = "judged_by_a_test"
PROMPTS = prompts_frame(
    [
        [{"role": "user", "content": "hi"}],
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}],
    ]
)
SAMPLES = pl.DataFrame(
    {"prompt_id": [1, 0, 0], "response": ["because", "", "no\x1b[31m"]},
    schema={"prompt_id": pl.UInt32, "response": pl.String},
)
Written = Callable[..., FunctionJudge]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Written]:
    """Makes the judge of a module with this source."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source: str, name: str = "score") -> FunctionJudge:
        (tmp_path / f"{MODULE}.py").write_text(source)
        forget()
        return FunctionJudge.of(FunctionConfig(call=f"{MODULE}:{name}"), ModelConfig())

    yield write
    forget()


def forget() -> None:
    """As in a fresh process."""
    sys.modules.pop(MODULE, None)
    importlib.invalidate_caches()


def test_it_gets_the_texts_and_gives_the_number(written: Written) -> None:
    judge = written("seen = []\ndef score(*texts):\n    seen.append(texts)\n    return len(texts[1])")
    scores = judge.scores(PROMPTS, SAMPLES)
    assert (scores.dtype, scores.to_list()) == (pl.Float64, [7.0, 0.0, 7.0])
    asked = "system: be brief\n\nuser: why?"
    assert sys.modules[MODULE].seen == [(asked, "because"), ("hi", ""), ("hi", "no\x1b[31m")]


def test_numbers_of_numpy_and_methods_of_a_class_serve(written: Written) -> None:
    source = "import numpy as np\nclass Of:\n    def it(p, r):\n        return np.float32(0.5) if r else True"
    assert written(source, "Of.it").scores(PROMPTS, SAMPLES).to_list() == [0.5, 1.0, 0.5]


def test_its_progress_is_reported(written: Written) -> None:
    judge, told = written("def score(p, r): return 0"), []
    many = pl.DataFrame({"prompt_id": [0] * 300, "response": ["x"] * 300}, schema=SAMPLES.schema)
    judge.scores(PROMPTS, many, lambda event, **fields: told.append((event, fields["done"], fields["total"])))
    assert told == [("progress", 256, 300), ("progress", 300, 300)]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return 1 / len(response)", r"fails on response 1 \(prompt 0\): ZeroDivisionError"),
        ("return float('nan')", r"returns nan for response 0 \(prompt 1\)"),
        ("return float('inf') if not response else 0", r"returns inf for response 1 \(prompt 0\)"),
        ("return 'good'", "returns 'good' for response 0.*no number"),
        ("return None", "returns None for response 0.*no number"),
        ("return 10 ** 400", r"returns inf for response 0.*finite"),
        ("raise SystemExit(0)", "fails on response 0.*SystemExit: 0; mend"),
    ],
)
def test_what_is_no_score(body: str, said: str, written: Written) -> None:
    judge = written(f"def score(prompt, response):\n    {body}")
    with pytest.raises(DataError, match=said):
        judge.scores(PROMPTS, SAMPLES)


def test_the_place_in_the_users_file_is_in_the_error(written: Written) -> None:
    judge = written("def score(p, r): return None")
    with pytest.raises(DataError, match=r"ours\.jsonl, line 7"):
        judge.scores(PROMPTS, SAMPLES.head(1).with_columns(where=pl.lit("ours.jsonl, line 7")))


@pytest.mark.parametrize(
    ("source", "name", "said"),
    [
        ("raise OSError('no lexicon')", "score", r"cannot be imported \(OSError: no lexicon\).*PYTHONPATH"),
        ("raise SystemExit(0)", "score", r"cannot be imported \(SystemExit: 0\)"),
        ("score = 3", "score", "which is of type int"),
        ("def other(p, r): ...", "score", f"{MODULE} has no score"),
    ],
)
def test_what_cannot_be_called(source: str, name: str, said: str, written: Written) -> None:
    with pytest.raises(UsageError, match=said):
        written(source, name)


@pytest.mark.parametrize(
    ("module", "said"), [("absent_module", "cannot be imported"), ("sys", "not a module in a file")]
)
def test_a_module_without_a_file(module: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        FunctionJudge.of(FunctionConfig(call=f"{module}:exit"), ModelConfig())


@pytest.mark.parametrize("call", ["score", "a.b.", "a:b:c", "a:", ":b", "a b:c", "../x:y"])
def test_what_names_no_function(call: str) -> None:
    assert "package.module:name" in config_refused(f"evaluate.judges.function.call={call!r}")


def test_the_key_is_of_name_and_source(written: Written) -> None:
    source = "def score(p, r): return 0\nother = score\n"
    first = written(source)
    assert written(source).key_fields() == first.key_fields()
    changed = [written(source, "other"), written(f"{source}# changed")]
    assert all(judge.key_fields() != first.key_fields() for judge in changed)
    # The first judge's module is another one now: its scores would be kept under a key that is not theirs.
    with pytest.raises(DataError, match="has changed since"):
        first.scores(PROMPTS, SAMPLES)


def test_the_registry_makes_it_from_its_section(written: Written) -> None:
    judge = written("def score(p, r): return 0")
    config: Any = JudgesConfig.model_validate({"function": {"call": judge.call}})
    assert build_judges(config, ModelConfig(), is_world=False) == (judge,)
    assert build_judges(JudgesConfig(), ModelConfig(), is_world=False) == ()


def test_the_python_of_the_page_runs(written: Written) -> None:
    page = (ROOT / "docs" / "judges.md").read_text(encoding="utf-8")
    (block,) = (part.split("```")[0] for part in page.split("```python\n")[1:])
    samples = SAMPLES.with_columns(response=pl.Series(["It ends.", "", "It does not"]))
    assert written(block).scores(PROMPTS, samples).to_list() == [1.0, 0.0, 0.0]
