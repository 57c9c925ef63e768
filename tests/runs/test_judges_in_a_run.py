"""Judges of `evaluate.judges` in a run: they are found before the first round, and their paths are the run's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from damage import notes
from faked_stages import faked_stages
from own_run import Events

from dice_py.config.judges import JudgesConfig
from dice_py.config.run import RunConfig
from dice_py.errors import DataError
from dice_py.runs import loop
from dice_py.runs.stored_config import with_absolute_paths
from dice_py.stages.evaluate import EvaluateJob
from dice_py.stages.job import StageResult
from dice_py.storage.files import Manifest, write_sealed


def with_judges(config: RunConfig, **judges: Any) -> RunConfig:
    evaluate = config.evaluate.model_copy(update={"judges": JudgesConfig.model_validate(judges)})
    return config.model_copy(update={"evaluate": evaluate})


@pytest.mark.parametrize(
    ("judges", "said"),
    [
        ({"implicit": {"policy": "absent-model/x", "reference": "y/z"}}, r"evaluate\.judges\.implicit\.policy"),
        ({"reward_model": {"model": "./absent"}}, r"evaluate\.judges\.reward_model.*absent"),
        (
            {"openai": {"base_url": "http://127.0.0.1:9/v1", "model": "m", "template": "absent.jinja"}},
            r"absent\.jinja does not exist",
        ),
    ],
)
def test_a_judge_that_is_not_there_stops_the_run_first(
    judges: dict[str, Any], said: str, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = faked_stages(monkeypatch)
    with pytest.raises(DataError, match=said):
        loop.run(with_judges(config, **judges), tmp_path / "run", Events())
    assert given == []


def test_a_judges_failure_is_a_warning_until_it_answers(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    down = True

    def evaluation(job: EvaluateJob) -> StageResult:
        assert [judge.name for judge in job.judges] == ["openai"]
        metrics = {"judge_failures": {"openai": "no answer"}} if down else {"openai_win_rate": 0.6}
        write_sealed(job.out / "metrics.json", metrics, job.key())
        return StageResult([(job.out / "metrics.json", job.key())], metrics)

    faked_stages(monkeypatch, evaluation)
    judged = with_judges(config, openai={"base_url": "http://127.0.0.1:9/v1", "model": "m"})
    folder, events = tmp_path / "run", Events()
    assert list(loop.run(judged, folder, events)) == ["round-01"]
    (warning,) = [fields for event, fields in events.events if event == "warning" and fields["stage"] == "evaluate"]
    assert warning["name"] == "judge_failure"
    assert "no answer" in warning["text"]
    down = False
    events = Events()
    metrics = loop.resume(folder, events)
    assert metrics["round-01"]["openai_win_rate"] == 0.6
    assert [stage for stage, status in events.stages() if status == "done"] == ["round-01/evaluate"]
    assert Manifest(folder / "manifest.json").stage("round-01/evaluate")["warnings"] == []
    assert not any("damaged" in note for note in notes(events))


def test_paths_of_judges_do_not_depend_on_the_working_directory(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    judges = with_absolute_paths(
        with_judges(
            config,
            reward_model={"model": "model"},
            implicit={"policy": "./p", "reference": "some-name/of-the-hub"},
            openai={"base_url": "http://127.0.0.1:9/v1", "model": "m", "template": "t.jinja"},
        )
    ).evaluate.judges
    assert judges.reward_model is not None
    assert judges.implicit is not None
    assert judges.openai is not None
    assert judges.reward_model.model == str(tmp_path / "model")
    assert (judges.implicit.policy, judges.implicit.reference) == (str(tmp_path / "p"), "some-name/of-the-hub")
    assert (judges.openai.template, judges.openai.model) == (str(tmp_path / "t.jinja"), "m")
