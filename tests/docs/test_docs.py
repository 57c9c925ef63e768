"""The pages: their Python runs, their links and names lead somewhere, and what is generated is up to date."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from places import ROOT
from tiny_models import make_llama

from dice_py.config.loading import known_keys
from dice_py.config.shared import ModelConfig
from dice_py.config.stages import ScoreConfig
from dice_py.stages.score import ScoreJob

PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
}
GUIDES = "\n".join(text for page, text in PAGES.items() if page != "CHANGELOG.md")  # which names what was, too
LINKS = [(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text)]

BLOCKS = {page: [block.split("```")[0] for block in text.split("```python\n")[1:]] for page, text in PAGES.items()}
"""The Python of each page."""


def test_the_python_of_every_page_is_run_here() -> None:
    assert {page: len(blocks) for page, blocks in BLOCKS.items() if blocks} == {
        "docs/cards.md": 2,  # in tests/reporting/test_cards.py
        "docs/judges.md": 1,  # in tests/evaluation/test_function_judge.py
        "docs/mining.md": 1,
        "docs/scoring.md": 2,
    }


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    random = np.random.default_rng(0)
    rows = 4000
    prompt = np.arange(rows) // 8
    scored = pl.DataFrame(
        {
            "prompt_id": prompt,
            "prompt": [f"question {p}" for p in prompt],
            "response": [f"answer {p} {i}" for p, i in zip(prompt, random.integers(0, 30, rows), strict=True)],
            "response_tokens": random.integers(5, 400, rows),
            "reward": random.normal(size=rows),
            "round": random.integers(1, 3, rows),
        }
    )
    (tmp_path / "scored").mkdir()
    for i, part in enumerate(scored.iter_slices(1500)):
        part.write_parquet(tmp_path / "scored" / f"part-{i}.parquet")
    offline = pl.DataFrame(
        {
            "prompt_id": np.arange(490, 1490),
            "prompt": [f"question {p}" for p in range(490, 1490)],
            "chosen": ["good"] * 1000,
            "rejected": ["bad"] * 1000,
            "margin": random.normal(size=1000),
        }
    )
    offline.write_parquet(tmp_path / "offline.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_from_a_scan_to_a_training_set(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = BLOCKS["docs/mining.md"]
    assert sum(bool(line.strip()) for line in block.splitlines()) <= 13
    exec(compile(block, "docs/mining.md", "exec"), {})
    assert "duplicate" in capsys.readouterr().out
    made = pl.read_parquet(files / "training_set.parquet")
    assert made.columns == ["prompt", "chosen", "rejected"]
    # As many offline pairs as mined ones, and none on a prompt that was mined.
    replayed = made.filter(pl.col("chosen") == "good")
    mined = made.filter(pl.col("chosen") != "good")
    assert mined.height == 500
    assert 400 < replayed.height <= 500
    assert not set(mined["prompt"]) & set(replayed["prompt"])
    own = pl.col("chosen").str.split(" ").list.get(1)
    assert mined.select((pl.format("question {}", own) == pl.col("prompt")).all()).item()


def test_responses_from_elsewhere_are_scored_and_mined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, seed in (("my-dpo-model", 1), ("my-sft-model", 2)):
        make_llama(tmp_path / "my-org" / name, seed=seed)
    to_ids, to_pairs = BLOCKS["docs/scoring.md"]
    exec(compile(to_ids, "docs/scoring.md", "exec"), {})
    responses = pl.read_parquet("responses.parquet")
    many = pl.concat([responses.with_columns(prompt_id=pl.lit(prompt), response_tokens=pl.lit(length))
                      for prompt in range(3) for length in (4, 9)])  # fmt: skip
    Path("gen").mkdir()
    many.with_columns(pl.col("token_ids").list.head(pl.col("response_tokens"))).write_parquet(
        "gen/generations-0.parquet"
    )
    ScoreJob(
        config=ScoreConfig(),
        models=ModelConfig(device="cpu"),
        policy=Path("my-org/my-dpo-model"),
        reference=Path("my-org/my-sft-model"),
        generations=[Path("gen/generations-0.parquet")],
        generation_keys=["key"],
        out=Path("scores"),
        beta=0.1,
    ).run()
    made: dict[str, Any] = {}
    exec(compile(to_pairs, "docs/scoring.md", "exec"), made)
    assert made["mined"].pairs.height == 3


def test_config_reference_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "config_reference.py"))["page"]()
    assert PAGES["docs/configuration.md"] == made, "run: make docs"


def test_config_reference_has_every_key() -> None:
    rows = re.findall(r"^(?:## `?([^`\n]+)`?|\| `([^`]+)` \|)", PAGES["docs/configuration.md"], re.MULTILINE)
    section, documented = "", set()
    for heading, key in rows:
        if heading:
            section = "" if heading == "Top level" else heading.replace("NAME", "*") + "."
        else:
            documented.add(section + key.replace("NAME", "*"))
    sections = {name.rpartition(".")[0] for name in known_keys()}
    assert {name for name in known_keys() if name not in sections} <= documented


def test_every_key_has_a_description() -> None:
    rows = [line.split(" | ") for line in PAGES["docs/configuration.md"].splitlines() if line.startswith("| `")]
    assert [cells[0] for cells in rows if len(cells) == 4 and not cells[3].strip(" |")] == []


def test_figures_have_the_table_of_the_bench() -> None:
    table = (ROOT / "benches" / "results" / "mining.md").read_text(encoding="utf-8").strip()
    assert f"<!-- benches/results/mining.md -->\n{table}\n" in PAGES["docs/figures.md"]


@pytest.mark.parametrize(("page", "link"), [pair for pair in LINKS if "://" not in pair[1]])
def test_links_lead_to_files(page: str, link: str) -> None:
    assert (ROOT / page).parent.joinpath(link).exists()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts and MkDocs make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


ANCHORS = [(page, *link) for page, text in PAGES.items() for link in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", text)]


@pytest.mark.parametrize(("page", "link", "anchor"), [found for found in ANCHORS if "://" not in found[1]])
def test_links_lead_to_headings(page: str, link: str, anchor: str) -> None:
    assert anchor in anchors((ROOT / page).parent / link if link else ROOT / page)


def test_the_site_has_every_page() -> None:
    site = (ROOT / "docs" / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r": ([\w-]+\.md)$", site, re.MULTILINE))
    assert {Path(page).name for page in PAGES if page.startswith("docs/")} <= listed


def test_options_in_the_pages_are_keys_of_the_config() -> None:
    patterns = [re.compile(re.escape(name).replace(r"\*", r"\w+")) for name in known_keys()]
    named = set(re.findall(r"--set ([\w.]+)=", GUIDES))
    assert [name for name in named if not any(pattern.fullmatch(name) for pattern in patterns)] == ["section.key"]


def test_make_targets_in_the_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", GUIDES, re.MULTILINE))
    assert {"run", "test", "test-fast"} <= named <= targets


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/layout.md"])
def test_files_that_a_page_names_exist(page: str) -> None:
    named = re.findall(r"`([\w/.*-]+\.(?:py|md|toml))`", PAGES[page])
    # Only the project's own files: those of an environment or a build beside them would hide a missing one.
    folders = [ROOT / name for name in ("benches", "cli", "configs", "dice_py", "docs", "examples", "rust", "tests")]
    files = [*ROOT.glob("*.*"), *(file for folder in folders for file in folder.rglob("*.*"))]
    missing = [name for name in named if "NAME" not in name and not any(file.match(name) for file in files)]
    assert named
    assert missing == []


def test_layout_lists_every_folder() -> None:
    """Of each package folder, and of the Rust sources' folders."""
    listed = set(re.findall(r"^ *([\w-]+(?:/[\w-]+)*)/ ", PAGES["docs/layout.md"], re.MULTILINE))
    folders = {file.parent.name for file in (ROOT / "dice_py").rglob("__init__.py")} - {"dice_py"}
    assert folders <= {name.rpartition("/")[2] for name in listed}
