"""The locked sets of versions: what they stand for, and the main job with the oldest and the newest of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from places import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = ROOT / "requirements"
RANGED = ("torch", "transformers", "trl")
"""Packages whose ranges have an upper end."""

TINY = {
    "world.sft_steps": 2,
    "world.offline_pairs": 40,
    "world.round_prompts": 40,
    "world.eval_prompts": 8,
    "world.eval_pairs": 20,
    "world.width": 32,
    "data.prompts_per_round": 20,
    "generate.engine": "transformers",
    "generate.samples": 8,
    "generate.temperature": 1,
    "generate.max_new_tokens": 24,
    "evaluate.samples": 2,
    "train.max_steps": 2,
    "model.device": "cpu",
}


def locked(name: str) -> dict[str, Version]:
    """The versions of a lock file, by package; of several, that for the oldest Python."""
    lines = re.findall(r"^([a-z0-9-]+)==([^ \n]+)", (REQUIREMENTS / name).read_text(encoding="utf-8"), re.MULTILINE)
    return {package: Version(version) for package, version in reversed(lines)}


def ranges() -> dict[str, Requirement]:
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    return {found.name: found for found in map(Requirement, [*PROJECT["dependencies"], *extras])}


@pytest.mark.parametrize("name", ["oldest.txt", "dev.txt", "newest.txt", "gpu.txt"])
def test_every_locked_version_is_in_the_range(name: str) -> None:
    versions, known = locked(name), ranges()
    outside = {package: str(version) for package, version in versions.items()
               if package in known and version not in known[package].specifier}  # fmt: skip
    assert outside == {}
    assert set(RANGED) <= set(versions)


def test_the_sets_are_the_ends_of_the_ranges() -> None:
    oldest, newest = locked("oldest.txt"), locked("newest.txt")
    for package in RANGED:
        bounds = {bound.operator: Version(bound.version) for bound in ranges()[package].specifier}
        low, high = bounds[">="], bounds["<"]
        assert oldest[package].release[:2] == low.release[:2] or package == "trl"
        assert (newest[package].major, newest[package].minor + 1) == (high.major, high.minor)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", ["oldest", "newest"])
def test_two_rounds(name: str, tmp_path: Path) -> None:
    """In an environment of its own, from the lock file with hashes; the extension is that of this checkout."""
    uv = shutil.which("uv", path=Path(sys.executable).parent) or shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(python.parents[1])], check=True)
    install = [uv, "pip", "install", "--quiet", "--python", str(python), "--no-deps", "--require-hashes"]
    done = subprocess.run(
        [*install, "-r", str(REQUIREMENTS / f"{name}.txt")], capture_output=True, text=True, timeout=1800
    )
    if done.returncode != 0 and re.search("offline|connect|dns|timed out", done.stderr, re.IGNORECASE):
        pytest.skip(f"the packages of {name}.txt are neither in uv's cache nor to be had: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DICE_CACHE": str(tmp_path / "cache")}

    def dice(*arguments: str) -> str:
        command = [str(python), "-m", "cli.main", *arguments, "--json"]
        called = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800)
        assert called.returncode == 0, called.stderr
        return called.stdout

    versions = locked(f"{name}.txt")
    packages = json.loads(dice("doctor"))["packages"]
    assert {package: packages[package].partition("+")[0] for package in RANGED} == {
        package: str(versions[package]) for package in RANGED
    }
    settings = [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
    result = json.loads(dice("run", "--rounds", "2", "--run-dir", "run", *settings))
    assert (Path(tmp_path, result["policy"]) / "model.safetensors").is_file()
    state = json.loads(dice("status", "run"))
    assert (state["state"], state["done"], state["stages"]) == ("finished", 14, 14)
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
