"""Ablations on tiny models: what runs of one seed share, what a second call does, and what the results say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from damage import prepare_nothing, run_inline
from own_run import Events, own_config
from tiny_models import make_mistral

from dice_py.ablation.arms import make_arms
from dice_py.ablation.run import RESULTS, Ablation, run_ablation
from dice_py.compute.stage_process import WarmPool
from dice_py.config.loading import resolve
from dice_py.errors import UsageError
from dice_py.runs import folder as run_folder
from dice_py.runs import loop
from dice_py.storage.files import Manifest
from dice_py.storage.lock import exclusive_lock
from dice_py.synthetic.world import World, world_key

pytestmark = pytest.mark.slow

WORLD = {"sft_steps": 2, "offline_pairs": 40, "round_prompts": 40, "eval_prompts": 8, "eval_pairs": 20}
SETTINGS = [
    *(f"world.{name}={value}" for name, value in WORLD.items()),
    "world.width=32",
    "data.prompts_per_round=20",
    "generate.samples=8",
    "generate.temperature=1",
    "generate.max_new_tokens=24",
    "evaluate.samples=2",
    "train.max_steps=2",
    "report.pairs=0",
]


@pytest.fixture(scope="module")
def ablation() -> Ablation:
    base = resolve(assignments=[*SETTINGS, "rounds.count=1"])
    return Ablation(base, make_arms(base, ["length", "both"]), (0, 1), jobs=2)


@pytest.fixture
def inline_stages() -> Iterator[None]:
    """Stages run in this process, which has torch already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "run_in_subprocess", run_inline)
        patch.setattr(WarmPool, "prepare", prepare_nothing)
        yield


@pytest.fixture(scope="module")
def made(ablation: Ablation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete ablation on small worlds. Read only."""
    out = tmp_path_factory.mktemp("ablation") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DICE_CACHE", str(out.parent / "cache"))
        run_ablation(ablation, out)
    return out


def _results(out: Path) -> dict[str, Any]:
    return json.loads((out / RESULTS).read_text())


def _stages(folder: Path) -> dict[str, Any]:
    return Manifest(folder / "manifest.json").data["stages"]


def test_runs_of_one_seed_share_what_has_the_same_key(made: Path) -> None:
    for seed in (0, 1):
        length, both = (made / "runs" / arm / f"seed-{seed}" for arm in ("length", "both"))
        same = [name for name, entry in _stages(length).items() if _stages(both)[name]["key"] == entry["key"]]
        assert same[:3] == ["round-01/generate", "round-01/score", "round-01/mine"]
        assert "round-01/train" not in same
        for name in same[:3]:
            for file in _stages(length)[name]["files"]:
                assert (length / file["file"]).samefile(both / file["file"])
        start = "evaluate/start/generations-00000.parquet"
        assert (length / start).samefile(both / start)
        own = "round-01/evaluate/samples/generations-00000.parquet"
        assert not (length / own).samefile(both / own)


def test_the_results_are_those_of_the_runs(made: Path) -> None:
    results = _results(made)
    assert (results["rounds"], results["seeds"], results["interval"]) == (1, [0, 1], "seeds")
    assert results["unfinished"] == []
    for arm in results["arms"]:
        folders = [made / "runs" / arm["arm"] / f"seed-{seed}" for seed in (0, 1)]
        for name in ("oracle_win_rate", "mean_response_tokens", "kl_to_start"):
            values = [_stages(folder)["round-01/evaluate"]["counts"][name] for folder in folders]
            found = arm["rounds"][0]["metrics"][name]
            assert found["by_seed"] == values
            assert found["mean"] == pytest.approx(sum(values) / 2)
        assert arm["start"]["oracle_win_rate"]["by_seed"] == [0.5, 0.5]
        trained = [_stages(folder)["round-01/train"]["counts"]["response_tokens"] for folder in folders]
        assert arm["rounds"][0]["training"]["response_tokens"]["by_seed"] == trained
    replay = next(one for one in results["contrasts"] if one["claim"] == "replay")
    ends = {arm["arm"]: arm["rounds"][0]["metrics"][replay["metric"]]["by_seed"] for arm in results["arms"]}
    assert replay["difference"]["by_seed"] == [b - a for a, b in zip(ends["length"], ends["both"], strict=True)]


@pytest.mark.long
def test_a_run_of_an_ablation_is_the_run_of_its_config(
    ablation: Ablation, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stages in processes of their own, and with nothing taken over, every key and every file is the same."""
    monkeypatch.setenv("DICE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one = ablation.planned(made)[1]
    assert one.name == "both/seed-0"
    world = World(made / "runs/length/seed-0/inputs/world")
    shutil.copytree(world.folder, tmp_path / "cache/world" / world_key(one.config.world))
    loop.run(one.config, tmp_path / "run")
    alone, shared = _stages(tmp_path / "run"), _stages(one.folder)
    assert alone.keys() == shared.keys()
    for name, entry in alone.items():
        assert entry["key"] == shared[name]["key"], name
        assert entry["counts"].keys() == shared[name]["counts"].keys()
    file = "round-01/generate/generations-00000.parquet"
    tokens = [pl.read_parquet(folder / file)["token_ids"].to_list() for folder in (tmp_path / "run", one.folder)]
    assert tokens[0] == tokens[1]
    models = [
        (folder / "round-01/train/model/model.safetensors").read_bytes() for folder in (tmp_path / "run", one.folder)
    ]
    assert models[0] == models[1]


@pytest.mark.long
def test_a_second_call_makes_nothing_again(ablation: Ablation, made: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(made, tmp_path / "out")
    stages = {one.name: _stages(copy / one.folder.relative_to(made)) for one in ablation.planned(made)}
    before = _results(copy)
    (copy / RESULTS).unlink()
    shutil.rmtree(copy / "lanes")
    after = run_ablation(replace(ablation, jobs=3), copy)
    # Of one seed only one run works at a time: a third lane would have nothing to do.
    assert sorted(path.name for path in (copy / "lanes").iterdir()) == ["lane-1.log", "lane-2.log"]
    assert {name: value for name, value in after.items() if name != "seconds"} == {
        name: value for name, value in before.items() if name != "seconds"
    }
    for one in ablation.planned(copy):
        assert _stages(one.folder) == stages[one.name]


def test_a_folder_in_use_is_refused(ablation: Ablation, tmp_path: Path) -> None:
    with exclusive_lock(tmp_path / ".lock"), pytest.raises(UsageError, match="is in use by another `dice ablate`"):
        run_ablation(ablation, tmp_path)


def test_a_folder_of_something_else_is_refused(ablation: Ablation, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and holds no ablation; give another --out"):
        run_ablation(ablation, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.long
def test_a_run_that_fails_does_not_end_the_others(ablation: Ablation, made: Path, tmp_path: Path) -> None:
    out = shutil.copytree(made, tmp_path / "out")
    broken = out / "runs/length/seed-1"
    shutil.rmtree(broken)
    broken.mkdir()
    (broken / "notes.txt").write_text("mine")
    (out / RESULTS).unlink()
    published: list[dict[str, Any]] = []
    said = rf"^length/seed-1: {broken} is not empty and holds no run.*\. 3 of 4 runs are complete: {out / RESULTS}$"
    with pytest.raises(UsageError, match=said):
        run_ablation(replace(ablation, seeds=(1, 0), jobs=1), out, publish=published.append)
    assert [json.loads(json.dumps(each)) for each in published] == [_results(out)]
    assert _results(out)["unfinished"] == list(_results(out)["failures"]) == ["length/seed-1"]
    assert [arm["seeds"] for arm in _results(out)["arms"]] == [[0], [1, 0]]


def test_runs_of_other_settings_are_not_made_again_without_a_word(
    ablation: Ablation, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(made, tmp_path / "out")
    calls: list[list[str]] = []
    monkeypatch.setattr(
        "dice_py.ablation.run.run_in_lanes", lambda planned, *_, **__: calls.append([one.name for one in planned])
    )

    def other(*assignments: str) -> Ablation:
        base = resolve(assignments=[*SETTINGS, "rounds.count=1", *assignments])
        return Ablation(base, make_arms(base, ["length", "both"]), (0, 1))

    changed = other("beta=0.5")
    with pytest.raises(UsageError, match=r"length/seed-0 holds a run of other settings: .*beta.*; or --change"):
        run_ablation(changed, out)
    assert calls == []
    run_ablation(changed, out, change=True)
    run_ablation(other("rounds.count=2"), out)  # a longer run is the same run
    assert calls == [["length/seed-0", "both/seed-0", "length/seed-1", "both/seed-1"]] * 2


def test_the_folder_of_a_run_is_refused(ablation: Ablation, made: Path, tmp_path: Path) -> None:
    run = shutil.copytree(made / "runs/both/seed-0", tmp_path / "run")
    before = sorted(path.name for path in run.iterdir())
    with pytest.raises(UsageError, match="holds a run, and an ablation has runs of its own: give another --out"):
        run_ablation(ablation, run)
    assert sorted(path.name for path in run.iterdir()) == before


def test_an_own_model_with_one_seed_has_intervals_over_prompts(
    tmp_path_factory: pytest.TempPathFactory, inline_stages: None
) -> None:
    del inline_stages
    base = own_config(tmp_path_factory.mktemp("own"), make_mistral)
    out = tmp_path_factory.mktemp("ablation") / "out"
    events = Events()
    for names in (["neither"], ["both"], ["neither", "both"]):  # an arm of a later call shares what is there
        results = run_ablation(Ablation(base, make_arms(base, names), (3,)), out, events)
    assert (results["interval"], results["is_world"]) == ("prompts", False)
    first = out / "runs/neither/seed-3/round-01"
    metrics = json.loads((first / "evaluate/metrics.json").read_text())
    found = results["arms"][0]["rounds"][0]["metrics"]["mean_response_tokens"]
    assert found["ci95"] == metrics["mean_response_tokens_ci95"]
    (generated,) = Manifest(out / "runs/both/seed-3/manifest.json").stage("round-01/generate")["files"][:1]
    assert (first.parent / generated["file"]).samefile(out / "runs/both/seed-3" / generated["file"])
    assert "run 2 of 2: both/seed-3" in [fields["text"] for event, fields in events.events if event == "note"]
    # Without a judge the reward of the first reference judges, which at the start is the only one.
    quality = "implicit_reward_accuracy_initial_reference"
    assert results["quality"] == quality
    assert results["arms"][0]["start"][quality]["mean"] == metrics["start_implicit_reward_accuracy"]
    (gain,) = [
        one for one in results["contrasts"]
        if (one["claim"], one["arm"], one["round"], one["metric"]) == ("rounds", "neither", 1, quality)
    ]  # fmt: skip
    assert gain["difference"]["mean"] == pytest.approx(metrics[quality] - metrics["start_implicit_reward_accuracy"])
    assert gain["difference"]["ci95"] is not None
