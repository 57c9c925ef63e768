"""The metrics of the evaluate stage on small examples, and the reward accuracy of tiny models."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from tiny_sets import CPU

from dice_py.config.stages import EvaluateConfig, GenerateConfig, ScoreConfig
from dice_py.data import pairs_frame
from dice_py.evaluation.judges.oracle import oracle_metrics
from dice_py.evaluation.metrics import bootstrap_ci95, reward_accuracy, win_rate
from dice_py.evaluation.values import ItemValues
from dice_py.models.tokenization import encode_pairs, load_tokenizer, stop_token_ids
from dice_py.scoring.pairs import score_pairs
from dice_py.stages import evaluate as stage
from dice_py.stages.evaluate import EvaluateJob
from dice_py.storage.files import read_json
from dice_py.storage.parquet import write_parquet
from dice_py.storage.schemas import METRIC_VALUES
from dice_py.synthetic.task import prompt_messages


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def text_pairs(count: int) -> pl.DataFrame:
    """`count` pairs of random letters."""
    rng = random.Random(0)

    def text() -> str:
        return "".join(rng.choices("abcdef ", k=rng.randint(1, 9)))

    return pairs_frame(
        [{"prompt": user(text()), "chosen": assistant(text()), "rejected": assistant(text())} for _ in range(count)]
    )


def test_reward_accuracy_counts_ties_half() -> None:
    chosen, rejected = pl.Series([1.0, 0.0, 2.0, -1.0]), pl.Series([0.0, 1.0, 2.0, -3.0])
    assert reward_accuracy(chosen, rejected) == (1 + 0 + 0.5 + 1) / 4
    assert reward_accuracy(chosen, rejected) + reward_accuracy(rejected, chosen) == 1.0
    assert reward_accuracy(chosen, chosen) == 0.5
    assert reward_accuracy(pl.Series([3]), pl.Series([2])) == 1.0


def test_win_rate_is_over_all_pairs_of_samples() -> None:
    rates = win_rate(
        [
            ([1.0], [0.0]),
            ([0.0], [1.0]),
            ([1.0], [1.0]),
            ([1.0, 0.0], [0.5]),
            ([1.0, 0.5], [0.5, 0.0, 1.0]),  # wins 2, ties 1; wins 1, ties 1
        ]
    )
    assert rates == [1.0, 0.0, 0.5, 0.5, pytest.approx((2.5 + 1.5) / 6)]


def test_win_rates_of_both_sides_sum_to_one() -> None:
    rng = random.Random(0)
    pairs = [([float(rng.randint(0, 3)) for _ in range(4)], [float(rng.randint(0, 3)) for _ in range(3)])] * 20
    swapped = [(theirs, ours) for ours, theirs in pairs]
    assert [a + b for a, b in zip(win_rate(pairs), win_rate(swapped), strict=True)] == pytest.approx([1.0] * 20)


def test_bootstrap_interval() -> None:
    rng = random.Random(0)
    values = [rng.gauss(5.0, 2.0) for _ in range(400)]
    mean = sum(values) / len(values)
    low, high = bootstrap_ci95(values, 0)
    assert low < mean < high
    # 1.96 standard errors on either side, by the normal approximation
    assert high - low == pytest.approx(2 * 1.96 * 2.0 / 20, rel=0.15)
    assert (high + low) / 2 == pytest.approx(mean, abs=0.03)


def test_bootstrap_interval_is_seeded() -> None:
    values = [0.0, 1.0, 0.5, 1.0]
    assert bootstrap_ci95(values, 1) == bootstrap_ci95(values, 1)
    assert bootstrap_ci95([0.25] * 7, 3) == [0.25, 0.25]
    low, high = bootstrap_ci95(values, 2**63 + 1)
    assert 0.0 <= low <= high <= 1.0


def test_oracle_metrics() -> None:
    prompts = pl.DataFrame({"prompt_id": [0, 1], "messages": [prompt_messages("reverse", tuple("abc"))] * 2})
    # Scores of ours 1 and 0.1 (right and wrong), 1 and 0.97; of theirs 1 and 1, 0.1 and 0.1.
    ours = ["c b a .", "a b c .", "c b a . sure", "c b a . sure indeed so"]
    theirs = ["c b a .", "c b a .", "a b c .", "a b c ."]
    samples = [pl.DataFrame({"prompt_id": [0, 0, 1, 1], "response": responses}) for responses in (ours, theirs)]
    metrics = oracle_metrics(prompts, *samples, pl.Series([2.0, 1.0, 0.5, 0.5]), 0)
    assert metrics["oracle_win_rate"] == (0.25 + 1.0) / 2
    assert metrics["oracle_accuracy"] == (0.5 + 1.0) / 2
    assert metrics["start_oracle_accuracy"] == 0.5
    assert metrics["oracle_score"] == pytest.approx((1 + 0.1 + 1 + 0.97) / 4)
    assert metrics["start_oracle_score"] == pytest.approx((1 + 1 + 0.1 + 0.1) / 4)
    # The reward orders the samples of the first prompt as the oracle does, and ties those of the second.
    assert metrics["on_policy_reward_accuracy"] == (1 + 0.5) / 2
    assert metrics["oracle_score_ci95"] == bootstrap_ci95([(1 + 0.1) / 2, (1 + 0.97) / 2], 0)
    collected = ItemValues()
    assert oracle_metrics(prompts, *samples, pl.Series([2.0, 1.0, 0.5, 0.5]), 0, collected) == metrics
    assert collected.frame().select("metric", "item", pl.col("value", "start").round(6)).rows() == [
        ("oracle_win_rate", 0, 0.25, 0.5), ("oracle_win_rate", 1, 1.0, 0.5),
        ("oracle_accuracy", 0, 0.5, 1.0), ("oracle_accuracy", 1, 1.0, 0.0),
        ("oracle_score", 0, 0.55, 1.0), ("oracle_score", 1, 0.985, 0.1),
    ]  # fmt: skip
    for interval in ("oracle_win_rate_ci95", "oracle_accuracy_ci95"):
        assert metrics[interval] == bootstrap_ci95([0.25, 1.0] if "win" in interval else [0.5, 1.0], 0)
    assert metrics["oracle_accuracy_gain_ci95"] == bootstrap_ci95([-0.5, 1.0], 0)


def test_reward_accuracy_of_the_oracle_needs_different_scores() -> None:
    prompts = pl.DataFrame({"prompt_id": [0], "messages": [prompt_messages("copy", tuple("abc"))]})
    samples = pl.DataFrame({"prompt_id": [0, 0], "response": ["a b c .", "a b c ."]})
    assert "on_policy_reward_accuracy" not in oracle_metrics(prompts, samples, samples, None, 0)
    assert oracle_metrics(prompts, samples, samples, pl.Series([1.0, 2.0]), 0)["on_policy_reward_accuracy"] is None


REWARD, INITIAL = "implicit_reward_accuracy", "implicit_reward_accuracy_initial_reference"


def evaluation(
    policy: Path, reference: Path, initial: Path, pairs: Path, folder: Path, start: Path | None = None, **more: Any
) -> EvaluateJob:
    """A job on held-out pairs; log-probabilities are kept in `folder/shared`. `start`: None is the policy."""
    return EvaluateJob(
        EvaluateConfig(pairs=20),
        GenerateConfig(),
        ScoreConfig(allow_same_model=True),
        CPU,
        policy=policy,
        start=start or policy,
        previous=start or policy,
        previous_samples=folder / "before",
        reference=reference,
        initial_reference=initial,
        prompts=None,
        pairs=pairs,
        input_keys=[None, "pairs"],
        out=folder / "out",
        shared=folder / "shared",
        seed=0,
        max_prompt_tokens=100,
        judges=(),
        **more,
    )


def accuracy(
    policy: Path, reference: Path, initial: Path, pairs: pl.DataFrame, folder: Path, start: Path | None = None
) -> dict[str, Any]:
    """The metrics of held-out pairs."""
    file = write_parquet(folder / "pairs.parquet", pairs, key="pairs")
    job = evaluation(policy, reference, initial, file, folder, start)
    result = job.run()
    assert read_json(folder / "out" / "metrics.json") == result.counts
    assert job.incomplete(result.files) == []
    return result.counts


def test_policy_against_itself_ties(llama: Path, other: Path, tmp_path: Path) -> None:
    metrics = accuracy(llama, llama, llama, text_pairs(20), tmp_path)
    assert metrics[REWARD] == metrics[INITIAL] == 0.5
    assert len(list((tmp_path / "shared").iterdir())) == 1  # one model, one pass


def test_accuracy_is_of_the_difference_of_logps(llama: Path, other: Path, tmp_path: Path) -> None:
    policy, reference = llama, other
    pairs = text_pairs(25)
    metrics = accuracy(policy, reference, policy, pairs, tmp_path, start=reference)
    tokenizer = load_tokenizer(policy, CPU)
    encoded = encode_pairs(pairs.head(20), tokenizer, stop_token_ids(policy, tokenizer))
    ours, theirs = (score_pairs(ScoreConfig(), CPU, policy=model, pairs=encoded) for model in (llama, other))
    reward = ours - theirs
    right = sum(chosen > rejected for chosen, rejected in reward.iter_rows())
    lengths = [
        1.0 if len(chosen) > len(rejected) else 0.5 if len(chosen) == len(rejected) else 0.0
        for chosen, rejected in encoded.select("chosen_ids", "rejected_ids").iter_rows()
    ]
    longer = sum(lengths)
    intervals = {name: metrics.pop(name) for name in list(metrics) if re.fullmatch(".*_drift.*_ci95", name)}
    worst = metrics.pop("worst_slice")
    assert metrics == {
        "eval_pairs": 20,  # the limit of the config
        REWARD: right / 20,
        f"{REWARD}_ci95": bootstrap_ci95([float(chosen > rejected) for chosen, rejected in reward.iter_rows()], 0),
        INITIAL: 0.5,
        f"{INITIAL}_ci95": [0.5, 0.5],
        "start_implicit_reward_accuracy": pytest.approx(1 - right / 20),
        "start_implicit_reward_accuracy_ci95": bootstrap_ci95([float(c < r) for c, r in reward.iter_rows()], 0),
        "length_only_accuracy": longer / 20,
        "length_only_accuracy_ci95": bootstrap_ci95(lengths, 0),
        **{
            f"{side}_logp_drift{since}": pytest.approx(reward[f"{side}_logp"].mean(), abs=1e-4)
            for side in ("chosen", "rejected")
            for since in ("", "_previous")
        },
    }
    for side in ("chosen", "rejected"):
        low, high = intervals.pop(f"{side}_logp_drift_ci95")
        assert low < metrics[f"{side}_logp_drift"] < high
        assert intervals.pop(f"{side}_logp_drift_previous_ci95") == [low, high]
    assert intervals == {}
    # Twenty pairs make one slice of enough of them, if the chosen is always the longer or there is one length.
    assert worst is None or worst["pairs"] >= 20
    assert 0 < right < 20
    # The values that the accuracies are means of, and those of the start.
    values = pl.read_parquet(tmp_path / "out" / "values.parquet")
    assert values.schema == METRIC_VALUES
    chosen_first = [float(chosen > rejected) for chosen, rejected in reward.iter_rows()]
    expected = [
        (name, n, value, 1 - chosen_first[n])
        for name, of_pairs in ((REWARD, chosen_first), (INITIAL, [0.5] * 20))
        for n, value in enumerate(of_pairs)
    ]
    assert values.rows() == expected


def test_values_are_by_the_pair_of_the_file(llama: Path, other: Path, tmp_path: Path) -> None:
    """A pair that cannot be used leaves the others' numbers as they are, so that two evaluations can be compared."""
    pairs = text_pairs(6)
    equal = pairs[2].with_columns(rejected=pl.col("chosen"))
    accuracy(llama, other, other, pl.concat([pairs[:2], equal, pairs[3:]]), tmp_path)
    values = pl.read_parquet(tmp_path / "out" / "values.parquet").filter(pl.col("metric") == REWARD)
    assert values["item"].to_list() == [0, 1, 3, 4, 5]


def test_each_model_is_scored_once(llama: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, reference = llama, other
    first = accuracy(policy, reference, reference, text_pairs(20), tmp_path)
    monkeypatch.setattr(stage, "score_pairs", lambda *_, **__: pytest.fail("a model was scored twice"))
    assert accuracy(policy, reference, reference, text_pairs(20), tmp_path) == first
    swapped = accuracy(reference, policy, policy, text_pairs(20), tmp_path)
    assert swapped[REWARD] == pytest.approx(1 - first[REWARD])


def test_other_pairs_are_scored_again(llama: Path, other: Path, tmp_path: Path) -> None:
    policy, reference = llama, other
    pairs = text_pairs(20)
    fresh = accuracy(policy, reference, reference, pairs.reverse(), tmp_path / "fresh")
    accuracy(policy, reference, reference, pairs, tmp_path / "cache")
    assert accuracy(policy, reference, reference, pairs.reverse(), tmp_path / "cache") == fresh
