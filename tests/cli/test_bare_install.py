"""The wheel, installed without an extra in an environment of its own: the miner works, and all else names its extra."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import polars as pl
import pytest
from command_line import contents, jsonl, scored
from places import ROOT
from reported_runs import reported_run

from dice_py.config.extras import EXTRAS

TOOLS = Path(sys.executable).parent
pytestmark = pytest.mark.slow


def tool(name: str) -> str:
    found = shutil.which(name, path=str(TOOLS)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seconds where `make setup` has built the extension."""
    if shutil.which("cargo") is None:
        pytest.skip("Rust is not installed")
    out = tmp_path_factory.mktemp("wheel")
    environment = {**os.environ, "PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}", "PYO3_PYTHON": sys.executable}
    subprocess.run(
        [tool("maturin"), "build", "--release", "--quiet", "--out", str(out)], cwd=ROOT, env=environment, check=True
    )
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of the environment. Its packages have the locked versions, from uv's cache or the index."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    uv = tool("uv")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(folder)], check=True)
    install = [uv, "pip", "install", "--quiet", "--python", str(folder / "bin" / "python")]
    install += ["--constraint", str(ROOT / "requirements" / "dev.txt"), str(wheel)]
    for options in (["--offline"], []):
        done = subprocess.run([*install, *options], capture_output=True, text=True, timeout=300)
        if done.returncode == 0:
            return folder / "bin"
    pytest.skip(f"neither uv's cache nor a package index has the wheel's dependencies: {done.stderr[-300:]}")


def call(bare: Path, folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """Runs a program of the environment in a folder, with nothing of the clone on its path."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL"))}
    program, *arguments = map(str, command)
    return subprocess.run(
        [str(bare / program), *arguments],
        cwd=folder,
        env={**environment, "DICE_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_wheel_is_for_every_python_from_3_11_on(wheel: Path) -> None:
    assert re.fullmatch(r"dice_align-[\d.]+-cp311-abi3-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        text = archive.read(metadata).decode()
    cargo = tomllib.loads((ROOT / "Cargo.toml").read_text(encoding="utf-8"))["workspace"]["package"]
    assert f"\nVersion: {cargo['version']}\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text
    assert {name.partition("/")[0] for name in names} - {"dice_py", "cli"} == {metadata.partition("/")[0]}
    files = {str(file.relative_to(ROOT)) for top in ("dice_py", "cli") for file in (ROOT / top).rglob("*.*")}
    packed = {name for name in files if "__pycache__" not in name and not name.endswith(".so")}
    assert packed <= set(names)  # the pages' templates, styles and data, too
    assert "dice_py/_native.abi3.so" in names


def test_nothing_of_an_extra_is_there(bare: Path, tmp_path: Path) -> None:
    code = "import importlib.util, sys; print([name for name in sys.argv[1:] if importlib.util.find_spec(name)])"
    assert call(bare, tmp_path, "python", "-c", code, *(sum(EXTRAS.values(), ()))).stdout.strip() == "[]"


MINING = """
import polars as pl
import dice_py
frame = pl.read_parquet("scored.parquet")
mined = dice_py.mine_pairs(frame)
assert frame.pipe(dice_py.mine_pairs).pairs.equals(mined.pairs)
offline = pl.DataFrame({"prompt_id": range(100, 150), "chosen": ["a"] * 50, "rejected": ["b"] * 50})
texts = frame.with_columns(response=pl.format("r{}", "sample_id"))
pairs = dice_py.attach_text(mined.pairs, texts)
mixed = dice_py.mix_replay(pairs, offline, gamma=0.5, seed=1)
for name in dice_py.__all__:
    getattr(dice_py, name)
print(dice_py.__version__, mined.pairs.height)
"""


def test_the_miner_works_in_python(bare: Path, tmp_path: Path) -> None:
    scored(tmp_path / "scored.parquet")
    done = call(bare, tmp_path, "python", "-c", MINING)
    assert done.returncode == 0, done.stderr
    version, pairs = done.stdout.split()
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert int(pairs) > 0


def test_the_trial_of_a_release_passes(bare: Path, tmp_path: Path) -> None:
    done = call(bare, tmp_path, "python", ROOT / ".ci" / "try_wheel.py")
    assert done.returncode == 0, done.stderr
    assert f"at {bare.parent}/" in done.stdout
    assert "mine" in call(bare, tmp_path, "dice", "--help").stdout
    told = call(bare, tmp_path, "dice", "mine", "scored.parquet", "-o", "again.parquet")
    assert told.returncode == 0, told.stderr
    assert pl.read_parquet(tmp_path / "again.parquet").equals(pl.read_parquet(tmp_path / "pairs.parquet"))


def test_doctor_says_what_to_add(bare: Path, tmp_path: Path) -> None:
    done = call(bare, tmp_path, "dice", "doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["packages"]["torch"] is None
    assert found["missing"][0] == {
        "what": "torch, transformers, trl, accelerate, datasets, peft",
        "command": "pip install 'dice-align[train]'",
    }


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("run", "train"),
        ("plan", "train"),
        ("world", "train"),
        ("ablate --out out", "train"),
        ("generate --policy {model} --prompts prompts.jsonl --out out", "train"),
        ("inspect pairs.jsonl", "train"),
        ("report run", "train"),
        ("audit pairs.jsonl --policy {model} --reference {model}", "train"),
        ("winrate verdicts.jsonl --baseline b", "judge"),
        ("judge openai prompts.jsonl other.jsonl --base-url http://127.0.0.1:9/v1 --model m", "judge"),
    ],
)
def test_a_command_names_the_extra_that_it_needs(
    bare: Path, llama: Path, tmp_path: Path, command: str, extra: str
) -> None:
    for name in ("prompts", "other"):
        jsonl(tmp_path / f"{name}.jsonl", {"prompt": "p", "response": "r"})
    jsonl(tmp_path / "pairs.jsonl", {"prompt": "p", "chosen": "a", "rejected": "b"})
    jsonl(tmp_path / "verdicts.jsonl", {"prompt_id": 0, "model": "m", "score": 1, "response": "r"})
    reported_run(tmp_path / "run", 1)
    before = contents(tmp_path)
    done = call(bare, tmp_path, "dice", *command.format(model=llama).split())
    assert done.returncode == 2, done.stderr
    said = rf"error: [\w, ]+ is not installed; add it with: pip install 'dice-align\[{extra}\]'"
    assert re.fullmatch(said, done.stderr.strip().splitlines()[-1]), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    after = contents(tmp_path)
    made = {path.removeprefix(f"{tmp_path}/").partition("/")[0] for path in after if path not in before}
    assert made <= {"cache", "out" if command.startswith("generate") else ""}  # with the log of the stage's process
    assert {path: after[path] for path in before} == before
