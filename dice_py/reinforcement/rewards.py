"""Rewards of sampled responses: the round's implicit reward, corrected for length, or the scores of a judge.

A response that the token limit cut off, or that has no token, has no reward, as mining does not use it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import polars as pl

from dice_py.config.mining import Debias, MineConfig
from dice_py.config.shared import ModelConfig
from dice_py.config.stages import ScoreConfig
from dice_py.errors import UsageError
from dice_py.evaluation.judges.base import Judge, PairwiseJudge, ScoringJudge
from dice_py.events import Report, no_report
from dice_py.models.identity import model_identity
from dice_py.models.loading import load_model
from dice_py.models.thinking import AnswerLength
from dice_py.timing import timed

if TYPE_CHECKING:
    from dice_py.scoring.scorer import Scorer


CUT_OFF = "completions/cut_off"
"""In the log: the share of the responses that the token limit cut off."""


@dataclass(frozen=True)
class Responses:
    """Complete responses that were sampled for a step.

    Attributes:
        prompts: token ids of each response's prompt.
        responses: token ids, the stop token included.
        texts: the responses' texts, without special tokens.
        of_prompt: the number of each response's prompt; equal numbers are the same prompt.
        messages: by the number of a prompt (storage.schemas.MESSAGES).
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    texts: list[str]
    of_prompt: list[int]
    messages: pl.Series


class Rewards(Protocol):
    """Scores the responses of a step in one call."""

    def __call__(self, sampled: Responses, report: Report = no_report) -> list[float]:
        """The reward of each response; more is better. NaN: it has none."""
        ...


class RewardSource(Protocol):
    """The settings of rewards, picklable; what they need is loaded by `load`."""

    def key_fields(self) -> dict[str, Any]:
        """All that decides the rewards, by name (JSON values)."""
        ...

    def folders(self) -> list[Path]:
        """The model folders of the run that it reads."""
        ...

    def load(self, report: Report = no_report) -> Rewards:
        """Loads models, where there are any."""
        ...


@dataclass(frozen=True)
class LengthPenalty:
    """The correction of rewards for length that mining made in the round."""

    debias: Debias
    length: str
    """The unit, `mine.length`."""
    alpha: float
    """Of `debias=linear`: reward per unit of length."""
    tokenizer: Path | None = None
    """The folder of the tokenizer, for `length=answer_tokens`."""
    thinking: tuple[str, ...] | None = None
    """The delimiters of the thinking part, for the same."""

    @staticmethod
    def of(mine: MineConfig, alpha: float | None, policy: Path, thinking: Sequence[str] | None) -> LengthPenalty:
        """That of a mining.

        Args:
            alpha: the penalty that it found (`MinedPairs.alpha`).

        Raises:
            UsageError: it corrects by buckets, whose means are those of the mined responses.
        """
        if mine.debias == "bucket":
            raise UsageError(
                "train.method is mpo, whose reward has the length penalty of mining, but mine.debias is bucket, which "
                "has none for new responses: set mine.debias=linear, per_token or none"
            )
        return LengthPenalty(
            mine.debias, mine.length, alpha or 0.0, policy, None if thinking is None else tuple(thinking)
        )

    def key_fields(self) -> dict[str, Any]:
        """The kind, the unit and the penalty."""
        thinking = {"thinking": self.thinking} if self.length == "answer_tokens" else {}
        return {"debias": self.debias, "length": self.length, "alpha": self.alpha, **thinking}

    def apply(self, rewards: Sequence[float], sampled: Responses) -> list[float]:
        """The score by which mining ranks responses, of new ones (mining/ranking.py)."""
        if self.debias not in ("linear", "per_token"):
            return list(rewards)
        lengths = self._lengths(sampled)
        if self.debias == "per_token":
            return [reward / max(length, 1) for reward, length in zip(rewards, lengths, strict=True)]
        return [reward - self.alpha * length for reward, length in zip(rewards, lengths, strict=True)]

    def _lengths(self, sampled: Responses) -> list[int]:
        if self.length == "chars":
            return list(map(len, sampled.texts))
        if self.length == "tokens":
            return list(map(len, sampled.responses))
        assert self.tokenizer is not None
        answer = AnswerLength.of_folder(self.tokenizer, self.thinking)
        return [
            answer.of(response, is_opened=answer.is_opened_by(prompt))
            for prompt, response in zip(sampled.prompts, sampled.responses, strict=True)
        ]


@dataclass(frozen=True)
class ImplicitRewards:
    """The debiased implicit reward of a round: β·(log π(y|x) − log π_ref(y|x)) of its policy and its reference.

    Source: Chen et al., arXiv 2406.09760, eq. 3 and 5.
    """

    policy: Path
    reference: Path
    config: ScoreConfig
    models: ModelConfig
    beta: float
    penalty: LengthPenalty

    def key_fields(self) -> dict[str, Any]:
        """Both models, β and the correction for length."""
        return {
            "policy": model_identity(self.policy),
            "reference": model_identity(self.reference),
            "beta": self.beta,
            "score": self.config.model_dump(),
            "length penalty": self.penalty.key_fields(),
        }

    def folders(self) -> list[Path]:
        """Its policy and its reference."""
        return [self.policy, self.reference]

    def load(self, report: Report = no_report) -> LoadedImplicitRewards:
        """Loads both models onto their device."""
        with timed("import"):
            from dice_py.scoring.scorer import Scorer

        policy, reference = (
            Scorer(load_model(folder, self.models), self.config, report) for folder in (self.policy, self.reference)
        )
        return LoadedImplicitRewards(self, policy, reference)


class LoadedImplicitRewards:
    """`ImplicitRewards` with both models in memory."""

    def __init__(self, settings: ImplicitRewards, policy: Scorer, reference: Scorer) -> None:
        self.settings, self.policy, self.reference = settings, policy, reference

    def undebiased(self, sampled: Responses) -> pl.Series:
        """r of each response as the score stage stores it: f32, without the penalty."""
        logps, ref_logps = (
            pl.Series(scorer.sums(sampled.prompts, sampled.responses), dtype=pl.Float64)
            for scorer in (self.policy, self.reference)
        )
        # The difference is taken before rounding to f32: two sums of -1000 share most of their digits.
        return (self.settings.beta * (logps - ref_logps)).cast(pl.Float32)

    def __call__(self, sampled: Responses, report: Report = no_report) -> list[float]:
        """The debiased reward of each response, in nats times β."""
        del report
        return self.settings.penalty.apply(self.undebiased(sampled).to_list(), sampled)


@dataclass(frozen=True)
class JudgeRewards:
    """The scores of a judge; of one that compares, a response's mean preference over the prompt's others."""

    judge: Judge

    def key_fields(self) -> dict[str, Any]:
        """The judge and what decides its verdicts."""
        return {"judge": self.judge.name, **self.judge.key_fields()}

    def folders(self) -> list[Path]:
        """None: a judge's model is none of the run's."""
        return []

    def load(self, report: Report = no_report) -> JudgeRewards:
        """A judge loads what it needs on its first call."""
        del report
        return self

    def __call__(self, sampled: Responses, report: Report = no_report) -> list[float]:
        """The reward of each response: a score, or a probability from 0 to 1."""
        ids = pl.Series("prompt_id", sampled.of_prompt, dtype=pl.UInt32)
        asked = ids.unique(maintain_order=True)
        prompts = pl.DataFrame({"prompt_id": asked, "messages": sampled.messages.gather(asked)})
        samples = pl.DataFrame({"prompt_id": ids, "response": pl.Series(sampled.texts, dtype=pl.String)})
        if isinstance(self.judge, ScoringJudge):
            return self.judge.scores(prompts, samples, report).to_list()
        assert isinstance(self.judge, PairwiseJudge)
        pairs = [
            (first, second)
            for first in range(samples.height)
            for second in range(first + 1, samples.height)
            if sampled.of_prompt[first] == sampled.of_prompt[second]
        ]
        ours, theirs = (samples[[pair[side] for pair in pairs]] for side in (0, 1))
        verdicts = self.judge.preferences(prompts, ours, theirs, report).to_list() if pairs else []
        won: list[list[float]] = [[] for _ in range(samples.height)]
        for (first, second), preference in zip(pairs, verdicts, strict=True):
            if preference is not None:
                won[first].append(preference)
                won[second].append(1 - preference)
        return [sum(each) / len(each) if each else math.nan for each in won]
