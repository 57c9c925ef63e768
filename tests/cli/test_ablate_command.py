"""`dice ablate`: what its options make of the config, and what it prints. The runs are not made here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_ablations import made_results

from dice_py.ablation.run import Ablation
from dice_py.errors import DataError

Dice = Callable[..., tuple[int, str, str]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, empty_folder: Path) -> list[tuple[Ablation, Path, dict[str, Any]]]:
    """The ablations that are asked for. Each has made-up results."""
    calls: list[tuple[Ablation, Path, dict[str, Any]]] = []

    def run(ablation: Ablation, out: Path, report: object, **options: Any) -> dict[str, Any]:
        calls.append((ablation, out, options))
        out.mkdir(parents=True)
        results = made_results()
        options["publish"](results)
        return results

    monkeypatch.setattr("dice_py.ablation.run.run_ablation", run)
    return calls


def test_the_defaults(dice: Dice, asked: list[tuple[Ablation, Path, dict[str, Any]]]) -> None:
    code, printed, err = dice("ablate")
    assert code == 0, err
    ((ablation, out, options),) = asked
    assert [arm.name for arm in ablation.arms] == ["neither", "length", "replay", "both"]
    assert (ablation.seeds, ablation.config.rounds.count, ablation.jobs) == ((3, 4, 5, 6, 7), 2, None)
    assert (out, options["force"], options["change"]) == (Path("runs/ablation"), False, False)
    assert "page:    runs/ablation/ablation.html" in printed
    assert (out / "ablation.html").stat().st_size > 10_000


def test_json_is_alone_on_stdout(dice: Dice, asked: list[tuple[Ablation, Path, dict[str, Any]]]) -> None:
    code, printed, _ = dice("ablate", "--json", "--out", "mine")
    assert code == 0
    assert json.loads(printed) == json.loads(json.dumps(made_results()))
    assert (asked[0][1] / "ablation.html").exists()


@pytest.mark.parametrize(("options", "rounds"), [((), 5), (("--rounds", "1"), 1)])
def test_rounds_of_a_config_file(
    options: tuple[str, ...], rounds: int, dice: Dice, asked: list[tuple[Ablation, Path, dict[str, Any]]]
) -> None:
    Path("run.yaml").write_text("rounds: 5\n")
    assert dice("ablate", "-c", "run.yaml", *options)[0] == 0
    assert asked[0][0].config.rounds.count == rounds


def test_the_page_is_there_when_a_run_failed(dice: Dice, monkeypatch: pytest.MonkeyPatch, empty_folder: Path) -> None:
    def run(ablation: Ablation, out: Path, report: object, **options: Any) -> dict[str, Any]:
        out.mkdir(parents=True)
        options["publish"](made_results(unfinished=[("both", 3)]))
        raise DataError("both/seed-3: no pairs")

    monkeypatch.setattr("dice_py.ablation.run.run_ablation", run)
    code, printed, err = dice("ablate", "--json", "-o", "mine")
    assert (code, printed) == (3, "")
    assert "both/seed-3: no pairs" in err
    assert "both/seed-3" in Path("mine/ablation.html").read_text()
