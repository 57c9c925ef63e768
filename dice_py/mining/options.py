"""Mining options as keywords: those of Python functions, read, and those of the extension, written.

The options themselves (names, types, defaults, checks) are in config/mining.py.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from dice_py.config.mining import MAX_LENGTH, MiningOptions
from dice_py.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])


def with_mining_signature(function: F) -> F:
    """Shows every mining option with its type and default in `help()` and `inspect.signature`, in place of
    `**keywords`."""
    signature = inspect.signature(function, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.annotation)
        for name, field in MiningOptions.model_fields.items()
    ]
    function.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return function


def read_options(function: str, options: MiningOptions | None, keywords: Mapping[str, Any]) -> MiningOptions:
    """The options of a call, which come as one object or as keywords.

    Args:
        function: the name of the called function, for errors.

    Raises:
        TypeError: an unknown keyword.
        UsageError: a keyword out of its range, or both an object and keywords.
    """
    for name in keywords:
        if name not in MiningOptions.model_fields:
            close = difflib.get_close_matches(name, MiningOptions.model_fields, n=1)
            hint = f". Did you mean '{close[0]}'?" if close else ""
            raise TypeError(f"{function}() got an unexpected keyword argument '{name}'{hint}")
    if options is None:
        return MiningOptions(**keywords)
    if keywords:
        raise UsageError(f"{function}() has options as an object and as keywords ({', '.join(keywords)}): use one way")
    return options


def native_keywords(options: MiningOptions) -> dict[str, Any]:
    """The options of `_native.mine` and `_native.SegmentMiner`."""

    def length(value: int | None) -> int | None:
        # The extension holds lengths in u32. A greater bound means the same as the greatest length.
        return None if value is None else min(value, MAX_LENGTH)

    names = {
        "debias", "min_responses", "min_length", "buckets", "bucket_scale", "length_ratio", "pairing", "top_k",
        "bottom_k", "pairs_per_prompt", "sweet_spot_deviations", "seed", "chosen_from", "rejected_from",
    }  # fmt: skip
    return {
        **options.model_dump(include=names),
        "alpha": None if options.alpha == "auto" else options.alpha,
        "max_length": length(options.max_length),
        "length_tolerance": length(options.length_tolerance),
        "win_rates": options.label_scale if options.win_rates else None,
    }
