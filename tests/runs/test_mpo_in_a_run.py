"""MPO in a run: both stages through two rounds, a kill in the second, and shares of hard prompts of 0 and 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from own_run import Events
from safetensors.torch import load_file

from dice_py.config.loading import resolve
from dice_py.errors import InterruptedRunError
from dice_py.models.identity import model_identity
from dice_py.reporting.cards.facts import RunFacts, models_of
from dice_py.reporting.html import write_report
from dice_py.runs import loop
from dice_py.runs.audited import audited_round
from dice_py.runs.folder import stage_names
from dice_py.runs.status import run_status
from dice_py.runs.stored_config import stored_config
from dice_py.runs.verify import verify_run
from dice_py.storage.files import read_json

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("inline_stages")]

SMALL = [
    "world.sft_steps=60", "world.offline_pairs=120", "world.round_prompts=60", "world.eval_prompts=8",
    "world.eval_pairs=8", "data.prompts_per_round=24", "generate.samples=4", "generate.shard_prompts=24",
    "generate.engine=transformers", "model.device=cpu", "train.max_steps=2", "train.batch_size=8",
    "train.per_device_train_batch_size=8", "train.save_steps=1", "train.logging_steps=1", "evaluate.prompts=4",
    "evaluate.samples=1", "evaluate.pairs=4", "train.method=mpo", "train.mpo.batch_size=16",
    "train.mpo.num_generations=4", "train.mpo.per_device_train_batch_size=16", "train.mpo.steps=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One world for all runs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def shared_cache(cache: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICE_CACHE", str(cache))


def run(folder: Path, *assignments: str) -> Events:
    events = Events()
    loop.run(resolve([], [*SMALL, *assignments]), folder, events, after_round=write_report)
    return events


def counts(folder: Path, stage: str) -> dict[str, Any]:
    entry: dict[str, Any] = read_json(folder / "manifest.json")["stages"][stage]
    assert entry["status"] == "done"
    return dict(entry["counts"])


def notes(events: Events) -> list[str]:
    return [fields["text"] for event, fields in events.events if event == "note"]


def test_two_rounds(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, "rounds=2")
    for name in ("round-01", "round-02"):
        labels = pl.read_parquet(folder / name / "replay/training_set.parquet")["difficulty"].value_counts(name="n")
        hard = dict(labels.iter_rows())["hard"]
        assert counts(folder, f"{name}/reinforce")["hard_prompts"] == hard
        assert counts(folder, f"{name}/train")["pairs"] == labels["n"].sum() - hard
        assert counts(folder, f"{name}/reinforce")["step0_max_abs_difference"] < 1e-3
        models = [folder / name / stage / "model/model.safetensors" for stage in ("train", "reinforce")]
        trained, reinforced = map(load_file, models)
        assert any(not torch.equal(trained[key], reinforced[key]) for key in trained)
    # Round 2 begins with the policy of stage 2, and so does the run end.
    start = read_json(folder / "round-02/train/model/dice.json")["start"]
    assert start == model_identity(folder / "round-01/reinforce/model")
    status = run_status(folder)
    assert status["state"] == "finished"
    assert status["policy"] == str(folder / "round-02/reinforce/model")
    assert verify_run(folder)["damaged"] == []
    events = Events()
    loop.resume(folder, events)
    assert events.stages() == [(name, "kept") for name in stage_names(resolve([], [*SMALL, "rounds=2"]))]
    page = (folder / "report.html").read_text()
    assert "Stage 2: reward of the sampled responses" in page
    assert "last values of the log of stage 2" in page


def test_a_kill_in_stage_2_resumes_in_stage_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "run"
    run(undisturbed, "rounds=1")

    class Killed(Events):
        def __call__(self, event: str, **fields: Any) -> None:
            super().__call__(event, **fields)
            if event == "progress" and fields.get("stage") == "reinforce" and fields["done"] == 2:
                raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError):
        loop.run(resolve([], [*SMALL, "rounds=1"]), folder, Killed())
    events = Events()
    loop.resume(folder, events)
    stages = dict(events.stages())
    assert [stages[f"round-01/{name}"] for name in ("train", "reinforce")] == ["kept", "done"]
    assert "training resumes from checkpoint-1" in notes(events)
    ours, theirs = (load_file(each / "round-01/reinforce/model/model.safetensors") for each in (folder, undisturbed))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("share", "skipped"), [(0, "reinforce"), (1, "train")])
def test_a_share_of_hard_prompts_of_none_or_all(tmp_path: Path, share: int, skipped: str) -> None:
    folder = tmp_path / "run"
    events = run(folder, "rounds=1", f"mine.difficulty_quantile={share}")
    made = "train" if skipped == "reinforce" else "reinforce"
    assert "skipped" in counts(folder, f"round-01/{skipped}")
    assert any(note.startswith(f"round-01/{skipped} is skipped") for note in notes(events))
    assert not (folder / f"round-01/{skipped}/model").exists()
    assert run_status(folder)["policy"] == str(folder / f"round-01/{made}/model")
    assert verify_run(folder)["damaged"] == []
    again = Events()
    loop.resume(folder, again)
    assert {status for _, status in again.stages()} == {"kept"}


def test_other_settings_of_stage_2_keep_stage_1(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, "rounds=1")
    events = Events()
    loop.resume(folder, events, assignments=["train.mpo.kl_beta=0.2"])
    stages = dict(events.stages())
    assert [stages[f"round-01/{name}"] for name in ("train", "reinforce")] == ["kept", "done"]


def test_another_method_leaves_no_trace_of_stage_2(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, "rounds=1")
    (folder / "report.html").unlink()
    loop.resume(folder, Events(), assignments=["train.method=dpo"], after_round=write_report)
    assert (folder / "round-01/reinforce/model").is_dir()
    assert run_status(folder)["policy"] == str(folder / "round-01/train/model")
    assert audited_round(folder, None).policy == folder / "round-01/train/model"
    assert "Stage 2" not in (folder / "report.html").read_text()
    facts = RunFacts(folder, stored_config(folder)[0], read_json(folder / "manifest.json"))
    assert models_of(facts, "round-01") == [folder / "round-01/train/model"]


def test_the_reward_of_a_judge(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, "rounds=1", "train.mpo.reward=oracle", "train.mpo.trainer=rloo")
    assert -1 < counts(folder, "round-01/reinforce")["first_reward"] <= 1
