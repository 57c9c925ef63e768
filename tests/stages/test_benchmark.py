"""The user's own benchmark: real programs, their output, failures and time limits."""

from __future__ import annotations

import json
import os
import signal
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from damage import notes
from own_run import Events

from dice_py.errors import UsageError
from dice_py.stages.benchmark import BenchmarkJob, benchmark_metrics, check_command, last_object
from dice_py.stages.job import StageResult
from dice_py.storage.files import read_sealed


def job(model: Path, folder: Path, code: str, *arguments: str, timeout: float = 60.0) -> BenchmarkJob:
    """A Python program of this source, which is in the folder that it runs in."""
    (folder / "bench.py").write_text(textwrap.dedent(code))
    return BenchmarkJob(model, (sys.executable, "bench.py", *arguments), folder, timeout, folder / "out")


def failed(job: BenchmarkJob) -> str:
    result = job.run()
    assert result.counts["metrics"] == {}
    assert job.incomplete(result.files) == [job.out / "benchmark.json"]  # a resume tries again
    text: str = result.counts["failure"]
    return text


def test_its_numbers_are_metrics_of_the_round(llama: Path, tmp_path: Path) -> None:
    bench = job(
        llama,
        tmp_path,
        """
        import json, pathlib, sys
        print("loading", sys.argv[1:])
        print("{not JSON}")
        layers = json.loads((pathlib.Path(sys.argv[-1]) / "config.json").read_text())["num_hidden_layers"]
        print(json.dumps({"layers": layers, "score": 0.5, "name": "x", "good": True, "list": [1], "none": None}))
        print("done", file=sys.stderr)
        """,
        "--tasks",
        "all",
    )
    events = Events()
    result = bench.run(events)
    layers = json.loads((llama / "config.json").read_text())["num_hidden_layers"]
    assert result.counts["metrics"] == {"layers": layers, "score": 0.5}
    assert benchmark_metrics(result.counts) == {"command.layers": layers, "command.score": 0.5}
    assert (result.counts["failure"], result.counts["left_out"]) == (None, ["name", "good", "list", "none"])
    assert read_sealed(bench.out / "benchmark.json", bench.key()) == result.counts
    assert bench.incomplete(result.files) == []
    assert (bench.out / "stdout.log").read_text().startswith(f"loading ['--tasks', 'all', '{llama}']")
    assert notes(events) == [f"benchmark: layers {layers}, score 0.5"]


def test_the_model_goes_where_the_command_says(llama: Path, tmp_path: Path) -> None:
    code = (
        "import json, sys; print(json.dumps({'right': float(sys.argv[1:] == ['--model=' + sys.argv[2], sys.argv[2]])}))"
    )
    assert job(llama, tmp_path, code, "--model={model}", "{model}").run().counts["metrics"] == {"right": 1.0}


def test_no_shell_runs_it(llama: Path, tmp_path: Path) -> None:
    code = "import json, sys; print(json.dumps({'arguments': len(sys.argv) - 1}))"
    bench = job(llama, tmp_path, code, "; touch gone", "$(touch gone)", "a b")
    assert bench.run().counts["metrics"] == {"arguments": 4.0}
    assert not (tmp_path / "gone").exists()


def test_hostile_names_and_numbers_are_left_out(llama: Path, tmp_path: Path) -> None:
    code = r"""
        print(r'{"\u001b[31m": 1, "\ud800": 1, "": 1, "' + 'n' * 101 + '": 1, "nan": NaN, "inf": -Infinity, "huge": 1'
              + '0' * 400 + ', "good": 2}')
        """
    counts = job(llama, tmp_path, code).run().counts
    assert counts["metrics"] == {"good": 2.0}
    assert counts["left_out"] == ["\\x1b[31m", "\\ud800", "", "n" * 100, "nan", "inf", "huge"]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "import sys; print('half'); print('no such task', file=sys.stderr); sys.exit(3)",
            "exit code 3; .*no such task",
        ),
        ("import os; os.kill(os.getpid(), 11)", "it ended with signal 11; it printed nothing"),
        ("print('all is well')", "no JSON object to stdout; .*all is well"),
        ("print('[1, 2]')", "no JSON object"),
        ('print(\'{"a": "b"}\')', "no finite number"),
        ("print('{\"a\": ' + '[' * 100000)", "no JSON object"),
        ("print('{\"a\": ' + '1' * 5000 + '}')", "no JSON object"),
        ("pass", "it printed nothing"),
    ],
)
def test_a_failure_is_a_sentence_with_the_last_lines(code: str, said: str, llama: Path, tmp_path: Path) -> None:
    import re

    assert re.search(said, failed(job(llama, tmp_path, code)))


def test_only_the_last_lines_are_told(llama: Path, tmp_path: Path) -> None:
    code = "import sys; [print('line', n, file=sys.stderr) for n in range(20)]; sys.exit(1)"
    text = failed(job(llama, tmp_path, code))
    assert text.endswith("line 15 | line 16 | line 17 | line 18 | line 19")
    assert "line 14" not in text


def test_a_time_limit_ends_all_that_it_started(llama: Path, tmp_path: Path) -> None:
    code = """
        import pathlib, signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        pathlib.Path("child").write_text(str(child.pid))
        print("working", flush=True)
        time.sleep(600)
        """
    started = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dice_py.stages.benchmark.GRACE", 0.5)
        text = failed(job(llama, tmp_path, code, timeout=5.0))
    assert "stopped at evaluate.command_timeout (5 s)" in text
    assert text.endswith("working")
    assert time.monotonic() - started < 60
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        if _is_gone(child):
            break
        time.sleep(0.1)
    assert _is_gone(child)


def _is_gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_an_interrupt_ends_it(llama: Path, tmp_path: Path) -> None:
    code = f"""
        import os, pathlib, signal, time
        pathlib.Path("self").write_text(str(os.getpid()))
        os.kill({os.getpid()}, signal.SIGINT)
        time.sleep(600)
        """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            job(llama, tmp_path, code).run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert _is_gone(int((tmp_path / "self").read_text()))
    assert not (tmp_path / "out" / "benchmark.json").exists()


def test_a_program_that_cannot_be_started(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no program")
    bench = BenchmarkJob(llama, ("./text",), tmp_path, 5.0, tmp_path / "out")
    assert "./text cannot be started" in failed(bench)


def test_the_program_is_looked_for_before_a_run(tmp_path: Path) -> None:
    check_command([sys.executable, "x"], tmp_path)
    check_command(["sh"], tmp_path)
    with pytest.raises(UsageError, match=r"no program ./absent"):
        check_command(["./absent"], tmp_path)
    with pytest.raises(UsageError, match="no program no-such-program-at-all"):
        check_command(["no-such-program-at-all"], tmp_path)
    with pytest.raises(UsageError, match="is no folder"):
        check_command(["sh"], tmp_path / "absent")


def test_the_key_has_the_program_but_no_paths_of_the_machine(llama: Path, other: Path, tmp_path: Path) -> None:
    bench = job(llama, tmp_path, "print(1)")
    key = bench.key()
    assert job(other, tmp_path, "print(1)").key() != key
    assert job(llama, tmp_path, "print(2)").key() != key  # the file that the command names
    assert job(llama, tmp_path, "print(1)", timeout=1.0).key() == key
    assert str(tmp_path) not in json.dumps(bench.key_fields())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": 1}', {"a": 1}),
        ('{\n  "a": 1\n}\n', {"a": 1}),
        ('log\n{"a": 1}\n{"a": 2}\nend', {"a": 2}),
        ('{"a": 1}\n{broken', {"a": 1}),
        ('  {"a": 1}  ', {"a": 1}),
        ("[1]", None),
        ("", None),
        ('text {"a": 1}', None),
    ],
)
def test_the_last_object(text: str, found: dict[str, Any] | None) -> None:
    assert last_object(text) == found


def test_the_result_is_what_the_manifest_holds(llama: Path, tmp_path: Path) -> None:
    result = job(llama, tmp_path, "print('{\"a\": 1}')").run()
    assert isinstance(result, StageResult)
    assert json.loads(json.dumps(result.counts)) == result.counts
