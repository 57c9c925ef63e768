"""`report.html`: what the page says of a run, of several, and of runs that lack something."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hostile_texts import HOSTILE, in_a_path, obeyed
from report_page import Page, text
from reported_runs import log_of, metrics_of, reported_run, write_log

from dice_py.config.loading import resolve
from dice_py.reporting import html
from dice_py.reporting.foreign_text import visible
from dice_py.reporting.formatting import evaluation_rows, mining_rows
from dice_py.reporting.html import is_report, report_page, write_comparison, write_report
from dice_py.reporting.sections import mining
from dice_py.reporting.stored_run import read_run
from dice_py.runs.stored_config import stored_config
from dice_py.storage.files import Manifest, read_json
from dice_py.storage.lock import exclusive_lock

ROUNDS = ("round-01", "round-02")
GAP = "Length gap of the best and the worst response, |best| − |worst|, against α"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two rounds, with its page. Read only."""
    folder = reported_run(tmp_path_factory.mktemp("reported") / "mine", 2, "replay.gamma=0.4")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(run / "report.html")


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(run, tmp_path / "mine"))


# --- the page ---------------------------------------------------------------------------------------------------


def test_it_is_a_page_of_its_own(run: Path, page: Page) -> None:
    source = (run / "report.html").read_text()
    (policy,) = [meta.get("content", "") for meta in page.all("meta") if meta.get("http-equiv")]
    assert policy.startswith("default-src 'none'; script-src 'none'; style-src 'sha256-")
    assert page.all("script") == page.all("img") == page.all("link") == page.all("iframe") == []
    for element in page.root.iter():
        assert "style" not in element.attrib
        assert not [name for name in element.attrib if name.startswith("on")]
        for name in ("href", "src", "xlink:href"):
            assert element.get(name, "#").startswith("#")
    assert not re.findall(r"url\(|@import", source)
    assert len(source) < 400_000


def test_its_outline_is_in_order_and_its_contents_lead_somewhere(page: Page) -> None:
    assert page.headings() == [
        (1, "DICE run mine"), (2, "Overview"), (2, "Evaluation"), (2, "Mining, round-01"), (2, "Mining, round-02"),
        (2, "Training"), (2, "Pairs"), (2, "Configuration"),
    ]  # fmt: skip
    ids = [element.get("id") for element in page.root.iter() if element.get("id")]
    assert len(set(ids)) == len(ids)
    links = [link.get("href", "") for nav in page.all("nav") for link in nav.iter("a")]
    assert [link[1:] for link in links] == [name for name in ids if name is not None]
    assert page.root.get("lang") == "en"
    assert text(page.all("title")[0]) == "DICE run mine"


def facts_of(page: Page) -> dict[str, str]:
    (facts,) = page.all("dl", "run-facts")
    return dict(zip(map(text, facts.iter("dt")), map(text, facts.iter("dd")), strict=True))


def test_the_overview(run: Path, page: Page) -> None:
    facts = facts_of(page)
    assert facts["state"] == "finished"
    assert facts["reference of round 1"] == "the sft"
    assert "new policy: round-02/train/model" in map(text, page.all("p"))
    assert [text(each) for each in page.all("p", "round-name")] == ["round-01 10 min 30 s", "round-02 10 min 30 s"]
    assert len(page.all("ol", "stages")) == 2
    steps = [text(item) for item in page.all("ol", "stages")[0].iter("li")]
    steps.remove("inspect 1 min 30 s")
    assert steps == [
        "generate 1 min 30 s", "score 1 min 30 s", "mine 1 min 30 s 60 pairs",
        "replay 1 min 30 s 60 mined, 20 replayed", "train 1 min 30 s", "evaluate 1 min 30 s",
    ]  # fmt: skip
    assert page.items("warned") == page.items("missing") == []


def test_the_evaluation(page: Page) -> None:
    metrics = {"round-01": metrics_of(1), "round-02": metrics_of(2)}
    assert page.table("on held-out prompts and pairs") == {
        visible(name): cells for name, *cells in evaluation_rows(metrics)
    }
    assert "KL is a mean over samples" in map(text, page.all("p", "note"))
    plots = page.plots()
    assert plots["oracle win rate"] == (
        "oracle win rate by round, with 95 % intervals. 0.52 after round 1, 0.54 after round 2."
    )
    assert "0.58 at the start, 0.61 after round 1" in plots["implicit reward accuracy"]
    assert "41.5 at the start, 39 after round 1, 38 after round 2" in plots["mean response tokens"]


def test_the_mining_of_a_round(run: Path, page: Page) -> None:
    stored = read_json(run / "round-01/mine/mining.json")
    shown = [table for table in page.all("table") if text(table.find("caption")) == "mine (lengths in tokens)"]
    assert len(shown) == 2
    rows = [[text(cell) for cell in row] for row in shown[0].iter("tr")]
    assert rows == mining_rows(stored)
    found = read_json(run / "round-01/inspect/distributions.json")
    plots = page.plots("mining-round-01")
    gap = plots[GAP]
    assert gap.startswith(f"Mean length gap against α. mine: from {stored['curve']['mean_length_gap'][0]:.4g} at α = 0")
    assert "usable responses; least squares" in plots["Reward against length"]
    chosen, rejected = (found["lengths"][f"{side}_after"]["mean"] for side in ("chosen", "rejected"))
    assert f"Means: chosen {chosen:.4g}, rejected {rejected:.4g}." in plots["Lengths of the mined pairs"]
    captions = page.captions()
    assert captions.count("what other settings of mine.debias would have mined of the same scores") == 2
    assert captions.count("dropped") == 2


def test_the_training(page: Page) -> None:
    last = log_of(1)[-1]
    row = page.table("last values of the trainer's log")["round 1"]
    assert row[:2] == ["80", f"{last['loss']:.4g}"]
    plots = page.plots()
    assert plots["Loss"] == "Loss by rounds trained. mine, round 1: 0.7 to 0.63; mine, round 2: 0.7 to 0.63."
    assert (
        "by rounds trained. chosen, round 1: -30 to -37; rejected, round 1: -40 to -54"
        in plots["Log-probability of chosen and rejected"]
    )
    assert {"Reward margin", "Gradient norm", "Accuracy: pairs whose chosen has the higher reward"} <= plots.keys()


def test_the_configuration(run: Path, page: Page) -> None:
    assert page.table("settings that are not the defaults of the synthetic world") == {"replay.gamma": ["0.4", "0.5"]}
    models = page.table("models")
    assert models["reference of round 1"] == ["the sft", "7c1926893eb16351cbfe0acb"]
    assert models["new policy"] == ["round-02/train/model", "k"]
    assert page.table("data, with digests (xxh3-128)") == {
        "inputs/world/prompts.parquet": ["a4ee32693ced70d59106e067f2b4bf89"]
    }
    assert page.table("versions") == {"torch": ["2.13.0"]}
    assert page.table("seeds, of which all random numbers follow") == {"seed": ["0"], "world.seed": ["0"]}
    (command,) = page.all("pre", "command")
    assert text(command) == f"dice run -c {run / 'config.yaml'} --run-dir {run}-again"


@pytest.mark.parametrize(
    "assignments",
    [
        ("rounds.keep=best", "seed=7", "world.seed=3"),
        ("model.policy=/p", "model.reference=/r", "data.prompts=/x.jsonl", "replay.gamma=0", "train.method=spa"),
    ],
    ids=["world", "own"],
)
def test_the_command_that_makes_it_again_has_its_settings(tmp_path: Path, assignments: tuple[str, ...]) -> None:
    folder = reported_run(tmp_path / "mine", 1, *assignments)
    assert resolve([folder / "config.yaml"]) == stored_config(folder)[0]


# --- what is missing --------------------------------------------------------------------------------------------


def damage(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40] + b"x" * 40)


def without_stage(folder: Path, stage: str) -> None:
    manifest = Manifest(folder / "manifest.json")
    del manifest.data["stages"][stage]
    manifest.save()


def scrambled(folder: Path) -> None:
    """Whole files whose content is another one."""
    (folder / "round-01/mine/mining.json").write_text(json.dumps({"length": [], "curve": 3}))
    (folder / "round-01/evaluate/metrics.json").write_text(json.dumps({"worst_slice": {"ci95": 1}}))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no metrics": (lambda run: (run / "round-02/evaluate/metrics.json").unlink(), "evaluate/metrics.json is missing"),
    "damaged metrics": (lambda run: damage(run / "round-02/evaluate/metrics.json"), "metrics.json is damaged"),
    "damaged mining": (lambda run: damage(run / "round-01/mine/mining.json"), "mine/mining.json is damaged"),
    "no distributions": (lambda run: shutil.rmtree(run / "round-01/inspect"), "distributions.json is missing"),
    "an older run": (
        lambda run: (shutil.rmtree(run / "round-01/inspect"), without_stage(run, "round-01/inspect")),
        "round-01 has no distributions of its mining and no pairs to read: an earlier version made it",
    ),
    "no log": (lambda run: (run / "round-01/train/log.jsonl").unlink(), "round-01 has no log of its training"),
    "damaged manifest": (lambda run: damage(run / "manifest.json"), "manifest.json is damaged"),
    "edited config": (
        lambda run: (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("seed: 0", "seed: 1")),
        "config.yaml is damaged, or was edited (seed",
    ),
    "damaged pairs": (
        lambda run: (run / "round-01/inspect/pairs.parquet").write_bytes(b"PAR1 and no more"),
        "inspect/pairs.parquet cannot be read",
    ),
    "other content": (scrambled, "the evaluation cannot be shown, since a file of it is not as dice writes it"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_page_says_what_is_missing(copy: Path, what: str) -> None:
    breaks, said = BROKEN[what]
    breaks(copy)
    page = Page(write_report(copy))
    assert [item for item in page.items("missing") if said in item], page.items("missing")
    assert "Loss" in page.plots()
    assert page.captions()


def test_other_distributions_do_not_hide_the_mining(copy: Path) -> None:
    for content in ({}, {"margins": 1}, {"reward_length": {"counts": [[1, 2, 3]]}, "variants": []}):
        (copy / "round-01/inspect/distributions.json").write_text(json.dumps(content))
        page = Page(write_report(copy))
        said = "mine: round-01/inspect/distributions.json cannot be shown: it is not as dice writes it."
        assert said in map(text, page.all("p", "note"))
        assert list(page.plots("mining-round-01")) == [GAP]
        assert "Reward against length" in page.plots("mining-round-02")


def test_a_stopped_run(copy: Path) -> None:
    manifest = Manifest(copy / "manifest.json")
    manifest.data["stages"]["round-02/train"] |= {"status": "running", "seconds": None}
    del manifest.data["stages"]["round-02/evaluate"], manifest.data["outcome"]
    manifest.save()
    shutil.rmtree(copy / "round-02/evaluate")
    shutil.rmtree(copy / "round-02/train")
    page = Page(write_report(copy))
    facts = facts_of(page)
    assert facts["state"] == f"not finished; to go on: dice resume {copy}"
    steps = [text(item) for item in page.all("ol", "stages")[1].iter("li")]
    assert [step for step in steps if "1 min 30 s" not in step] == ["train stopped", "evaluate to do"]
    assert page.items("missing") == []


def test_a_run_in_progress(copy: Path) -> None:
    without_stage(copy, "round-02/evaluate")
    with exclusive_lock(copy / ".lock", wait=False):
        page = Page(write_report(copy))
    assert facts_of(page)["state"] == "in progress when this page was written"
    # The run writes the page after its last stage, too, while it holds the lock.
    shutil.rmtree(copy)
    reported_run(copy, 1)
    with exclusive_lock(copy / ".lock", wait=False):
        assert facts_of(Page(write_report(copy)))["state"] == "finished"


def test_warnings_stand_on_top(copy: Path) -> None:
    manifest = Manifest(copy / "manifest.json")
    manifest.data["stages"]["round-01/mine"]["warnings"] = [{"name": "n", "text": "lengths differ: set mine.debias"}]
    manifest.save()
    page = Page(write_report(copy))
    assert page.items("warned") == ["round-01, mine: lengths differ: set mine.debias"]
    order = [element.get("class") or element.tag for element in page.root.iter() if element.tag in ("div", "dl")]
    assert order.index("warned") < order.index("run-facts") < order.index("round")


def test_without_an_address_space_the_page_has_its_tables(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (2**33, 2**33))
    page = Page(write_report(copy))
    assert page.plots() == {}
    (said,) = page.items("missing")
    assert said.startswith("plots are left out: drawing them reserves 128 GiB")
    assert "on held-out prompts and pairs" in page.captions()


def test_without_the_libraries_of_plots_the_page_has_its_tables(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("altair", "vl_convert"):
        monkeypatch.setitem(sys.modules, name, None)  # the import fails
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    page = Page(write_report(copy))
    assert page.plots() == {}
    (said,) = page.items("missing")
    assert said.startswith("plots are left out, since altair and vl_convert cannot be imported")
    assert "on held-out prompts and pairs" in page.captions()


# --- several runs -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    other = reported_run(tmp_path_factory.mktemp("reported") / "other", 1, "replay.gamma=0.5", seed=1)
    return Page(write_comparison([run, other], other.parent / "both.html"))


def test_runs_side_by_side(compared: Page) -> None:
    assert text(compared.all("title")[0]) == "DICE runs mine, other"
    assert compared.table("settings that differ") == {"rounds.count": ["2", "1"], "replay.gamma": ["0.4", "0.5"]}
    (table,) = [t for t in compared.all("table") if text(t.find("caption")) == "on held-out prompts and pairs"]
    heads = [text(cell) for head in table.iter("thead") for cell in head.iter("th")]
    assert heads == ["mine, round-01", "mine, round-02", "other, round-01"]
    plots = compared.plots() | compared.plots("mining-round-01")
    assert "mine: 0.52 after round 1, 0.54 after round 2; other: 0.52 after round 1" in plots["oracle win rate"]
    assert "mine: from" in plots[GAP]
    assert "Reward against length, mine" in plots
    assert "Reward against length, other" in plots
    assert "other, round 1: 0.7 to 0.63" in plots["Loss"]
    legends = [text(label) for svg in compared.all("svg") for label in svg.iter("text")]
    assert {"mine", "other"} <= set(legends)


def test_histograms_are_drawn_of_as_many_rounds_as_a_page_holds(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mining.charts, "svg", lambda *_: "")
    one = read_run(run, "one")
    titles = [[figure.title for figure in mining.mining_round([one], name, draws=True)["figures"]] for name in ROUNDS]
    assert titles[0] == titles[1]
    assert "Reward against length" in titles[0]
    first, last = (mining.mining_round([one] * 15, name, draws=True) for name in ROUNDS)
    assert [figure.title for figure in first["figures"] if figure.title.startswith("Reward")] == []
    assert first["notes"] == ["Histograms are drawn of the last rounds only, so that the page stays small."]
    assert len([figure for figure in last["figures"] if figure.title.startswith("Reward")]) == 15
    assert last["notes"] == []


def test_charts_are_as_vega_lites_schema_asks(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = report_page([read_run(run, "run")], with_pairs=False)
    monkeypatch.setattr(html, "unchecked", nullcontext)
    assert report_page([read_run(run, "run")], with_pairs=False) == page


# --- hostile texts ----------------------------------------------------------------------------------------------


def test_hostile_names_of_runs_are_shown_in_plots(run: Path, tmp_path: Path) -> None:
    """All of them in one page, as names of runs whose plots have legends."""
    folders = []
    for number, name in enumerate(("html", "textarea", "escape", "surrogate")):
        folder = tmp_path / str(number) / in_a_path(HOSTILE[name])
        shutil.copytree(run, folder)
        folders.append(folder)
    out = write_comparison(folders, tmp_path / "page.html")
    source = out.read_text(encoding="utf-8")
    assert obeyed(source) == []
    page = Page(out)
    assert page.all("script") == page.all("b") == page.all("textarea") == []
    legends = {text(label) for svg in page.all("svg") for label in svg.iter("text")}
    for folder in folders:
        assert " ".join(visible(folder.name).split()) in legends


# --- size -------------------------------------------------------------------------------------------------------


def test_twenty_rounds_stay_below_three_megabytes(run: Path, tmp_path: Path) -> None:
    folder = reported_run(tmp_path / "long", 1, "rounds=20")
    for number in range(1, 21):
        base = folder / f"round-{number:02d}"
        for stage in ("mine", "inspect", "evaluate"):
            if not (base / stage).exists():
                shutil.copytree(folder / "round-01" / stage, base / stage)
        write_log(base / "train", log_of(number, 3000))
    fill(folder)
    out = write_comparison([folder], tmp_path / "page.html", with_pairs=False)
    assert out.stat().st_size < 3_000_000
    page = Page(out)
    assert len([title for level, title in page.headings() if title.startswith("Mining")]) == 20
    notes = " ".join(map(text, page.all("p", "note")))
    assert "Of long logs every k-th entry is drawn (k up to 60), and the last." in notes
    assert "Bins are twice as wide as the finest, for the size of the page." in notes
    assert "The pairs were left out (--no-pairs)." in notes


def fill(folder: Path) -> None:
    """Makes every bin of the first round's histogram of reward and length hold something, as of many responses."""
    for file in folder.glob("round-*/inspect/distributions.json"):
        number = int(file.parts[-3].removeprefix("round-"))
        found = json.loads(file.read_text())
        found["reward_length"] |= {
            "length_edges": list(range(0, 41 * 12, 12)),
            "reward_edges": [0.1 * n for n in range(31)],
            "counts": [[x, y, 1 + (x * y + number) % 97] for x in range(40) for y in range(30)],
        }
        file.write_text(json.dumps({name: value for name, value in found.items() if not name.startswith("dice.")}))


def test_a_page_is_known_as_one(run: Path, tmp_path: Path) -> None:
    assert is_report(run / "report.html")
    for name in ("manifest.json", "config.yaml", "round-01/mine/mining.json"):
        assert not is_report(run / name)
    (tmp_path / "empty.html").write_text("")
    assert not is_report(tmp_path / "empty.html")
