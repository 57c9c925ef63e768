"""The part of the pre-check that reads texts: renders every prompt and pair, and compares tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.config.run import RunConfig
from dice_py.errors import DataError, UsageError
from dice_py.events import Report
from dice_py.generation.limits import check_fits
from dice_py.models.limits import model_positions
from dice_py.models.tokenization import encode_pairs, encode_prompts, load_tokenizer, stop_token_ids, turn_end_note
from dice_py.storage.parquet import read_parquet


@dataclass(frozen=True)
class TokenFacts:
    """What the tokens of a run's data come to."""

    largest_id: int
    """Of all prompts, pairs and stop tokens."""
    longest_prompt: int
    """Tokens of the longest prompt that is sampled on."""
    offline: pl.DataFrame | None
    """The pairs of the first file, as token ids."""


def check_data(
    config: RunConfig,
    *,
    policy: Path,
    reference: Path,
    prompts: Sequence[Path],
    pairs: Sequence[Path],
    report: Report,
) -> TokenFacts:
    """Renders and tokenizes all prompts and pairs with the policy's tokenizer.

    Raises:
        DataError: the template refuses a row, or no pair of a file can be used.
        UsageError: prompts and responses are too long for the models, or train.max_length is below every prompt.
    """
    tokenizer = load_tokenizer(policy, config.model)
    stops = stop_token_ids(policy, tokenizer)
    if note := turn_end_note(tokenizer, stops, policy):
        report("note", text=note)
    largest, lengths = max(stops), []
    for file in prompts:
        encoded = encode_prompts(read_parquet(file), tokenizer, rule=config.data.bad_rows, report=report)
        largest = max([largest, *(max(ids) for _, ids in encoded)])
        kept = [len(ids) for _, ids in encoded if len(ids) <= config.data.max_prompt_tokens]
        if not kept:
            raise DataError(
                f"none of the {len(encoded)} prompts of {file.name} has at most {config.data.max_prompt_tokens} "
                "tokens; raise data.max_prompt_tokens"
            )
        lengths += kept
        report("note", text=f"checked: {file.name}")
    encoded_pairs = _check_pairs(config, policy, pairs, tokenizer, stops, report)
    for frame in encoded_pairs:
        ids = frame.select(pl.col("prompt_ids", "chosen_ids", "rejected_ids").list.max().max())
        largest = max([largest, *ids.row(0)])
    longest = max(lengths, default=1)
    if lengths:
        _check_max_length(config, lengths, report)
        for folder in (policy, reference):
            check_fits(folder, config.model, longest, 0, config.generate.max_new_tokens)
    return TokenFacts(largest, longest, encoded_pairs[0] if encoded_pairs else None)


def _check_pairs(
    config: RunConfig, policy: Path, pairs: Sequence[Path], tokenizer: Any, stops: list[int], report: Report
) -> list[pl.DataFrame]:
    """The usable pairs of each file, as token ids."""
    positions = model_positions(policy, config.model)
    usable = []
    for file in pairs:
        stored = read_parquet(file)
        encoded = encode_pairs(stored, tokenizer, stops, positions=positions, rule=config.data.bad_rows, report=report)
        if encoded.is_empty():
            raise DataError(
                f"none of the {stored.height} offline pairs in {file.name} can be used: they are too long for the "
                f"model in {policy}, or chosen and rejected have the same tokens"
            )
        usable.append(encoded)
        longer = pl.max_horizontal(pl.col("chosen_ids", "rejected_ids").list.len())
        lengths = encoded.select(pl.col("prompt_ids").list.len() + longer).to_series().to_list()
        _warn_too_long(config, lengths, "pairs", report)
        report("note", text=f"checked: {file.name}")
    return usable


def _check_max_length(config: RunConfig, prompts: list[int], report: Report) -> None:
    limit, shortest = config.train.max_length, min(prompts)
    if limit is not None and shortest >= limit:
        raise UsageError(
            f"train.max_length is {limit}, but the shortest prompt alone has {shortest} tokens: no pair could be "
            "trained on; raise it"
        )
    _warn_too_long(config, [length + 1 for length in prompts], "prompts", report)


def _warn_too_long(config: RunConfig, lengths: Sequence[int], noun: str, report: Report) -> None:
    """A note where train.max_length leaves out more than a tenth: the trainer cuts nothing."""
    limit = config.train.max_length
    out = 0 if limit is None else sum(length > limit for length in lengths)
    if out > len(lengths) / 10:
        what = "offline pairs" if noun == "pairs" else "prompts, with every answer to them,"
        report(
            "note",
            text=f"warning: train.max_length={limit} leaves {out} of {len(lengths)} {what} out of the training, since "
            f"they are longer (the longest has {max(lengths)} tokens); raise it if they are meant to be trained on",
        )
