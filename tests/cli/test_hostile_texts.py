"""Hostile texts in names, keys and values go through every command: nothing of them is obeyed, and nothing breaks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import polars as pl
import pytest
from command_line import scored
from hostile_texts import HOSTILE, in_a_path, obeyed
from rich.table import Table

from cli.main import main
from cli.progress import Display
from cli.tables import print_table
from cli.terminal import console
from dice_py.config.loading import dump, resolve
from dice_py.reporting.foreign_text import html_text, visible
from dice_py.reporting.html import write_report
from dice_py.storage.files import Manifest
from dice_py.storage.parquet import write_parquet

pytestmark = pytest.mark.usefixtures("empty_folder")
each = pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Calls `dice …`; returns (exit code, all of its output), of which nothing is obeyed."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["dice", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        assert obeyed(out + err) == []
        assert "Traceback" not in err
        assert ended.value.code in (0, 2, 3, 5)
        return int(ended.value.code), out + err

    return call


def on_disk(text: str) -> Path:
    """A path of the text."""
    return Path(in_a_path(text))


def shown(text: str) -> str:
    return visible(str(on_disk(text)))


@each
def test_a_text_is_shown_and_never_obeyed(text: str) -> None:
    assert obeyed(visible(text)) == []
    assert visible(visible(text)) == visible(text)
    page = html_text(text)
    assert obeyed(page) == []
    assert not set(page) & set("<>\"'")


def test_plain_text_stays_as_it_is() -> None:
    text = "Größe 😀 👩‍💻 می‌خواهم עברית 漢字 [a] {b}\n\tline two"
    assert visible(text) == text


@each
@pytest.mark.parametrize(
    "arguments",
    [
        ("{}",),
        ("mine", "--{}", "x"),
        ("mine", "{}", "-o", "out.parquet"),
        ("run", "--set", "{}"),
        ("run", "--set", "{}=1"),
        ("run", "--set", "train.optim={}", "--set", "nothing={}"),
        ("run", "-c", "{}"),
        ("run", "--rounds", "{}"),
        (
            "run",
            "--policy",
            "./{}",
            "--reference",
            "r",
            "--prompts",
            "{}",
            "--run-dir",
            "run",
            "--set",
            "replay.gamma=0",
        ),
        ("plan", "--policy", "./{}", "--reference", "./{}", "--prompts", "{}", "--set", "replay.gamma=0"),
        ("resume", "{}"),
        ("resume", "{}", "--set", "{}"),
        ("status", "{}"),
        ("status", "{}", "--verify"),
        ("status", "{}", "--profile"),
        ("report", "{}", "-o", "{}"),
        ("samples", "{}", "--source", "{}"),
        ("inspect", "{}", "--policy", "./{}", "--reference", "./{}", "-o", "{}.html"),
        ("generate", "--policy", "./{}", "--prompts", "{}", "-o", "out"),
        ("score", "{}", "--policy", "./{}", "--reference", "./{}", "-o", "out"),
        ("replay", "--policy", "./{}", "--replay", "{}", "-o", "out"),
        ("train", "--policy", "./{}", "--training-set", "{}", "-o", "out"),
        ("evaluate", "--policy", "./{}", "--start", "./{}", "--reference", "./{}", "--prompts", "{}", "-o", "out"),
        ("world", "--set", "world.{}=1"),
        ("demo", "--model", "./{}"),
    ],
    ids=lambda arguments: " ".join(arguments).replace("{}", "_"),
)
def test_as_an_argument(said, text: str, arguments: tuple[str, ...]) -> None:
    """Nothing of that name is there, so every command refuses it."""
    if text.startswith("-"):
        pytest.skip("an option")
    code, _ = said(*(part.replace("{}", in_a_path(text)) for part in arguments))
    assert code in (2, 3)


@each
def test_as_a_run_folder(said, text: str) -> None:
    folder = on_disk(text)
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(resolve()))
    code, output = said("status", folder)
    assert code == 0
    assert shown(text)[:12] in output
    Path("runs").mkdir()
    (Path("runs") / folder).mkdir()
    (Path("runs") / folder / "config.yaml").write_text(dump(resolve()))
    code, output = said("status")
    assert code == 0
    assert shown(text) in output
    code, output = said("status", folder, "--json")
    assert code == 0
    assert json.loads(output)["run"] == str(folder)


@each
def test_as_a_name_of_a_file_of_scores(said, text: str) -> None:
    file = scored(Path("scored.parquet"))
    file.rename(on_disk(text + ".parquet"))
    out = on_disk("out " + text)
    code, output = said("mine", on_disk(text + ".parquet"), "-o", out)
    if any(mark in text for mark in "*?[{"):  # a pattern of files
        assert code in (0, 2, 3)
    elif text == HOSTILE["surrogate"]:  # no library takes such a path
        assert code == 2
        assert "is not UTF-8 text" in output
    else:
        assert code == 0
        assert shown("out " + text) in output


@each
def test_as_a_column(said, text: str) -> None:
    try:
        pl.DataFrame({text: [1, 2], "reward": [0.1, 0.2]}).write_parquet("scored.parquet")
    except (UnicodeEncodeError, pl.exceptions.PolarsError):
        return  # no valid name of a column
    assert said("mine", "scored.parquet", "-o", "out.parquet")[0] == 3
    assert said("mine", "scored.parquet", "-o", "out.parquet", "--reward-column", text)[0] in (2, 3)
    Path("prompts.jsonl").write_text(json.dumps({text: "x", "more": 1}) + "\n")
    assert said("generate", "--policy", "./p", "--prompts", "prompts.jsonl", "-o", "out")[0] == 3
    assert said("replay", "--policy", "./p", "--replay", "prompts.jsonl", "-o", "out")[0] == 3


@each
def test_as_a_value_in_data(said, text: str) -> None:
    rows = [{"prompt": [text]}, {"prompt": [{"role": text}]}, {"prompt": text, "chosen": text, "rejected": {text: 1}}]
    for number, row in enumerate(rows):
        file = Path(f"{number}.jsonl")
        file.write_text(json.dumps(row) + "\n")
        assert said("replay", "--policy", "./p", "--replay", file, "-o", "out")[0] == 3


@each
def test_as_a_key_and_a_value_of_a_config(said, text: str) -> None:
    for number, content in enumerate((json.dumps({text: 1}), json.dumps({"train": {"optim": [text]}, "model": text}))):
        file = Path(f"{number}.yaml")  # JSON is YAML
        file.write_text(content)
        assert said("run", "-c", file)[0] == 2


@each
def test_in_rich_tables_titles_and_notes(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    print_table(table)
    with Display() as display:
        display("note", text=text)
        display.line(text)
    terminal = console(err=True)
    terminal.print(text)
    out, err = capfd.readouterr()
    assert obeyed(out + err) == []
    assert visible(text) in out
    assert err.count(visible(text)) == 3


@each
def test_in_the_report(text: str) -> None:
    folder = Path("run") / on_disk(text)
    folder.mkdir(parents=True)
    manifest = Manifest(folder / "manifest.json")
    manifest.data |= {"policy": {"folder": text, "identity": ""}, "reference": {"folder": text, "identity": ""}}
    manifest.data["versions"] = {text: text}
    counts = {text: text, "engine": text}
    manifest.record("round-01/generate", status="done", seconds=1.0, counts=counts, files=[], key="k", started=0.0)
    page = write_report(folder).read_text(encoding="utf-8")
    assert obeyed(page) == []
    for tag in ("<script>", "<img", "</textarea>", "<b>"):
        assert tag not in page


def test_a_terminal_that_is_not_utf_8(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "out.txt"
    with out.open("w", encoding="latin-1") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "argv", ["dice", "status"])
        Path("runs/Größe 漢").mkdir(parents=True)
        Path("runs/Größe 漢/config.yaml").write_text(dump(resolve()))
        with pytest.raises(SystemExit):
            main()
    assert "Größe \\u6f22" in out.read_text(encoding="latin-1")


def test_stored_keys_that_are_hostile(said) -> None:
    """A file of ours under a hostile key, which an error names."""
    frame = pl.DataFrame({"a": [1]})
    write_parquet(Path("x.parquet"), frame, key="\x1b[2J")
    assert said("train", "--policy", "./p", "--training-set", "x.parquet", "-o", "out")[0] in (2, 3)
