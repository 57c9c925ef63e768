"""Warnings about a stage's result: of made counts, of tiny artifacts, in a run and its report, and of a stage alone."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from faked_stages import CUT_OFF, faked_stages, no_evaluation
from own_run import SAMPLES, Events
from report_page import Page

from dice_py.compute import stage_process
from dice_py.config.rounds import WarningsConfig
from dice_py.config.run import RunConfig
from dice_py.errors import DamagedError
from dice_py.mining.pairs import mine_pairs
from dice_py.reporting.html import write_report
from dice_py.runs import loop
from dice_py.runs.warnings import StageWarning, mining_warnings, stage_warnings
from dice_py.stages.evaluate import EvaluateJob
from dice_py.stages.job import StageResult
from dice_py.stages.registry import ROUND_STAGES
from dice_py.storage.files import Manifest
from dice_py.storage.parquet import write_parquet
from dice_py.storage.schemas import GENERATIONS, SCORES

LIMITS = WarningsConfig()


def warned(
    stage: str, counts: dict[str, Any], files: Sequence[Path] = (), limits: WarningsConfig = LIMITS, **job: Any
) -> dict[str, StageWarning]:
    """The warnings by name."""
    result = StageResult([(file, "key") for file in files], counts)
    found = stage_warnings(stage, SimpleNamespace(**job), result, limits)
    return {warning.name: warning for warning in found}


def shard(path: Path, token_ids: list[list[int]], samples: int) -> Path:
    rows = [
        (n // samples, n % samples, [1], ids, "x", len(ids), 1, "stop", 0.0) for n, ids in enumerate(token_ids)
    ]  # fmt: skip
    return write_parquet(path, pl.DataFrame(rows, schema=GENERATIONS, orient="row"), key="k")


SAMPLING = SimpleNamespace(max_new_tokens=96)


@pytest.mark.parametrize(("cut_off", "warns"), [(421, True), (53, True), (52, False), (0, False)])
def test_cut_off_responses(cut_off: int, warns: bool) -> None:
    # The run of the issue: 421 of 520.
    found = warned("generate", {"responses": 520, "cut_off": cut_off}, config=SAMPLING)
    assert ("cut_off_share" in found) is warns
    if warns:
        warning = found["cut_off_share"]
        assert (warning.value, warning.limit) == (cut_off / 520, 0.1)
        assert warning.text.startswith(f"{cut_off} of 520 responses ({cut_off / 520:.0%}) were cut off at generate.max")
        assert "max_new_tokens=96" in warning.text
        assert "raise generate.max_new_tokens" in warning.text


def test_repeated_responses_of_a_prompt(tmp_path: Path) -> None:
    # Of four: all different; two equal; all equal. Equal ones of two prompts are no repetition.
    first = shard(tmp_path / "0.parquet", [[1], [2], [3], [1, 2], [1], [1], [2], [3]], 4)
    second = shard(tmp_path / "1.parquet", [[5, 5]] * 4, 4)
    found = warned("generate", {"responses": 12}, [first, second], config=SAMPLING)
    assert list(found) == ["duplicate_share"]
    assert found["duplicate_share"].value == (0 + 1 + 3) / 12
    assert "raise generate.temperature" in found["duplicate_share"].text
    assert warned("generate", {"responses": 8}, [first], config=SAMPLING) == {}
    # Of equal lengths, but not equal.
    third = shard(tmp_path / "2.parquet", [[5, 5], [5, 6], [6, 5], [6, 6]], 4)
    assert warned("generate", {"responses": 4}, [third], config=SAMPLING) == {}
    second.unlink()
    off = WarningsConfig(duplicate_share=None)  # the shards are not even read
    assert warned("generate", {"responses": 12}, [first, second], off, config=SAMPLING) == {}


def scores(path: Path, logp: list[float], ref_logp: list[float]) -> Path:
    frame = pl.DataFrame({"logp": logp, "ref_logp": ref_logp, "reward": [0.0] * len(logp)}, schema=SCORES)
    return write_parquet(path, frame, key="k")


def test_rewards_near_rounding(tmp_path: Path) -> None:
    files = [
        scores(tmp_path / "scores-00000.parquet", [-30.0, -60.0], [-40.0, -50.0]),
        scores(tmp_path / "scores-00001.parquet", [-80.0, math.nan], [-10.0, -1.0]),
    ]
    size = math.sqrt((30**2 + 40**2 + 60**2 + 50**2 + 80**2 + 10**2) / 3)

    def share(dtype: str, spread: float, **gate: float) -> float | None:
        limits = WarningsConfig(rounding_share=1e-9)
        counts = {"reward_std": spread, "dtype": dtype, "policy_logps_gate": gate or None}
        found = warned("score", counts, [*files, tmp_path / "gate.json"], limits, beta=0.5)
        return found["rounding_share"].value if found else None

    assert share("bfloat16", 0.25) == pytest.approx(0.5 * 2**-8 * size / 0.25)
    assert share("float16", 0.25) == pytest.approx(0.5 * 2**-11 * size / 0.25)
    assert share("float32", 0.25) == pytest.approx(0.5 * 2**-24 * size / 0.25)
    # The gate's difference counts where it is larger.
    assert share("float32", 0.25, share=0.125) == 0.125
    assert share("bfloat16", 0.25, share=0.125) == pytest.approx(0.5 * 2**-8 * size / 0.25)
    assert share("float32", 0.0) == 1.0
    # At the default limit, the same spread is enough in float32 and not in bfloat16.
    counts = {"reward_std": 0.25, "policy_logps_gate": None}
    assert warned("score", counts | {"dtype": "float32"}, files, beta=0.5) == {}
    text = warned("score", counts | {"dtype": "bfloat16"}, files, beta=0.5)["rounding_share"].text
    assert "standard deviation is 0.25, and rounding in bfloat16 leaves 0.14" in text
    assert "model.dtype=float32" in text


def test_scores_of_an_earlier_version_have_no_dtype(tmp_path: Path) -> None:
    lost = [tmp_path / "scores-00000.parquet"]
    assert warned("score", {"reward_std": 0.25}, lost, beta=0.5) == {}
    gate = {"reward_std": 0.25, "policy_logps_gate": {"share": 0.5}}
    assert warned("score", gate, lost, beta=0.5)["rounding_share"].value == 0.5
    assert warned("score", {"reward_std": None, "dtype": "float32"}, lost, beta=0.5) == {}


MINED: dict[str, Any] = {
    "prompts": 65,
    "dropped": {"truncated": 421, "too_short": 2, "too_few_responses": 30},
    "dropped_prompts": {"too_few_responses": 38, "tied": 0},
    "reward_length_correlation_before": 0.9,
    "reward_length_correlation_after": -0.45,
}


def test_prompts_without_a_pair_and_the_length_that_is_left() -> None:
    found = {warning.name: warning for warning in mining_warnings(MINED, "linear", LIMITS)}
    assert (found["no_pair_share"].value, found["length_correlation"].value) == (38 / 65, 0.45)
    assert found["no_pair_share"].text == (
        "38 of 65 prompts (58%) give no pair, most of them since too few responses are usable (421 were cut off: raise "
        "generate.max_new_tokens)"
    )
    assert "(-0.45; +0.90 before)" in found["length_correlation"].text
    assert found == warned("mine", MINED | {"debias": "linear"})
    quiet = MINED | {"dropped_prompts": {"tied": 13}, "reward_length_correlation_after": 0.2}
    assert mining_warnings(quiet, "linear", LIMITS) == []  # a limit is allowed
    assert mining_warnings(MINED, "linear", WarningsConfig(no_pair_share=None, length_correlation=None)) == []


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"dropped_prompts": {"tied": 40}}, "raise generate.temperature"),
        ({"dropped_prompts": {"no_match": 40}}, "length_tolerance"),
        ({"dropped_prompts": {"no_contrast": 40}}, "chosen_from"),
        ({"dropped": {"truncated": 0, "duplicate": 9}}, "9 repeat another one: raise generate.temperature"),
        ({"dropped": {"truncated": 0, "too_few_responses": 30}}, "raise generate.samples"),
        ({"dropped": {"not_finite": 9}}, "9 have a reward that is not finite"),
    ],
)
def test_the_remedy_follows_from_the_reason(changes: dict[str, Any], remedy: str) -> None:
    (warning, *_) = mining_warnings(MINED | changes, "none", LIMITS)
    assert remedy in warning.text


def test_what_the_miner_counts_is_what_is_warned_of() -> None:
    # Of ten prompts, four have one usable response; rewards are lengths.
    rows = [(p, float(n), 5 * n, "length" if p < 4 and n else "stop") for p in range(10) for n in range(3)]
    frame = pl.DataFrame(rows, schema=["prompt_id", "reward", "response_tokens", "finish_reason"], orient="row")
    summary = mine_pairs(frame, debias="none", min_length=None).summary()
    found = {warning.name: warning for warning in mining_warnings(summary, "none", LIMITS)}
    assert found["no_pair_share"].value == 0.4
    assert "(8 were cut off: raise generate.max_new_tokens)" in found["no_pair_share"].text
    assert found["length_correlation"].value == pytest.approx(1.0)
    assert "Try debias linear" in found["length_correlation"].text


def test_a_replay_shortfall() -> None:
    counts = {"mined": 100, "replay": 60, "shortfall": {"mined": 0, "replay": 38}}
    found = warned("replay", counts)["replay_shortfall"]
    assert found.value == 38 / 98
    assert found.text.startswith("38 of 98 replay pairs (39%) could not be had: give more offline pairs")
    # Pairs that were drawn and could not be tokenized are lacking too.
    assert warned("replay", counts | {"left_out": 2})["replay_shortfall"].value == 40 / 100
    assert warned("replay", {"mined": 9, "replay": 97, "shortfall": {"mined": 3, "replay": 3}}) == {}
    assert warned("replay", {"mined": 9, "replay": 0, "shortfall": {"mined": 3, "replay": 0}}) == {}


def test_chosen_log_probabilities_that_fall() -> None:
    # From -60 to -75 nats.
    found = warned("train", {"final_chosen_logps": -75.0, "final_chosen_change": -15.0})["chosen_logps_fall"]
    assert found.value == pytest.approx(15 / 60)
    assert "fell by 25% (-60 to -75 nats a response)" in found.text
    assert "train.sft_weight" in found.text
    assert warned("train", {"final_chosen_logps": -75.0, "final_chosen_change": 15.0}) == {}
    assert warned("train", {"final_chosen_logps": -63.0, "final_chosen_change": -3.0}) == {}
    assert warned("train", {"final_loss": 0.3}) == {}  # of an earlier version
    assert warned("evaluate", {"cut_off_share": 1.0}) == {}


# --- in a run -------------------------------------------------------------------------------------------------


def of_run(events: Events) -> list[tuple[str, str]]:
    return [(fields["stage"], fields["name"]) for event, fields in events.events if event == "warning"]


def test_a_run_warns_once_and_its_report_lists_it(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dice
) -> None:
    faked_stages(monkeypatch)
    folder, events = tmp_path / "run", Events()
    loop.run(config, folder, events, after_round=write_report)
    expected = [("generate", "cut_off_share"), ("mine", "length_correlation")]
    assert of_run(events) == expected
    (first, _) = [
        json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines() if '"warning"' in line
    ]
    assert first.keys() == {"time", "event", "round", "stage", "name", "value", "limit", "text"}
    share = len(CUT_OFF) / (3 * SAMPLES)
    assert (first["round"], first["stage"], first["value"], first["limit"]) == (1, "generate", share, 0.1)

    def listed() -> list[str]:
        return Page(folder / "report.html").items("warned")

    assert [item.partition(": ")[0] for item in listed()] == ["round-01, generate", "round-01, mine"]
    assert listed()[0].startswith("round-01, generate: 2 of 12 responses (17%) were cut off")
    # A resume says it again, once, and the report has it once.
    events = Events()
    loop.resume(folder, events, after_round=write_report)
    assert of_run(events) == expected
    assert {status for _, status in events.stages()} == {"kept"}
    assert len(listed()) == 2
    # Limits change no key. The report follows them.
    code, out, err = dice("resume", folder, "--json", "--set", "warnings.cut_off_share=none")
    assert code == 0, err
    assert json.loads(out)["metrics"] == {"round-01": {}}
    assert sum(line.startswith("  warning: with debias linear, score and length") for line in err.splitlines()) == 1
    assert " made again" not in err
    assert len(listed()) == 1
    assert Manifest(folder / "manifest.json").data["stages"]["round-01/generate"]["warnings"] == []


def test_rounds_that_begin_again_in_one_session_warn_once(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[Path] = []

    def evaluation(job: EvaluateJob) -> StageResult:
        if not met:
            met.append(job.policy)
            raise DamagedError("a file of the run is damaged")
        return no_evaluation(job)

    faked_stages(monkeypatch, evaluation)
    events = Events()
    loop.run(config, tmp_path / "run", events)
    assert [stage for stage, status in events.stages() if status == "kept"] == [
        f"round-01/{name}" for name in ROUND_STAGES[:-1]
    ]
    assert of_run(events) == [("generate", "cut_off_share"), ("mine", "length_correlation")]


# --- a stage alone --------------------------------------------------------------------------------------------


def test_a_stage_alone_warns_on_stderr(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dice) -> None:
    def sampled(work: Any, **_: Any) -> StageResult:
        file = shard(tmp_path / "generations-00000.parquet", [[1], [1]], 2)
        return StageResult([(file, "k")], {"responses": 2, "cut_off": 1})

    monkeypatch.setattr(stage_process, "run_in_subprocess", sampled)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    command = ["generate", "--policy", llama, "--prompts", tmp_path / "prompts.jsonl", "-o", tmp_path / "out", "--json"]
    code, out, err = dice(*command)
    assert code == 0, err
    assert json.loads(out)["cut_off"] == 1
    assert [line.split(" (")[0] for line in err.splitlines() if line.startswith("warning: ")] == [
        "warning: 1 of 2 responses",
        "warning: 1 of 2 responses",
    ]
    code, out, err = dice(*command, "--set", "warnings.cut_off_share=0.5", "--set", "warnings.duplicate_share=")
    assert (code, "warning: " in err) == (0, False)


def test_dice_mine_warns_on_stderr(tmp_path: Path, dice) -> None:
    rows = [(p, float(n), 5 + 5 * n) for p in range(10) for n in range(3)]
    frame = pl.DataFrame(rows, schema=["prompt_id", "reward", "response_tokens"], orient="row")
    frame.write_parquet(tmp_path / "scored.parquet")
    command = ["mine", tmp_path / "scored.parquet", "-o", tmp_path / "pairs.parquet", "--debias", "none", "--json"]
    code, out, err = dice(*command)
    assert (code, json.loads(out)["pairs"]) == (0, 10)
    assert err.startswith("warning: with debias none, score and length are still correlated (+1.00; +1.00 before)")
