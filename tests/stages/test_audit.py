"""The audit of tiny models: its rewards are those of plain forwards, each model is run once, and files are kept."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from logp_oracle import SAME, plain
from tiny_models import MAX_POSITIONS, make_mistral
from tiny_sets import CPU

from dice_py.config.stages import ScoreConfig
from dice_py.data import pairs_frame
from dice_py.errors import DataError, UsageError
from dice_py.mining.pairs import mine_pairs
from dice_py.models.loading import load_model
from dice_py.models.tokenization import encode_prompt, encode_response, load_tokenizer, stop_token_ids
from dice_py.scoring.scorer import Scorer
from dice_py.stages.audit import AuditJob
from dice_py.storage.files import read_sealed
from dice_py.storage.schemas import MESSAGES

BETA = 0.3


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdef ", k=rng.randint(1, 20))) + "." for _ in range(count)]


def pair_rows(count: int = 40) -> pl.DataFrame:
    """Pairs, two of a prompt by turns; the answer of the first is chosen once and rejected once."""
    prompts, answers = texts(count // 2), texts(2 * count, seed=1)
    pairs = [
        {
            "prompt": user(prompts[n // 2]),
            "chosen": assistant(answers[2 * n]),
            "rejected": assistant(answers[2 * n + 1]),
        }
        for n in range(count)
    ]
    pairs[1]["rejected"] = pairs[0]["chosen"]
    where = [f"f.jsonl, line {n + 1}" for n in range(count)]
    return pairs_frame(pairs).drop("key").with_columns(where=pl.Series(where))  # type: ignore[arg-type]


def scored_rows(prompts: int = 15, responses: int = 4) -> pl.DataFrame:
    asked, answers = texts(prompts), texts(prompts * responses, seed=2)
    rng = random.Random(3)
    rows = [
        {"prompt": user(f"{n} {asked[n]}"), "response": assistant(answers[n * responses + k]),
         "score": float(rng.random() < 0.5), "model": f"m{k}", "where": f"line {n * responses + k}"}
        for n in range(prompts)
        for k in range(responses)
    ]  # fmt: skip
    schema = {"prompt": MESSAGES, "response": MESSAGES, "score": pl.Float64, "model": pl.String, "where": pl.String}
    return pl.DataFrame(rows, schema=schema)


def job(policy: Path, rows: pl.DataFrame, out: Path | None = None, **changed: Any) -> AuditJob:
    fields: dict[str, Any] = {
        "config": ScoreConfig(allow_same_model=True), "models": CPU, "policy": policy, "references": {}, "rows": rows,
        "rows_key": "rows", "beta": BETA, "alpha": "auto", "form": "penalized", "seed": 0, "out": out, **changed,
    }  # fmt: skip
    return AuditJob(**fields)


class Notes:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, event: str, **fields: Any) -> None:
        if event == "note" and "share no history" not in fields["text"]:
            self.texts.append(fields["text"])


def naive_logps(model: Path, rows: pl.DataFrame, side: str) -> tuple[np.ndarray, np.ndarray]:
    """Sums and lengths, by one plain forward for each row."""
    tokenizer = load_tokenizer(model, CPU)
    stops = stop_token_ids(model, tokenizer)
    prompts = [encode_prompt(tokenizer, prompt) for prompt in rows["prompt"].to_list()]
    pairs = zip(rows["prompt"].to_list(), rows[side].to_list(), strict=True)
    responses = [encode_response(tokenizer, prompt, response, stops) for prompt, response in pairs]
    return np.array(plain(load_model(model, CPU), prompts, responses)), np.array([len(one) for one in responses])


def test_rewards_of_pairs_are_those_of_plain_forwards(llama: Path, other: Path, tmp_path: Path) -> None:
    rows = pair_rows()
    result = job(llama, rows, tmp_path, references={"previous": other}).run(Notes())
    (file, key), (figures_file, _) = result.files
    figures = result.counts
    assert read_sealed(figures_file, key) == figures
    made = pl.read_parquet(file)
    ours, theirs = ({s: naive_logps(m, rows, s) for s in ("chosen", "rejected")} for m in (llama, other))
    summed = {s: BETA * (ours[s][0] - theirs[s][0]) for s in ours}
    length = {s: ours[s][1] for s in ours}
    frame = pl.DataFrame(
        {
            "prompt_id": np.repeat(np.arange(rows.height), 2),
            "reward": np.stack([summed["chosen"], summed["rejected"]], axis=1).reshape(-1),
            "response_tokens": np.stack([length["chosen"], length["rejected"]], axis=1).reshape(-1),
        }
    )
    alpha = mine_pairs(frame, alpha="auto").alpha
    assert alpha is not None
    expected = {
        "previous, sum": summed,
        "previous, penalized": {s: summed[s] - alpha * length[s] for s in summed},
        "previous, per token": {s: summed[s] / length[s] for s in summed},
        "none, sum": {s: BETA * ours[s][0] for s in summed},
        "none, per token": {s: BETA * ours[s][0] / length[s] for s in summed},
        "length alone": {s: length[s].astype(float) for s in length},
    }
    by_name = {entry["choice"]: entry for entry in figures["choices"]}
    assert list(by_name) == [
        f"{reference}, {form}" for reference in ("previous", "none") for form in ("sum", "penalized", "per token")
    ]
    for name, rewards in expected.items():
        right = (rewards["chosen"] > rewards["rejected"]) + 0.5 * (rewards["chosen"] == rewards["rejected"])
        entry = figures["length_alone"] if name == "length alone" else by_name[name]
        assert entry["metrics"]["accuracy"]["value"] == pytest.approx(right.mean())
        assert made[f"outcome {name}"].to_list() == right.tolist()
        if name != "length alone":
            for side in ("chosen", "rejected"):
                assert made[f"{side}_reward {name}"].to_numpy() == pytest.approx(rewards[side], abs=SAME)
    assert by_name["previous, penalized"]["alpha"] == pytest.approx(alpha, abs=1e-4)
    assert by_name["previous, sum"]["alpha"] is None
    for side in ("chosen", "rejected"):
        assert made[f"{side}_logp policy"].to_numpy() == pytest.approx(ours[side][0], abs=SAME)
        assert made[f"{side}_logp previous"].to_numpy() == pytest.approx(theirs[side][0], abs=SAME)
        assert made[f"{side}_tokens"].to_list() == length[side].tolist()
        assert made[side].to_list() == rows[side].to_list()
    assert (figures["prompts"], figures["comparisons"], figures["main"]) == (20, 40, "previous, penalized")
    assert figures["beta"] == BETA


def test_rewards_of_scored_responses(llama: Path, other: Path, tmp_path: Path) -> None:
    rows = scored_rows()
    figures = job(llama, rows, tmp_path, references={"previous": other}, form="sum", alpha=0.05).run(Notes()).counts
    made = pl.read_parquet(tmp_path / "responses.parquet")
    ours, theirs = (naive_logps(model, rows, "response") for model in (llama, other))
    reward = BETA * (ours[0] - theirs[0])
    assert made["reward previous, sum"].to_numpy() == pytest.approx(reward, abs=SAME)
    assert made["reward previous, penalized"].to_numpy() == pytest.approx(reward - 0.05 * ours[1], abs=SAME)
    assert made["response_tokens"].to_list() == ours[1].tolist()
    score = rows["score"].to_numpy().reshape(15, 4)
    best = reward.reshape(15, 4).argmax(axis=1)
    metrics = figures["choices"][0]["metrics"]
    assert metrics["end_score"]["value"] == pytest.approx(score[np.arange(15), best].mean())
    assert figures["choices"][0]["curve"][0] == pytest.approx(score.mean())
    assert metrics["spearman"]["value"] is not None
    assert (figures["best_of"], figures["models"], figures["kind"]) == (4, ["m0", "m1", "m2", "m3"], "scored set")


def test_each_model_is_run_once_over_each_distinct_response(
    llama: Path, other: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs: list[int] = []
    sums = Scorer.sums

    def counted(self: Scorer, prompts: list[Any], responses: list[Any], *rest: Any) -> list[float]:
        runs.append(len(responses))
        return sums(self, prompts, responses, *rest)

    monkeypatch.setattr(Scorer, "sums", counted)
    copy = tmp_path / "copy"
    copy.symlink_to(other)
    notes = Notes()
    references = {"previous": other, "initial": copy, "sft": make_other(tmp_path / "third")}
    figures = job(llama, pair_rows(), references=references).run(notes).counts
    assert runs == [79] * 3  # 80 responses, one of which is in two pairs
    assert "initial is the same model as previous: its rewards are those of it" in notes.texts
    assert {entry["reference"] for entry in figures["choices"]} == {"previous", "sft", "none"}


def make_other(folder: Path) -> Path:
    from tiny_models import make_llama

    return make_llama(folder, seed=7)


def test_an_equal_audit_is_kept_and_another_is_made(
    llama: Path, other: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = job(llama, pair_rows(), tmp_path, references={"previous": other})
    made = first.run(Notes())
    assert first.incomplete(made.files) == []
    monkeypatch.setattr(Scorer, "sums", lambda *_: pytest.fail("the audit was made again"))
    notes = Notes()
    again = job(llama, pair_rows(), tmp_path, references={"previous": other}).run(notes)
    assert again == made
    assert notes.texts == [f"the same audit is in {tmp_path} already"]
    monkeypatch.undo()
    for changed in ({"beta": 0.5}, {"alpha": 0.1}, {"form": "sum"}, {"seed": 1}, {"references": {"initial": other}}):
        different = job(llama, pair_rows(), tmp_path, **{"references": {"previous": other}, **changed})
        assert different.key() != first.key()
    assert job(llama, pair_rows(), tmp_path, references={"previous": other}, seed=1).run(Notes()).counts != made.counts


def test_a_file_of_the_users_is_set_aside(llama: Path, other: Path, tmp_path: Path) -> None:
    (tmp_path / "audit.json").write_text("mine")
    notes = Notes()
    job(llama, pair_rows(), tmp_path, references={"previous": other}).run(notes)
    assert (tmp_path / "audit.json.damaged").read_text() == "mine"
    assert any("set aside" in text for text in notes.texts)


def test_figures_do_not_depend_on_the_order_of_batches(llama: Path, other: Path) -> None:
    first, second = (
        job(llama, pair_rows(), references={"previous": other}, config=ScoreConfig(token_budget=budget)).run(Notes())
        for budget in (60, 5000)
    )
    accuracies = [[entry["metrics"]["accuracy"] for entry in result.counts["choices"]] for result in (first, second)]
    assert accuracies[0] == accuracies[1]


def test_without_a_reference(llama: Path) -> None:
    figures = job(llama, pair_rows()).run(Notes()).counts
    assert [entry["choice"] for entry in figures["choices"]] == ["none, sum", "none, penalized", "none, per token"]
    assert figures["main"] == "none, penalized"


def test_what_is_refused(llama: Path, other: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="policy and reference are the same model"):
        job(llama, pair_rows(), references={"previous": llama}, config=ScoreConfig()).run(Notes())
    with pytest.raises(DataError, match="tokenizer"):
        job(llama, pair_rows(), references={"previous": make_mistral(tmp_path / "mistral")}).run(Notes())
    long = scored_rows(2, 3).with_columns(prompt=pl.Series([user("a" * MAX_POSITIONS)] * 6, dtype=MESSAGES))
    notes = Notes()
    with pytest.raises(DataError, match="none of the 6 scored responses can be used"):
        job(llama, long).run(notes)
    assert "6 of 6 responses left out: longer than the model's 256 positions" in notes.texts
    equal = pair_rows(2).with_columns(rejected=pl.col("chosen"))
    with pytest.raises(DataError, match="none of the 2 pairs can be used"):
        job(llama, equal).run(Notes())


def test_responses_without_another_are_left_out(llama: Path) -> None:
    rows = scored_rows(10, 3)
    notes = Notes()
    figures = job(llama, rows[:28]).run(notes).counts
    assert notes.texts == ["1 of 28 responses left out: no other response to their prompt is there"]
    assert (figures["prompts"], figures["responses"], figures["best_of"]) == (9, 27, 3)
