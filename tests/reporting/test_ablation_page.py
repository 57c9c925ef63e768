"""The page of an ablation: what it says of arms, claims and rounds, of few and of many, and of what is missing."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from hostile_texts import HOSTILE, in_a_path, obeyed
from made_ablations import contrast, made_arm, made_results, many_arms, value
from report_page import Page, text

from dice_py.errors import DataError
from dice_py.reporting import ablation_page
from dice_py.reporting.ablation_page import is_ablation_page, write_ablation_page
from dice_py.reporting.ablation_results import history, measured, seed_texts, signed
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
    assert told["versions"] == "dice 0.2.0, torch 2.13.0"
    arms = page.table("arms, and the settings in which they differ")
    assert arms["both"] == ["length penalty (linear) and replay", "linear", "0.3", "3, 4, 5, 6, 7"]
    assert page.table("settings of all arms") == {"generate.samples": ["8"], "evaluate.prompts": ["200"]}
    (command,) = page.all("pre", "command")
    assert text(command) == (
        "dice ablate --arms neither,length,replay,both --debias linear --rounds 2 --seeds 3,4,5,6,7 --set "
        f"generate.samples=8 --set evaluate.prompts=200 --out {folder}-again"
    )
    assert page.items("warned") == page.items("missing") == []


def test_the_claims(page: Page) -> None:
    claims = page.table("claims")
    assert claims["rounds"][1:] == [
        "both, round 2 − both, round 1", "oracle win rate", "+0.040 (+0.020 to +0.060)",
        "shown: the interval lies above 0",
    ]  # fmt: skip
    assert claims["length"][0] == "with the length penalty − without it (replay in both)"
    assert claims["length"][3:] == ["-0.040 (-0.060 to -0.020)", "refuted: the interval lies below 0"]
    assert claims["replay"][4] == "open: the interval has 0 in it"
    by_seed = page.table("differences by seed")
    assert by_seed["rounds: round 2 − round 1 (both)"] == ["+0.020", "+0.030", "+0.040", "+0.050", "+0.060"]


def test_the_plots_tell_their_numbers(page: Page) -> None:
    results = made_results()
    plots = page.plots("rounds")
    assert list(plots) == PLOTS
    both = results["arms"][3]
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
    (row,) = [made_results()["arms"][1]["rounds"][0]]
    numbers = page.table("arms by round")
    assert list(numbers)[:4] == ["neither, start", "neither, round 1", "neither, round 2", "length, start"]
    found = measured(row["metrics"]["oracle_win_rate"])
    assert found is not None
    assert numbers["length, round 1"][0] == found.text()
    assert numbers["length, start"][-1] == "–"
    assert "distinct 2" in page.table("metrics of length")
    assert list(page.table("mining of length")) == ["alpha", "mean length gap before", "mean length gap after", "pairs"]


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
    assert list(page.plots("rounds")) == PLOTS


def test_many_arms_are_in_several_plots_on_one_scale(tmp_path: Path) -> None:
    page = page_of(many_arms(12), tmp_path)
    plots = page.plots("rounds")
    assert list(plots) == [f"{title} (arms {n})" for title in PLOTS for n in ("1 to 6 of 12", "7 to 12 of 12")]
    assert list(page.plots("frontier")) == [f"{FRONTIER} (arms {n})" for n in ("1 to 6 of 12", "7 to 12 of 12")]
    first, second = (each for each in page.all("figure") if text(each.find("figcaption")).startswith(PLOTS[0]))
    named = [
        [text(label) for label in figure.iter("text") if text(label).startswith("arm-")] for figure in (first, second)
    ]
    assert named == [[f"arm-{n}" for n in range(6)], [f"arm-{n}" for n in range(6, 12)]]
    scales = [
        [text(label) for label in figure.iter("text") if re.match(r"0\.\d", text(label))] for figure in (first, second)
    ]
    assert scales[0] == scales[1] != []
    assert len(page.table("arms by round")) == 12 * 4
    assert (tmp_path / "ablation.html").stat().st_size < 1_000_000


@pytest.mark.parametrize(("arms", "plots"), [(1, [1]), (8, [8]), (9, [5, 4]), (13, [5, 5, 3])])
def test_how_many_plots(monkeypatch: pytest.MonkeyPatch, arms: int, plots: list[int]) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(
        ablation_plots.charts, "svg", lambda _, rows, __: drawn.append(len({r["series"] for r in rows}))
    )
    ablation_plots.by_round(many_arms(arms, (3, 4), 1))
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
    page = page_of(results, tmp_path)
    assert list(page.plots("rounds")) == [PLOTS[0].replace("oracle", "function"), "function score", *PLOTS[3:]]
    assert list(page.plots("frontier")) == ["function score against KL to the start"]
    assert page.items("missing") == []
    (command,) = page.all("pre", "command")
    assert "--set replay.gamma=0.3" in text(command)  # which is not the default of a user's run
    notes = " ".join(map(text, page.all("p", "note")))
    assert "There is nothing to compare" in notes


def test_unfinished_runs_stand_on_top(tmp_path: Path) -> None:
    results = made_results(unfinished=["both/seed-7", "both/seed-6"])
    settings = {"mine.debias": "linear", "replay.gamma": 0.3}
    results["arms"][3] = made_arm("both", "both of them", settings, (3, 4, 5), 2)
    results["contrasts"] = [contrast("length", "x", "both", "replay", value([0.01, 0.02, 0.03]))]
    page = page_of(results, tmp_path)
    assert page.items("warned") == ["both/seed-7", "both/seed-6"]
    assert page.table("arms, and the settings in which they differ")["both"][-1] == "3, 4, 5"
    assert page.table("differences by seed")["length: x"] == ["+0.010", "+0.020", "+0.030", "–", "–"]
    assert page.table("oracle accuracy, by seed")["both, start"][3:] == ["–", "–"]


def test_an_ablation_of_which_no_run_is_complete(tmp_path: Path) -> None:
    results = made_results(contrasts=[], unfinished=["length/seed-3"])
    for arm in results["arms"]:
        arm |= {"seeds": [], "start": {}, "rounds": []}
    page = page_of(results, tmp_path)
    assert "No run is complete yet." in map(text, page.all("p", "note"))
    assert page.plots() == {}


def test_without_an_interval_a_claim_is_open(tmp_path: Path) -> None:
    results = made_results((3,))
    results["contrasts"] = [contrast("length", "x", "both", "replay", value([0.2]), verdict="open")]
    assert page_of(results, tmp_path).table("claims")["length"][3:] == ["+0.200", "open: there is no interval"]


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


# --- commands, numbers, schema, hostile texts ---------------------------------------------------------------------


def test_the_command_has_methods_losses_and_what_a_shell_would_read(tmp_path: Path) -> None:
    results = made_results(settings={"data.prompts": "my prompts; x.jsonl", "train.lora": None})
    more = {"train.method": "sppo", "train.loss": [{"type": "ipo", "weight": 1.0}], "replay.gamma": 0.45}
    results["arms"] = [arm | {"settings": arm["settings"] | more} for arm in results["arms"][2:]]
    (command,) = page_of(results, tmp_path / "my folder").all("pre", "command")
    words = shlex.split(text(command))
    assert words[:4] == ["dice", "ablate", "--arms", "replay,both"]
    options = list(zip(words[2::2], words[3::2], strict=True))
    assert ("--methods", "sppo") in options
    assert ("--losses", "ipo") in options
    assert ("--set", "data.prompts=my prompts; x.jsonl") in options
    assert ("--set", "train.lora=null") in options
    assert ("--set", "replay.gamma=0.45") in options
    assert words[-1] == f"{tmp_path / 'my folder'}-again"


@pytest.mark.parametrize(
    ("entry", "shown", "difference"),
    [
        ({"mean": 0.5432, "ci95": [0.512, 0.5755]}, "0.543 (0.512 to 0.576)", "+0.543 (+0.512 to +0.576)"),
        ({"mean": -0.0001, "ci95": [-0.02, 0.0201]}, "0.000 (-0.020 to 0.020)", "0.000 (-0.020 to +0.020)"),
        ({"mean": 41.52, "ci95": None}, "41.5", "+41.5"),
        ({"mean": 1234.5, "ci95": [1000, 2000]}, "1,234 (1,000 to 2,000)", "+1,234 (+1,000 to +2,000)"),
        ({"mean": 0.00123, "ci95": [None, 1]}, "0.00123", "+0.00123"),
        ({"mean": 0, "ci95": [0, 0]}, "0.000 (0.000 to 0.000)", "0.000 (0.000 to 0.000)"),
    ],
)
def test_values_as_a_person_reads_them(entry: dict[str, Any], shown: str, difference: str) -> None:
    found = measured(entry)
    assert found is not None
    assert (found.text(), found.text(signs=True)) == (shown, difference)


@pytest.mark.parametrize("entry", [None, 0.5, {}, {"mean": None}, {"mean": float("nan")}, {"mean": True}])
def test_what_is_no_value(entry: Any) -> None:
    assert measured(entry) is None


def test_values_by_seed() -> None:
    found = measured({"mean": 0.5, "ci95": None, "by_seed": [0.4, None, 0.6]})
    assert seed_texts(found, [3, 5, 7], [3, 4, 5, 6, 7]) == ["0.400", "–", "–", "–", "0.600"]
    assert seed_texts(found, [3, 5], [3, 5]) == ["–", "–"]  # whose they are is not known
    assert signed(-0.0) == "0.000"


def test_a_start_that_is_known_by_definition() -> None:
    arm = made_arm("both", "", {}, (3, 4), 1)
    assert history(arm, "oracle_win_rate")[0].mean == 0.5
    assert history(arm, "kl_to_start")[0].mean == 0
    assert history(arm, "oracle_accuracy")[0].mean == arm["start"]["oracle_accuracy"]["mean"]
    assert list(history(arm, "distinct_2")) == [1]
    assert history(arm, "other_win_rate") == {}  # nothing is known of it: there is no start of it either


def test_charts_are_as_vega_lites_schema_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unchecked = write_ablation_page(made_results(), tmp_path / "ablation.html").read_bytes()
    monkeypatch.setattr(ablation_page, "unchecked", nullcontext)
    assert write_ablation_page(made_results(), tmp_path / "ablation.html").read_bytes() == unchecked


def test_hostile_names_are_shown_and_never_obeyed(tmp_path: Path) -> None:
    settings = {"mine.debias": "none", "replay.gamma": 0.3}
    names = [in_a_path(HOSTILE[name]) for name in ("html", "textarea", "escape", "surrogate", "bidirectional")]
    arms = [made_arm(name, f"{name}, a label", settings, (3, 4), 1) for name in [*names, "x" * 300, "x" * 299 + "y"]]
    texts = [contrast(text, text, names[0], names[1], value([0.1, 0.2])) for text in HOSTILE.values()]
    results = made_results((3, 4), 1, arms=arms, contrasts=texts, unfinished=list(HOSTILE.values()))
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
    page = page_of(made_results((3,), arms=[made_arm(name, "", {}, (3,), 1)], contrasts=[]), tmp_path)
    assert [link.get("href") for link in page.all("a") if not link.get("href", "").startswith("#")] == []
