"""The gate: the policy's log-probabilities that came with the samples are taken where they are the scorer's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tiny_stage import BETA, KEYS, Stage

from dice_py.errors import DataError
from dice_py.scoring import scorer as logps
from dice_py.scoring import shards
from dice_py.scoring.gate import gate_rows
from dice_py.scoring.shards import Columns, Shard
from dice_py.stages import score as stage
from dice_py.storage.files import read_sealed
from dice_py.storage.keys import digest
from dice_py.storage.parquet import parquet_key, write_parquet

pytestmark = pytest.mark.usefixtures("release_models")

SAMPLED = (True, True)


@pytest.fixture(scope="module")
def own(llama: Path, other: Path, tmp_path_factory: pytest.TempPathFactory) -> list[pl.DataFrame]:
    """The scores of the two shards, all scored."""
    run = Stage(llama, other, tmp_path_factory.mktemp("own"))
    run()
    return run.scores()


@pytest.fixture
def run(llama: Path, other: Path, own: list[pl.DataFrame], tmp_path: Path) -> Stage:
    """With the log-probabilities that the scorer itself gives."""
    run = Stage(llama, other, tmp_path)
    run.came_with(*(frame["logp"].to_list() for frame in own))
    return run


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(model folder's name, responses) of every call of the scorer."""
    calls: list[tuple[str, int]] = []
    real = logps.Scorer.sums

    def sums(scorer: Any, prompts: Any, responses: Any, *rest: Any) -> list[float]:
        calls.append((Path(scorer.model.name_or_path).name, len(responses)))
        return real(scorer, prompts, responses, *rest)

    monkeypatch.setattr(logps.Scorer, "sums", sums)
    return calls


def off_by(run: Stage, nats: float) -> None:
    """The log-probabilities that came are off by so much, one way and the other."""
    sign = np.array([1, -1, 1, -1, 1])
    run.came_with(*(frame["sampled_logp"].to_numpy() + nats * sign[: frame.height] for frame in run.frames))


def scored_rewards(own: list[pl.DataFrame]) -> np.ndarray:
    """Of the responses that have tokens."""
    return np.concatenate([own[0]["reward"].to_numpy()[[0, 1, 2, 4]], own[1]["reward"].to_numpy()]).astype(np.float64)


REFERENCE_PASS = [("other", 4), ("other", 4)]
GATE_OF_ALL = [("llama", 4), ("llama", 4)]
POLICY_PASS = [("llama", 4), ("llama", 4)]


# --- it passes ----------------------------------------------------------------------------------------------


def test_passes_with_the_scorers_own(run: Stage, own: list[pl.DataFrame], forwards: list[tuple[str, int]]) -> None:
    made = run(sampled=SAMPLED, config={"gate_responses": 3})
    assert made.files == [*run.files, run.gate_file]
    assert made.gate is not None
    assert made.gate["passed"] is True
    assert made.gate["responses"] == 3
    assert forwards[:2] == REFERENCE_PASS
    assert sum(count for _, count in forwards[2:]) == 3  # the gate, and no pass of the policy
    assert {name for name, _ in forwards[2:]} == {"llama"}
    for scores, frame, want in zip(run.scores(), run.frames, own, strict=True):
        assert scores["logp"].equals(frame["sampled_logp"].alias("logp"))
        assert scores["ref_logp"].equals(want["ref_logp"])
        difference = frame["sampled_logp"].to_numpy().astype(np.float64) - want["ref_logp"].to_numpy()
        np.testing.assert_allclose(scores["reward"].to_numpy(), BETA * difference, atol=1e-4)
        np.testing.assert_allclose(scores["reward"].to_numpy(), want["reward"].to_numpy(), atol=1e-4)
    assert [parquet_key(file) for file in run.files] == KEYS
    assert sorted(run.out.iterdir()) == [run.gate_file, *run.files]
    (note,) = run.of("note", "text")
    assert note.startswith("the policy's log-probabilities are those that came with the samples")
    assert run.of("progress", "done")[-1] == run.of("progress", "total")[-1] == 2 * 9
    assert run.of("shard", "file") == [file.name for file in run.files]


def test_what_came_is_what_is_written(run: Stage) -> None:
    """Not what was scored, though within the tolerance."""
    off_by(run, 0.001)
    made = run(sampled=SAMPLED)
    assert made.gate is not None
    assert made.gate["passed"] is True
    for scores, frame in zip(run.scores(), run.frames, strict=True):
        assert scores["logp"].equals(frame["sampled_logp"].alias("logp"))


def test_figures(run: Stage, own: list[pl.DataFrame]) -> None:
    off_by(run, 0.5)
    gate = run(sampled=SAMPLED).gate
    assert gate is not None
    spread = scored_rewards(own).std()
    assert gate == {
        "responses": 8,
        "mean_abs_difference": pytest.approx(BETA * 0.5, rel=1e-4),
        "max_abs_difference": pytest.approx(BETA * 0.5, rel=1e-4),
        "reward_std": pytest.approx(spread, rel=1e-4),
        "share": pytest.approx(BETA * 0.5 / spread, rel=1e-4),
        "tolerance": 0.01,
        "passed": False,
    }
    stored = json.loads(run.gate_file.read_text())
    assert stored["gate"] == gate


@pytest.mark.parametrize(("factor", "passed"), [(1.02, True), (0.98, False)])
def test_the_tolerance_is_a_share_of_the_spread(
    run: Stage, own: list[pl.DataFrame], factor: float, passed: bool
) -> None:
    off_by(run, 0.5)
    share = BETA * 0.5 / scored_rewards(own).std()
    gate = run(sampled=SAMPLED, config={"gate_tolerance": factor * share}).gate
    assert gate is not None
    assert gate["passed"] is passed


# --- it fails -----------------------------------------------------------------------------------------------


def check_all_were_scored(run: Stage, own: list[pl.DataFrame], forwards: list[tuple[str, int]]) -> None:
    assert forwards == [*REFERENCE_PASS, *GATE_OF_ALL, *POLICY_PASS]
    assert all(scores.equals(want) for scores, want in zip(run.scores(), own, strict=True))
    assert sorted(run.out.iterdir()) == [run.gate_file, *run.files]
    assert run.of("progress", "done")[-1] == 2 * 9


def test_fails_where_they_are_off(run: Stage, own: list[pl.DataFrame], forwards: list[tuple[str, int]]) -> None:
    off_by(run, 2.0)
    gate = run(sampled=SAMPLED).gate
    assert gate is not None
    assert gate["passed"] is False
    (note,) = run.of("note", "text")
    assert note.startswith("the policy's log-probabilities are recomputed: with those of the samples the reward")
    check_all_were_scored(run, own, forwards)


@pytest.mark.parametrize("value", [None, float("nan"), float("-inf")])
def test_fails_where_one_is_no_number(
    run: Stage, own: list[pl.DataFrame], forwards: list[tuple[str, int]], value: float | None
) -> None:
    shards = [frame["sampled_logp"].to_list() for frame in run.frames]
    shards[1][2] = value
    run.came_with(*shards)
    gate = run(sampled=SAMPLED).gate

    def refuse(word: str) -> None:
        pytest.fail(f"{word} is not JSON")

    assert json.loads(run.gate_file.read_text(), parse_constant=refuse)["gate"] == gate
    assert gate is not None
    assert gate["passed"] is False
    names = ("mean_abs_difference", "max_abs_difference", "reward_std", "share")
    assert [gate[name] for name in names] == [None] * 4
    assert gate["responses"] == 8
    (note,) = run.of("note", "text")
    assert "not finite" in note
    check_all_were_scored(run, own, forwards)


def test_fails_where_the_reward_has_no_spread(run: Stage, forwards: list[tuple[str, int]]) -> None:
    """Policy and reference are one: any difference is all of the reward."""
    gate = run({"allow_same_model": True}, sampled=SAMPLED, reference=run.policy).gate
    assert gate is not None
    assert gate["passed"] is False
    assert gate["share"] is None
    assert [frame["reward"].to_list() for frame in run.scores()] == [[0.0] * 5, [0.0] * 4]
    assert len(forwards) == 6


def test_fails_where_no_response_has_tokens(run: Stage) -> None:
    run.frames = [frame.with_columns(token_ids=pl.lit([], dtype=pl.List(pl.Int32))) for frame in run.frames]
    run.write()
    gate = run(sampled=SAMPLED).gate
    assert gate is not None
    assert (gate["passed"], gate["responses"]) == (False, 0)
    assert [frame["logp"].to_list() for frame in run.scores()] == [[0.0] * 5, [0.0] * 4]


def test_a_shard_with_what_is_no_number_is_scored_though_the_gate_passed(
    run: Stage, own: list[pl.DataFrame], forwards: list[tuple[str, int]]
) -> None:
    """The gate sees some responses only."""
    shards = [
        Shard(file, out, half, key, sampled=True)
        for file, out, half, key in zip(run.generations, run.files, run.halves, KEYS, strict=True)
    ]
    drawn = {shard.key: rows for shard, rows in gate_rows(3, shards, Columns(), gate_key())}
    unseen = next(row for row in range(4) if row not in drawn.get(KEYS[1], []))
    values = [frame["sampled_logp"].to_list() for frame in run.frames]
    values[1][unseen] = float("nan")
    run.came_with(*values)
    gate = run(sampled=SAMPLED, config={"gate_responses": 3}).gate
    assert gate is not None
    assert gate["passed"] is True
    assert forwards[-1] == ("llama", 4)
    assert run.scores()[1].equals(own[1])
    assert run.scores()[0]["logp"].equals(run.frames[0]["sampled_logp"].alias("logp"))
    assert run.of("progress", "done")[-1] == 2 * 9


# --- what it is asked for -----------------------------------------------------------------------------------


def test_shards_of_other_policies_are_always_scored(
    run: Stage, own: list[pl.DataFrame], forwards: list[tuple[str, int]]
) -> None:
    """What came with them is not even looked at."""
    run.came_with(run.frames[0]["sampled_logp"].to_list(), [float("nan")] * 4)
    gate = run(sampled=[True, False]).gate
    assert gate is not None
    assert (gate["passed"], gate["responses"]) == (True, 4)
    assert forwards == [*REFERENCE_PASS, ("llama", 4), ("llama", 4)]  # the gate on one shard, the pass on the other
    assert run.scores()[1].equals(own[1])
    assert run.scores()[0]["logp"].equals(run.frames[0]["sampled_logp"].alias("logp"))


@pytest.mark.parametrize("sampled", [None, [False, False]])
def test_without_shards_of_this_policy_nothing_is_measured(
    run: Stage, own: list[pl.DataFrame], sampled: list[bool] | None
) -> None:
    off_by(run, 9.0)
    assert run(sampled=sampled).gate is None
    assert not run.gate_file.exists()
    assert all(scores.equals(want) for scores, want in zip(run.scores(), own, strict=True))


def test_scored_never_measures(run: Stage, own: list[pl.DataFrame], forwards: list[tuple[str, int]]) -> None:
    off_by(run, 0.001)
    assert run(sampled=SAMPLED, config={"policy_logps": "recompute"}).gate is None
    assert not run.gate_file.exists()
    assert forwards == [*REFERENCE_PASS, *POLICY_PASS]
    assert all(scores.equals(want) for scores, want in zip(run.scores(), own, strict=True))


def test_scored_does_not_take_a_gate_that_is_there(run: Stage, own: list[pl.DataFrame]) -> None:
    off_by(run, 0.001)
    run(sampled=SAMPLED)
    for file in run.files:
        file.unlink()
    assert run(sampled=SAMPLED, config={"policy_logps": "recompute"}).gate is None
    assert all(scores.equals(want) for scores, want in zip(run.scores(), own, strict=True))


def test_samples_without_their_logps(run: Stage) -> None:
    for file, frame in zip(run.generations, run.frames, strict=True):
        write_parquet(file, frame.drop("sampled_logp"), key="generated")
    with pytest.raises(DataError, match=r"generations-00000\.parquet: no column 'sampled_logp'"):
        run(sampled=SAMPLED)


# --- resume, and the draw -----------------------------------------------------------------------------------


def gate_key(keys: list[str] = KEYS) -> str:
    return digest("gate", keys)


def interrupt(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def raise_it(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for module in (stage, shards):
        monkeypatch.setattr(module, name, raise_it, raising=module is stage)


@pytest.mark.parametrize("nats", [0.0, 2.0])
def test_resume_takes_the_gate_that_was_measured(run: Stage, monkeypatch: pytest.MonkeyPatch, nats: float) -> None:
    off_by(run, nats)
    with monkeypatch.context() as patch:
        interrupt(patch, "write_scores")
        with pytest.raises(KeyboardInterrupt):
            run(sampled=SAMPLED)
    assert sorted(run.out.iterdir()) == [run.gate_file, *run.halves]
    measured = read_sealed(run.gate_file, gate_key())
    assert measured is not None
    with monkeypatch.context() as patch:
        interrupt(patch, "MeasureGate")
        made = run(sampled=SAMPLED)
    assert made.gate == measured["gate"]
    assert made.gate["passed"] is (nats == 0.0)
    assert run.of("throughput", "model") == ["policy"] * 2 * (nats != 0.0)
    # And a call that finds all done still tells how it was done.
    assert run(sampled=SAMPLED).gate == measured["gate"]
    assert run.events == []
    # Without the file, the scores know it.
    before = run.gate_file.read_bytes()
    run.gate_file.unlink()
    assert run(sampled=SAMPLED).gate == measured["gate"]
    assert run.gate_file.read_bytes() == before


def test_a_gate_of_other_keys_is_measured_again(run: Stage, forwards: list[tuple[str, int]]) -> None:
    run(sampled=SAMPLED)
    forwards.clear()
    off_by(run, 2.0)
    keys = [KEYS[0], "another"]
    gate = run(sampled=SAMPLED, keys=keys).gate
    assert gate is not None
    assert (gate["passed"], gate["responses"]) == (False, 4)  # only what is not whole yet
    assert forwards == [("other", 4), ("llama", 4), ("llama", 4)]
    assert read_sealed(run.gate_file, gate_key(keys)) == {"gate": gate}


def test_the_draw_is_seeded(run: Stage) -> None:
    shards = [
        Shard(file, out, half, key, sampled=True)
        for file, out, half, key in zip(run.generations, run.files, run.halves, KEYS, strict=True)
    ]

    def draw(count: int, key: str) -> list[tuple[str, int]]:
        found = gate_rows(count, shards, Columns(), key)
        assert all(rows == sorted(set(rows)) for _, rows in found)
        return [(shard.key, row) for shard, rows in found for row in rows]

    assert draw(3, "a") == draw(3, "a")
    draws = {tuple(draw(3, str(number))) for number in range(40)}
    assert len(draws) > 20  # of 56
    assert {len(rows) for rows in draws} == {3}
    filled = [(KEYS[0], row) for row in (0, 1, 2, 4)] + [(KEYS[1], row) for row in range(4)]  # one has no tokens
    assert {row for rows in draws for row in rows} == set(filled)
    assert draw(100, "a") == filled
