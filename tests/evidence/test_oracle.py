"""The oracle of the sentiment task, alone and as a judge of an evaluation."""

from __future__ import annotations

import importlib
import sys

import polars as pl
import pytest

from dice_py.config.judges import JudgesConfig
from dice_py.config.shared import ModelConfig
from dice_py.data import prompts_frame
from dice_py.errors import UsageError
from dice_py.evaluation.judges.registry import build_judges
from dice_py.evidence import oracle

REASON = "the oracle's package is not installed"


def test_it_knows_good_from_bad() -> None:
    pytest.importorskip("vaderSentiment", reason=REASON)
    texts = ["It is wonderful, and I love it!", "It is a kettle.", "", "Awful: it broke, and I hate it."]
    good, neutral, empty, bad = (oracle.sentiment("Review it.", text) for text in texts)
    assert 1.0 > good > 0.5
    assert -1.0 < bad < -0.5
    assert (neutral, empty) == (0.0, 0.0)
    assert oracle.sentiment("a wonderful prompt", texts[1]) == 0.0  # the response alone counts


def test_it_is_a_judge_by_its_name() -> None:
    pytest.importorskip("vaderSentiment", reason=REASON)
    config = JudgesConfig.model_validate({"function": {"call": oracle.CALL}})
    (judge,) = build_judges(config, ModelConfig(), is_world=False)
    prompts = prompts_frame([[{"role": "user", "content": "Review it."}]])
    samples = pl.DataFrame({"prompt_id": [0, 0], "response": ["good", "bad"]})
    good, bad = judge.scores(prompts, samples)  # type: ignore[attr-defined]
    assert good > 0.0 > bad


def test_without_the_package_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    fresh = importlib.reload(oracle)  # without the analyzer that an earlier test has made
    with pytest.raises(UsageError, match=r"vaderSentiment, which is not installed.*pip install"):
        fresh.require_oracle()
