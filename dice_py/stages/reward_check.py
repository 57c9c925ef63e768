"""Rewards of a few offline pairs under policy and reference, before anything is sampled.

They show what no file shows: models that were given the wrong way round, and a model with random weights. The figures
are kept in the cache, so that `dice run` after `dice plan` does not compute them again.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.config.run import RunConfig
from dice_py.evaluation.metrics import reward_accuracy
from dice_py.evaluation.plausibility import mean_loss, random_warning, swap_warning
from dice_py.events import Report
from dice_py.models.identity import model_identity
from dice_py.models.limits import model_positions
from dice_py.models.loading import placement, release_held
from dice_py.models.sizes import model_size
from dice_py.scoring.pairs import score_pairs
from dice_py.storage.cache import recall, remember
from dice_py.storage.keys import digest, seed_for, versions

_PAIRS = 64
CPU_WORK = 2e12
"""Parameters × tokens of one model on a CPU: some tens of seconds on a few cores."""
_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


def warn_of_rewards(config: RunConfig, policy: Path, reference: Path, pairs: pl.DataFrame, report: Report) -> None:
    """Reports warnings, as notes, where the implicit reward on offline pairs cannot be right.

    Up to 64 pairs are scored; on a CPU fewer, or none, if the models are large.

    Args:
        pairs: `prompt_ids`, `chosen_ids` and `rejected_ids`, lists of token ids.
        policy, reference: before round 0 the same folder; then only its loss is looked at.
    """
    few = _few(config, [policy, reference], pairs)
    if few.is_empty():
        return
    identities = [model_identity(policy), model_identity(reference)]
    content = [few[name].to_list() for name in _IDS]
    model_fields = config.model.model_dump(include={"dtype", "device", "attn_implementation"})
    key = digest(identities, content, model_fields, versions("torch", "transformers"))
    figures = recall("rewards", key)
    if figures is None:
        figures = _measure(config, policy, reference, few)
        remember("rewards", key, figures)
    warnings = [
        random_warning(role, figures["losses"][role], model_size(folder).vocabulary)
        for role, folder in (("policy", policy), ("reference", reference))
        if role in figures["losses"]
    ]
    if figures["accuracy"] is not None:
        warnings.append(swap_warning(figures["accuracy"], few.height))
    for text in warnings:
        if text is not None:
            report("note", text=text)


def _few(config: RunConfig, folders: list[Path], pairs: pl.DataFrame) -> pl.DataFrame:
    """The pairs that are scored: a seeded sample, cut where it would take too long on a CPU."""
    limits = [model_positions(folder, config.model) for folder in folders] + [config.train.max_length]
    limit = min((limit for limit in limits if limit is not None), default=float("inf"))
    length = pl.sum_horizontal(pl.col(name).list.len() for name in _IDS)
    fitting = pairs.select(*_IDS).filter(length <= limit)
    rows = list(range(fitting.height))
    random.Random(seed_for(config.seed, "reward check")).shuffle(rows)
    few = fitting[rows[:_PAIRS]]
    if placement(config.model).device.startswith("cuda"):
        return few
    parameters = max(model_size(folder).parameters for folder in folders)
    return few.filter(few.select(length.cast(pl.Float64).cum_sum() * parameters <= CPU_WORK).to_series())


def _measure(config: RunConfig, policy: Path, reference: Path, few: pl.DataFrame) -> dict[str, Any]:
    """The accuracy of the reward (None where policy and reference are one folder), and each model's mean loss."""
    logps = {
        role: score_pairs(config.score, config.model, policy=folder, pairs=few)
        for role, folder in (("reference", reference), ("policy", policy))
        if role == "policy" or folder != policy
    }
    release_held()
    accuracy = None
    if "reference" in logps:
        chosen, rejected = (
            logps["policy"][side] - logps["reference"][side] for side in ("chosen_logp", "rejected_logp")
        )
        accuracy = reward_accuracy(chosen, rejected)
    losses = {role: mean_loss(frame["chosen_logp"], few["chosen_ids"]) for role, frame in logps.items()}
    return {"accuracy": accuracy, "losses": losses}
