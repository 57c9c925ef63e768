"""The rewards of stage 2: those of the score stage on the same tokens, less the length penalty; or a judge's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import polars as pl
import pytest
from tiny_reinforcement import BETA, implicit, responses
from tiny_sets import CPU, IDS, token_pairs

from dice_py.config.mining import MineConfig, MiningOptions
from dice_py.config.stages import ScoreConfig
from dice_py.errors import UsageError
from dice_py.evaluation.judges.base import PairwiseJudge
from dice_py.evaluation.judges.oracle import OracleJudge
from dice_py.events import Report, no_report
from dice_py.mining.ranking import ranking_scores
from dice_py.reinforcement.rewards import JudgeRewards, LengthPenalty, Responses
from dice_py.stages.score import ScoreJob
from dice_py.storage.parquet import write_parquet
from dice_py.storage.schemas import MESSAGES
from dice_py.synthetic.task import prompt_messages


@pytest.fixture(scope="module")
def sampled() -> Responses:
    pairs = token_pairs(9)
    texts = [f"text of {len(ids)} tokens" for ids in pairs["chosen_ids"]]
    return responses(pairs["prompt_ids"].to_list(), pairs["chosen_ids"].to_list(), texts)


@pytest.fixture(scope="module")
def scored(sampled: Responses, llama: Path, other: Path, tmp_path_factory: pytest.TempPathFactory) -> pl.Series:
    """What the score stage says of the same tokens."""
    folder = tmp_path_factory.mktemp("scored")
    columns = {"prompt_token_ids": sampled.prompts, "token_ids": sampled.responses}
    file = write_parquet(folder / "g.parquet", pl.DataFrame(columns, schema=dict.fromkeys(columns, IDS)), key="sampled")
    config = ScoreConfig(token_budget=200)
    result = ScoreJob(config, CPU, llama, other, [file], ["sampled"], folder / "score", BETA).run()
    return pl.read_parquet(result.files[0][0])["reward"]


def test_the_reward_is_that_of_the_score_stage(sampled: Responses, scored: pl.Series, llama: Path, other: Path) -> None:
    loaded = implicit(llama, other).load()
    assert loaded.undebiased(sampled).to_list() == scored.to_list()


@pytest.mark.parametrize("length", ["tokens", "chars"])
@pytest.mark.parametrize("debias", ["none", "linear", "per_token", "matched"])
def test_the_penalty_is_that_of_mining(
    sampled: Responses, scored: pl.Series, llama: Path, other: Path, debias: Any, length: Any
) -> None:
    penalty = LengthPenalty(debias, length, 0.07)
    rewards = implicit(llama, other, penalty).load()(sampled)
    lengths = [len(each) for each in (sampled.responses if length == "tokens" else sampled.texts)]
    frame = pl.DataFrame({"prompt_id": 0, "reward": scored, "response_tokens": lengths})
    tolerance = {"length_tolerance": 3} if debias == "matched" else {}
    options = MiningOptions(prompt_column="prompt_id", debias=debias, truncated_column=None, **tolerance)
    assert rewards == ranking_scores(frame, options, 0.07).to_list()


def test_buckets_have_no_penalty_for_new_responses(llama: Path) -> None:
    with pytest.raises(UsageError, match=r"mine\.debias is bucket.*set mine\.debias=linear"):
        LengthPenalty.of(MineConfig(debias="bucket"), 0.1, llama, None)


def test_other_penalties_have_other_keys(llama: Path, other: Path) -> None:
    keys = [
        str(implicit(llama, other, penalty).key_fields())
        for penalty in (
            LengthPenalty("linear", "tokens", 0.1),
            LengthPenalty("linear", "tokens", 0.2),
            LengthPenalty("linear", "chars", 0.1),
        )
    ]
    assert len(set(keys)) == len(keys)


def test_a_scoring_judge() -> None:
    prompts = [prompt_messages("reverse", ("a", "b", "c")), prompt_messages("copy", ("d", "a", "b"))]
    texts = ["c b a . sure", "a b c .", "d a b ."]
    sampled = Responses([[7], [7], [8]], [[9], [9], [9]], texts, [0, 0, 1], pl.Series(prompts, dtype=MESSAGES))
    asked = pl.DataFrame({"prompt_id": [0, 1], "messages": sampled.messages})
    answered = pl.DataFrame({"prompt_id": [0, 0, 1], "response": texts})
    rewards = JudgeRewards(OracleJudge()).load()(sampled)
    assert rewards == OracleJudge().scores(asked, answered).to_list()
    assert rewards[0] == rewards[2] == 1.0 > rewards[1]


@dataclass(frozen=True)
class LongerIsBetter(PairwiseJudge):
    """Prefers the longer text; of a text with "?" it gives no verdict."""

    name: ClassVar[str] = "longer"

    def key_fields(self) -> dict[str, Any]:
        return {}

    def preferences(
        self, prompts: pl.DataFrame, ours: pl.DataFrame, theirs: pl.DataFrame, report: Report = no_report
    ) -> pl.Series:
        del prompts, report
        assert (ours["prompt_id"] == theirs["prompt_id"]).all()
        pairs = zip(ours["response"], theirs["response"], strict=True)
        return pl.Series(
            [None if "?" in one + two else (len(one) > len(two)) + 0.5 * (len(one) == len(two)) for one, two in pairs],
            dtype=pl.Float64,
        )


def test_a_pairwise_judge_gives_the_mean_preference_over_the_others() -> None:
    texts = ["aaa", "a", "aa", "?", "b", "c"]
    sampled = Responses([[7]] * 6, [[9]] * 6, texts, [0, 0, 0, 0, 1, 2], responses([[7]] * 3, [[9]] * 3).messages)
    rewards = JudgeRewards(LongerIsBetter())(sampled)
    assert rewards[:3] == [1.0, 0.0, 0.5]
    assert all(map(math.isnan, rewards[3:]))  # no verdict, and nothing to be compared with
