"""The pairs that a training method trains on: what it makes of the labels of the training set, as terms of each loss.

A training set of plain DPO has no term: its columns are those of training/dataset.py. The terms are in the columns
`PAIR_TERMS`; training/pair_loss.py puts them into TRL's loss.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from dice_py.config.training import TrainConfig
from dice_py.errors import DataError
from dice_py.storage.parquet import parquet_meta, present
from dice_py.storage.schemas import SHARED_LOGPS, START_LOGPS
from dice_py.training.dataset import COLUMNS, load_training_set
from dice_py.training.methods.base import TERMS, Settings
from dice_py.training.methods.registry import METHODS

PAIR_TERMS = (*TERMS, "weight", *SHARED_LOGPS)
"""Columns of the trainer's pairs beyond log-probabilities of the complete responses; a column is there where it is
needed."""
TRAINER_COLUMNS = (*COLUMNS, *START_LOGPS, *PAIR_TERMS)
"""All columns that the trainer's pairs may have."""

_REMEDIES = {
    "chosen_win_rate": "mine with mine.win_rates=true",
    "rejected_win_rate": "mine with mine.win_rates=true",
    "soft_label": "mine with mine.soft_labels=true",
    "difficulty": "mine with mine.difficulty_quantile=0.1",
    "consistency": "mine with mine.second_reward",
    **dict.fromkeys(SHARED_LOGPS, "make the training set with train.ld_alpha set (dice replay --set train.ld_alpha=…)"),
}


def load_pairs(path: Path, config: TrainConfig, beta: float, vocabulary: int | None = None) -> tuple[pl.DataFrame, int]:
    """The pairs of a training set for `train.method`, and the number of those that are too long.

    Args:
        path: a Parquet file with the schema `TRAINING_SET`, the labels that the method reads, and the weight column.
        beta: of the loss.
        vocabulary: as in `load_training_set`.

    Returns:
        Some of `TRAINER_COLUMNS`, terms as float64: log-probabilities and shifts in nats, labels and weights without a
        unit, weights with the mean 1.

    Raises:
        DataError: as `load_training_set`; or a label or weight is missing or out of its range.
        UsageError: the method needs a penalty that the training set does not name.
    """
    method = METHODS[config.method]
    shared = SHARED_LOGPS if config.ld_alpha is not None else ()
    weight = () if config.weight_column is None else (config.weight_column,)
    further = (*method.labels, *shared, *weight)
    _check_present(path, config, further)
    pairs, too_long = load_training_set(path, config.max_length, vocabulary, further=further)
    for name in method.labels:
        _check_label(pairs, name, path)
    if method.keeps is not None:
        pairs = pairs.filter(method.keeps)
        if pairs.is_empty():
            raise DataError(
                f"{path}: train.method={method.name} leaves no pair to train on: all of them are hard; lower "
                "mine.difficulty_quantile and mine again"
            )
    meta = parquet_meta(path)
    alpha = meta.get("mined_alpha") if isinstance(meta, dict) else None
    terms = method.terms(pairs, Settings(config, beta, alpha))
    if config.weight_column is not None:
        terms["weight"] = _weights(pairs[config.weight_column], path)
    # A column of the user's may have the name of a term.
    kept = pairs.select(name for name in (*COLUMNS, *START_LOGPS, *shared) if name in pairs.columns)
    return kept.with_columns(series.cast(pl.Float64).alias(name) for name, series in terms.items()), too_long


def label_note(pairs: pl.DataFrame, config: TrainConfig) -> str | None:
    """A sentence for the user where the labels do nothing, or turn more of the loss around than they leave; else None.

    Args:
        pairs: of `load_pairs`.
    """
    if config.method == "sppo" and not pairs.select(pl.any_horizontal("chosen_shift", "rejected_shift").any()).item():
        return (
            "no pair has a win rate: train.method=sppo takes the hard ones, 1 and 0 (replayed pairs of files have none)"
        )
    if "label" not in pairs.columns:
        return None
    if (pairs["label"] == 1.0).all():
        return (
            f"no pair has a label below 1, so that train.method={config.method} is DPO here (replayed pairs of files "
            "have no labels)"
        )
    labels = pairs["label"].filter(pairs["label"] < 1.0)
    mean = labels.mean()
    if not isinstance(mean, float) or mean >= 0.5:
        return None
    why = (
        ": the two rankings of mine.second_reward disagree more than they agree (in round 1 the second one is that of "
        "the reference's log-probabilities, which the reward has the opposite sign of). Set train.method=dpo, or "
        "another mine.second_reward"
        if config.method == "cream"
        else f" (train.method={config.method})"
    )
    return (
        f"warning: the labels of {len(labels)} pairs have the mean {mean:.3g}, below one half, so that the loss "
        f"prefers their rejected responses{why}"
    )


def _check_present(path: Path, config: TrainConfig, names: tuple[str, ...]) -> None:
    if not path.is_file():
        return  # `load_training_set` says so
    there = present(path, *names)
    missing = [name for name in names if name not in there]
    if missing:
        setting = (
            f"train.weight_column={missing[0]}"
            if missing[0] == config.weight_column
            else "train.ld_alpha"
            if missing[0] in SHARED_LOGPS
            else f"train.method={config.method}"
        )
        remedy = _REMEDIES.get(missing[0], "name a column that the training set has")
        raise DataError(f"{path}: no column {missing[0]!r}, which {setting} reads: {remedy}")


def _check_label(pairs: pl.DataFrame, name: str, path: Path) -> None:
    """Checks a column of probabilities, or of difficulties."""
    column = pairs[name]
    if name == "difficulty":
        known = column.cast(pl.String, strict=False).is_in(["easy", "hard"]) | column.is_null()
        wanted = "easy, hard or null"
    elif column.dtype == pl.Null:
        return
    elif column.dtype.is_numeric():
        known = pairs.select(pl.col(name).cast(pl.Float64).is_between(0.0, 1.0) | pl.col(name).is_null()).to_series()
        wanted = "a probability from 0 to 1, or null"
    else:
        raise DataError(f"{path}: column {name!r} has dtype {column.dtype}, but must hold numbers; mine again")
    bad = ~known.fill_null(False)
    if bad.any():
        at = int(bad.arg_max() or 0)
        raise DataError(f"{path}: column {name!r} is {column[at]!r} in row {at}, but must be {wanted}; mine again")


def _weights(column: pl.Series, path: Path) -> pl.Series:
    """Weights with the mean 1 over the pairs that have one; 1 for the others."""
    if not (column.dtype.is_numeric() or column.dtype == pl.Null):
        raise DataError(f"{path}: column {column.name!r} has dtype {column.dtype}, but must hold weights: numbers")
    weights = column.cast(pl.Float64)
    bad = ~((weights.is_finite() & (weights >= 0)) | weights.is_null()).fill_null(False)
    if bad.any():
        at = int(bad.arg_max() or 0)
        raise DataError(
            f"{path}: column {column.name!r} is {column[at]} in row {at}, but a weight is a finite number of zero or "
            "more"
        )
    known = weights.drop_nulls()
    if len(known) and not (known > 0).any():
        raise DataError(f"{path}: column {column.name!r} has no weight above zero: nothing would be learned")
    if known.n_unique() <= 1:
        return pl.repeat(1.0, len(weights), eager=True)  # the mean of equal numbers need not be that number
    return (weights / known.mean()).fill_null(1.0)
