"""What runs as a command of its own: `dice run`, training by one rank of FSDP2, and the tests marked `gpu`."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

from gpu.context import Check, PartError, log
from gpu.parts.machine import adopt_world

DICE = [sys.executable, "-m", "cli.main"]
TINY_RUN = {"data.prompts_per_round": "64", "evaluate.prompts": "32", "generate.samples": "4", "train.max_steps": "2"}
ROUNDS = (1, 2)
KEPT = ("manifest.json", "events.jsonl", "profile.json", "config.yaml", "report.html")


def _settings(values: dict[str, str]) -> list[str]:
    return [item for name, value in values.items() for item in ("--set", f"{name}={value}")]


def command(check: Check, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command in the tested tree; the end of its output goes to the log."""
    done = subprocess.run(arguments, cwd=check.repo, capture_output=True, text=True)
    log(f"$ {' '.join(arguments)}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}")
    return done


def run(check: Check) -> None:
    """`dice run --rounds 2` on the embedded world; once more with a wide tolerance where step 0 stops it."""
    folder, figures = check.work / "run", check.figures
    figures["world"] = adopt_world()
    settings = _settings(TINY_RUN) if check.cpu else []
    for attempt, wider in (("", {}), ("_wider", {"train.step0_tolerance": "0.05"})):
        target = folder.with_name(folder.name + attempt)
        arguments = [*DICE, "run", "--rounds", str(len(ROUNDS)), "--run-dir", str(target), *settings]
        began = time.monotonic()
        done = command(check, arguments + _settings(wider))
        figures |= {f"exit_code{attempt}": done.returncode, f"seconds{attempt}": round(time.monotonic() - began, 1)}
        figures["last_error"] = done.stderr.strip()[-600:] if done.returncode else None
        read_run(check, target)
        check.save()
        if done.returncode == 0 or "step 0" not in done.stderr + done.stdout:
            break
        figures["stopped_at_step0"] = figures["last_error"]
    if figures["exit_code"]:
        raise PartError(f"dice run ended with {figures['exit_code']}: {figures['last_error']}")


def read_run(check: Check, folder: Path) -> None:
    """What the run measured: its profile, notes, losses at step 0, the gate, accuracies; its small files are kept."""
    figures = check.figures
    done = command(check, [*DICE, "status", str(folder), "--profile", "--json"])
    with contextlib.suppress(ValueError):
        figures["profile"] = json.loads(done.stdout)
    for line in _lines(folder / "events.jsonl"):
        event = json.loads(line)
        if event["event"] == "note":
            check.notes.append(event["text"])
    for number in ROUNDS:
        place = folder / f"round-{number:02d}"
        found: dict[str, Any] = {}
        metrics = _json(place / "evaluate" / "metrics.json")
        names = ("oracle_accuracy", "start_oracle_accuracy", "oracle_win_rate")
        found |= {name: metrics[name] for name in names if name in metrics}
        found |= _json(place / "train" / "model" / "dice.json").get("counts", {})
        found["gate"] = _json(place / "score" / "gate.json").get("gate")
        figures[place.name] = found
    with tarfile.open(check.out / "run.tar.gz", "w:gz") as tar:
        for file in [*(folder / name for name in KEPT), *sorted(folder.glob("round-*/*/*.log"))]:
            if file.is_file():
                tar.add(file, str(file.relative_to(folder)))


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


FSDP = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_machines: 1
num_processes: 1
machine_rank: 0
main_process_port: 0
use_cpu: false
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
  fsdp_offload_params: false
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_cpu_ram_efficient_loading: true
  fsdp_activation_checkpointing: false
"""
"""What training/parallelism.py writes for several processes, for one."""


def fsdp(check: Check) -> None:
    """The launcher, NCCL and FSDP2 with one rank, by an accelerate file of the user's."""
    from dice_py.config.stages import WorldConfig
    from dice_py.synthetic.world import find_world

    if check.cpu:
        check.figures["skipped"] = "needs a GPU"
        return
    adopt_world()
    world = find_world(WorldConfig())
    if world is None:
        raise PartError("there is no world: run the part `run` before")
    config, out = check.work / "fsdp.yaml", check.work / "fsdp"
    config.write_text(FSDP, encoding="utf-8")
    arguments = [*DICE, "train", "--policy", str(world.reference), "-o", str(out)]
    arguments += ["--training-set", str(world.folder / "dpo_training_set.parquet")]
    settings = {"train.max_steps": "8", "train.accelerate_config": str(config), "model.dtype": "float32"}
    done = command(check, arguments + _settings(settings))
    check.figures |= {"exit_code": done.returncode, **_json(out / "model" / "dice.json").get("counts", {})}
    if done.returncode:
        raise PartError(f"training with one rank of FSDP2 ended with {done.returncode}: {done.stderr.strip()[-400:]}")


def gpu_tests(check: Check) -> None:
    """pytest's tests that are marked `gpu`; on a GPU none may be skipped."""
    files = [
        str(file.relative_to(check.repo))
        for file in sorted((check.repo / "tests").rglob("test_*.py"))
        if "pytest.mark.gpu" in file.read_text(encoding="utf-8")
    ]
    if not files:
        raise PartError("no test is marked gpu")
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "--no-header"]
    done = command(check, [sys.executable, "-m", "pytest", *options, *files])
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    check.figures |= {"exit_code": done.returncode, "files": files, **counts}
    if done.returncode or (counts.get("skipped") and not check.cpu):
        raise PartError(f"pytest ended with {done.returncode}: {counts}")
