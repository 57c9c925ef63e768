"""Which α ends a round: the best that is not refused, measured once each; what loses is deleted."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import flip, notes
from moved_models import assert_equal, expected, trained, weights
from own_run import Events
from plan_data import own
from tiny_sets import CPU
from transformers import AutoModelForCausalLM

from dice_py.config.extrapolation import ExtrapolateConfig
from dice_py.config.loading import resolve
from dice_py.config.stages import EvaluateConfig, GenerateConfig, ScoreConfig
from dice_py.errors import DataError, UsageError
from dice_py.events import Report, no_report
from dice_py.stages import choose_alpha
from dice_py.stages.choose_alpha import ChooseAlphaJob
from dice_py.stages.evaluate import EvaluateJob
from dice_py.stages.job import StageResult
from dice_py.storage.files import read_sealed

Measured = dict[float, tuple[float | None, float | None]]
"""By α: the metric, and the mean length of responses."""


class Evaluations:
    """In place of the evaluation of models: figures that a test gives. `calls` has the α of each, in order."""

    def __init__(self) -> None:
        self.figures: Measured = {}
        self.calls: list[float] = []
        self.stop_at: float | None = None

    def run(self, job: EvaluateJob, report: Report = no_report) -> StageResult:
        alpha = float(job.out.name.removeprefix("alpha-"))
        self.calls.append(alpha)
        assert (job.policy / "dice.json").is_file() or alpha == 0.0
        if alpha == self.stop_at:
            raise KeyboardInterrupt
        (job.out / "samples").mkdir(parents=True)
        (job.out / "samples" / "alpha.txt").write_text(str(alpha))
        report("note", text="said of every model")
        value, length = self.figures[alpha]
        return StageResult(
            [], {"implicit_reward_accuracy": value, "oracle_win_rate": 1.0, "mean_response_tokens": length}
        )


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> Evaluations:
    made = Evaluations()
    monkeypatch.setattr(EvaluateJob, "run", lambda job, report=no_report: made.run(job, report))
    return made


@pytest.fixture(scope="module")
def after(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama` after a training. Read only."""
    return trained(llama, tmp_path_factory.mktemp("trained") / "after")


@pytest.fixture
def job(llama: Path, after: Path, tmp_path: Path) -> ChooseAlphaJob:
    evaluation = EvaluateJob(
        EvaluateConfig(),
        GenerateConfig(),
        ScoreConfig(),
        CPU,
        policy=after,
        start=llama,
        previous=llama,
        previous_samples=tmp_path / "before",
        reference=llama,
        initial_reference=llama,
        prompts=None,
        pairs=None,
        input_keys=[None, None],
        out=tmp_path / "evaluate",
        shared=tmp_path / "shared",
        seed=0,
        max_prompt_tokens=100,
        judges=(),
    )
    return ChooseAlphaJob(ExtrapolateConfig(alphas=[0.5, 0.25, 1.0]), llama, evaluation, tmp_path / "extrapolate")


def paths(job: ChooseAlphaJob) -> list[str]:
    return sorted(str(path.relative_to(job.out)) for path in job.out.glob("*/*")) + [
        path.name for path in job.out.glob("*.json")
    ]


def test_the_best_alpha_is_the_new_policy(
    job: ChooseAlphaJob, llama: Path, after: Path, evaluations: Evaluations
) -> None:
    evaluations.figures = {0.0: (0.6, 10.0), 0.25: (0.7, 10.5), 0.5: (0.9, 11.9), 1.0: (0.8, 10.0)}
    events = Events()
    result = job.run(events)
    assert evaluations.calls == [0.0, 0.25, 0.5, 1.0]
    model = job.out / "alpha-0.5" / "model"
    assert [file for file, _ in result.files] == [job.out / "choice.json", model]
    assert_equal(weights(model), expected(weights(llama), weights(after), 0.5))
    assert paths(job) == ["alpha-0.5/measured.json", "alpha-0.5/model", "choice.json"]
    assert result.counts == read_sealed(job.out / "choice.json", job.key())
    assert result.counts["alpha"] == 0.5
    measured = result.counts["measured"]
    assert [(each["alpha"], each["value"], each["mean_response_tokens"], each["refused"]) for each in measured] == [
        (alpha, *evaluations.figures[alpha], None) for alpha in (0.0, 0.25, 0.5, 1.0)
    ]
    assert [each["update_kept"] for each in measured] == [None, *3 * [pytest.approx(1.0, abs=1e-5)]]
    # The evaluate stage draws the same samples, and finds them.
    assert (job.evaluation.out / "samples" / "alpha.txt").read_text() == "0.5"
    (text,) = [text for text in notes(events) if text.startswith("extrapolation: ")]
    assert "alpha 0.5 is the new policy. alpha 0: accuracy 0.6000, 10.0 tokens; alpha 0.25: accuracy 0.7000" in text
    assert notes(events).count("said of every model") == 1
    assert job.incomplete(result.files) == []


def test_an_alpha_that_makes_responses_too_long_is_refused(job: ChooseAlphaJob, evaluations: Evaluations) -> None:
    evaluations.figures = {0.0: (0.6, 10.0), 0.25: (0.7, 12.0), 0.5: (0.9, 12.1), 1.0: (0.95, 20.0)}
    counts = job.run().counts
    assert counts["alpha"] == 0.25
    assert [each["refused"] for each in counts["measured"][:2]] == [None, None]
    assert counts["measured"][3]["refused"] == (
        "responses are longer by 100%, and extrapolate.max_length_growth is 0.2"
    )
    unlimited = replace(job, config=job.config.model_copy(update={"max_length_growth": None}))
    assert unlimited.run().counts["alpha"] == 1.0


def test_the_trained_policy_stays_where_nothing_is_better(job: ChooseAlphaJob, evaluations: Evaluations) -> None:
    # Equal is not better.
    evaluations.figures = {0.0: (0.6, 10.0), 0.25: (0.6, 9.0), 0.5: (None, 9.0), 1.0: (0.9, 20.0)}
    result = job.run()
    assert result.counts["alpha"] == 0.0
    assert [file for file, _ in result.files] == [job.out / "choice.json"]
    assert paths(job) == ["choice.json"]
    assert (job.evaluation.out / "samples" / "alpha.txt").read_text() == "0.0"


def test_a_killed_choice_goes_on_with_the_next_alpha(job: ChooseAlphaJob, evaluations: Evaluations) -> None:
    evaluations.figures = {0.0: (0.6, 10.0), 0.25: (0.9, 10.0), 0.5: (0.7, 10.0), 1.0: (0.8, 10.0)}
    evaluations.stop_at = 1.0
    with pytest.raises(KeyboardInterrupt):
        job.run()
    # What lost has no model any more; the best so far and the one that was measured have.
    assert sorted(path.parent.name for path in job.out.glob("*/model")) == ["alpha-0.25", "alpha-1.0"]
    evaluations.stop_at, evaluations.calls = None, []
    result = job.run()
    assert evaluations.calls == [1.0]
    assert result.counts["alpha"] == 0.25
    assert paths(job) == ["alpha-0.25/measured.json", "alpha-0.25/model", "choice.json"]


def test_a_choice_is_kept_and_its_model_made_again_where_it_is_damaged(
    job: ChooseAlphaJob, evaluations: Evaluations
) -> None:
    evaluations.figures = {0.0: (0.6, 10.0), 0.25: (0.9, 10.0), 0.5: (0.7, 10.0), 1.0: (0.8, 10.0)}
    first = job.run()
    before = {name: value.clone() for name, value in weights(first.files[1][0]).items()}  # the file is mapped
    evaluations.calls = []
    assert job.run() == first
    flip(first.files[1][0] / "model.safetensors")
    assert job.incomplete(first.files) == [first.files[1][0]]
    assert job.run() == first
    assert evaluations.calls == []
    assert_equal(weights(first.files[1][0]), before)
    flip(job.out / "choice.json")
    assert job.incomplete(first.files) == [job.out / "choice.json"]
    assert job.run().counts == first.counts
    assert evaluations.calls == [0.0, 0.5, 1.0]  # of the one that was picked, the measurement is kept


def test_other_settings_are_another_choice(job: ChooseAlphaJob, evaluations: Evaluations) -> None:
    evaluations.figures = {0.0: (0.6, 10.0), 0.25: (0.9, 10.0), 0.5: (0.7, 10.0), 1.0: (0.8, 10.0)}
    job.run()
    other = replace(job, config=ExtrapolateConfig(alphas=[1.0]))
    assert other.key() != job.key()
    assert other.run().counts["alpha"] == 1.0
    assert paths(other) == ["alpha-1.0/measured.json", "alpha-1.0/model", "choice.json"]
    # The order and a 0 do not matter.
    assert replace(job, config=ExtrapolateConfig(alphas=[1.0, 0.0, 0.25, 0.5, 0.5])).key() == job.key()
    for change in ({"metric": "win_rate"}, {"max_length_growth": 0.3}):
        assert replace(job, config=job.config.model_copy(update=change)).key() != job.key()


def test_weights_that_would_be_infinite_are_a_refused_alpha(
    job: ChooseAlphaJob, after: Path, tmp_path: Path, evaluations: Evaluations
) -> None:
    half = trained(after, tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(half).to(torch.float16).save_pretrained(half)
    evaluations.figures = {0.0: (0.6, 10.0)}
    config = ExtrapolateConfig(alphas=[1e7])
    counts = replace(job, config=config, evaluation=replace(job.evaluation, policy=half)).run().counts
    assert counts["alpha"] == 0.0
    assert "would be NaN or infinite in float16" in counts["measured"][1]["refused"]


def test_a_metric_that_is_not_there(job: ChooseAlphaJob, evaluations: Evaluations) -> None:
    evaluations.figures = {0.0: (None, None)}
    with pytest.raises(DataError, match="the trained policy has no implicit_reward_accuracy"):
        job.run()


def test_the_metrics_are_those_of_the_evaluate_stage() -> None:
    assert choose_alpha.METRICS == {"accuracy": "implicit_reward_accuracy", "win_rate": "oracle_win_rate"}


def problem(given: dict[str, Any], **facts: Any) -> str | None:
    facts = {"is_world": False, "prompts": 8, "pairs": 8, "has_pairs": True, **facts}
    return ExtrapolateConfig(**given).problem(**facts)


def test_what_cannot_be_measured_is_refused() -> None:
    on = {"alphas": [0.5]}
    assert problem(on) is None
    assert "only the synthetic world has a judge" in (problem({**on, "metric": "win_rate"}) or "")
    assert problem({**on, "metric": "win_rate"}, is_world=True, pairs=0) is None
    assert "nothing is sampled" in (problem({**on, "metric": "win_rate"}, is_world=True, prompts=0) or "")
    for facts in ({"pairs": 0}, {"has_pairs": False}):
        assert "no held-out pairs" in (problem(on, **facts) or "")
    assert "max_length_growth" in (problem(on, prompts=0) or "")
    assert problem({**on, "max_length_growth": None}, prompts=0) is None
    for alphas in (None, [], [0.0]):
        assert problem({"alphas": alphas, "metric": "win_rate"}) is None
    for alpha in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="alphas"):
            ExtrapolateConfig(alphas=[alpha])


def test_the_config_of_a_run_says_so_before_it_starts() -> None:
    with pytest.raises(UsageError, match="only the synthetic world has a judge") as caught:
        own("extrapolate.alphas=[0.3]", "extrapolate.metric=win_rate")
    assert caught.value.exit_code == 2
    assert resolve([], ["extrapolate.alphas=[0.3]", "extrapolate.metric=win_rate"]).extrapolate.tried == (0.3,)
    given = own("extrapolate.alphas=[0.5, -0.1, 0]", "extrapolate.max_length_growth=").extrapolate
    assert given.tried == (-0.1, 0.5)
    assert given.max_length_growth is None
    assert own().extrapolate.tried == ()
