"""Rounds that are compared by a metric: when a run ends early, which policy is its new one, and what a resume does."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from damage import notes
from faked_stages import faked_stages
from own_run import Events
from report_page import Page

from dice_py.config.rounds import RoundsConfig
from dice_py.config.run import RunConfig
from dice_py.errors import DataError, UsageError
from dice_py.evaluation.metrics import bootstrap_ci95
from dice_py.evaluation.values import ItemValues, change
from dice_py.reporting.html import write_report
from dice_py.runs import best, loop
from dice_py.runs.keeping import clean
from dice_py.runs.status import list_runs, run_status
from dice_py.stages.evaluate import EvaluateJob
from dice_py.stages.job import StageResult
from dice_py.storage.files import Manifest, write_sealed
from dice_py.storage.parquet import write_parquet

METRIC = "implicit_reward_accuracy_initial_reference"
ITEMS = 60
START = [float(item % 2) for item in range(ITEMS)]


def better(values: list[float], count: int) -> list[float]:
    """`count` more of the values are 1."""
    zeros = [item for item, value in enumerate(values) if value == 0.0][:count]
    return [1.0 if item in zeros else value for item, value in enumerate(values)]


def worse(values: list[float], count: int) -> list[float]:
    return [1.0 - value for value in better([1.0 - value for value in values], count)]


GOOD = better(START, 15)
BAD = worse(GOOD, 20)
SHUFFLED = random.Random(0).sample(GOOD, ITEMS)
"""As good as `GOOD`, on other pairs."""


def evaluated(*rounds: list[float]) -> Callable[[EvaluateJob], StageResult]:
    """Evaluations with these values of the held-out pairs."""

    def evaluation(job: EvaluateJob) -> StageResult:
        values = rounds[int(job.out.parent.name.removeprefix("round-")) - 1]
        collected = ItemValues()
        collected.add(METRIC, range(ITEMS), values, START)
        metrics = {METRIC: sum(values) / ITEMS, f"{METRIC}_ci95": bootstrap_ci95(values, 0)}
        write_parquet(job.values_file, collected.frame(), key=job.key())
        write_sealed(job.out / "metrics.json", metrics, job.key())
        return StageResult([(job.out / "metrics.json", job.key()), (job.values_file, job.key())], metrics)

    return evaluation


def with_rounds(config: RunConfig, **changes: Any) -> RunConfig:
    return config.model_copy(update={"rounds": RoundsConfig(**changes)})


def run(config: RunConfig, folder: Path) -> tuple[list[str], Events]:
    """The rounds that were made, and the events."""
    events = Events()
    metrics = loop.run(config, folder, events, after_round=write_report)
    return list(metrics), events


def of(events: Events, kind: str) -> list[dict[str, Any]]:
    return [fields for event, fields in events.events if event == kind]


@pytest.mark.parametrize(("keep", "kept"), [("last", "round-02"), ("best", "round-01")])
def test_a_round_that_is_worse_ends_the_run(
    config: RunConfig, keep: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dice
) -> None:
    given = faked_stages(monkeypatch, evaluated(GOOD, BAD, GOOD))
    folder = tmp_path / "run"
    rounds, events = run(with_rounds(config, count=3, keep=keep, stop_when="worse"), folder)
    assert rounds == ["round-01", "round-02"]
    first, second = of(events, "comparison")
    assert (first["start"], first["value"], first["worse"]) == (0.5, 0.75, False)
    assert first["change"] == pytest.approx(0.25)
    assert (second["start"], second["value"], second["worse"]) == (0.75, pytest.approx(25 / 60), True)
    assert second["change_ci95"][1] < 0
    (ended,) = of(events, "ended_early")
    assert (ended["round"], ended["rounds"]) == (2, 3)
    (finished,) = of(events, "finished")
    assert (finished["policy"], finished["round"]) == (str(folder / kept / "train/model"), kept)
    status = run_status(folder)
    assert (status["state"], status["stages"], status["ended_after"]) == ("finished", 14, 2)
    assert status["policy"] == finished["policy"]
    page = (folder / "report.html").read_text()
    assert f"new policy: {kept}/train/model" in page
    assert "ended after round 2" in page
    code, out, err = dice("status", folder)
    assert (code, err) == (0, "")
    assert out.splitlines()[-2:] == [
        f"ended after round 2 (rounds.stop_when=worse); to go on: dice resume {folder} --set rounds.stop_when=none",
        f"new policy: {folder / kept / 'train/model'}",
    ]

    # A resume makes nothing, and ends where the run ended.
    given.clear()
    code, out, err = dice("resume", folder, "--json")
    assert code == 0, err
    assert json.loads(out)["policy"] == finished["policy"]
    assert list(json.loads(out)["metrics"]) == rounds
    assert given == []
    assert "--set rounds.stop_when=none" in err

    # It goes on when it is told to, from the last round, whichever is kept.
    code, out, err = dice("resume", folder, "--set", "rounds.stop_when=none")
    assert code == 0, err
    assert given[0] == ("generate", folder / "round-02/train/model")
    # Equal rounds: the earlier one is the best.
    now = {"last": "round-03", "best": "round-01"}[keep]
    assert f"new policy: {folder / now / 'train/model'}\n" in out
    assert run_status(folder)["stages"] == 21
    assert list_runs(tmp_path)[0]["state"] == "finished"


def test_rounds_that_were_made_before_the_run_ends_earlier_are_not_shown(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faked_stages(monkeypatch, evaluated(GOOD, BAD, GOOD))
    folder = tmp_path / "run"
    rounds, _ = run(with_rounds(config, count=3), folder)
    assert len(rounds) == 3
    assert (2, "Mining, round-03") in Page(folder / "report.html").headings()
    # Rounds are compared from now on, for which the stored evaluations are enough.
    events = Events()
    metrics = loop.resume(folder, events, assignments=["rounds.stop_when=worse"], after_round=write_report)
    assert list(metrics) == ["round-01", "round-02"]
    assert {status for _, status in events.stages()} == {"kept"}
    page = (folder / "report.html").read_text()
    assert (2, "Mining, round-02") in Page(folder / "report.html").headings()
    assert "round-03" not in page
    assert run_status(folder)["policy"] == str(folder / "round-02/train/model")


def test_what_is_within_the_interval_is_not_worse(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_little_worse = worse(SHUFFLED, 2)
    faked_stages(monkeypatch, evaluated(GOOD, a_little_worse, better(a_little_worse, 9)))
    rounds, events = run(with_rounds(config, count=3, keep="best", stop_when="worse"), tmp_path / "run")
    assert len(rounds) == 3
    assert [fields["worse"] for fields in of(events, "comparison")] == [False] * 3
    assert sum(a_little_worse) < sum(GOOD)
    assert of(events, "finished")[0]["round"] == "round-03"


def test_the_best_model_is_kept(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked_stages(monkeypatch, evaluated(GOOD, better(GOOD, 5), BAD, BAD), weights=True)
    folder = tmp_path / "run"
    run(with_rounds(config, count=4), folder)
    with pytest.raises(UsageError, match=r"were not compared.*--set rounds.keep_models=best"):
        clean(folder, models="best")
    events = Events()
    loop.resume(folder, events, assignments=["rounds.keep_models=best"])
    assert {status for _, status in events.stages()} == {"kept"}
    assert [path.parts[-4] for path in sorted(folder.glob("round-*/train/model/*.safetensors"))] == [
        "round-02", "round-04",
    ]  # fmt: skip
    assert run_status(folder)["policy"] == str(folder / "round-04/train/model")
    events = Events()
    loop.resume(folder, events, assignments=["rounds.keep=best"])
    assert {status for _, status in events.stages()} == {"kept"}
    assert of(events, "finished")[0]["round"] == "round-02"


def test_a_worse_last_round_ends_nothing_early(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faked_stages(monkeypatch, evaluated(worse(START, 20)))
    folder = tmp_path / "run"
    rounds, events = run(with_rounds(config, count=1, keep="best", stop_when="worse"), folder)
    assert (rounds, of(events, "ended_early")) == (["round-01"], [])
    assert any("worse than the policy that the round started from" in note for note in notes(events))
    assert any("no round is better by" in note and "keep that one" in note for note in notes(events))
    # More rounds are asked for, by the shorthand; the other settings of the section stay.
    events = Events()
    metrics = loop.resume(folder, events, assignments=["rounds=2"])
    assert list(metrics) == ["round-01"]
    assert len(of(events, "ended_early")) == 1
    kept = {"count": 2, "keep": "best", "stop_when": "worse", "metric": None}
    assert kept.items() <= Manifest(folder / "manifest.json").data["config"]["rounds"].items()


def test_too_few_held_out_pairs(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked_stages(monkeypatch, evaluated(GOOD))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(f'{{"prompt": "q{n}", "chosen": "a {n}", "rejected": "b {n}"}}\n' for n in range(2)))
    changed = with_rounds(config, count=1, keep="best").model_copy(
        update={"data": config.data.model_copy(update={"replay": str(pairs)})}
    )
    with pytest.raises(UsageError, match=r"too few pairs to hold any out for it: give them in data\.eval_pairs"):
        loop.run(changed, tmp_path / "run")


def values_of(items: list[int], values: list[float]) -> pl.DataFrame:
    return pl.DataFrame({"item": items, "value": values})


def test_the_change_is_paired() -> None:
    # Two policies whose values differ by one half everywhere, though each varies by far more.
    rng = random.Random(0)
    before = [rng.gauss(0, 100) for _ in range(50)]
    found = change(values_of(list(range(50)), before), values_of(list(range(50)), [x - 0.5 for x in before]), 0)
    assert found.mean == pytest.approx(-0.5)
    assert found.ci95 == pytest.approx([-0.5, -0.5])
    assert found.is_worse
    # In any order; what only one of them has is left out.
    found = change(values_of([3, 1, 2], [1.0, 2.0, 4.0]), values_of([1, 3, 9], [5.0, 1.0, 7.0]), 0)
    assert (found.mean, found.items, found.is_worse) == (1.5, 2, False)
    with pytest.raises(DataError, match="in common"):
        change(values_of([1], [1.0]), values_of([2], [1.0]), 0)


@pytest.mark.parametrize(
    "changes",
    [{"settings": {"count": 9}}, {"policy": 3}, {"comparisons": []}, {"ended_after": "2"}],
    ids=["other settings", "policy", "comparisons", "ended_after"],
)
def test_an_outcome_of_other_settings_or_types_is_none(changes: dict[str, Any]) -> None:
    rounds = RoundsConfig().model_dump(mode="json")
    outcome = {"settings": rounds, "policy": "round-01/train/model", "comparisons": {}, "ended_after": None}
    found = best.stored_outcome({"config": {"rounds": rounds}, "outcome": outcome})
    assert found is not None
    assert found.policy == Path("round-01/train/model")
    assert best.stored_outcome({"config": {"rounds": rounds}, "outcome": outcome | changes}) is None
    assert best.stored_outcome({"outcome": outcome}) is None
