"""`dice audit` on the synthetic world, whose oracle labels the held-out pairs, in processes of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from dice_py.synthetic.task import oracle

pytestmark = pytest.mark.slow

Dice = Callable[..., tuple[int, str, str]]


@pytest.fixture
def world(dice: Dice) -> Path:
    """The default world, which other slow tests make too."""
    code, text, err = dice("world", "--json")
    assert code == 0, err
    return Path(json.loads(text)["folder"])


def test_a_dpo_tuned_policy_is_usable_and_its_swap_is_not(dice: Dice, world: Path, tmp_path: Path) -> None:
    policy, sft = world / "policy" / "model", world / "sft"
    pairs = world / "eval_pairs.parquet"
    code, text, err = dice("audit", pairs, "--policy", policy, "--reference", sft, "--beta", 1, "--json")
    assert code == 0, err
    figures = json.loads(text)
    assert figures["verdict"] == "usable"
    by_name = {entry["choice"]: entry["metrics"] for entry in figures["choices"]}
    plain, penalized = (by_name[f"previous, {form}"] for form in ("sum", "penalized"))
    assert plain["accuracy"]["value"] > 0.75
    assert penalized["length_balanced_accuracy"]["value"] > plain["length_balanced_accuracy"]["value"]
    assert penalized["accuracy_over_length"]["ci95"][0] > 0.1
    length = figures["length_alone"]["metrics"]["length_balanced_accuracy"]
    assert length["value"] == 0.5
    code, text, err = dice("audit", pairs, "--policy", sft, "--reference", policy, "--beta", 1, "--json")
    assert code == 0, err
    swapped = json.loads(text)
    assert swapped["verdict"] == "at chance"
    assert "swapped" in swapped["reason"]
    # The same answers as a verifiable set: the oracle says right or wrong.
    rows = []
    for prompt, chosen, rejected in pl.read_parquet(pairs).select("prompt", "chosen", "rejected").iter_rows():
        for answer in (chosen, rejected):
            rows.append({"prompt": prompt, "response": answer, "score": oracle(prompt, answer[0]["content"])[0]})
    pl.DataFrame(rows).write_parquet(tmp_path / "scored.parquet")
    arguments = ("--policy", policy, "--reference", sft, "--beta", 1, "--out", tmp_path / "out", "--json")
    code, text, err = dice("audit", tmp_path / "scored.parquet", *arguments)
    assert code == 0, err
    scored = json.loads(text)
    of_sets = {entry["choice"]: entry for entry in scored["choices"]}["previous, sum"]
    assert of_sets["metrics"]["accuracy"]["value"] == pytest.approx(plain["accuracy"]["value"], abs=0.02)
    assert of_sets["metrics"]["end_score"]["value"] > of_sets["curve"][0]
