"""An ablation in the terminal: the arms by round, the claims, and what is missing."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hostile_texts import HOSTILE, obeyed
from made_ablations import contrast, made_arm, made_results, many_arms, value

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
    at = lines.index("claims, as differences of oracle win rate")
    assert lines[at + 1 :] == [
        "claim|round|difference|verdict",
        "rounds|round 2 − round 1 (both)|2|+0.040 (+0.020 to +0.060)|shown",
        "length|with the length penalty − without it (replay in both)|2|-0.040 (-0.060 to -0.020)|refuted",
        "replay|with replay − without it (the length penalty in both)|2|+0.008 (-0.050 to +0.066)|open",
        "",
        "in brackets: 95 % intervals over seeds (Student's t)",
        "claims: within each seed; shown: the complete interval lies above 0; refuted: below 0; open: neither",
        "8 min 32 s on 2 cores, a processor",
    ]


def test_claims_of_several_metrics_name_them(capsys: pytest.CaptureFixture[str]) -> None:
    more = contrast("length", "longer", "both", "replay", value([1.0, 1.5]), metric="mean_response_tokens")
    lines = printed(made_results(contrasts=[*made_results()["contrasts"][:1], more]), capsys)
    assert "claims, as differences of oracle win rate and tokens" in lines
    assert "length|longer|tokens|2|+1.25 (-1.93 to +4.43)|open" in lines


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    results = made_results((3,), contrasts=[], unfinished=["both/seed-4", "both/seed-5"])
    for arm in results["arms"]:
        for each in arm["rounds"]:
            del each["metrics"]["oracle_accuracy"], each["metrics"]["kl_to_start"]
    lines = printed(results, capsys)
    assert lines[0] == "4 arms, 1 seed"
    assert lines[1] == "arm|round|oracle win rate|oracle score|tokens|reward on own samples"
    assert lines[-4:-1] == [
        "in brackets: 95 % intervals over the prompts of one seed: they do not tell what another seed would give",
        "not measured: KL to the start",
        "not complete, and counted nowhere: both/seed-4, both/seed-5; repeat the command to go on",
    ]


def test_many_arms(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(many_arms(12), capsys)
    assert [line.split("|")[0] for line in lines[2:50]] == [f"arm-{n}" for n in range(12) for _ in range(4)]


def test_hostile_names(capsys: pytest.CaptureFixture[str]) -> None:
    arms = [made_arm(name, name, {}, (3, 4), 1) for name in HOSTILE.values()]
    texts = [contrast(name, name, name, name, value([0.1, 0.2])) for name in HOSTILE.values()]
    print_ablation(made_results((3, 4), 1, arms=arms, contrasts=texts, unfinished=list(HOSTILE.values())))
    assert obeyed(capsys.readouterr().out) == []


def test_another_version_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"is of version None, and this dice reads version 1: repeat `dice ablate`"):
        print_ablation({})
    assert capsys.readouterr().out == ""
