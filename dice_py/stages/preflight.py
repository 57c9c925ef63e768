"""Checks a run's models and data together, before anything is made from them, in a process of its own.

It finds errors that would otherwise stop a run after hours: a tokenizer without a template, a template that refuses a
prompt or an offline pair, a model that lacks a token, an unknown scheduler, a model that is too large to train here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dice_py.config.run import RunConfig
from dice_py.errors import DataError, UsageError
from dice_py.events import Report, no_report
from dice_py.models.loading import model_identity, placement
from dice_py.models.same_tokenizer import check_same_tokenizer
from dice_py.stages.job import Job, StageResult
from dice_py.stages.preflight_data import check_data
from dice_py.storage.keys import digest, versions
from dice_py.training.memory_check import check_training_memory


@dataclass(frozen=True)
class PreflightJob(Job):
    """Renders every prompt and pair with the policy's template, and compares their tokens with both vocabularies.

    It writes no file; the caller remembers the key of a check that passed.

    Raises, when run:
        DataError: a tokenizer, template or vocabulary that cannot serve, naming the row.
        UsageError: a name in the config that transformers does not know, or a device that this machine lacks.
        OutOfMemoryError: training does not fit into the memory that is free.
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

    def key(self) -> str:
        """A digest of the data, the models, the complete config and versions."""
        models = [model_identity(self.policy), model_identity(self.reference)]
        return digest("check", self.data_key, models, self.config.model_dump(), versions("transformers"))

    def run(self, report: Report = no_report) -> StageResult:
        """Checks names, then prompts and pairs, then vocabularies, then memory."""
        placement(self.config.model)
        self._check_names()
        config = self.config
        check_same_tokenizer(self.policy, self.reference, config.model, report)
        facts = check_data(
            config,
            policy=self.policy,
            reference=self.reference,
            prompts=self.prompts,
            pairs=self.pairs,
            report=report,
        )
        for folder in (self.policy, self.reference):
            self._check_vocabulary(folder, facts.largest_id)
        check_training_memory(
            config.train, config.model, config.devices, self.policy,
            prompt=facts.longest_prompt, response=self.longest_response,
        )  # fmt: skip
        return StageResult([], {})

    def _check_names(self) -> None:
        from transformers import SchedulerType
        from transformers.training_args import OptimizerNames

        train = self.config.train
        schedulers = [str(kind.value) for kind in SchedulerType]
        for key, name, known in (
            ("train.lr_scheduler_type", train.lr_scheduler_type, schedulers),
            ("round0.lr_scheduler_type", self.config.round0.training(train).lr_scheduler_type, schedulers),
            ("train.optim", train.optim, [str(kind.value) for kind in OptimizerNames]),
        ):
            if name not in known:
                raise UsageError(f"{key} is {name!r}, which transformers does not know; it knows {', '.join(known)}")

    def _check_vocabulary(self, folder: Path, largest: int) -> None:
        from transformers import AutoConfig

        if not (folder / "config.json").is_file():
            return  # an adapter: its base model's config is not here
        config = AutoConfig.from_pretrained(folder, trust_remote_code=self.config.model.trust_remote_code)
        size = getattr(config.get_text_config(), "vocab_size", None)
        if size is not None and largest >= size:
            raise DataError(
                f"{folder}: the policy's tokenizer has token id {largest}, but this model's vocabulary has "
                f"{size} entries; policy, reference and tokenizer do not belong together"
            )
