"""A run whose rounds end with an extrapolation: what the next round starts from, and what a resume keeps."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from damage import assert_same_results, flip, notes
from own_run import Events
from safetensors.torch import load_file

from dice_py.config.extrapolation import ExtrapolateConfig
from dice_py.config.rounds import RoundsConfig
from dice_py.config.run import RunConfig
from dice_py.config.training import LoraConfig
from dice_py.errors import InterruptedRunError, UsageError
from dice_py.models.identity import model_identity
from dice_py.reporting.cards.write import write_cards
from dice_py.reporting.html import write_report
from dice_py.runs.keeping import clean
from dice_py.runs.loop import resume, run
from dice_py.runs.status import kept_policy, run_status
from dice_py.runs.verify import verify_run
from dice_py.stages import choose_alpha
from dice_py.stages.evaluate import EvaluateJob
from dice_py.storage.files import read_json, read_sealed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("inline_stages")]

ALPHAS = [2.0, 4.0]
STAGES = ["generate", "score", "mine", "replay", "inspect", "train", "extrapolate", "evaluate"]


@pytest.fixture(scope="module")
def longest_wins() -> Any:
    """The metric of an α is its characters: a policy of random weights has no direction that is better than another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(choose_alpha.METRICS, "accuracy", "mean_response_chars")
        yield


@pytest.fixture(scope="module")
def extrapolating(config: RunConfig) -> RunConfig:
    section = ExtrapolateConfig(alphas=ALPHAS, max_length_growth=None)
    few = {"max_steps": 2, "save_steps": None, "learning_rate": 1e-2, "lora": LoraConfig(r=4)}
    train = config.train.model_copy(update=few)
    return config.model_copy(update={"rounds": RoundsConfig(count=2), "extrapolate": section, "train": train})


@pytest.fixture(scope="module")
def complete(
    extrapolating: RunConfig, longest_wins: None, inline_stages: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Events, dict[str, Any]]:
    """A run of two rounds, its events and its metrics. Tests change copies only."""
    folder, events = tmp_path_factory.mktemp("run") / "run", Events()
    return folder, events, run(extrapolating, folder, events)


def copy_of(run_folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(run_folder, to / "copy"))


def policy_of(folder: Path, number: int) -> Path:
    """The new policy of a round, by its choice."""
    base = folder / f"round-{number:02d}"
    alpha = read_json(base / "extrapolate" / "choice.json")["alpha"]
    return base / "extrapolate" / f"alpha-{alpha!r}" / "model" if alpha else base / "train" / "model"


def test_both_models_of_an_older_round_need_not_be_kept(
    complete: tuple[Path, Events, dict[str, Any]], tmp_path: Path
) -> None:
    folder = copy_of(complete[0], tmp_path)
    older = sorted(folder.glob("round-01/**/model/model.safetensors"))
    found = clean(folder, models=1)
    assert [folder / item["place"] / "model.safetensors" for item in found["removed"]] == older[::-1]
    assert not any(file.exists() for file in older)
    events = Events()
    assert resume(folder, events) == complete[2]
    assert {status for _, status in events.stages()} == {"kept"}


def test_the_best_of_each_round_is_where_the_next_one_starts(
    complete: tuple[Path, Events, dict[str, Any]], extrapolating: RunConfig
) -> None:
    folder, events, metrics = complete
    assert [name for name, status in events.stages() if status == "done"] == [
        f"round-{number:02d}/{stage}" for number in (1, 2) for stage in STAGES
    ]
    manifest = read_json(folder / "manifest.json")["stages"]
    start = Path(str(extrapolating.model.policy))
    for number in (1, 2):
        base = folder / f"round-{number:02d}"
        choice = read_sealed(base / "extrapolate" / "choice.json")
        assert choice is not None
        assert choice == manifest[f"round-{number:02d}/extrapolate"]["counts"]
        assert [each["alpha"] for each in choice["measured"]] == [0.0, *ALPHAS]
        values = {each["alpha"]: each["value"] for each in choice["measured"]}
        assert len(set(values.values())) > 1
        assert values[choice["alpha"]] == max(values.values())
        # The evaluate stage measures the same model, on the same samples.
        found = metrics[f"round-{number:02d}"]
        assert found["extrapolation_alpha"] == choice["alpha"]
        assert found["mean_response_chars"] == max(values.values())
        policy = policy_of(folder, number)
        assert manifest[f"round-{number:02d}/evaluate"]["inputs"]["policy"] == model_identity(policy)
        assert manifest[f"round-{number:02d}/generate"]["inputs"]["policy"] == model_identity(start)
        # base + adapter is the trained policy, of which θ₀ is the start.
        assert (base / "train" / "adapter" / "adapter_config.json").is_file()
        before, after, new = (
            load_file(model / "model.safetensors") for model in (start, base / "train" / "model", policy)
        )
        for name, value in new.items():
            wanted = after[name] + choice["alpha"] * (after[name] - before[name]) if choice["alpha"] else after[name]
            assert (value - wanted).abs().max() == 0.0, name
        others = [path.name for path in (base / "extrapolate").glob("alpha-*")]
        assert others == ([f"alpha-{choice['alpha']!r}"] if choice["alpha"] else [])
        start = policy
    assert any(read_json(folder / f"round-0{number}/extrapolate/choice.json")["alpha"] for number in (1, 2))
    (told,) = [text for text in notes(events) if text.startswith("extrapolation: ")][:1]
    assert "alpha 4: accuracy" in told
    (finished,) = [fields for event, fields in events.events if event == "finished"]
    assert finished["policy"] == str(start) == str(kept_policy(folder))


def test_it_is_whole_and_a_resume_keeps_it(
    complete: tuple[Path, Events, dict[str, Any]], tmp_path: Path, longest_wins: None
) -> None:
    folder, _, metrics = complete
    report = verify_run(folder)
    assert report["damaged"] == report["missing"] == []
    assert [entry["stage"].partition("/")[2] for entry in run_status(folder)["entries"]] == 2 * STAGES
    copy, events = copy_of(folder, tmp_path), Events()
    assert resume(copy, events) == metrics
    assert {status for _, status in events.stages()} == {"kept"}
    assert "extrapolate: α = " in write_report(copy).read_text(encoding="utf-8")
    damaged = policy_of(copy, 2) / "model.safetensors"
    flip(damaged)
    (copy / "round-01/extrapolate/choice.json").write_text("{}")
    report = verify_run(copy)
    assert sorted(report["damaged"]) == sorted(map(str, (copy / "round-01/extrapolate/choice.json", damaged)))
    assert resume(copy, Events()) == metrics
    for path in copy.rglob("*.damaged*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert_same_results(copy, folder)


def test_the_card_of_the_model_that_was_evaluated_has_the_metrics(
    complete: tuple[Path, Events, dict[str, Any]], tmp_path: Path
) -> None:
    copy, events = copy_of(complete[0], tmp_path), Events()
    write_cards(copy, events)
    assert events.events == []
    for number in (1, 2):
        trained, policy = copy / f"round-{number:02d}" / "train" / "model", policy_of(copy, number)
        assert "| mean response chars | " in (policy / "README.md").read_text(encoding="utf-8")
        if policy != trained:
            assert "was not evaluated" in (trained / "README.md").read_text(encoding="utf-8")
            assert "(ExPO, α = " in (policy / "README.md").read_text(encoding="utf-8")
    assert verify_run(copy)["damaged"] == []


def test_adapters_are_verified_and_may_be_deleted(
    complete: tuple[Path, Events, dict[str, Any]], tmp_path: Path, longest_wins: None
) -> None:
    folder, _, metrics = complete
    copy = copy_of(folder, tmp_path)
    weights = copy / "round-01/train/adapter/adapter_model.safetensors"
    flip(weights)
    assert verify_run(copy)["damaged"] == [str(weights)]
    shutil.rmtree(weights.parent)
    report = verify_run(copy)
    assert report["damaged"] == report["missing"] == []
    events = Events()
    assert resume(copy, events) == metrics
    assert {status for _, status in events.stages()} == {"kept"}


def test_a_run_that_is_stopped_between_two_candidates_ends_the_same(
    complete: tuple[Path, Events, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    longest_wins: None,
) -> None:
    folder, _, metrics = complete
    copy, calls = copy_of(folder, tmp_path), list[str]()
    shutil.rmtree(copy / "round-02/extrapolate")
    shutil.rmtree(copy / "round-02/evaluate")
    evaluated = EvaluateJob.run

    def stopping(job: EvaluateJob, report: Any) -> Any:
        calls.append(job.out.name)
        if calls == ["alpha-0.0", "alpha-2.0"]:
            raise KeyboardInterrupt
        return evaluated(job, report)

    with monkeypatch.context() as patch:
        patch.setattr(EvaluateJob, "run", stopping)
        with pytest.raises(InterruptedRunError):
            resume(copy, Events())
        assert resume(copy, Events()) == metrics
    assert calls == ["alpha-0.0", "alpha-2.0", "alpha-2.0", "alpha-4.0", "evaluate"]
    assert_same_results(copy, folder)


def test_data_that_is_too_small_to_hold_some_out_is_refused_first(
    extrapolating: RunConfig, tmp_path: Path, config: RunConfig
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(Path(str(config.data.replay)).read_text(encoding="utf-8").splitlines(keepends=True)[:3]))
    data = extrapolating.data.model_copy(update={"replay": str(few)})
    with pytest.raises(UsageError, match=r"no held-out data to pick one by: name a file in data\.eval_pairs"):
        run(extrapolating.model_copy(update={"data": data}), tmp_path / "run")
    assert not list((tmp_path / "run").glob("round-*"))
