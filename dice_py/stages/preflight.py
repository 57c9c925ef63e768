"""Checks a run's models and data together, before anything is made from them, in a process of its own.

It finds errors that would otherwise stop a run after hours: a tokenizer without a template, a template that refuses a
prompt or an offline pair, a model that lacks a token, an unknown scheduler, a model that is too large to train here.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dice_py.compute.ray_cluster import check_cluster
from dice_py.config.run import RunConfig
from dice_py.errors import DataError, OutOfMemoryError
from dice_py.events import Report, no_report
from dice_py.generation.engines.factory import check_options, choose_engine
from dice_py.generation.engines.vllm_on_cpu import Workload
from dice_py.models.checkpoint import check_checkpoint
from dice_py.models.comparison import check_distinct, warn_of_unrelated
from dice_py.models.identity import model_identity
from dice_py.models.same_tokenizer import check_same_tokenizer
from dice_py.models.sizes import model_size
from dice_py.models.tokenization import load_tokenizer
from dice_py.replay.mix import requested_counts
from dice_py.stages.job import Job, StageResult
from dice_py.stages.preflight_data import check_data
from dice_py.stages.reward_check import warn_of_rewards
from dice_py.storage.keys import versions
from dice_py.storage.parquet import parquet_rows, read_parquet
from dice_py.training.memory_check import check_training_memory
from dice_py.training.schedule import setting_notes, training_steps
from dice_py.training.settings_check import check_training_settings


@dataclass(frozen=True)
class PreflightJob(Job):
    """Renders every prompt and pair with the policy's template, and compares their tokens with both vocabularies.

    It writes no file; the caller remembers the key of a check that passed.

    Raises, when run:
        DataError: a tokenizer, template or vocabulary that cannot serve, naming the row.
        UsageError: a name in the config that transformers or vLLM does not know, an engine that is not installed, or a
            device that this machine lacks.
        OutOfMemoryError: training does not fit into the memory that is free, and `force` is not set.
    """

    config: RunConfig
    policy: Path
    reference: Path
    prompts: list[Path]
    pairs: list[Path]
    data_key: str
    """A key of the files' content."""
    longest_response: int = 1
    """Tokens of the longest response that a plan has sampled to these prompts."""
    force: bool = False
    """Whether training that does not fit into memory is only warned of."""

    def key_fields(self) -> dict[str, Any]:
        """The data, the models, the config but for how rounds are compared and when to warn, and versions."""
        config = self.config.key_dump(exclude=("rounds", "warnings")) | {"rounds": self.config.rounds.count}
        return {
            "data": self.data_key,
            "policy": model_identity(self.policy),
            "reference": model_identity(self.reference),
            "config": config,
            "versions": versions("transformers"),
        }

    def run(self, report: Report = no_report) -> StageResult:
        """Checks models, settings, prompts and pairs, vocabularies, memory, and rewards of a few pairs."""
        for role, folder in (("model.policy", self.policy), ("model.reference", self.reference)):
            check_checkpoint(folder, role, self.config.model)
        config = self.config
        load_tokenizer(self.policy, config.model)  # whose own errors come before a comparison's
        check_same_tokenizer(self.policy, self.reference, config.model, report)
        if not config.has_round_zero:  # else both are the SFT model, and round 0 makes the policy
            check_distinct(self.policy, self.reference, allowed=config.score.allow_same_model, report=report)
            warn_of_unrelated(self.policy, self.reference, report)
        if config.devices.executor == "ray":
            check_cluster(config.devices)
        self._check_engine()
        self._check_training(report)
        facts = check_data(
            config,
            policy=self.policy,
            reference=self.reference,
            prompts=self.prompts,
            pairs=self.pairs,
            report=report,
        )
        self._check_vocabulary(self.policy, facts.largest_id)
        self._check_vocabulary(self.reference, max(facts.largest_id, self._largest_sampled()))
        try:
            check_training_memory(
                config.train, config.model, config.devices, self.policy,
                prompt=facts.longest_prompt, response=self.longest_response,
            )  # fmt: skip
        except OutOfMemoryError as error:
            if not self.force:
                raise
            report("note", text=f"warning: {error}. The run goes on, since --force was given")
        if facts.offline is not None:
            warn_of_rewards(config, self.policy, self.reference, facts.offline, report)
        return StageResult([], {})

    def _check_engine(self) -> None:
        """Checks that the engine of the first round is there, and takes the options that are passed on to it."""
        config = self.config
        generate = config.generate
        if generate.engine == "auto" and not generate.sampling_params and not generate.vllm.engine_args:
            return
        prompts = read_parquet(self.prompts[0], ["messages"]) if self.prompts else None
        if prompts is not None and config.data.prompts_per_round is not None:
            prompts = prompts.head(config.data.prompts_per_round)
        workload = None if prompts is None else Workload.of(self.policy, prompts)
        engine, _ = choose_engine(generate, config.model, workload)
        check_options(engine, generate, config.model, self.policy)

    def _check_training(self, report: Report) -> None:
        train, remote_code = self.config.train, self.config.model.trust_remote_code
        trainings = [("train", train, self._most_steps())]
        if self.config.has_round_zero:
            trainings.append(("round0", self.config.round0.training(train), None))
        for section, training, steps in trainings:
            check_training_settings(training, self.policy, section=section, remote_code=remote_code)
            for note in setting_notes(training, steps, section=section):
                report("note", text=note)

    def _most_steps(self) -> int | None:
        """The optimizer steps of a round, if every prompt has all of its pairs; None if the data is not known."""
        if not self.prompts:
            return None
        config = self.config
        prompts = min(parquet_rows(self.prompts[0]), config.data.prompts_per_round or sys.maxsize)
        mined, replayed = requested_counts(
            prompts * config.most_pairs_per_prompt(), config.replay.gamma, config.replay.total
        )
        return training_steps(config.train, mined + replayed)

    def _largest_sampled(self) -> int:
        """The largest token id that the policy can sample: of its tokenizer, as far as the model has it."""
        tokenizer = load_tokenizer(self.policy, self.config.model)
        return min(len(tokenizer), model_size(self.policy).vocabulary or len(tokenizer)) - 1

    def _check_vocabulary(self, folder: Path, largest: int) -> None:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, trust_remote_code=self.config.model.trust_remote_code)
        size = getattr(config.get_text_config(), "vocab_size", None)
        if size is not None and largest >= size:
            raise DataError(
                f"{folder}: the policy's tokenizer has token id {largest}, but this model's vocabulary has "
                f"{size} entries (vocab_size); policy, reference and tokenizer do not belong together"
            )
