"""The implicit reward of a DPO pair of models as a judge: r(x, y) = β·(log π(y|x) − log π_ref(y|x)).

Rafailov et al., arXiv 2305.18290, equation 5, without the term that depends on x alone. Responses are texts here: they
are rendered by the judge's own chat template and end with its stop token, as offline answers do, so the policy that
sampled them may have another tokenizer. The forwards are those of the packed scorer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import polars as pl

from dice_py.config.judges import ImplicitConfig
from dice_py.config.shared import ModelConfig
from dice_py.config.stages import ScoreConfig
from dice_py.errors import UsageError
from dice_py.evaluation.judges.base import ScoringJudge, conversations
from dice_py.events import Report, no_report
from dice_py.models.checkpoint import check_checkpoint
from dice_py.models.comparison import check_distinct, warn_of_unrelated
from dice_py.models.identity import model_identity
from dice_py.models.limits import check_positions, model_positions
from dice_py.models.loading import held_model
from dice_py.models.same_tokenizer import check_same_tokenizer
from dice_py.models.sources import resolve_model
from dice_py.models.template_time import check_time_is_set
from dice_py.models.tokenization import encode_prompt, encode_response, load_tokenizer, stop_token_ids
from dice_py.storage.keys import versions
from dice_py.timing import timed

Encoded = tuple[list[list[int]], list[list[int]]]
"""Token ids of the prompts and of the responses, row by row."""


@dataclass(frozen=True)
class ImplicitJudge(ScoringJudge):
    """Scores responses by the implicit reward of two models."""

    name: ClassVar[str] = "implicit"

    policy: Path
    """π, the folder of the DPO-tuned model; its tokenizer and template serve both."""
    reference: Path
    """π_ref, the folder of the model that its training started from."""
    config: ImplicitConfig
    models: ModelConfig
    """dtype, device, attention implementation, whether code of the models may run, and the template's time."""

    @staticmethod
    def of(config: ImplicitConfig, models: ModelConfig) -> ImplicitJudge:
        """The judge of a config section. It finds the models, downloads ids of the hub, and converts GGUF files.

        Raises:
            DataError: there is no such model.
            UsageError: the policy's chat template prints the time, and model.template_time is not set.
        """
        roles = [(name, f"evaluate.judges.implicit.{name}") for name in ("policy", "reference")]
        policy, reference = (
            resolve_model(getattr(config, name), getattr(config, f"{name}_revision"), role=role) for name, role in roles
        )
        check_time_is_set(models, policy, roles[0][1])
        return ImplicitJudge(policy, reference, config, models)

    def key_fields(self) -> dict[str, Any]:
        """The models, their precision, what the template prints, and the settings of the reward."""
        return {
            "policy": model_identity(self.policy),
            "reference": model_identity(self.reference),
            "settings": self.config.model_dump(include={"beta", "per_token"}),
            "precision": self.models.model_dump(include={"dtype", "device", "attn_implementation", "template_time"}),
            "versions": versions("torch", "transformers"),
        }

    def scores(self, prompts: pl.DataFrame, samples: pl.DataFrame, report: Report = no_report) -> pl.Series:
        """β·(log π − log π_ref) of each response, in nats times β, Float64; per token with `per_token`.

        Raises:
            DataError: a model is incomplete, the template refuses a conversation, or one is too long for the models.
            UsageError: both models have the same weights.
        """
        for role, folder in (("policy", self.policy), ("reference", self.reference)):
            check_checkpoint(folder, f"the judge's {role}", self.models)
        self._check_distinct(report)
        warn_of_unrelated(self.policy, self.reference, report)
        check_same_tokenizer(self.policy, self.reference, self.models, report)
        encoded = self._encode(prompts, samples)
        # The policy last, since it is held: a judge of two sets of samples uses it again at once.
        reference, policy = (self._logps(folder, encoded, report) for folder in (self.reference, self.policy))
        rewards = self.config.beta * (policy - reference)
        return rewards / pl.Series(map(len, encoded[1]), dtype=pl.Float64) if self.config.per_token else rewards

    def _check_distinct(self, report: Report) -> None:
        try:
            check_distinct(self.policy, self.reference, allowed=False, report=report)
        except UsageError:  # whose remedies are those of the stage `score`
            raise UsageError(
                f"the judge's policy and reference are the same model ({self.policy} and {self.reference}), so that "
                "every pair is a tie: give as reference the model that the policy's DPO training started from"
            ) from None

    def _encode(self, prompts: pl.DataFrame, samples: pl.DataFrame) -> Encoded:
        tokenizer = load_tokenizer(self.policy, self.models)
        stops = stop_token_ids(self.policy, tokenizer)
        by_prompt: dict[int, list[int]] = {}
        asked, answered = [], []
        of_rows = samples["prompt_id"].to_list()
        for prompt_id, (where, prompt, response) in zip(of_rows, conversations(prompts, samples), strict=True):
            if prompt_id not in by_prompt:
                by_prompt[prompt_id] = encode_prompt(tokenizer, prompt, where)
            asked.append(by_prompt[prompt_id])
            answered.append(encode_response(tokenizer, prompt, response, stops, where))
        for folder in (self.policy, self.reference):
            check_positions(
                (len(prompt) + len(response) for prompt, response in zip(asked, answered, strict=True)),
                model_positions(folder, self.models),
                where="the responses to judge",
                model=f"the judge's model {folder}",
                remedy="nothing is cut off: leave it out, sample shorter responses, or use models with more positions",
                noun="response",
            )
        return asked, answered

    def _logps(self, folder: Path, encoded: Encoded, report: Report) -> pl.Series:
        """Σ_t log π(y_t | x, y_<t) of each response under one model, in nats."""
        with timed("import"):
            from dice_py.scoring.scorer import Scorer

        scorer = Scorer(held_model(folder, self.models), ScoreConfig(token_budget=self.config.token_budget), report)
        done = 0

        def on_batch(scored: int) -> None:
            nonlocal done
            done += scored
            report("progress", stage="implicit reward", done=done, total=len(encoded[1]), unit="responses")

        return pl.Series(scorer.sums(*encoded, on_batch), dtype=pl.Float64)
