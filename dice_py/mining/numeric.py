"""From columns of any type to the numeric ones that the extension reads.

Numeric columns are passed on without a copy. Where the meaning is plain a value of another type is read (whole numbers
in a column of floats, the reason inside a struct); where it is not, the error names the column, its type and the row.
"""

from __future__ import annotations

import re

import polars as pl

from dice_py.config.mining import MAX_LENGTH, MiningOptions
from dice_py.errors import DataError
from dice_py.mining.columns import CHARACTERS, duplicate_hash, native_integer

_CUT_OFF = frozenset(
    ("length", "max_length", "model_length", "max_tokens", "max_new_tokens", "max_output_tokens",
     "max_completion_tokens", "token_limit", "truncated", "incomplete")
)  # fmt: skip
"""Finish reasons of OpenAI's, vLLM's, SGLang's, TGI's, Anthropic's and Google's servers that mean the token limit."""
_TYPE_IN_TEXT = re.compile(r"""^\s*\{.*?["']type["']\s*:\s*["']([^"']*)["']""", re.DOTALL)


def numeric_columns(narrow: pl.DataFrame, options: MiningOptions, first_row: int = 0) -> tuple[pl.DataFrame, bool]:
    """The columns under the names and in the types of the extension, and whether the prompts are integers.

    Integer prompts come back in the pairs unchanged; other prompts are replaced by their rank.

    Args:
        narrow: the columns that the options name.
        first_row: the number of its first row in the input, for errors.

    Returns:
        `prompt` (integers), `reward` (f32 or f64) and `length` (integers); `truncated` (bool), `duplicate`, `policy`
        (integers) and `second` (f32 or f64), where the options name such columns.

    Raises:
        DataError: a column is of an unsuitable type, a prompt or policy is NaN, or a length is no whole number.
    """
    key, native_key = _ordered(narrow, options.prompt_column, "prompt", first_row)
    length = _length(narrow, options.length_column, first_row)
    if options.min_length and CHARACTERS in narrow.columns and narrow.schema[CHARACTERS].is_numeric():
        length = pl.when(pl.col(CHARACTERS) == 0).then(0).otherwise(length).alias("length")
    columns = [key, _reward(narrow, options.reward_column, "reward"), length]
    truncated = _truncated(narrow, options.truncated_column)
    if truncated is not None:
        columns.append(truncated.alias("truncated"))
    if options.duplicate_column is not None:
        name = options.duplicate_column
        columns.append(duplicate_hash(narrow.schema[name], name).alias("duplicate"))
    if options.policy_column is not None:
        columns.append(_ordered(narrow, options.policy_column, "policy", first_row)[0])
    if options.second_reward_column is not None:
        columns.append(_reward(narrow, options.second_reward_column, "second"))
    return narrow.select(columns), native_key


def _ordered(narrow: pl.DataFrame, name: str, role: str, first_row: int) -> tuple[pl.Expr, bool]:
    """A column as integers in the same order (its dense rank, unless it is integers), and whether it is integers."""
    dtype = narrow.schema[name]
    key = pl.col(name)
    if native_integer(dtype):
        return key.alias(role), True
    if dtype in (pl.Categorical, pl.Enum):
        # By text: the physical order of a categorical depends on what was read before.
        key = key.cast(pl.String)
    elif dtype.is_nested() or dtype in (pl.Object, pl.Null, pl.Unknown):
        raise DataError(f"{role} column '{name}' has dtype {dtype}, which has no order: use integers or text")
    # As one prompt, the rows without an id would be mined together.
    if dtype.is_float():
        what = "NaN or infinite (as a join in pandas leaves it)"
        _refuse(~narrow[name].is_finite(), f"the {role} is {what}", name, first_row)
    elif dtype in (pl.String, pl.Categorical, pl.Enum):
        _refuse(narrow[name].cast(pl.String).str.strip_chars() == "", f"the {role} is an empty text", name, first_row)
    return key.rank("dense").alias(role), False


def _reward(narrow: pl.DataFrame, name: str, role: str) -> pl.Expr:
    dtype = narrow.schema[name]
    if dtype in (pl.Float32, pl.Float64):
        return pl.col(name).alias(role)
    if dtype.is_numeric() or dtype == pl.Null:
        return pl.col(name).cast(pl.Float64).alias(role)
    raise DataError(f"reward column '{name}' has dtype {dtype}, but must be numeric: cast it to Float32 first")


def _length(narrow: pl.DataFrame, name: str, first_row: int) -> pl.Expr:
    """Lengths as integers. Whole numbers of another type are taken; NaN counts as null."""
    dtype = narrow.schema[name]
    if native_integer(dtype):
        return pl.col(name).alias("length")
    if dtype == pl.Null:
        return pl.col(name).cast(pl.UInt32).alias("length")
    if not dtype.is_numeric():
        raise DataError(f"length column '{name}' has dtype {dtype}, but must hold integers: cast it to UInt32 first")
    lengths = narrow[name].fill_nan(None) if dtype.is_float() else narrow[name]
    bad = ((lengths < 0) | (lengths > MAX_LENGTH) | (lengths != lengths.cast(pl.Int64, strict=False))).fill_null(False)
    # Out of the range of 64 bits a cast is null.
    bad |= lengths.cast(pl.Int64, strict=False).is_null() & lengths.is_not_null()
    if bad.any():
        first = _first(bad, 0)
        raise DataError(
            f"row {first_row + first}: the length is {lengths[first]}; lengths are whole numbers between 0 and "
            f"{MAX_LENGTH}: correct or drop such rows (column '{name}', {dtype})"
        )
    return pl.lit(lengths.cast(pl.Int64).alias("length"))


def _truncated(narrow: pl.DataFrame, option: str | None) -> pl.Expr | None:
    """Whether a response was cut off; null counts as not."""
    if option is None:
        return None
    if option == "auto":
        return _cut_off(narrow["finish_reason"]) if "finish_reason" in narrow.columns else None
    if narrow.schema[option] not in (pl.Boolean, pl.Null):
        raise DataError(
            f"column '{option}' has dtype {narrow.schema[option]}, but truncated_column= must name a boolean column"
        )
    return pl.col(option).cast(pl.Boolean)


def _cut_off(reasons: pl.Series) -> pl.Expr:
    """Whether `finish_reason` says that the token limit ended the response, in the words of any server.

    In a struct the reason is the field `type` (or `reason`), or the only one with text.
    """
    dtype, reason = reasons.dtype, pl.col("finish_reason")
    if isinstance(dtype, pl.Struct):
        texts = [field.name for field in dtype.fields if _is_text(field.dtype)]
        named = [name for name in ("type", "reason") if name in texts]
        name = named[0] if named else texts[0] if len(texts) == 1 else None
        if name is not None:
            reasons, reason = reasons.struct.field(name), reason.struct.field(name)
    if _is_text(reasons.dtype):
        spellings = reasons.cast(pl.String).unique().drop_nulls()
        return reason.cast(pl.String).is_in([text for text in spellings if _is_cut_off(text)])
    raise DataError(
        f"column 'finish_reason' has dtype {dtype}, but must hold one text per response: make text of it, name a "
        "boolean column (truncated_column=/--truncated-column), or keep cut-off responses (None/none)"
    )


def _is_cut_off(text: str) -> bool:
    """Whether a finish reason means the token limit, as "length", "MAX_TOKENS", "FinishReason.LENGTH", or JSON do."""
    inside = _TYPE_IN_TEXT.search(text)
    word = inside[1] if inside else text.strip().rpartition(".")[2]
    return word.lower().replace("-", "_").replace(" ", "_") in _CUT_OFF


def _is_text(dtype: object) -> bool:
    return dtype in (pl.String, pl.Categorical, pl.Enum, pl.Null)


def _refuse(bad: pl.Series, what: str, column: str, first_row: int) -> None:
    bad = bad.fill_null(False)
    if bad.any():
        count = f"in {bad.sum()} rows of column '{column}'"
        raise DataError(f"row {_first(bad, first_row)}: {what}, {count}; fill or drop such rows first")


def _first(bad: pl.Series, first_row: int) -> int:
    return first_row + int(bad.arg_max() or 0)
