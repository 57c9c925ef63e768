"""Checks a run's models and data together, before anything is made from them, in a process of its own.

It finds errors that would otherwise stop a run after hours: a tokenizer without a template, a template that refuses a
prompt or an offline pair, a model that lacks a token, an unknown scheduler, a model that is too large to train here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.config.run import RunConfig
from dice_py.errors import DataError, UsageError
from dice_py.events import Report, no_report
from dice_py.models.checkpoint import check_checkpoint
from dice_py.models.comparison import check_distinct, warn_of_unrelated
from dice_py.models.identity import model_identity
from dice_py.models.sizes import model_size
from dice_py.models.tokenization import encode_pairs, encode_prompt, load_tokenizer, stop_token_ids
from dice_py.stages.job import Job, StageResult
from dice_py.stages.reward_check import warn_of_rewards
from dice_py.storage.keys import versions
from dice_py.storage.parquet import read_parquet
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

    def key_fields(self) -> dict[str, Any]:
        """The data, the models, the complete config and versions."""
        return {
            "data": self.data_key,
            "policy": model_identity(self.policy),
            "reference": model_identity(self.reference),
            "config": self.config.model_dump(),
            "versions": versions("transformers"),
        }

    def run(self, report: Report = no_report) -> StageResult:
        """Checks models, names, prompts and pairs, vocabularies, memory, and rewards of a few pairs."""
        for role, folder in (("model.policy", self.policy), ("model.reference", self.reference)):
            check_checkpoint(folder, role, self.config.model)
        config = self.config
        if not config.has_round_zero:  # else both are the SFT model, and round 0 makes the policy
            check_distinct(self.policy, self.reference, allowed=config.score.allow_same_model, report=report)
            warn_of_unrelated(self.policy, self.reference, report)
        self._check_names()
        largest, longest_prompt, offline = self._read(report)
        self._check_vocabulary(self.policy, largest)
        self._check_vocabulary(self.reference, max(largest, self._largest_sampled()))
        check_training_memory(
            config.train, config.model, config.devices, self.policy,
            prompt=longest_prompt, response=self.longest_response,
        )  # fmt: skip
        if offline is not None:
            warn_of_rewards(config, self.policy, self.reference, offline, report)
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

    def _read(self, report: Report) -> tuple[int, int, pl.DataFrame | None]:
        """The largest token id of all prompts, pairs and stop tokens, the tokens of the longest prompt in use, and the
        first file's pairs as token ids."""
        tokenizer = load_tokenizer(self.policy, self.config.model)
        stops = stop_token_ids(self.policy, tokenizer)
        largest, longest = max(stops), 1
        for file in self.prompts:
            for row, messages in read_parquet(file, ["prompt_id", "messages"]).iter_rows():
                token_ids = encode_prompt(tokenizer, messages, f"prompt {row}")
                largest = max(largest, *token_ids)
                if len(token_ids) <= self.config.data.max_prompt_tokens:
                    longest = max(longest, len(token_ids))
            report("note", text=f"checked: {file.name}")
        offline: pl.DataFrame | None = None
        for file in self.pairs:
            encoded = encode_pairs(read_parquet(file), tokenizer, stops)
            for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
                largest = max(largest, int(encoded[name].explode().max()))  # type: ignore[arg-type]
            offline = encoded if offline is None else offline
            report("note", text=f"checked: {file.name}")
        return largest, longest, offline

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
