"""Counterfactual mining: the pairs that other options would have made of the same scores, side by side.

The columns of all variants are read once. mining/variants.py makes the options of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from dice_py.config.mining import MiningOptions
from dice_py.errors import DataError, UsageError
from dice_py.events import Report, no_report
from dice_py.mining.columns import Frame, narrow_frame
from dice_py.mining.files import fits_in_memory, footers, open_files, source_name
from dice_py.mining.numeric import numeric_columns
from dice_py.mining.pairs import MinedPairs, mine_columns
from dice_py.mining.parquet_input import columns_to_read, narrow_batches
from dice_py.mining.variants import Variant, make_variants
from dice_py.storage.keys import digest
from dice_py.storage.parquet import write_parquet

_PAIR = ["chosen_row", "rejected_row"]


@dataclass(frozen=True)
class MiningComparison:
    """What several minings of the same rows make of them."""

    variants: list[Variant]
    """In the order of the call. One that equals an earlier one is left out."""
    mined: list[MinedPairs | None]
    """The result of each; None where its options contradict each other (`Variant.error` says how)."""

    @cached_property
    def overlap(self) -> list[list[float | None]]:
        """For each two variants the Jaccard index of their pairs: |A ∩ B| / |A ∪ B| of (prompt, chosen, rejected).

        None where one of them was not mined, or where neither has a pair.
        """
        return _matrix([None if mined is None else mined.pairs.select(_PAIR) for mined in self.mined], _jaccard)

    @cached_property
    def same_chosen(self) -> list[list[float | None]]:
        """For each two variants: of the prompts with a pair in both, the share with a chosen response in common.

        None where one of them was not mined, where there is no such prompt, or where the two read the prompts from
        different columns.
        """
        sides = [
            None if mined is None or variant.options is None else _Chosen.of(mined.pairs, variant.options.prompt_column)
            for variant, mined in zip(self.variants, self.mined, strict=True)
        ]
        return _matrix(sides, _same_chosen)

    @cached_property
    def pairs(self) -> pl.DataFrame:
        """The pairs of all variants: those of `MinedPairs.pairs` after a column `variant` (str, `Variant.name`)."""
        frames = [
            mined.pairs.select(pl.lit(variant.name).alias("variant"), pl.all())
            for variant, mined in zip(self.variants, self.mined, strict=True)
            if mined is not None
        ]
        return pl.concat(frames, how="diagonal_relaxed")

    def summary(self) -> dict[str, Any]:
        """Everything but the frames, ready for JSON.

        `variants` has an object for each: its `settings`, `error`, and, if it was mined, `prompts_with_pair` and what
        `MinedPairs.summary` has. `overlap` and `same_chosen` are matrices in the same order.
        """
        entries = []
        for variant, mined in zip(self.variants, self.mined, strict=True):
            entry: dict[str, Any] = {"variant": variant.name, "settings": variant.settings, "error": variant.error}
            if mined is not None:
                entry |= {"prompts_with_pair": mined.pairs["prompt_id"].n_unique(), **mined.summary()}
            entries.append(entry)
        return {"variants": entries, "overlap": self.overlap, "same_chosen": self.same_chosen}


@dataclass(frozen=True, eq=False)
class _Chosen:
    """The chosen responses of a variant."""

    prompt_column: str
    prompts: pl.DataFrame
    """`prompt_id`, once each."""
    responses: pl.DataFrame
    """`prompt_id` and `chosen_row`, once each."""

    @staticmethod
    def of(pairs: pl.DataFrame, prompt_column: str) -> _Chosen:
        responses = pairs.select("prompt_id", "chosen_row").unique()
        return _Chosen(prompt_column, responses.select("prompt_id").unique(), responses)


Side = TypeVar("Side")


def _matrix(sides: Sequence[Side | None], measure: Callable[[Side, Side], float | None]) -> list[list[float | None]]:
    """A symmetric measure of each two sides; None where one of them is None."""
    count = len(sides)
    matrix: list[list[float | None]] = [[None] * count for _ in range(count)]
    for row, one in enumerate(sides):
        for column, other in enumerate(sides[: row + 1]):
            if one is not None and other is not None:
                matrix[row][column] = matrix[column][row] = measure(one, other)
    return matrix


def _jaccard(one: pl.DataFrame, other: pl.DataFrame) -> float | None:
    if one is other:
        return 1.0 if one.height else None
    common = one.join(other, on=_PAIR, how="semi").height
    union = one.height + other.height - common
    return common / union if union else None


def _same_chosen(one: _Chosen, other: _Chosen) -> float | None:
    if one is other:
        return 1.0 if one.prompts.height else None
    if one.prompt_column != other.prompt_column:
        return None
    both = one.prompts.join(other.prompts, on="prompt_id", how="semi").height
    # A row is of one prompt.
    same = one.responses.join(other.responses, on="chosen_row", how="semi")["prompt_id"].n_unique()
    return same / both if both else None


def compare_mining(
    frame: Frame,
    options: MiningOptions | Mapping[str, Any] | None,
    variants: Sequence[Mapping[str, Any]],
) -> MiningComparison:
    """Mines the same rows with several sets of options, to see what each would change.

    The frame is collected once, with the columns that any variant reads.

    Args:
        frame: as in `mine_pairs`.
        options: what all variants share: options of `mine_pairs` by name, or all of them as one object; None: defaults.
        variants: for each variant the options that differ. An option that the variant's own `debias` or `pairing` does
            not take (`length_tolerance`, `length_ratio`, `pairs_per_prompt`) is left out of it.

    Returns:
        The result of each variant, and how much each two of them have in common.

    Raises:
        UsageError: an unknown option, no variant that can be mined, or a shared option that none of them takes.
        DataError: as `mine_pairs`.

    Example:
        >>> import polars as pl
        >>> scored = pl.DataFrame({
        ...     "prompt_id": [1, 1, 1, 2, 2, 2],
        ...     "reward": [0.9, 0.8, 0.1, 0.4, 0.7, 0.2],
        ...     "response_tokens": [90, 40, 35, 10, 60, 30],
        ... })
        >>> variants = [{"debias": "none"}, {"debias": "linear"}, {"debias": "matched"}]
        >>> compared = compare_mining(scored, {"length_tolerance": 20}, variants)
        >>> [(v.name, m.pairs.height, m.mean_length_gap_after) for v, m in zip(compared.variants, compared.mined)]
        [('debias=none', 2, 42.5), ('debias=linear', 2, -7.5), ('debias=matched', 2, -7.5)]
        >>> compared.overlap
        [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0]]
    """
    made = _made_variants(options, variants)
    narrow = narrow_frame(frame, *(variant.options for variant in made if variant.options is not None))
    return _compare(narrow, made, no_report)


def compare_files(
    scored: list[str],
    options: MiningOptions | Mapping[str, Any] | None,
    variants: Sequence[Mapping[str, Any]],
    *,
    out: Path | None = None,
    memory_gib: float = 1.0,
    report: Report = no_report,
) -> MiningComparison:
    """`compare_mining` of Parquet files, which are opened and read once.

    Args:
        scored: as in `mine_files`.
        options: as in `compare_mining`.
        variants: as in `compare_mining`.
        out: a Parquet file for `MiningComparison.pairs`, with the summary in its footer; None: nothing is written.
        memory_gib: GiB for the rows. Larger input is refused, since all variants share the rows.
        report: receives progress events.

    Raises:
        UsageError: as `compare_mining`, more rows than `memory_gib` holds, or an `out` that cannot be written.
        DataError: as `mine_files`.
    """
    made = _made_variants(options, variants)
    files = open_files(scored, out, memory_gib)
    if not fits_in_memory(files, memory_gib):
        raise UsageError(
            f"{files.rows} rows are more than --memory (memory_gib) of {memory_gib:g} GiB holds, and a comparison is "
            "not streamed, since its variants share the rows: raise it, or compare a part of the files"
        )
    used = [variant.options for variant in made if variant.options is not None]
    try:
        columns = columns_to_read(files, *used)
        narrow = pl.concat(narrow_batches(files, columns, *used), rechunk=False)
        compared = _compare(narrow, made, report)
    except DataError as error:
        raise DataError(f"{source_name(scored)}: {error}") from None
    if out is not None:
        key = digest("compare", footers(files), [variant.options and variant.options.model_dump() for variant in made])
        write_parquet(out, compared.pairs, key=key, meta={**compared.summary(), "files": files.files})
    return compared


def _made_variants(
    options: MiningOptions | Mapping[str, Any] | None, variants: Sequence[Mapping[str, Any]]
) -> list[Variant]:
    base = options.model_dump() if isinstance(options, MiningOptions) else dict(options or {})
    return make_variants(base, variants)


def _compare(narrow: pl.DataFrame, variants: list[Variant], report: Report) -> MiningComparison:
    """Mines each variant on columns that were read once; variants that read them alike share the numbers, too."""
    numbers: dict[str, tuple[pl.DataFrame, bool]] = {}
    mined: list[MinedPairs | None] = []
    for done, variant in enumerate(variants):
        report("progress", stage="mine", done=done, total=len(variants), unit="variants")
        options = variant.options
        if options is None:
            mined.append(None)
            continue
        read = repr((options.columns, options.truncated_column, bool(options.min_length)))
        try:
            if read not in numbers:
                numbers[read] = numeric_columns(narrow, options)
            mined.append(mine_columns(narrow, numbers[read], options))
        except DataError as error:
            raise DataError(f"{variant.name}: {error}") from None
    report("progress", stage="mine", done=len(variants), total=len(variants), unit="variants")
    return MiningComparison(variants, mined)
