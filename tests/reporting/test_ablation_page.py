"""The page of an ablation: what it says of arms, claims and rounds, of few and of many, and of what is missing."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from hostile_texts import HOSTILE, in_a_path, obeyed
from made_ablations import NAMES, SEEDS, arms_called, made_results, many_arms
from report_page import Page, text

from dice_py.ablation.statistics import over_seeds
from dice_py.errors import DataError
from dice_py.reporting import ablation_page
from dice_py.reporting.ablation_page import is_ablation_page, write_ablation_page
from dice_py.reporting.ablation_results import measured
from dice_py.reporting.charts import SERIES
from dice_py.reporting.foreign_text import visible
from dice_py.reporting.html import is_report
from dice_py.reporting.sections import ablation_plots

PLOTS = [
    "oracle win rate over the start", "oracle accuracy", "oracle score", "mean response length (tokens)",
    "KL to the start (nats a response)", "accuracy of the reward on own samples",
]  # fmt: skip
FRONTIER = "oracle score against KL to the start"


def page_of(results: dict[str, Any], folder: Path) -> Page:
    return Page(write_ablation_page(results, folder / "ablation.html"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ablation of four arms, of which two runs have a report. Read only."""
    found = tmp_path_factory.mktemp("ablated") / "mine"
    for run in ("both/seed-3", "both/seed-7", "length/seed-4", "other/seed-3"):
        (found / "runs" / run).mkdir(parents=True)
        (found / "runs" / run / "report.html").write_text("a report")
    write_ablation_page(made_results(), found / "ablation.html")
    return found


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page(folder / "ablation.html")


# --- the page ---------------------------------------------------------------------------------------------------


def test_it_is_a_page_of_its_own(folder: Path, page: Page) -> None:
    (policy,) = [meta.get("content", "") for meta in page.all("meta") if meta.get("http-equiv")]
    assert policy.startswith("default-src 'none'; script-src 'none'; style-src 'sha256-")
    assert page.all("script") == page.all("img") == page.all("link") == []
    assert not [element for element in page.root.iter() if "style" in element.attrib]
    assert (folder / "ablation.html").stat().st_size < 400_000
    assert is_ablation_page(folder / "ablation.html")
    assert not is_report(folder / "ablation.html")
    changed = folder.parent / "changed.html"
    changed.write_bytes((folder / "ablation.html").read_bytes().replace(b"neither", b"nothing"))
    assert not is_ablation_page(changed)


def test_its_outline_is_in_order_and_its_contents_lead_somewhere(page: Page) -> None:
    assert page.headings() == [
        (1, "DICE ablation mine"), (2, "What was run"), (2, "Claims"), (2, "By round"), (2, "Frontier"),
        (2, "Numbers"), (2, "Reports of the runs"),
    ]  # fmt: skip
    links = [link.get("href", "") for nav in page.all("nav") for link in nav.iter("a")]
    assert [link.removeprefix("#") for link in links] == [heading.get("id") for heading in page.all("h2")]


def test_what_was_run(folder: Path, page: Page) -> None:
    facts = page.all("dl", "run-facts")[0]
    told = dict(zip(map(text, facts.iter("dt")), map(text, facts.iter("dd")), strict=True))
    assert told["arms"] == "neither, length, replay, both"
    assert (told["rounds"], told["seeds"], told["time"]) == ("2", "3, 4, 5, 6, 7", "8 min 32 s")
    assert told["versions"] == "dice-align 0.2.0, torch 2.13.0"
    assert page.table("arms, and the settings in which they differ") == {
        "neither": ["neither", "none", "0.0", "3, 4, 5, 6, 7"],
        "length": ["length penalty", "linear", "0.0", "3, 4, 5, 6, 7"],
        "replay": ["replay", "none", "0.5", "3, 4, 5, 6, 7"],
        "both": ["length penalty and replay", "linear", "0.5", "3, 4, 5, 6, 7"],
    }
    assert page.table("settings of all arms") == {"generate.samples": ["8"], "evaluate.prompts": ["200"]}
    (command,) = page.all("pre", "command")
    assert text(command) == (
        "dice ablate --arms neither,length,replay,both --debias linear --rounds 2 --seeds 3,4,5,6,7 --set "
        f"generate.samples=8 --set evaluate.prompts=200 --out {folder}-again"
    )
    assert page.items("warned") == page.items("missing") == []


def rows_of(page: Page, caption: str) -> list[list[str]]:
    """The rows of the one table with this caption; headings of rows may be equal."""
    (table,) = [each for each in page.all("table") if text(each.find("caption")) == caption]
    return [[text(cell) for cell in row] for body in table.iter("tbody") for row in body.iter("tr")]


def test_the_claims(page: Page) -> None:
    rows = rows_of(page, "differences of oracle win rate")
    assert [row[0] for row in rows] == ["rounds"] * 8 + ["length"] * 4 + ["replay"] * 4
    contrasts = made_results()["contrasts"]
    (one,) = [each for each in contrasts if each["claim"] == "length" and each["arm"] == "both" and each["round"] == 2
              and each["metric"] == "oracle_win_rate"]  # fmt: skip
    low, high = one["difference"]["ci95"]
    assert rows[11] == [
        "length", "with the length penalty − without it (replay in both)", "both − replay", "2",
        f"+{one['difference']['mean']:.3f} (+{low:.3f} to +{high:.3f})", "shown: above 0",
        *(f"+{number:.3f}" for number in one["difference"]["by_seed"]),
    ]  # fmt: skip
    assert rows[0][1:4] == ["round 1 − π_1, where the run starts", "neither", "1"]
    assert {row[5] for row in rows[12:]} == {"open: both sides of 0"}
    # Of the length only what is claimed of it: that the penalty makes answers shorter.
    tokens = rows_of(page, "differences of mean response tokens")
    assert [row[0] for row in tokens] == ["length"] * 4
    assert {row[5] for row in tokens} == {"shown: below 0"}
    assert len(rows_of(page, "differences of oracle score")) == 16
    rest = rows_of(page, "differences of mean response tokens, without a claim")
    assert [row[0] for row in rest] == ["rounds"] * 8 + ["replay"] * 4
    assert {row[5] for row in rest} == {"–"}


def test_the_plots_tell_their_numbers(page: Page) -> None:
    plots = page.plots("rounds")
    assert list(plots) == PLOTS
    both = made_results()["arms"][3]
    rates = [measured(each["metrics"]["oracle_win_rate"]) for each in both["rounds"]]
    texts = [rate.text() for rate in rates if rate is not None]
    told = f"both: 0.500 at start, {texts[0]} at round 1, {texts[1]} at round 2."
    assert plots[PLOTS[0]].endswith(told)
    assert plots[PLOTS[0]].startswith(f"{PLOTS[0]} by round, with 95 % intervals over seeds (Student's t). neither: ")
    assert "at start" not in plots["accuracy of the reward on own samples"]
    by_seed = page.table("mean response length (tokens), by seed")
    numbers = both["rounds"][1]["metrics"]["mean_response_tokens"]["by_seed"]
    assert by_seed["both, round 2"] == [f"{number:.2f}" for number in numbers]
    (frontier,) = page.plots("frontier").items()
    assert frontier[0] == FRONTIER
    ends = [both["start"]["oracle_score"]["mean"], both["rounds"][1]["metrics"]["oracle_score"]["mean"]]
    kl = both["rounds"][1]["metrics"]["kl_to_start"]["mean"]
    assert f"both: {ends[0]:.3g} at KL 0 (start)" in frontier[1]
    assert frontier[1].endswith(f"{ends[1]:.3g} at KL {kl:.3g} (round 2).")


def test_bars_of_arms_stand_beside_one_another(page: Page) -> None:
    (svg,) = [each.find("svg") for each in page.all("figure") if text(each.find("figcaption")) == PLOTS[1]]
    assert svg is not None
    bars = [line for line in svg.iter("line") if (line.get("stroke") or "").startswith("var(--series")]
    places = [re.findall(r"translate\(([\d.]+)", bar.get("transform", ""))[0] for bar in bars]
    assert len(bars) == len(set(places)) == 4 * 3  # four arms at the start and after two rounds
    assert {bar.get("stroke") for bar in bars} == set(SERIES[:4])


def test_the_numbers(page: Page) -> None:
    row = made_results()["arms"][1]["rounds"][0]
    numbers = page.table("arms by round")
    assert list(numbers)[:4] == ["neither, start", "neither, round 1", "neither, round 2", "length, start"]
    found = measured(row["metrics"]["oracle_win_rate"])
    assert found is not None
    assert numbers["length, round 1"][0] == found.text()
    assert numbers["length, start"][-1] == "–"
    assert "distinct 2" in page.table("metrics of length")
    assert list(page.table("mining of length")) == ["pairs", "alpha", "mean length gap before", "mean length gap after"]


def test_reports_of_runs_are_linked_where_they_are(folder: Path, page: Page) -> None:
    (section,) = [each for each in page.all("section") if each.get("aria-labelledby") == "reports"]
    links = [(link.get("href", ""), link.get("aria-label")) for link in section.iter("a")]
    assert links == [
        ("runs/length/seed-4/report.html", "report of length, seed 4"),
        ("runs/both/seed-3/report.html", "report of both, seed 3"),
        ("runs/both/seed-7/report.html", "report of both, seed 7"),
    ]
    assert all((folder / link).is_file() for link, _ in links)


# --- few and many -----------------------------------------------------------------------------------------------


def test_a_single_seed_has_intervals_over_prompts(tmp_path: Path) -> None:
    page = page_of(made_results((3,)), tmp_path)
    notes = " ".join(map(text, page.all("p", "note")))
    assert "Differences are of one seed, with 95 % intervals over the prompts of one seed" in notes
    assert "with 95 % intervals over the prompts" in page.plots("rounds")[PLOTS[0]]
    assert [caption for caption in page.captions() if "by seed" in caption] == []
    assert len(rows_of(page, "differences of oracle win rate")[0]) == 6
    assert list(page.plots("rounds")) == PLOTS


def test_many_arms_are_in_several_plots_on_one_scale(tmp_path: Path) -> None:
    page = page_of(many_arms(), tmp_path)
    parts = ("1 to 6 of 12", "7 to 12 of 12")
    assert list(page.plots("rounds")) == [f"{title} (arms {part})" for title in PLOTS for part in parts]
    assert list(page.plots("frontier")) == [f"{FRONTIER} (arms {part})" for part in parts]
    figures = [each for each in page.all("figure") if text(each.find("figcaption")).startswith(PLOTS[0])]
    labels = [[text(label) for label in figure.iter("text")] for figure in figures]
    arms = [arm["arm"] for arm in many_arms()["arms"]]
    assert [[label for label in of_plot if label in arms] for of_plot in labels] == [arms[:6], arms[6:]]
    scales = [[label for label in of_plot if re.fullmatch(r"0\.\d+", label)] for of_plot in labels]
    assert scales[0] == scales[1] != []
    assert len(page.table("arms by round")) == 12 * 4
    assert {"method", "debias"} <= {row[0] for row in rows_of(page, "differences of oracle win rate")}
    assert (tmp_path / "ablation.html").stat().st_size < 1_000_000


@pytest.mark.parametrize(("count", "plots"), [(1, [1]), (8, [8]), (9, [5, 4]), (13, [5, 5, 3])])
def test_how_many_plots(monkeypatch: pytest.MonkeyPatch, count: int, plots: list[int]) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(
        ablation_plots.charts, "svg", lambda _, rows, __: drawn.append(len({r["series"] for r in rows}))
    )
    ablation_plots.by_round(made_results((3, 4), 1, arms=arms_called([f"both-{n}" for n in range(count)])))
    assert drawn == plots * len(PLOTS)
    assert max(plots) <= len(SERIES)


# --- what is missing --------------------------------------------------------------------------------------------


def without(results: dict[str, Any], *metrics: str) -> dict[str, Any]:
    for arm in results["arms"]:
        for values in (arm["start"], *(each["metrics"] for each in arm["rounds"])):
            for metric in metrics:
                values.pop(metric, None)
    return results


def test_a_metric_that_no_arm_has_is_named(tmp_path: Path) -> None:
    page = page_of(without(made_results(), "kl_to_start", "on_policy_reward_accuracy"), tmp_path)
    assert page.items("missing") == [
        "KL to the start: no arm has it",
        "accuracy of the reward on own samples: no arm has it",
        "the frontier: it needs the KL to the start (evaluate.kl_to_start) and a judge",
    ]
    assert list(page.plots("rounds")) == PLOTS[:4]
    assert page.plots("frontier") == {}


def test_a_metric_that_one_arm_lacks_leaves_out_this_arm(tmp_path: Path) -> None:
    results = made_results()
    without({"arms": results["arms"][:1]}, "kl_to_start")
    page = page_of(results, tmp_path)
    told = page.plots("rounds")["KL to the start (nats a response)"]
    assert "neither" not in told
    assert "length: 0.000 at start, " in told
    assert "neither" not in page.plots("frontier")[FRONTIER]
    assert page.table("arms by round")["neither, round 1"][4] == "–"


def test_another_judge(tmp_path: Path) -> None:
    """Of a model of the user's: no oracle, and the judge's accuracy on own samples under the judge's name."""
    results = made_results(is_world=False, quality="function_win_rate", contrasts=[])
    for arm in results["arms"]:
        for values in (arm["start"], *(each["metrics"] for each in arm["rounds"])):
            for name in list(values):
                new = name.replace("oracle_", "function_").replace("on_policy", "function_on_policy")
                values[new] = values.pop(name)
    without(results, "function_accuracy")
    page = page_of(results, tmp_path / "own")
    assert list(page.plots("rounds")) == [PLOTS[0].replace("oracle", "function"), "function score", *PLOTS[3:]]
    assert list(page.plots("frontier")) == ["function score against KL to the start"]
    assert page.items("missing") == []
    (command,) = page.all("pre", "command")
    assert text(command) == (
        f"dice ablate -c {tmp_path}/own/runs/replay/seed-3/config.yaml --arms neither,length,replay,both "
        f"--debias linear --rounds 2 --seeds 3,4,5,6,7 --out {tmp_path}/own-again"
    )
    assert "There is nothing to compare yet." in map(text, page.all("p", "note"))


def test_without_a_judge_it_is_the_reward_that_is_judged(tmp_path: Path) -> None:
    results = made_results(is_world=False, quality="implicit_reward_accuracy_initial_reference", contrasts=[])
    without(results, "oracle_win_rate", "oracle_accuracy", "oracle_score", "on_policy_reward_accuracy")
    for arm in results["arms"]:
        for each in arm["rounds"]:
            each["metrics"][results["quality"]] = over_seeds([0.7] * 5)
    page = page_of(results, tmp_path)
    assert next(iter(page.plots("rounds"))) == "implicit reward accuracy initial reference"
    assert page.items("missing") == [
        "a judge's accuracy and score: no arm has it", "accuracy of the reward on own samples: no arm has it",
    ]  # fmt: skip
    assert list(page.plots("frontier")) == ["implicit reward accuracy initial reference against KL to the start"]


def test_unfinished_runs_stand_on_top(tmp_path: Path) -> None:
    gap = "both/seed-3, round 2: oracle_score"
    failed = {"failures": {"both/seed-7": "out of <memory>"}, "gaps": [gap]}
    page = page_of(made_results(unfinished=[("both", 4), ("both", 7)], **failed), tmp_path)
    assert page.items("warned") == ["both/seed-4", "both/seed-7: out of <memory>"]
    assert page.items("missing") == [f"{gap}: not measured in this run, and so missing from its arm"]
    assert page.table("arms, and the settings in which they differ")["both"][-1] == "3, 5, 6"
    rows = rows_of(page, "differences of oracle win rate")
    of_both = [row[6:] for row in rows if row[2] in ("both", "both − replay", "both − length")]
    assert len(of_both) == 6
    assert {tuple(number == "–" for number in row) for row in of_both} == {(False, True, False, False, True)}
    numbers = page.table("oracle accuracy, by seed")["both, start"]
    assert [number == "–" for number in numbers] == [False, True, False, False, True]


def test_notes_on_the_figures(tmp_path: Path) -> None:
    page = page_of(made_results(notes=["KL is of <truncated> samples"]), tmp_path)
    assert "KL is of <truncated> samples." in [text(each) for each in page.all("p", "note")]


def test_an_ablation_of_which_no_run_is_complete(tmp_path: Path) -> None:
    every = [(arm, seed) for arm in NAMES for seed in SEEDS]
    page = page_of(made_results(unfinished=every), tmp_path)
    assert len(page.items("warned")) == 20
    assert "No run is complete yet." in map(text, page.all("p", "note"))
    assert page.plots() == {}


def test_without_an_interval_a_claim_is_open(tmp_path: Path) -> None:
    results = made_results((3,))
    for each in results["contrasts"]:
        each |= {"difference": each["difference"] | {"ci95": None}, "verdict": "open"}
    rows = rows_of(page_of(results, tmp_path), "differences of oracle win rate")
    assert rows[9][4:] == [f"+{results['contrasts'][27]['difference']['mean']:.3f}", "open: no interval"]


def test_without_an_address_space_the_page_has_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (2**33, 2**33))
    page = page_of(made_results(), tmp_path)
    assert page.plots() == {}
    (said,) = page.items("missing")
    assert said.startswith("plots are left out: drawing them reserves 128 GiB")
    assert said.endswith("`dice ablate` without the limit draws them")
    assert "arms by round" in page.captions()


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        (lambda results: results | {"version": 2}, "is of version 2, and this dice reads version 1"),
        (lambda results: results | {"arms": 3}, "is not as dice writes it"),
        (lambda results: {name: results[name] for name in results if name != "quality"}, "KeyError: 'quality'"),
    ],
)
def test_other_results_are_refused(
    tmp_path: Path, breaks: Callable[[dict[str, Any]], dict[str, Any]], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        page_of(breaks(made_results()), tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- schema, hostile texts -------------------------------------------------------------------------------------------


def test_charts_are_as_vega_lites_schema_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unchecked = write_ablation_page(made_results(), tmp_path / "ablation.html").read_bytes()
    monkeypatch.setattr(ablation_page, "unchecked", nullcontext)
    assert write_ablation_page(made_results(), tmp_path / "ablation.html").read_bytes() == unchecked


def test_hostile_names_are_shown_and_never_obeyed(tmp_path: Path) -> None:
    names = [in_a_path(HOSTILE[name]) for name in ("html", "textarea", "escape", "surrogate", "bidirectional")]
    results = made_results((3, 4), 1, arms=arms_called([*names, "x" * 300, "x" * 299 + "y"]))
    texts = {"claim": HOSTILE["title"], "text": HOSTILE["textarea"], "verdict": HOSTILE["html"]}
    results["contrasts"] = [each | texts for each in results["contrasts"]]
    results["unfinished"] = list(HOSTILE.values())
    results |= {"machine": HOSTILE["template"], "versions": {HOSTILE["attribute"]: HOSTILE["html"]}}
    results["settings"] = {"x": HOSTILE["yaml"], "y": HOSTILE["html"]}
    for name in names:
        (tmp_path / "runs" / name / "seed-3").mkdir(parents=True)
        (tmp_path / "runs" / name / "seed-3/report.html").touch()
    out = write_ablation_page(results, tmp_path / "ablation.html")
    assert obeyed(out.read_text(encoding="utf-8")) == []
    page = Page(out)
    assert page.all("script") == page.all("b") == page.all("img") == page.all("textarea") == []
    arms_of_the_page = page.table("arms, and the settings in which they differ")
    assert {" ".join(visible(name).split()) for name in names} <= arms_of_the_page.keys()
    legends = {text(label) for svg in page.all("svg") for label in svg.iter("text")}
    assert {visible(names[2]), "x" * 23 + "…", "x" * 23 + "… (2)"} <= legends
    links = [link.get("href", "") for link in page.all("a") if link.get("href", "").startswith("runs/")]
    assert [unquote(link, errors="surrogateescape") for link in links] == [
        f"runs/{name}/seed-3/report.html" for name in names
    ]


@pytest.mark.parametrize("name", ["..", ".", "a/b", "/etc"])
def test_no_link_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    for place in (tmp_path / "runs" / "seed-3", tmp_path / "seed-3", tmp_path / "runs/a/b/seed-3"):
        place.mkdir(parents=True)
        (place / "report.html").touch()
    page = page_of(made_results((3,), 1, arms=arms_called([name])), tmp_path)
    assert [link.get("href") for link in page.all("a") if not link.get("href", "").startswith("#")] == []
