"""`dice report`: one run, several, and files and folders that are none of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import contents
from report_page import Page, text
from reported_runs import reported_run

from dice_py.reporting.html import is_report

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take most of the time, and have tests of their own."""
    monkeypatch.setattr("dice_py.reporting.html.cannot_draw", lambda: "plots are left out here")


def test_one_run(dice) -> None:
    run = reported_run(Path("runs/mine"), 1)
    code, out, err = dice("report", run)
    assert (code, err) == (0, "")
    assert out == f"report: {run}/report.html\n"
    assert is_report(run / "report.html")
    # Again, over the page that is there, and beside it.
    assert dice("report", run)[0] == 0
    code, out, _ = dice("report", run, "-o", "page.html", "--no-pairs", "--json")
    assert (code, json.loads(out)) == (0, {"report": "page.html", "runs": [str(run)]})
    notes = [text(note) for note in Page(Path("page.html")).all("p", "note")]
    assert "The pairs were left out (--no-pairs)." in notes


def test_several_runs_come_into_this_folder(dice) -> None:
    runs = [reported_run(Path("runs") / name, 1) for name in ("a", "b")]
    assert dice("report", *runs)[1] == "report: report.html\n"
    assert text(Page(Path("report.html")).all("title")[0]) == "DICE runs a, b"
    assert dice("report", *runs)[0] == 0
    assert not (runs[0] / "report.html").exists()
    # Equal names are told apart by their paths.
    other = reported_run(Path("elsewhere/a"), 1)
    assert dice("report", runs[0], other)[0] == 0
    assert text(Page(Path("report.html")).all("title")[0]) == "DICE runs runs/a, elsewhere/a"


def test_a_file_of_the_users_own_is_not_replaced(refused) -> None:
    runs = [reported_run(Path("runs") / name, 1) for name in ("a", "b")]
    Path("report.html").write_text("<h1>My thesis</h1>")
    before = contents(Path())
    assert "report.html is there, and is no page of dice" in refused(2, "report", *runs)
    assert "report.html is there" in refused(2, "report", runs[0], "-o", "report.html")
    assert "manifest.json is there" in refused(2, "report", runs[0], "-o", runs[0] / "manifest.json")
    assert "is a folder" in refused(2, "report", runs[0], "-o", "runs")
    assert contents(Path()) == before


def test_what_is_no_run(refused) -> None:
    Path("empty").mkdir()
    assert "empty holds no run (no config.yaml)" in refused(2, "report", "empty")
    assert "absent holds no run" in refused(2, "report", "absent")
    run = reported_run(Path("runs/a"), 1)
    assert "is given twice" in refused(2, "report", run, Path("runs/../runs/a"))
    runs = [reported_run(Path(f"runs/{n}"), 1) for n in range(9)]
    assert "9 runs are more than a plot can tell apart: compare at most 8" in refused(2, "report", *runs)
    assert not Path("report.html").exists()
