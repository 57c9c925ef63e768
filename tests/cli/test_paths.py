"""Files and folders that options name: no regular file, not the file that is meant, or no place to write to."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import polars as pl
import pytest
from command_line import contents, jsonl, scored

from cli.output import write_copy
from dice_py.synthetic.task import is_prompt, prompt_messages

pytestmark = pytest.mark.usefixtures("empty_folder")

MODELS = ("--policy", "/absent/p", "--reference", "/absent/r")
INPUTS = {
    "generate": ("generate", *MODELS[:2], "--prompts", "{}", "-o", "out"),
    "score": ("score", "{}", *MODELS, "-o", "out"),
    "replay": ("replay", *MODELS[:2], "--replay", "{}", "-o", "out"),
    "buffer": ("replay", *MODELS[:2], "--buffer", "x={}", "-o", "out"),
    "mined": ("replay", *MODELS[:2], "--replay", "p.jsonl", "--mined", "{}", "--generations", "a.parquet",
              "--scores", "a.parquet", "--prompts", "a.parquet", "-o", "out"),
    "scores": ("replay", *MODELS[:2], "--replay", "p.jsonl", "--mined", "m.parquet", "--generations", "a.parquet",
               "--scores", "{}", "--prompts", "a.parquet", "-o", "out"),
    "train": ("train", *MODELS[:2], "--training-set", "{}", "-o", "out"),
    "prompts": ("evaluate", *MODELS, "--start", "/absent/s", "--prompts", "{}", "-o", "out"),
    "pairs": ("evaluate", *MODELS, "--start", "/absent/s", "--pairs", "{}", "-o", "out"),
    "run": ("run", *MODELS, "--prompts", "{}", "--set", "replay.gamma=0", "--run-dir", "out"),
    "run's pairs": ("run", *MODELS, "--prompts", "p.jsonl", "--replay", "{}", "--run-dir", "out"),
    "plan": ("plan", *MODELS, "--prompts", "{}", "--set", "replay.gamma=0"),
    "mine": ("mine", "{}", "-o", "pairs.parquet"),
    "inspect": ("inspect", "{}", "-o", "page.html"),
}  # fmt: skip
"""Commands; {} is the file in question."""

inputs = pytest.mark.parametrize("arguments", INPUTS.values(), ids=INPUTS)


def with_file(arguments: tuple[str, ...], file: str) -> list[str]:
    return [argument.replace("{}", file) for argument in arguments]


@inputs
def test_inputs_that_are_no_regular_files(refused, arguments: tuple[str, ...]) -> None:
    jsonl(Path("p.jsonl"), {"prompt": "q", "chosen": "a", "rejected": "b"})
    os.mkfifo("pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.jsonl")
        Path("folder.jsonl").mkdir()
        for file in ("pipe.jsonl", "/dev/zero", "socket.jsonl", "folder.jsonl"):
            assert file in refused(3, *with_file(arguments, file))
    assert arguments[0] == "run" or not Path("out").exists()  # a run stores its config first


def test_a_pipe_in_a_config(refused) -> None:
    os.mkfifo("pipe.jsonl")
    said = refused(3, "run", *MODELS, "--set", "data.prompts=pipe.jsonl", "--set", "replay.gamma=0", "--run-dir", "r")
    assert "pipe.jsonl is a pipe or a device, not a regular file" in said


@pytest.mark.parametrize("name", ["score", "mined", "train"])
def test_files_that_are_not_the_ones_meant(refused, name: str) -> None:
    jsonl(Path("p.jsonl"), {"prompt": "q", "chosen": "a", "rejected": "b"})
    scored(Path("scored.parquet"))
    said = refused(3, *with_file(INPUTS[name], "scored.parquet"))
    assert "scored.parquet has no column" in said
    assert "Give the file that dice " in said
    assert "p.jsonl cannot be read as Parquet" in refused(3, *with_file(INPUTS[name], "p.jsonl"))


@pytest.mark.parametrize("arguments", [INPUTS["generate"], INPUTS["train"], INPUTS["prompts"], INPUTS["run"]])
@pytest.mark.parametrize("out", ["/proc/x", "/proc/x/y", "file", "file/below", "/dev/null", "a" * 300])
def test_results_that_have_no_place(refused, arguments: tuple[str, ...], out: str) -> None:
    jsonl(Path("p.jsonl"), {"prompt": "q"})
    Path("file").write_text("kept")
    given = with_file([argument if argument != "out" else out for argument in arguments], "p.jsonl")
    assert out in refused(2, *given)
    assert contents(Path()).keys() == {"p.jsonl", "file"}
    assert Path("file").read_text() == "kept"


def test_pairs_that_have_no_place(refused) -> None:
    scored(Path("scored.parquet"))
    Path("folder").mkdir()
    os.mkfifo("pipe")
    for out in ("folder", "pipe", "/dev/null", "/proc/x", "/proc/x/y.parquet", "scored.parquet/x", "a" * 300):
        assert out in refused(2, "mine", "scored.parquet", "-o", out)
    assert Path("pipe").is_fifo()
    assert Path("/dev/null").is_char_device()


def test_a_link_is_not_replaced_by_a_result(refused) -> None:
    """As /dev/stdout would be, where stdout is a file."""
    scored(Path("scored.parquet"))
    for name, target in (("pairs.parquet", "elsewhere.parquet"), ("loop", "loop"), ("input", "scored.parquet")):
        Path(name).symlink_to(target)
        assert f"{name} is a symbolic link, which the result would replace" in refused(
            2, "mine", "scored.parquet", "-o", name
        )
        assert Path(name).is_symlink()


def test_a_tilde_is_the_home_folder_and_a_url_is_no_folder(dice, refused, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell does not expand the ~ of --out=~/x."""
    home = Path("home").absolute()
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    scored(Path("scored.parquet"))
    assert dice("mine", "scored.parquet", "--out=~/pairs.parquet")[0] == 0
    assert (home / "pairs.parquet").is_file()
    jsonl(home / "p.jsonl", "no JSON")
    assert f"{home}/p.jsonl, line 1" in refused(3, "generate", *MODELS[:2], "--prompts=~/p.jsonl", "-o", "out")
    assert "there is no such user" in refused(2, "mine", "scored.parquet", "-o", "~nosuchuser/pairs.parquet")
    for url in ("s3://bucket/pairs.parquet", "hf://datasets/x/y.parquet", "file:///tmp/pairs.parquet"):
        assert "looks like a URL" in refused(2, "mine", "scored.parquet", "-o", url)
    # A name that pyarrow would take for a URL, or for that of a home folder.
    Path("~nobody").mkdir()
    for name in ("./x:y", "./~nobody"):
        assert dice("mine", "scored.parquet", "-o", f"{name}/pairs.parquet")[0] == 0
        assert (Path(name) / "pairs.parquet").is_file()


KEPT = {
    "out/prompts.parquet": ("generate", *MODELS[:2], "--prompts", "{}"),
    "out/scores-00000.parquet": ("score", "{}", *MODELS),
    "out/offline.parquet": ("replay", *MODELS[:2], "--replay", "{}"),
    "out/buffer-x.parquet": ("replay", *MODELS[:2], "--buffer", "x={}:0.5"),
    "out/model": ("train", "--policy", "{}", "--training-set", "t.parquet"),
    "out/model/t.parquet": ("train", *MODELS[:2], "--training-set", "{}"),
    "out/eval_pairs.parquet": ("evaluate", *MODELS, "--start", "/absent/s", "--pairs", "{}"),
}
"""Inputs that lie where the command writes."""


@pytest.mark.parametrize("file", KEPT)
@pytest.mark.parametrize("out", ["out", "link"])
def test_an_input_in_the_place_of_a_result_is_kept(refused, file: str, out: str) -> None:
    place = Path(file)
    place.parent.mkdir(parents=True)
    if place.suffix:
        place.write_bytes(b"work of hours")
    else:
        (place / "model.safetensors").mkdir(parents=True)
    Path("link").symlink_to("out")
    Path("t.parquet").touch()
    before = contents(Path())
    arguments = [part.replace("{}", file) for part in KEPT[file]]
    assert f"{file} is in {out}, where a result of that name is written" in refused(2, *arguments, "-o", out)
    assert contents(Path()) == before


def test_a_file_of_the_users_own_is_set_aside(capfd: pytest.CaptureFixture[str]) -> None:
    """Under the name of an artifact, in the folder that --out names."""
    file, theirs, ours = Path("prompts.parquet"), pl.DataFrame({"mine": ["x"]}), pl.DataFrame({"prompt_id": [0]})
    theirs.write_parquet(file)
    for _ in range(2):
        write_copy(file, ours, key="k")
        assert pl.read_parquet(file).equals(ours)
    assert pl.read_parquet("prompts.parquet.damaged").equals(theirs)
    assert not Path("prompts.parquet.damaged-2").exists()
    assert "set aside as prompts.parquet.damaged" in capfd.readouterr().err


def test_the_oracle_knows_the_prompts_of_the_world_alone(refused) -> None:
    prompts = jsonl(Path("p.jsonl"), {"prompt": "What is love?"})
    start = ("evaluate", *MODELS, "--start", "/absent/s", "-o", "out", "--oracle")
    assert "prompt 0 of p.jsonl is not of the synthetic world" in refused(2, *start, "--prompts", prompts)
    assert not is_prompt([{"role": "user", "content": "reverse : k b"}])
    assert is_prompt(prompt_messages("reverse", ("k", "b", "a")))
    pairs = jsonl(Path("pairs.jsonl"), {"prompt": "q", "chosen": "a", "rejected": "b"})
    assert "give them with --prompts" in refused(2, *start, "--pairs", pairs)


@pytest.mark.parametrize("command", ["generate", "replay", "train", "prompts", "run"])
def test_seeds_below_zero(refused, command: str) -> None:
    assert "seed" in refused(2, *with_file(INPUTS[command], "p.jsonl"), "--seed", "-1")


def test_no_home(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("DICE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert "set DICE_CACHE to a folder" in refused(2, "world")
    prompts = jsonl(Path("p.jsonl"), {"prompt": "q"})
    said = refused(3, "generate", "--policy", "~nobody-of-that-name/m", "--prompts", prompts, "-o", "out")
    assert "no such user or home folder" in said


def test_a_cache_that_cannot_be_written_is_done_without(dice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICE_CACHE", "/proc/cache")
    scored(Path("scored.parquet"))
    code, _, err = dice("mine", "scored.parquet", "-o", "pairs.parquet")
    assert (code, "Traceback" in err) == (0, False)
    assert pl.read_parquet("pairs.parquet").height
