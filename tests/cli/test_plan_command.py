"""`dice plan` as a user sees it, and one real calibration."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from plan_data import GIB, estimated, small

from dice_py.config.loading import resolve
from dice_py.config.run import RunConfig
from dice_py.planning import plan as plan_module
from dice_py.planning.feasibility import Room, first_failure, peak_disk
from dice_py.planning.machine import Cluster
from dice_py.planning.plan import plan
from dice_py.runs.measured_costs import recall_costs
from dice_py.runs.throughput import costs_key


def made_plan(**changes: Any) -> dict[str, Any]:
    config, run_data = small()
    stages = estimated(config, run_data)
    room = changes.pop("room", Room(50 * GIB, 20 * GIB, "memory"))
    failure = first_failure(stages, room)
    for stage in stages.values():
        stage.pop("remedy", None)  # as the plan does
    return {
        "total_seconds": 75.5,
        "gpu_hours": 0.0,
        "cpu_hours": 0.25,
        "disk_bytes": peak_disk(stages),
        "peak_memory_bytes": 3 * GIB,
        "free_disk_bytes": room.disk,
        "free_memory_bytes": room.memory,
        "fits": failure is None,
        "first_failure": failure,
        "calibration": {
            "source": "stored", "of": "calibration", "device": "a CPU", "dtype": "float32", "engine": "transformers",
            "responses": 8, "extrapolated_responses": 0, "cut_at_tokens": None, "mean_response_tokens": 5.0,
            "usable_prompt_share": 1.0,
        },
        "start_seconds": 0.5,
        "rounds": 1,
        "may_end_early": False,
        "method": "dpo",
        "labels": [],
        "not_estimated": [],
        "cluster": None,
        "stages": stages,
        **changes,
    }  # fmt: skip


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Replaces planning: `found` is the plan that it returns, `given` the arguments of the last call."""
    state: dict[str, Any] = {"found": made_plan()}

    def fake(config: RunConfig, folder: Path, **options: Any) -> dict[str, Any]:
        state["given"] = (config, folder, options)
        options["report"]("note", text="calibrating: something")
        found: dict[str, Any] = state["found"]
        return found

    monkeypatch.setattr(plan_module, "plan", fake)
    monkeypatch.chdir(tmp_path)
    return state


def test_what_a_user_sees(dice, faked) -> None:
    code, out, err = dice("plan", "--rounds", 1, "--seed", 7)
    assert code == 0
    assert err == "  calibrating: something\n"
    lines = [re.sub("  +", "|", line) for line in out.splitlines()]
    assert lines[1].split("|")[-7:] == ["time", "start-up", "GPU h", "tokens", "disk", "peak memory", "counts"]
    assert lines[2].split("|")[:4] == ["round-01/generate", "2.6 s", "1.0 s", "0"]
    assert lines[2].endswith("shards 2, prompts 4, responses 8")
    assert lines[9].startswith("all|1 min 16 s|")
    assert lines[10:] == [
        "costs: kept from a calibration, of this model shape in float32 on a CPU, engine transformers; "
        "responses of 5 tokens on average; pairs are an estimate",
        "no GPU is used: 0.25 core hours",
        "it fits: 50.0 GiB of disk and 20.0 GiB of memory are free",
    ]
    config, folder, options = faked["given"]
    assert (config.rounds.count, config.seed, folder, options["fresh"]) == (1, 7, Path("runs"), False)


def test_extrapolated_lengths_are_reported(dice, faked) -> None:
    assert "extrapolated" not in dice("plan")[1]
    faked["found"]["calibration"] |= {"extrapolated_responses": 3, "cut_at_tokens": 30}
    assert (
        "\n3 of 8 responses of the calibration were cut at 30 tokens: their lengths are extrapolated" in dice("plan")[1]
    )


def test_what_is_not_estimated_is_said(dice, faked) -> None:
    faked["found"]["not_estimated"] = ["evaluate.judges.openai", "evaluate.command"]
    _, out, _ = dice("plan")
    assert "not in the estimate, since nothing is known of them: evaluate.judges.openai, evaluate.command" in out


def test_a_cluster_that_need_not_be_there(dice, faked) -> None:
    faked["found"]["cluster"] = {
        "nodes": 8, "gpus": 64, "node_hours": 72.0, "reserved_gpu_hours": 576.0, "idle_gpu_hours": 69.0,
        "idle_share": 0.12, "idle_by_stage": {"round-01/train": 60.0, "round-01/generate": 6.0, "round-01/mine": 0.03},
        "network_bytes": 2**40, "filesystem_bytes": 3 * 2**30, "assumed_network_gb_per_s": 50.0,
        "assumed_filesystem_gb_per_s": 5.0,
    }  # fmt: skip
    code, out, _ = dice("plan", "--nodes", 8, "--gpus-per-node", 4, "--filesystem", 5)
    assert code == 0
    assert (
        "\ncluster: 8 node(s), 64 GPUs, 72 node hours; of 576 GPU hours 12 % are idle (round-01/train 60, "
        "round-01/generate 6, round-01/mine 0.03)\n"
        "between nodes 1,024.0 GiB, over the file system 3.0 GiB; assumed: 50 GB/s a node, 5 GB/s for all "
        "(--network, --filesystem)\n"
    ) in out
    assert faked["given"][2]["on_paper"](1) == Cluster(8, 4, 50.0, 5.0)
    dice("plan", "--nodes", 2)
    assert faked["given"][2]["on_paper"](3) == Cluster(2, 3)
    dice("plan")
    assert faked["given"][2]["on_paper"] is None
    assert dice("plan", "--gpus-per-node", 8)[0] == 2


def test_a_run_that_may_end_early_is_planned_to_its_end(dice, faked) -> None:
    assert "stop_when" not in dice("plan")[1]
    faked["found"]["may_end_early"] = True
    assert "\nrounds.stop_when=worse may end the run before its last round, 1\n" in dice("plan")[1]


def test_a_plan_that_does_not_fit_is_a_plan(dice, faked) -> None:
    faked["found"] = made_plan(room=Room(50 * GIB, 1500, "memory"))
    code, out, _ = dice("plan")
    assert code == 0
    assert "it does not fit: round-01/generate needs " in out
    assert "(generate.token_budget); lower generate.token_budget" in out
    code, out, _ = dice("plan", "--json", "--fresh")
    assert code == 0
    found = json.loads(out)
    assert found["fits"] is False
    assert found["first_failure"]["stage"] == "round-01/generate"
    assert faked["given"][2]["fresh"] is True


def test_a_dry_run_is_a_plan_and_writes_nothing(dice, faked, tmp_path: Path) -> None:
    code, out, _ = dice("run", "--dry-run", "--rounds", 3, "--run-dir", tmp_path / "there", "--json")
    assert code == 0
    assert json.loads(out)["total_seconds"] == 75.5
    assert (faked["given"][0].rounds.count, faked["given"][1]) == (3, tmp_path / "there")
    assert list(tmp_path.iterdir()) == []


def test_planning_imports_no_torch() -> None:
    code = "import sys, dice_py.planning.plan; print(sorted({'torch', 'transformers', 'trl'} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"


def test_errors_are_those_of_the_run(dice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DICE_CACHE", str(tmp_path / "cache"))
    code, _, err = dice("plan", "--set", "generate.sampels=3")
    assert code == 2
    assert "did you mean 'generate.samples'" in err
    code, _, err = dice("plan", "--policy", "p", "--reference", "r", "--prompts", "x.jsonl", "--replay", "y.jsonl")
    assert code == 3
    assert "x.jsonl" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.long
@pytest.mark.slow
def test_a_real_calibration_is_kept_and_leaves_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_models import make_llama

    policy, reference = make_llama(tmp_path / "policy", seed=1), make_llama(tmp_path / "reference", seed=2)
    prompts, pairs = tmp_path / "prompts.jsonl", tmp_path / "pairs.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"question {n}"}) + "\n" for n in range(30)))
    rows = ({"prompt": f"asked {n}", "chosen": f"good {n}", "rejected": f"a bad one {n}"} for n in range(30))
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("DICE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    config = resolve(
        [],
        [
            f"model.policy={policy}", f"model.reference={reference}", f"data.prompts={prompts}",
            f"data.replay={pairs}", "model.device=cpu", "model.dtype=float32", "generate.engine=transformers",
            "generate.samples=4", "generate.max_new_tokens=64", "train.batch_size=4", "rounds=2",
            "data.prompts_per_round=10",
        ],
    )  # fmt: skip
    notes: list[str] = []
    found = plan(config, tmp_path / "run", report=lambda event, **fields: notes.append(fields.get("text", "")))
    assert any("calibrating: training" in note for note in notes)
    assert found["calibration"]["source"] == "measured"
    assert found["first_failure"] is None
    assert [found["rounds"], len(found["stages"]), found["fits"]] == [2, 14, True]
    generate = found["stages"]["round-02/generate"]
    assert (generate["prompts"], generate["responses"], generate["shards"]) == (10, 40, 1)
    for stage in found["stages"].values():
        for name in ("seconds", "startup_seconds", "tokens", "disk_bytes", "peak_memory_bytes"):
            assert math.isfinite(stage[name])
            assert stage[name] >= 0
    assert found["total_seconds"] == pytest.approx(sum(stage["seconds"] for stage in found["stages"].values()))
    assert generate["seconds"] > 0
    json.dumps(found, allow_nan=False)
    # Nothing is left but what is remembered, and the next plan needs no calibration.
    assert list(temporary.iterdir()) == []
    assert not (tmp_path / "run").exists()
    assert sorted(os.listdir(tmp_path / "cache")) == ["remembered.json", "remembered.lock"]  # noqa: PTH208
    assert recall_costs(costs_key(config, policy, "transformers")) is not None
    # Another shape has other figures.
    shutil.rmtree(policy)
    make_llama(policy, seed=1, num_hidden_layers=1)
    assert recall_costs(costs_key(config, policy, "transformers")) is None
