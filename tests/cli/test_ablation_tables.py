"""An ablation in the terminal: the arms by round, the claims, and what is missing."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hostile_texts import HOSTILE, obeyed
from made_ablations import arms_called, made_results, many_arms

from cli.ablation_tables import print_ablation
from dice_py.errors import DataError


def printed(results: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines, with two blanks or more between cells as one bar."""
    print_ablation(results)
    return [re.sub("  +", "|", line) for line in capsys.readouterr().out.splitlines()]


def test_four_arms_and_two_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    print_ablation(made_results())
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[0] == "4 arms, 5 seeds"
    assert re.split("  +", lines[1]) == ["arm", "round", "oracle win rate", "oracle accuracy", "tokens", "KL to start"]
    assert [tuple(line.split()[:2]) for line in lines[2:14]] == [
        (arm, place) for arm in ("neither", "length", "replay", "both") for place in ("start", "1", "2")
    ]
    interval = r"\d\.\d{3} \(\d\.\d{3} to \d\.\d{3}\)"
    short = interval.replace("{3}", "{2}")
    assert re.fullmatch(rf"neither +1 +{interval} +{interval} +{short} +{short}", lines[3])
    start = made_results()["arms"][0]["start"]["oracle_accuracy"]["mean"]
    assert re.fullmatch(rf"neither +start +0\.500 +{start:.3f} \(.* to .*\) +\d\.\d\d \(.*\) +0\.00", lines[2])


def test_the_claims(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(made_results(), capsys)
    at = lines.index("differences of oracle win rate")
    assert lines[at + 1] == "claim|arm|round|difference|verdict"
    assert [line.split("|")[0] for line in lines[at + 2 : at + 18]] == ["rounds"] * 8 + ["length"] * 4 + ["replay"] * 4
    interval = r"\+0\.\d{3} \(\+0\.\d{3} to \+0\.\d{3}\)"
    text = re.escape("with the length penalty − without it (replay in both)")
    assert re.fullmatch(rf"length\|{text}\|both\|2\|{interval}\|shown", lines[at + 13])
    assert lines[at + 14].endswith("|open")
    at = lines.index("differences of tokens")
    assert [line.split("|")[0] for line in lines[at + 2 : at + 6]] == ["length"] * 4
    assert lines[at + 6 :] == [
        "",
        "in brackets: 95 % intervals over seeds (Student's t)",
        "claims: within each seed; shown: the complete interval lies on the claim's side of 0; refuted: on the other",
        "8 min 32 s on 2 processor cores, made up",
    ]


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    results = made_results((3,), contrasts=[], unfinished=[("both", 3), ("replay", 3)])
    results |= {"failures": {"both/seed-3": "no pairs"}, "gaps": ["length/seed-3, round 1: openai_win_rate"]}
    for arm in results["arms"]:
        for each in arm["rounds"]:
            del each["metrics"]["oracle_accuracy"], each["metrics"]["kl_to_start"]
    lines = printed(results, capsys)
    assert lines[0] == "4 arms, 1 seed"
    assert lines[1] == "arm|round|oracle win rate|oracle score|tokens|reward on own samples"
    assert {line.split("|")[0] for line in lines[2:8]} == {"neither", "length"}
    assert lines[-6:-1] == [
        "in brackets: 95 % intervals over the prompts of one seed: they do not tell what another seed would give",
        "not measured: KL to the start",
        "length/seed-3, round 1: openai_win_rate: not measured in this run, and so missing from its arm",
        "not complete, and counted nowhere: both/seed-3: no pairs",
        "not complete, and counted nowhere: replay/seed-3",
    ]


def test_many_arms(capsys: pytest.CaptureFixture[str]) -> None:
    results = many_arms()
    lines = printed(results, capsys)
    assert [line.split("|")[0] for line in lines[2:50]] == [arm["arm"] for arm in results["arms"] for _ in range(4)]


def test_hostile_names(capsys: pytest.CaptureFixture[str]) -> None:
    results = made_results((3, 4), 1, arms=arms_called(list(HOSTILE.values())))
    for each, text in zip(results["contrasts"], HOSTILE.values(), strict=False):
        each |= {"claim": text, "text": text, "verdict": text}
    results |= {"unfinished": list(HOSTILE.values()), "machine": HOSTILE["escape"]}
    print_ablation(results)
    assert obeyed(capsys.readouterr().out) == []


def test_another_version_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"is of version None, and this dice reads version 1: repeat `dice ablate`"):
        print_ablation({})
    assert capsys.readouterr().out == ""
