"""Wrong options, configs and input data: exit codes, sentences, and that nothing is destroyed."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import contents, jsonl

from dice_py.config.loading import dump, resolve

pytestmark = pytest.mark.usefixtures("empty_folder")


def test_unknown_options_and_commands(refused) -> None:
    assert "No such command 'bogus'" in refused(2, "bogus")
    assert "No such option: --bogus" in refused(2, "mine", "--bogus")
    assert "Missing" in refused(2, "mine", "scored.parquet")  # --out
    assert "'--rounds'" in refused(2, "run", "--rounds", "many")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--set", "trian.epochs=1"), "unknown key 'trian'; did you mean 'train'?"),
        (("--set", "replay.gamma=1.5"), "replay.gamma: Input should be less than or equal to 1 (got 1.5)"),
        (
            ("--set", "generate.samples=1"),
            "generate.samples: Input should be greater than or equal to 2 (got 1)",
        ),
        (("--rounds", "0"), "rounds.count: Input should be greater than or equal to 1 (got 0)"),
        (("--config", "absent.yaml"), "config file absent.yaml does not exist"),
        (("--policy", "p"), "also needs model.reference (--reference) and data.prompts (--prompts)"),
        (("--prompts", "p.jsonl"), "given without model.policy (--policy)"),
    ],
)
def test_a_wrong_config_starts_nothing(refused, arguments: tuple[str, ...], said: str) -> None:
    assert said in refused(2, "run", *arguments)
    assert contents(Path()) == {}


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "--policy", "p", "--prompts", "x.jsonl", "-o", "out"),
        ("replay", "--policy", "p", "--replay", "x.jsonl", "-o", "out"),
        ("train", "--policy", "p", "--training-set", "x.parquet", "-o", "out"),
        ("evaluate", "--policy", "p", "--start", "p", "--reference", "p", "--prompts", "x.jsonl", "-o", "out"),
        ("mine", "x.parquet", "-o", "out"),
        ("inspect", "x.jsonl"),
        ("samples", "runs/x"),
        ("run",),
        ("plan",),
    ],
)
@pytest.mark.parametrize("seed", ["-1", str(2**64)])
def test_a_seed_out_of_range_is_refused_by_every_command(refused, command: tuple[str, ...], seed: str) -> None:
    said = refused(2, *command, "--seed", seed)
    assert "seed" in said
    assert contents(Path()) == {}


def test_a_seed_of_the_world_out_of_range(refused) -> None:
    assert "world.seed: Input should be greater than or equal to 0 (got -1)" in refused(
        2, "run", "--set", "world.seed=-1"
    )


def test_an_unknown_key_in_a_file(refused) -> None:
    Path("my.yaml").write_text("generate:\n  sample: 4\n")
    assert "unknown key 'generate.sample'; did you mean 'generate.samples'?" in refused(2, "run", "-c", "my.yaml")
    said = refused(2, "generate", "--policy", "p", "--prompts", "x.jsonl", "-o", "out", "--samples", "1")
    assert "generate.samples: Input should be greater than or equal to 2 (got 1)" in said


def test_a_run_folder_of_another_config_is_left_alone(refused) -> None:
    folder = Path("mine")
    (folder / "round-01").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(resolve([], ["seed=1"])))
    (folder / "round-01" / "kept.parquet").write_bytes(b"work of hours")
    before = contents(folder)
    said = refused(2, "run", "--seed", "2", "--run-dir", folder)
    assert "mine holds a run of another config (see mine/config.yaml)" in said
    assert "dice resume mine" in said
    assert contents(folder) == before


def test_a_folder_that_is_no_run_is_left_alone(refused) -> None:
    folder = Path("thesis")
    folder.mkdir()
    (folder / "chapter-1.tex").write_text("years of work")
    before = contents(folder)
    assert "thesis is not empty and holds no run; give another --run-dir" in refused(2, "run", "--run-dir", folder)
    assert "thesis holds no run (no config.yaml)" in refused(2, "resume", folder)
    assert "thesis holds no run (no config.yaml)" in refused(2, "status", folder)
    assert "absent holds no run (no config.yaml)" in refused(2, "resume", "absent")
    assert "absent holds no run (no config.yaml)" in refused(2, "status", "absent")
    assert contents(Path()) == {"thesis": None, **before}


def test_a_run_folder_in_use_is_left_alone(refused) -> None:
    folder = Path("mine")
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(resolve()))
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        before = contents(folder)
        assert "mine is in use by another `dice` process" in refused(2, "resume", folder)
        assert contents(folder) == before


def test_a_run_folder_that_cannot_be_made(refused) -> None:
    Path("file").write_text("x")
    assert "file/run: Not a directory" in refused(2, "run", "--run-dir", "file/run")
    assert "file: Not a directory" in refused(2, "run", "--run-dir", "file")
    assert Path("file").read_text() == "x"


def test_options_that_belong_together(refused) -> None:
    assert "give --prompts, --pairs or both" in refused(
        2, "evaluate", "--policy", "p", "--start", "s", "--reference", "r", "-o", "out"
    )
    assert "--mined also needs --generations, --scores and --prompts" in refused(
        2, "replay", "--policy", "p", "--replay", "x.jsonl", "--mined", "m.parquet", "-o", "out"
    )
    alone = (2, "replay", "--policy", "p", "-o", "out")
    assert "give --replay FILE, --buffer NAME=FILE:SHARE, or both" in refused(*alone)
    assert "a half-life also needs --round" in refused(*alone, "--replay", "x.jsonl", "--half-life", "2")
    assert "weigh the pairs of --replay, which is not given" in refused(
        *alone, "--buffer", "uf=x.jsonl", "--margin-power", "1"
    )
    assert "leave it out here" in refused(*alone, "--replay", "x.jsonl", "--set", "replay.buffer.capacity=3")
    assert contents(Path()) == {}


@pytest.mark.parametrize("given", ["x.jsonl", "=x.jsonl", "uf=", "uf=a.jsonl uf=b.jsonl"])
def test_buffers_that_are_none(refused, given: str) -> None:
    options = [part for text in given.split() for part in ("--buffer", text)]
    assert "write it as NAME=FILE or NAME=FILE:SHARE, each name once" in refused(
        2, "replay", "--policy", "p", *options, "-o", "out"
    )


def test_replay_reads_every_buffer_before_the_model(refused) -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    jsonl(Path("pairs.jsonl"), pair | {"margin": 1, "round": 3})
    jsonl(Path("a:b.jsonl"), pair)  # a colon of its own
    jsonl(Path("c.jsonl"), pair)
    start = ("replay", "--policy", "/absent", "-o", "out", "--replay", "pairs.jsonl")
    options = ("--buffer", "x=a:b.jsonl", "--buffer", "y=c.jsonl:0.5", "--margin-power", "1", "--half-life", "2")
    said = refused(3, *start, *options, "--round", "3")
    assert said == "error: --policy: /absent is not a folder; give a model folder, a GGUF file or a Hugging Face id"
    said = refused(3, *start, *options, "--round", "2")
    assert "pairs.jsonl, line 1: 'round' is 3, but the current round is 2" in said
    said = refused(3, *start, *options, "--round", "3", "--stratify-by", "source")
    assert "no column 'source'" in said
    said = refused(3, *start, *options, "--round", "3", "--set", "replay.buffers.y.weight_column=w")
    assert "Name the right one with --set replay.buffers.y.weight_column=NAME" in said
    assert "replay.buffers.y.share: Input should be greater than 0" in refused(2, *start, "--buffer", "y=c.jsonl:0")
    assert not Path("out").exists()


# --- input data


@pytest.fixture
def own(refused) -> Callable[..., str]:
    """`dice run` on a model of one's own, with what is wrong put in; returns its sentence."""

    def call(code: int = 3, **wrong: Path) -> str:
        given = {"policy": stub_model(Path("policy")), "reference": stub_model(Path("reference"))}
        given |= {"prompts": jsonl(Path("prompts.jsonl"), *({"prompt": f"q{i}"} for i in range(5)))}
        given |= {"replay": jsonl(Path("pairs.jsonl"), {"prompt": "q", "chosen": "a", "rejected": "b"})}
        given |= wrong
        options = [part for name, value in given.items() for part in (f"--{name}", value)]
        return refused(code, "run", *options)

    return call


def stub_model(folder: Path) -> Path:
    """What looks like a model folder from outside."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")  # a header of no tensors
    return folder


def test_model_folders_that_are_none(own) -> None:
    said = own(policy=Path("/absent/model"))
    assert said.startswith("error: model.policy (--policy): /absent/model is not a folder; give a model folder")
    empty = Path("empty")
    empty.mkdir()
    said = own(reference=empty)
    assert said.startswith("error: model.reference (--reference): ")
    assert "empty has no config.json" in said


def test_a_model_folder_without_weights(own) -> None:
    cut_off = Path("cut-off")
    cut_off.mkdir()
    (cut_off / "config.json").write_text("{}")
    assert "cut-off has a config but no weights (*.safetensors or pytorch_model*.bin)" in own(policy=cut_off)


def test_prompts_that_cannot_be_used(own) -> None:
    empty = Path("empty.jsonl")
    empty.touch()
    assert own(prompts=empty) == f"error: {empty.absolute()} is empty"
    assert "absent.jsonl" in own(prompts=Path("absent.jsonl"))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"prompt": "a"', "bad.jsonl, line 2: not valid JSON (Expecting ',' delimiter at column 15)"),
        ({"question": "a"}, "bad.jsonl, line 2: no column 'prompt'; its columns are question."),
        ({"prompt": [{"role": "system", "content": "a"}]}, "bad.jsonl, line 2: the prompt has no user turn"),
    ],
)
def test_a_bad_line_of_prompts(own, row: Any, said: str) -> None:
    assert said in own(prompts=jsonl(Path("bad.jsonl"), {"prompt": "good"}, row))


def test_pairs_that_cannot_be_used(own) -> None:
    said = own(replay=jsonl(Path("bad.jsonl"), {"prompt": "a", "better": "b", "worse": "c"}))
    assert "bad.jsonl, line 1: no column 'chosen'; its columns are prompt, better, worse." in said
    assert "--set data.chosen_column=NAME" in said


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("command", ["run", "generate"])
def test_a_tokenizer_without_a_template(refused, command: str) -> None:
    from tiny_models import make_llama, make_tokenizer

    folder = make_llama(Path("plain"))
    for file in ("chat_template.jinja", "tokenizer_config.json"):
        (folder / file).unlink(missing_ok=True)
    make_tokenizer("plain").save_pretrained(folder)
    prompts = jsonl(Path("prompts.jsonl"), *({"prompt": f"q{i}"} for i in range(20)))
    options = ["--policy", folder, "--prompts", prompts]
    if command == "run":
        options += ["--reference", make_llama(Path("other"), seed=1), "--set", "replay.gamma=0", "--run-dir", "run"]
    else:
        options += ["--out", "out"]
    said = refused(3, command, *options)
    assert "plain: its tokenizer has no chat template, so a prompt cannot be rendered" in said
    assert not list(Path().rglob("generations-*.parquet"))


@pytest.mark.parametrize(
    "given",
    [
        "generate --policy /absent --prompts absent.jsonl -o out",
        "score absent.parquet --policy /absent --reference /absent -o out",
        "replay --policy /absent --replay absent.jsonl -o out",
        "train --policy /absent --training-set absent.parquet -o out",
        "evaluate --policy /absent --start /absent --reference /absent --pairs absent.jsonl -o out",
    ],
)
def test_stages_alone_without_their_input(refused, given: str) -> None:
    # The data is looked at before the models, which may be a long download.
    assert "error: absent." in refused(3, *given.split())
    assert contents(Path()) == {}


def test_stages_alone_without_a_model(refused) -> None:
    prompts = jsonl(Path("prompts.jsonl"), {"prompt": "q"})
    said = refused(3, "generate", "--policy", "/absent", "--prompts", prompts, "-o", "out")
    assert said == "error: --policy: /absent is not a folder; give a model folder, a GGUF file or a Hugging Face id"
    assert list(contents(Path())) == ["prompts.jsonl"]


def test_a_file_that_is_no_gguf(own, refused) -> None:
    page = Path("model.gguf")
    page.write_text("<html>")
    prompts = jsonl(Path("prompts.jsonl"), {"prompt": "q"})
    said = refused(3, "generate", "--policy", page, "--prompts", prompts, "-o", "out")
    assert said.startswith("error: --policy: model.gguf is not a GGUF file")
    said = own(policy=page)
    assert said.startswith(f"error: model.policy (--policy): {page.absolute()} is not a GGUF file")


def test_an_sft_model_beside_a_policy_or_without_pairs(own, refused) -> None:
    sft = stub_model(Path("sft"))
    said = own(2, sft=sft)
    assert "model.policy (--policy) and model.reference (--reference) given together with model.sft (--sft)" in said
    said = refused(2, "run", "--sft", sft, "--prompts", "prompts.jsonl")
    assert "model.sft (--sft) is given without offline pairs" in said
    said = refused(3, "run", "--sft", "/absent", "--replay", "pairs.jsonl")
    assert said.startswith("error: model.sft (--sft): /absent is not a folder")


def test_a_working_directory_that_was_removed(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    named = ["--policy", "./p", "--reference", "./r", "--prompts", "p.jsonl", "--replay", "r.jsonl"]
    said = refused(2, "run", *named, "--run-dir", tmp_path / "run")
    assert "the working directory was removed" in said


@pytest.mark.parametrize(
    "error",
    [MemoryError(), ImportError("libarrow.so.2600: failed to map segment from shared object")],
    ids=["allocation", "import"],
)
def test_too_little_memory_for_the_command_itself(
    refused: Callable[..., str], error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr("dice_py.runs.status.run_status", full)
    assert "there is not enough memory" in refused(4, "status", tmp_path)
