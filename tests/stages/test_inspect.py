"""The stage inspect on a small round of two tiny models: the pairs, their credits, and what happens without models."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from tiny_sets import CPU, draw_ids

from dice_py.config.mining import MineConfig
from dice_py.config.report import ReportConfig
from dice_py.config.rounds import WarningsConfig
from dice_py.config.stages import ReplayConfig, ScoreConfig
from dice_py.data import pairs_frame
from dice_py.errors import DamagedError, DataError
from dice_py.mining.files import ROW_BYTES
from dice_py.models.token_pieces import TokenPieces
from dice_py.models.tokenization import read_tokenizer
from dice_py.runs.warnings import stage_warnings
from dice_py.scoring import credit
from dice_py.stages import token_credit
from dice_py.stages.inspect import InspectJob
from dice_py.stages.mine import MineJob
from dice_py.stages.replay import ReplayJob
from dice_py.stages.score import ScoreJob
from dice_py.storage.files import read_sealed
from dice_py.storage.parquet import parquet_rows, read_parquet, write_parquet
from dice_py.storage.schemas import GENERATIONS, INSPECTED_PAIRS, PROMPTS

PROMPTS_OF_A_ROUND, SAMPLES, SHARDS, BETA, OFFLINE = 12, 4, 2, 0.5, 9
STOP = 4


def turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def make_generations(folder: Path, tokenizer: Any) -> list[Path]:
    """Shards of responses whose rewards and lengths differ; the last one of a prompt was cut off."""
    rng = random.Random(0)
    files, pieces = [], TokenPieces(tokenizer)
    for shard in range(SHARDS):
        rows = []
        for p in range(shard, PROMPTS_OF_A_ROUND, SHARDS):
            prompt = draw_ids(rng, 5)
            for s in range(SAMPLES):
                ids = [*draw_ids(rng, rng.randint(1, 20)), STOP]
                text, reason = pieces.text(ids[:-1]), "length" if s == SAMPLES - 1 else "stop"
                rows.append((p, s, prompt, ids, text, len(ids), len(text), reason, -1.0))
        frame = pl.DataFrame(rows, schema=GENERATIONS, orient="row")
        files.append(write_parquet(folder / f"generations-{shard:05d}.parquet", frame, key=f"g{shard}"))
    return files


@pytest.fixture(scope="module")
def made(llama: Path, other: Path, tmp_path_factory: pytest.TempPathFactory) -> InspectJob:
    """The job of a round whose stages before it were run."""
    folder = tmp_path_factory.mktemp("round")
    generations = make_generations(folder, read_tokenizer(llama, CPU))
    prompts = pl.DataFrame(
        {"prompt_id": range(PROMPTS_OF_A_ROUND), "messages": [turn("user", f"q{p}") for p in range(PROMPTS_OF_A_ROUND)]}
    )
    asked = write_parquet(folder / "prompts.parquet", prompts, key="p", schema=PROMPTS)
    config = ScoreConfig(policy_logps="recompute")
    score = ScoreJob(config, CPU, llama, other, generations, ["g0", "g1"], folder / "score", BETA)
    scores = [(file, key) for file, key in score.run().files if file.suffix == ".parquet"]
    mine = MineJob(
        config=MineConfig(alpha=0.05, soft_labels=True, second_reward="logp"),
        generations=generations,
        scores=[file for file, _ in scores],
        score_keys=[key for _, key in scores],
        rounds=[3] * SHARDS,
        out=folder / "mine",
        seed=0,
    )
    mined = mine.run().files[0]
    offline = pairs_frame(
        [
            {
                "prompt": turn("user", f"offline {n}"),
                "chosen": turn("assistant", "漢字 " * n + "good 😀"),
                "rejected": turn("assistant", f"bad {n}"),
            }
            for n in range(OFFLINE)
        ]  # type: ignore[misc]
    )
    replay = ReplayJob(
        config=ReplayConfig(gamma=0.4),
        score_config=config,
        models=CPU,
        policy=llama,
        mined=mined[0],
        generations=generations,
        scores=mine.scores,
        prompts=asked,
        offline=write_parquet(folder / "offline.parquet", offline, key="o"),
        input_keys="k",
        out=folder / "replay",
        seed=0,
    )
    return InspectJob(
        config=ReportConfig(),
        score_config=config,
        models=CPU,
        policy=llama,
        reference=other,
        beta=BETA,
        mine=mine,
        mined=mined,
        training_set=replay.run().files[0],
        prompts=asked,
        out=folder / "inspect",
        seed=0,
        round_number=3,
    )


@pytest.fixture(scope="module")
def counts(made: InspectJob) -> dict[str, Any]:
    """The counts of the job, which was run."""
    result = made.run()
    assert result.files == [(made.distributions_file, made.key()), (made.pairs_file, made.key())]
    assert made.incomplete(result.files) == []
    return result.counts


@pytest.fixture(scope="module")
def pairs(made: InspectJob, counts: dict[str, Any]) -> pl.DataFrame:
    assert counts["pairs"] > 0
    return read_parquet(made.pairs_file)


def test_the_pairs_are_those_of_the_round(made: InspectJob, counts: dict[str, Any], pairs: pl.DataFrame) -> None:
    assert dict(pairs.schema) == dict(INSPECTED_PAIRS)
    mined, training = read_parquet(made.mined[0]), read_parquet(made.training_set[0])
    replayed = training.filter(pl.col("source") == "replay").height
    assert counts["sources"] == {"mined": mined.height, "replay": replayed}
    assert mined.height > 5
    assert replayed > 3
    numbers = [
        *(f"r03-mined-{row}" for row in range(mined.height)),
        *(f"r03-replay-{mined.height + n}" for n in range(replayed)),
    ]
    assert pairs["pair_id"].to_list() == numbers
    assert pairs["round"].unique().to_list() == [3]
    sampled = pl.concat([pl.read_parquet(file) for file in made.mine.generations])
    for side in ("chosen", "rejected"):
        rows = sampled[mined[f"{side}_row"]]
        of_mined = pairs.head(mined.height)
        assert [turns[0]["content"] for turns in of_mined[side]] == rows["response"].to_list()
        assert of_mined[f"{side}_tokens"].to_list() == rows["response_tokens"].to_list()
        assert of_mined[f"{side}_finish_reason"].unique().to_list() == ["stop"]
        assert of_mined[f"{side}_reward"].to_list() == mined[f"{side}_reward"].to_list()
    assert [turns[0]["content"] for turns in pairs.head(mined.height)["prompt"]] == [
        f"q{p}" for p in mined["prompt_id"]
    ]
    assert pairs["margin"].to_list()[: mined.height] == mined["margin"].to_list()
    labels = [json.loads(text) for text in pairs.head(mined.height)["labels"]]
    assert [label["soft_label"] for label in labels] == mined["soft_label"].to_list()
    assert all(label.keys() <= {"soft_label", "consistency"} for label in labels)


def test_candidates_are_all_responses_best_first(made: InspectJob, pairs: pl.DataFrame) -> None:
    sampled = pl.concat([pl.read_parquet(file) for file in made.mine.generations])
    scores = pl.concat([pl.read_parquet(file) for file in made.mine.scores])
    alpha = read_sealed(made.mine.out / "mining.json")["alpha"]  # type: ignore[index]
    assert alpha == 0.05
    for pair in pairs.filter(pl.col("source") == "mined").iter_rows(named=True):
        prompt = int(pair["prompt"][0]["content"][1:])
        rows = sampled.hstack(scores.select("reward")).filter(pl.col("prompt_id") == prompt)
        candidates = pair["candidates"]
        assert sorted(each["sample_id"] for each in candidates) == rows["sample_id"].to_list()
        used = [each for each in candidates if each["finish_reason"] == "stop"]
        assert candidates[len(used) :] == [each for each in candidates if each["finish_reason"] == "length"]
        for each in candidates:
            row = rows.row(each["sample_id"], named=True)
            assert (each["response"], each["reward"]) == (row["response"], row["reward"])
            if each in used:
                assert each["penalized_reward"] == pytest.approx(
                    row["reward"] - alpha * row["response_tokens"], abs=1e-5
                )
            else:
                assert each["penalized_reward"] is None  # mining did not use it
        # max_min: the pair is the first and the last.
        assert [each["role"] for each in used] == ["chosen", *[None] * (len(used) - 2), "rejected"]
        assert used[0]["penalized_reward"] == pair["chosen_penalized_reward"]
        assert used[-1]["penalized_reward"] == pair["rejected_penalized_reward"]
        assert pair["chosen_penalized_reward"] - pair["rejected_penalized_reward"] == pytest.approx(
            pair["margin"], abs=1e-5
        )
    replayed = pairs.filter(pl.col("source") == "replay")
    assert replayed["candidates"].list.len().unique().to_list() == [0]
    assert replayed["chosen_penalized_reward"].null_count() == replayed.height


def test_credits_are_the_parts_of_the_reward(
    made: InspectJob, counts: dict[str, Any], pairs: pl.DataFrame, llama: Path
) -> None:
    pieces = TokenPieces(read_tokenizer(llama, CPU))
    training = read_parquet(made.training_set[0])
    for pair in pairs.iter_rows(named=True):
        for side in ("chosen", "rejected"):
            found = pair[f"{side}_credit"]
            assert sum(each["credit"] for each in found) == pytest.approx(pair[f"{side}_reward"], abs=1e-4)
            assert all(
                each["credit"] == pytest.approx(BETA * (each["logp"] - each["ref_logp"]), abs=1e-5) for each in found
            )
    assert pairs["chosen_reward"].std() > 0.5  # type: ignore[operator]  # so that the tolerance means something
    # Of replayed pairs the training set has the policy's sums, and its tokens.
    replayed = pairs.filter(pl.col("source") == "replay")
    rows = training[[int(name.rpartition("-")[2]) for name in replayed["pair_id"]]]
    for side in ("chosen", "rejected"):
        logps = replayed[f"{side}_credit"].list.eval(pl.element().struct.field("logp")).list.sum()
        assert (logps - rows[f"ref_{side}_logps"]).abs().max() < 1e-3  # type: ignore[operator]
        for credits, ids in zip(replayed[f"{side}_credit"], rows[f"{side}_ids"], strict=True):
            assert "".join(each["text"] for each in credits) == pieces.text(ids.to_list())
    assert any(each["text"] == "😀" for credits in replayed["chosen_credit"] for each in credits)
    tokens = sum(int(pairs[f"{side}_tokens"].sum()) for side in ("chosen", "rejected"))
    assert counts["tokens"] == tokens
    assert 0 <= counts["largest_difference"] < 1e-4 * counts["reward_std"]


def test_the_same_job_keeps_its_files(made: InspectJob, counts: dict[str, Any], no_model: list[str]) -> None:
    before = made.pairs_file.stat().st_mtime_ns
    again = made.run()
    assert (again.counts, made.pairs_file.stat().st_mtime_ns, no_model) == (counts, before, [])


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that are asked for, which are refused."""
    asked: list[str] = []

    def held(folder: Path, *_: Any) -> Any:
        asked.append(folder.name)
        raise torch_error("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(credit, "held_model", held)
    return asked


def torch_error(text: str) -> Exception:
    import torch

    return torch.OutOfMemoryError(text)


def test_without_pairs_no_model_is_loaded(made: InspectJob, tmp_path: Path, no_model: list[str]) -> None:
    job = replace(made, config=ReportConfig(pairs=0), out=tmp_path)
    result = job.run()
    assert (result.counts, [file.name for file, _ in result.files]) == ({"pairs": 0}, ["distributions.json"])
    found = read_sealed(job.distributions_file, job.key())
    assert found is not None
    assert found["rows"] == PROMPTS_OF_A_ROUND * SAMPLES
    assert found["usable"] == PROMPTS_OF_A_ROUND * (SAMPLES - 1)
    assert (no_model, job.incomplete(result.files)) == ([], [])


def test_without_credit_no_model_is_loaded(
    made: InspectJob, pairs: pl.DataFrame, tmp_path: Path, no_model: list[str]
) -> None:
    job = replace(made, config=ReportConfig(token_credit=False), out=tmp_path)
    result = job.run()
    found = read_parquet(job.pairs_file)
    known = [
        name for name in pairs.columns if not name.endswith(("credit", "chosen_reward", "rejected_reward", "margin"))
    ]
    assert found.select(known).equals(pairs.select(known))
    assert found["chosen_credit"].null_count() == found.height
    replayed = found.filter(pl.col("source") == "replay")
    assert replayed["chosen_reward"].null_count() == replayed["margin"].null_count() == replayed.height
    assert (no_model, result.counts.keys(), job.incomplete(result.files)) == ([], {"pairs", "sources"}, [])


def test_models_that_do_not_fit_leave_pairs_without_credit(
    made: InspectJob, tmp_path: Path, no_model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = replace(made, out=tmp_path)
    result = job.run()
    assert no_model == ["llama"]
    assert result.counts["credit_failure"] == "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB"
    assert read_parquet(job.pairs_file)["chosen_credit"].null_count() == result.counts["pairs"]
    (warning,) = stage_warnings("inspect", job, result, WarningsConfig())
    assert warning.name == "inspect_credit_failure"
    assert "no credit by token: out of memory: CUDA" in warning.text
    # A resume tries again.
    assert job.incomplete(result.files) == [job.pairs_file]
    monkeypatch.undo()
    again = job.run()
    assert "credit_failure" not in again.counts
    assert job.incomplete(again.files) == []


def test_other_failures_are_not_taken_for_a_lack_of_memory(
    made: InspectJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(error: Exception) -> Callable[..., Any]:
        def call(*_: Any, **__: Any) -> Any:
            raise error

        return call

    job = replace(made, out=tmp_path)
    monkeypatch.setattr("dice_py.stages.inspect.with_credit", fails(DataError("logits are NaN")))
    assert job.run().counts["credit_failure"] == "logits are NaN"
    for error in (ZeroDivisionError("a bug"), DamagedError("the model is damaged")):
        monkeypatch.setattr("dice_py.stages.inspect.with_credit", fails(error))
        with pytest.raises(type(error)):
            job.run()


def test_a_sample_of_fewer_pairs_has_every_source(made: InspectJob, pairs: pl.DataFrame, tmp_path: Path) -> None:
    config = ReportConfig(pairs=6, token_credit=False)
    drawn = [replace(made, config=config, seed=seed, out=tmp_path / str(seed)) for seed in (0, 0, 1)]
    found = []
    for job in drawn:
        job.run()
        found.append(read_parquet(job.pairs_file))
    assert found[0].equals(found[1])
    assert not found[0]["pair_id"].equals(found[2]["pair_id"])
    for sample in found:
        assert sample.height == 6
        assert set(sample["source"]) == {"mined", "replay"}
        assert set(sample["pair_id"]) <= set(pairs["pair_id"])


def test_what_changes_the_key(made: InspectJob, llama: Path, other: Path) -> None:
    key = made.key()
    changes: dict[str, Any] = {
        "config": ReportConfig(pairs=7),
        "beta": 0.1,
        "seed": 1,
        "policy": other,
        "reference": llama,
        "mined": (made.mined[0], "another"),
        "training_set": (made.training_set[0], "another"),
        "score_config": ScoreConfig(policy_logps="recompute", logit_chunk=7),
    }
    keys = {replace(made, **{name: value}).key() for name, value in changes.items()}
    assert len(keys | {key}) == len(changes) + 1
    assert replace(made, out=Path("elsewhere")).key() == key


def test_a_difference_from_the_stored_rewards_is_warned_of(
    made: InspectJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the scores are of another model than the run has now."""
    real = token_credit.summed_credit
    monkeypatch.setattr(token_credit, "summed_credit", lambda *arguments: real(*arguments) + 9.0)
    job = replace(made, out=tmp_path)
    result = job.run()
    assert result.counts["largest_difference"] == pytest.approx(9.0, abs=1e-3)
    (warning,) = stage_warnings("inspect", job, result, WarningsConfig())
    assert (warning.name, warning.limit) == ("credit_difference", 0.5)
    assert warning.value == pytest.approx(9.0 / result.counts["reward_std"], rel=1e-3)
    assert stage_warnings("inspect", job, result, WarningsConfig(credit_difference=None)) == []


def test_mining_of_another_key_is_damage(made: InspectJob, tmp_path: Path) -> None:
    mine = replace(made.mine, seed=1)
    with pytest.raises(DamagedError, match=r"mining\.json is damaged, or not of the pairs in"):
        replace(made, mine=mine, out=tmp_path).run()


def test_of_a_round_that_is_streamed_some_shards_are_looked_at(
    made: InspectJob, pairs: pl.DataFrame, tmp_path: Path
) -> None:
    rows = [parquet_rows(file) for file in made.mine.generations]
    # Memory for the rows of one of the two shards.
    mine = replace(made.mine, memory_gib=max(rows) * ROW_BYTES / 2**30)
    notes: list[str] = []
    job = replace(made, mine=mine, out=tmp_path, config=ReportConfig(token_credit=False))
    job.run(lambda event, **fields: notes.append(fields["text"]))
    assert notes == ["the round is large: its pairs to read are of 1 of 2 shards"]
    sample = read_parquet(job.pairs_file).filter(pl.col("source") == "mined")
    assert 0 < sample.height < pairs.filter(pl.col("source") == "mined").height
    known = ["prompt", "chosen", "rejected", "chosen_reward", "rejected_reward", "margin", "labels", "candidates"]
    assert sample.select(known).join(pairs.select(known), on=known[:3], how="anti").is_empty()
    same = pairs.select(known).join(sample.select(known[:3]), on=known[:3], how="semi")
    assert_frame_equal(sample.select(known), same, check_row_order=False)
