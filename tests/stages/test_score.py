"""Stage 2: its shards, keys and resume; pairs; and which models it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from logp_oracle import SAME, max_abs_diff, plain
from tiny_models import make_llama
from tiny_sets import CPU, IDS, token_pairs
from tiny_stage import BETA, KEYS, Stage, refuse
from transformers import PreTrainedModel

from dice_py.config.stages import ScoreConfig
from dice_py.errors import DataError
from dice_py.models import loading as models
from dice_py.models.loading import held_model, load_model, release_held
from dice_py.scoring.pairs import score_pairs
from dice_py.scoring.shards import token_arrays
from dice_py.storage.parquet import parquet_key, parquet_meta, write_parquet
from dice_py.storage.schemas import SCORES

pytestmark = pytest.mark.usefixtures("release_models")


@pytest.fixture
def run(llama: Path, other: Path, tmp_path: Path) -> Stage:
    return Stage(llama, other, tmp_path)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that models were read from."""
    read: list[Path] = []

    def load(folder: Path, *rest: Any) -> PreTrainedModel:
        read.append(folder)
        return load_model(folder, *rest)

    monkeypatch.setattr(models, "load_model", load)
    return read


# --- shards, keys, resume -----------------------------------------------------------------------------------


def test_shards_are_aligned_with_the_generations(run: Stage, llama: Path, other: Path) -> None:
    assert run().files == run.files
    policy, reference = load_model(llama, CPU), load_model(other, CPU)
    for file, frame, key in zip(run.files, run.frames, KEYS, strict=True):
        scores = pl.read_parquet(file)
        assert dict(scores.schema) == dict(SCORES)
        assert parquet_key(file) == key
        assert parquet_meta(file)["beta"] == BETA
        assert scores.height == frame.height
        for row, (prompt, response) in enumerate(frame.iter_rows()):
            logp, ref_logp, reward = scores.row(row)
            if not response:
                assert (logp, ref_logp, reward) == (0.0, 0.0, 0.0)
                continue
            assert logp == pytest.approx(plain(policy, [prompt], [response])[0], abs=SAME)
            assert ref_logp == pytest.approx(plain(reference, [prompt], [response])[0], abs=SAME)
            assert reward == pytest.approx(BETA * (logp - ref_logp), abs=SAME)
    assert sorted(run.out.iterdir()) == run.files


def test_what_it_tells(run: Stage) -> None:
    scored = run()
    assert (scored.gate, scored.dtype) == (None, "float32")
    done = run.of("progress", "done")
    assert done == sorted(done)
    assert done[-1] == run.of("progress", "total")[-1] == 2 * 9
    assert run.of("shard", "file") == [file.name for file in run.files]
    assert run.of("shard", "rows") == [5, 4]
    assert run.of("throughput", "model") == ["reference"] * 2 + ["policy"] * 2
    assert run.of("throughput", "file") == [file.name for file in run.files] * 2
    assert run.of("throughput", "sequences") == [4, 4, 4, 4]  # a response of no tokens is not run
    tokens = [sum(map(len, frame["token_ids"])) for frame in run.frames]
    assert all(ran > own for ran, own in zip(run.of("throughput", "tokens"), tokens * 2, strict=True))
    assert not run.of("shard_complete", "number")  # for the dispatcher alone
    assert not run.of("advance", "count")


def test_reward_is_zero_where_the_models_are_one(run: Stage) -> None:
    run({"allow_same_model": True}, reference=run.policy)
    assert [frame["reward"].to_list() for frame in run.scores()] == [[0.0] * 5, [0.0] * 4]
    assert all(frame["logp"].min() < -10.0 for frame in run.scores())


def test_second_call_does_nothing_again(run: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    times = [file.stat().st_mtime_ns for file in run.files]
    refuse(monkeypatch, run.policy, run.reference)
    assert run().files == run.files
    assert [file.stat().st_mtime_ns for file in run.files] == times
    assert run.events == []


def test_only_the_shard_of_another_key_is_scored_again(run: Stage) -> None:
    run()
    time = run.files[0].stat().st_mtime_ns
    run(keys=[KEYS[0], "another"])
    assert run.of("shard", "file") == ["scores-00001.parquet"]
    assert run.files[0].stat().st_mtime_ns == time
    assert parquet_key(run.files[1]) == "another"
    assert run.of("progress", "total")[-1] == run.of("progress", "done")[-1] == 2 * 4


def test_scores_of_shards_that_are_no_more_are_removed(run: Stage) -> None:
    run()
    run(generations=run.generations[:1], keys=KEYS[:1])
    assert sorted(run.out.glob("scores-*")) == run.files[:1]


def test_resume_takes_the_kept_half(run: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    whole = [file.read_bytes() for file in run.files]
    for file in run.files:
        file.unlink()
    refuse(monkeypatch, run.policy)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert sorted(run.out.iterdir()) == run.halves
    assert [parquet_key(half) for half in run.halves] == KEYS
    refuse(monkeypatch, run.reference)
    run()
    assert [file.read_bytes() for file in run.files] == whole
    assert sorted(run.out.iterdir()) == run.files
    done = run.of("progress", "done")
    assert (done[0], done[-1]) == (9, 2 * 9)  # what was there counts as done


def test_resume_within_the_second_pass(run: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """One shard whole, the other's half kept: neither is run again under the reference."""
    run()
    whole = [file.read_bytes() for file in run.files]
    run.files[1].unlink()
    refuse(monkeypatch, run.policy)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert sorted(run.out.iterdir()) == [run.halves[1], run.files[0]]
    refuse(monkeypatch, run.reference)
    run()
    assert run.of("shard", "file") == ["scores-00001.parquet"]
    assert [file.read_bytes() for file in run.files] == whole


def test_kept_half_of_another_key_is_not_taken(run: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, run.policy)
    with pytest.raises(KeyboardInterrupt):
        run(keys=["another", KEYS[1]])
    refuse(monkeypatch, run.reference)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.undo()
    run()
    assert run.of("throughput", "model") == ["reference", "policy", "policy"]
    assert [parquet_key(file) for file in run.files] == KEYS
    assert sorted(run.out.iterdir()) == run.files


# --- columns ------------------------------------------------------------------------------------------------


def test_columns_by_other_names(run: Stage) -> None:
    run()
    want = run.scores()
    for file, frame in zip(run.generations, run.frames, strict=True):
        write_parquet(file, frame.rename({"prompt_token_ids": "p", "token_ids": "y"}), key="generated")
    run(keys=["a", "b"], prompt_column="p", response_column="y")
    assert all(frame.equals(other) for frame, other in zip(run.scores(), want, strict=True))


def test_missing_column(run: Stage) -> None:
    with pytest.raises(DataError, match=r"generations-00000\.parquet: no column 'tokens'"):
        run(response_column="tokens")


def test_text_instead_of_tokens(run: Stage) -> None:
    run.frames[1] = run.frames[1].with_columns(token_ids=pl.lit("well"))
    run.write()
    with pytest.raises(DataError, match=r"00001\.parquet: column 'token_ids' is String, not a list of token ids"):
        run()
    assert not any(file.exists() for file in run.files)


@pytest.mark.parametrize("column", ["prompt_token_ids", "token_ids"])
@pytest.mark.parametrize("nulls", [[None, [7], [8], [9]], [[7], [8, None], [9], [9]]])
def test_nulls_in_token_columns(run: Stage, column: str, nulls: list[Any]) -> None:
    run.frames[1] = run.frames[1].with_columns(pl.Series(column, nulls, dtype=IDS))
    run.write()
    with pytest.raises(DataError, match=rf"00001\.parquet: column '{column}' holds nulls"):
        run()
    assert not any(file.exists() for file in run.files)


def test_token_of_another_vocabulary(run: Stage) -> None:
    foreign = pl.DataFrame({"prompt_token_ids": [[7]], "token_ids": [[999]]}, schema=run.frames[0].schema)
    write_parquet(run.generations[0], foreign, key="generated")
    with pytest.raises(DataError, match="outside the model's vocabulary"):
        run()


def test_token_arrays() -> None:
    lists = [[1, 2], [], [3], []]
    for dtype in (pl.Int32, pl.UInt16, pl.Int64):
        frame = pl.DataFrame({"t": lists}, schema={"t": pl.List(dtype)})
        assert [array.tolist() for array in token_arrays(frame, "t", "here")] == lists
        assert [array.tolist() for array in token_arrays(frame[1:3], "t", "here")] == [[], [3]]
    assert token_arrays(frame[:0], "t", "here") == []


def test_shard_of_no_rows(run: Stage) -> None:
    run.frames[1] = run.frames[1][:0]
    run.write()
    run()
    assert [frame.height for frame in run.scores()] == [5, 0]


# --- the models that are held -------------------------------------------------------------------------------


def test_each_model_is_read_once(run: Stage, loads: list[Path]) -> None:
    run()
    assert loads == [run.reference, run.policy]
    score_pairs(ScoreConfig(), CPU, policy=run.policy, pairs=token_pairs(2))
    assert loads == [run.reference, run.policy]  # held still


def test_one_model_in_both_roles_is_read_once(run: Stage, loads: list[Path]) -> None:
    run({"allow_same_model": True}, reference=run.policy)
    assert loads == [run.policy]


def test_held_model(tmp_path: Path, llama: Path, loads: list[Path]) -> None:
    mine = make_llama(tmp_path / "mine")
    first = held_model(mine, CPU)
    assert held_model(mine, CPU) is first
    assert held_model(tmp_path / "." / "mine", CPU) is first
    assert len(loads) == 1
    assert held_model(mine, CPU.model_copy(update={"dtype": "bfloat16"})) is not first
    held_model(llama, CPU)
    again = held_model(mine, CPU)
    assert again is not first
    assert len(loads) == 4
    make_llama(mine, seed=3)  # other weights under the same name
    assert held_model(mine, CPU) is not again
    release_held()
    release_held()
    held_model(mine, CPU)
    assert len(loads) == 6


# --- pairs --------------------------------------------------------------------------------------------------


def test_score_pairs(llama: Path) -> None:
    model, pairs = load_model(llama, CPU), token_pairs(5)
    events: list[dict[str, Any]] = []
    scored = score_pairs(
        ScoreConfig(), CPU, policy=llama, pairs=pairs, report=lambda event, **fields: events.append(fields)
    )
    assert dict(scored.schema) == {"chosen_logp": pl.Float32, "rejected_logp": pl.Float32}
    for side in ("chosen", "rejected"):
        want = plain(model, pairs["prompt_ids"].to_list(), pairs[f"{side}_ids"].to_list())
        assert max_abs_diff(scored[f"{side}_logp"].to_list(), want) < SAME
    assert events[-1]["done"] == events[-1]["total"] == 10


def test_no_pairs(llama: Path) -> None:
    scored = score_pairs(ScoreConfig(), CPU, policy=llama, pairs=token_pairs(0))
    assert (scored.height, scored.columns) == (0, ["chosen_logp", "rejected_logp"])
