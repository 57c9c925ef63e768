"""The GPU check: its parts run on a CPU in tiny shapes, each under its own limit and all under the budget."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import check as kit
from gpu import part as parts
from gpu.context import Check, PartError
from gpu.criteria import evaluate, is_met, lines
from places import ROOT, child_environment

CHEAP = ("machine", "attention", "scoring", "draw", "generation", "fsdp", "reinforcement")
"""Parts of a few seconds on one core in tiny shapes, that do not start `dice run`."""


@pytest.mark.parametrize("name", parts.PARTS)
def test_every_part_is_there_and_starts_no_gpu_when_imported(name: str) -> None:
    module = importlib.import_module(f"gpu.parts.{parts.PARTS[name].module}")
    assert callable(getattr(module, name))
    assert not torch.cuda.is_initialized()


def test_what_is_imported_ahead_starts_no_gpu() -> None:
    importlib.import_module("gpu.preload")
    assert not torch.cuda.is_initialized()


def test_limits_fit_the_nine_minutes_up_to_the_tests_on_the_gpu() -> None:
    """The parts that must not be missed come first: before the budget ends, even if each takes all of its limit."""
    order = list(parts.PARTS)
    needed = order[: order.index("training") + 1]
    assert needed == ["machine", "attention", "parity", "scoring", "training"]
    assert sum(parts.PARTS[name].seconds for name in needed) < kit.parse([]).budget == 540


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow, pytest.mark.long] if name == "scoring" else []) for name in CHEAP],
)
def test_a_dry_run_of_a_part(name: str, tmp_path: Path) -> None:
    dry_run(name, tmp_path)


def dry_run(name: str, folder: Path) -> None:
    """Runs a part in this process, and asserts that it reached what it must and that its figures can be written."""
    check = Check(name, ROOT, folder / "work", folder, cpu=True)
    check.work.mkdir()
    getattr(importlib.import_module(f"gpu.parts.{parts.PARTS[name].module}"), name)(check)
    result = {"ok": True, "code": 0, "seconds": 0.0, "figures": check.figures, "notes": check.notes}
    result["criteria"] = evaluate(name, check.figures)
    assert is_met(result, cpu=True), lines(name, result)
    check.save()
    assert json.loads(check.file.read_text())["figures"] == json.loads(json.dumps(check.figures, default=str))
    assert not check.shared_memory.exists()


@pytest.mark.long
@pytest.mark.slow
def test_a_dry_run_of_parity_with_rotary_frequencies_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that was cast to float32 and back has them in bfloat16, and other sums."""
    from dice_py.scoring import scorer

    seen: list[set[torch.dtype]] = []

    class Spy(scorer.Scorer):
        def __init__(self, model: Any, *arguments: Any) -> None:
            seen.append({buffer.dtype for buffer in model.buffers()})
            super().__init__(model, *arguments)

    monkeypatch.setattr(scorer, "Scorer", Spy)
    dry_run("parity", tmp_path)
    assert seen == [{torch.float32}] * 3


# --- limits and the budget, with parts made for the test -------------------------------------------------------


class Forked:
    """Processes that have this process's modules, and what a test changed in them."""

    Process = multiprocessing.get_context("fork").Process

    def set_forkserver_preload(self, names: list[str]) -> None:
        assert names == ["gpu.preload"]

    def get_start_method(self) -> str:
        return "fork"


def well(check: Check) -> None:
    check.figures |= {"float32_tflops": 1.0}


def overruns(check: Check) -> None:
    check.figures |= {"float32_tflops": 1.0}
    check.save()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (check.out / "child").write_text(str(child.pid))
    time.sleep(600)


def breaks(check: Check) -> None:
    check.notes.append("a path that fell back")
    raise PartError("the figures are off")


def dies(check: Check) -> None:
    os._exit(9)


Run = Callable[..., tuple[dict[str, Any], int]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `check.py --cpu` with the given functions as parts, named after themselves; (results.json, exit status)."""
    for name in ("PYTHONPATH", "HF_HOME", "TOKENIZERS_PARALLELISM", parts.NVML_CHECK, "PYTHONUNBUFFERED", "DICE_CACHE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # restored afterwards, since the check sets them
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: Forked())
    monkeypatch.setattr(kit, "CPU_FACTOR", 1.0)

    def call(*functions: Any, seconds: float = 30.0, budget: float = 100.0) -> tuple[dict[str, Any], int]:
        module = types.ModuleType("gpu.parts.made")
        monkeypatch.setitem(sys.modules, "gpu.parts.made", module)
        for table in (parts.PARTS, kit.evaluate.__globals__["CRITERIA"], kit.lines.__globals__["HEADLINES"]):
            for function in functions:
                name = function.__name__
                setattr(module, name, function)
                entry = parts.Part("made", seconds) if table is parts.PARTS else table["machine"]
                monkeypatch.setitem(table, name, entry)
        only = ",".join(function.__name__ for function in functions)
        status = kit.main(["--cpu", "--only", only, "--out", str(tmp_path), "--budget", str(budget)])
        return json.loads((tmp_path / "results.json").read_text()), status

    return call


def test_a_part_that_overruns_is_stopped_and_the_next_has_its_turn(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, status = run(overruns, well, seconds=3.0)
    assert status == 1
    stopped, after = (results["parts"][name] for name in ("overruns", "well"))
    assert (stopped["code"], stopped["ok"], stopped["met"]) == ("timeout", False, False)
    assert stopped["figures"] == {"float32_tflops": 1.0}  # what it had measured before
    assert (after["code"], after["met"]) == (0, True)
    text = capsys.readouterr().out
    assert "overruns    timeout" in text
    assert "not met: overruns" in text
    # What it had started is stopped too.
    child = Path("/proc") / (tmp_path / "child").read_text() / "stat"
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_failures_are_reported_and_cost_no_other_part_its_turn(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    results, status = run(breaks, dies, well)
    assert status == 1
    found = results["parts"]
    assert [found[name]["met"] for name in ("breaks", "dies", "well")] == [False, False, True]
    assert found["breaks"]["error"] == "the figures are off"
    assert found["dies"]["code"] == 9
    text = capsys.readouterr().out
    assert "note: a path that fell back" in text
    assert "not met: breaks, dies" in text


def test_no_part_is_started_after_the_budget(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    results, status = run(well, breaks, budget=kit.LEAST_SECONDS)
    assert status == 1
    for part in results["parts"].values():
        assert (part["code"], part["met"], part["seconds"]) == ("no time", False, 0.0)
        assert [criterion["reached"] for criterion in part["criteria"]].count(None) == 3
    assert "not met: well, breaks" in capsys.readouterr().out


def test_a_part_has_its_limit_or_what_is_left_of_the_budget(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    function = kit.run_in_process

    def recorded(context: Any, check: Check, log: Path, limit: float) -> dict[str, Any]:
        limits.append(limit)
        return function(context, check, log, 30.0)

    monkeypatch.setattr(kit, "run_in_process", recorded)
    run(well, seconds=7.0, budget=1000.0)
    run(well, seconds=2000.0, budget=1000.0)
    assert limits[0] == 7.0
    assert kit.LEAST_SECONDS < limits[1] < 1000.0


def test_all_reached_is_status_0(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(well)[1] == 0
    assert "all parts reached everything" in capsys.readouterr().out


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kit.main(["--only", "machine,nothing"])
    assert "nothing unknown; choose from machine, " in capsys.readouterr().err


# --- from the command line, training included ------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.slow
def test_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benches/gpu/check.py"), "--cpu", "--only", "lora,gpu_tests,draw"]
    environment = child_environment(OMP_NUM_THREADS="1")
    done = subprocess.run([*command, "--out", str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert {name: (part["code"], part["met"]) for name, part in results["parts"].items()} == {
        "lora": (0, True),
        "gpu_tests": (0, True),
        "draw": (0, True),
    }
    assert list(results["parts"]["lora"]["figures"]["ways"]) == ["score", "ours", "stock", "ours_checkpoint"]
    assert results["start_method"] == "forkserver"
    assert "a dry run on a CPU: no rate here counts" in done.stdout
    assert "(nothing was imported ahead)" not in (tmp_path / "log.txt").read_text()
