"""`--generations`: what it sets, and what is said of files that are not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cli.options import run_config
from dice_py.errors import UsageError


def config(
    *files: str, prompts: Path | None = None, rounds: int | None = None, assign: list[str] | None = None
) -> object:
    given = [Path(file) for file in files]
    return run_config(
        None, assign, "p", "r", None, prompts, Path("x.jsonl"), rounds, None, None, given
    ).generate.from_files


def test_it_is_generate_from_files() -> None:
    assert config("a.jsonl", "b/*.parquet") == ["a.jsonl", "b/*.parquet"]
    with pytest.raises(UsageError, match=r"data.prompts \(--prompts\), or generate.from_files \(--generations\)"):
        config()


def test_samples_limit_the_responses_that_are_sampled_only() -> None:
    few = ["generate.samples=2", "mine.min_responses=3"]
    assert config("a.jsonl", rounds=1, assign=few) == ["a.jsonl"]
    with pytest.raises(UsageError, match="no prompt could give a pair"):
        config("a.jsonl", rounds=2, assign=few)


@pytest.mark.usefixtures("empty_folder")
@pytest.mark.parametrize(
    ("name", "said"),
    [("none-*.jsonl", "no file matches"), ("none.jsonl", "does not exist"), ("text.txt", "unknown file type '.txt'")],
)
def test_files_that_cannot_be_read(refused: Callable[..., str], name: str, said: str) -> None:
    Path("text.txt").write_text("prompt,response\n")
    options = ["--policy", "p", "--reference", "r", "--set", "replay.gamma=0"]
    assert said in refused(3, "run", *options, "--generations", name)


@pytest.mark.usefixtures("empty_folder")
def test_the_world_samples(refused: Callable[..., str]) -> None:
    assert "generate.from_files (--generations) given without model.policy" in refused(
        2, "run", "--generations", "a.jsonl"
    )
