"""Looks at a run's models and data before anything is made from them, in a process of its own.

What would otherwise stop a run after hours: a tokenizer without a template, a template that refuses a prompt
or an offline pair, a model that lacks a token, a scheduler that nobody knows.
"""

from __future__ import annotations

from pathlib import Path

from dice_py.config.run import RunConfig
from dice_py.errors import DataError, UsageError
from dice_py.events import Report, no_report
from dice_py.models.loading import placement
from dice_py.models.tokenization import encode_pairs, encode_prompt, load_tokenizer, stop_token_ids
from dice_py.storage.parquet import read_parquet


def check(
    config: RunConfig,
    *,
    policy: Path,
    reference: Path,
    prompts: list[Path],
    pairs: list[Path],
    report: Report = no_report,
) -> None:
    """Renders every prompt and pair with the policy's template, and holds their tokens against both models.

    Raises:
        DataError: a tokenizer, template or vocabulary that cannot serve, naming the row.
        UsageError: a name in the config that transformers does not know, or a device that is not here.
    """
    from transformers import AutoConfig, SchedulerType
    from transformers.training_args import OptimizerNames

    placement(config.model)
    for key, given, known in (
        ("train.lr_scheduler_type", config.train.lr_scheduler_type, [str(name.value) for name in SchedulerType]),
        ("train.optim", config.train.optim, [str(name.value) for name in OptimizerNames]),
    ):
        if given not in known:
            raise UsageError(f"{key} is {given!r}, which transformers does not know; it knows {', '.join(known)}")
    tokenizer = load_tokenizer(policy, config.model)
    stops = stop_token_ids(policy, tokenizer)
    largest = max(stops)
    for file in prompts:
        for row, messages in read_parquet(file, ["prompt_id", "messages"]).iter_rows():
            largest = max(largest, *encode_prompt(tokenizer, messages, f"prompt {row}"))
        report("note", text=f"checked: {file.name}")
    for file in pairs:
        encoded = encode_pairs(read_parquet(file), tokenizer, stops)
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            largest = max(largest, int(encoded[name].explode().max()))  # type: ignore[arg-type]
        report("note", text=f"checked: {file.name}")
    for folder in (policy, reference):
        if not (folder / "config.json").is_file():
            continue  # an adapter: its base model's config is not here
        found = AutoConfig.from_pretrained(folder, trust_remote_code=config.model.trust_remote_code)
        size = getattr(found.get_text_config(), "vocab_size", None)
        if size is not None and largest >= size:
            raise DataError(
                f"{folder}: the policy's tokenizer gives token id {largest}, but this model's vocabulary has "
                f"{size} entries; policy, reference and tokenizer do not belong together"
            )
