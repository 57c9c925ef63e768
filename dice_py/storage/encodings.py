"""How the columns of a Parquet file are encoded and compressed, by their types.

`make bench-encodings` measured it (docs/figures.md). Token ids are the bulk of a run: as plain numbers, zstd finds the
words and phrases that repeat, which a dictionary's bit-packed indices hide from it. The bytes of floating-point numbers
are split into streams, of which those with sign and exponent compress. All else keeps its dictionary.

A file says how each of its columns is encoded, so files of other versions are read alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

_LEVEL = {"ids": 6, "text": 6, "floats": 3, "others": 3}
"""Of zstd. Tokens are written at several millions a second even so, faster than any engine samples them."""
_ENCODING = {"ids": "PLAIN", "floats": "BYTE_STREAM_SPLIT"}


def writer_options(schema: pa.Schema) -> dict[str, Any]:
    """Keywords of pyarrow's ParquetWriter for a table of this schema."""
    kinds = {path: kind for field in schema for path, kind in _leaves(field.name, field.type, in_list=False)}
    return {
        "compression": "zstd",
        "compression_level": {path: _LEVEL[kind] for path, kind in kinds.items()},
        "use_dictionary": [path for path, kind in kinds.items() if kind not in _ENCODING],
        "column_encoding": {path: _ENCODING[kind] for path, kind in kinds.items() if kind in _ENCODING},
    }


def _leaves(path: str, dtype: pa.DataType, *, in_list: bool) -> Iterator[tuple[str, str]]:
    """Parquet's path of each column of values, and its kind."""
    if pa.types.is_list(dtype) or pa.types.is_large_list(dtype) or pa.types.is_fixed_size_list(dtype):
        yield from _leaves(f"{path}.list.element", dtype.value_type, in_list=True)
    elif pa.types.is_struct(dtype):
        for number in range(dtype.num_fields):
            field = dtype.field(number)
            yield from _leaves(f"{path}.{field.name}", field.type, in_list=in_list)
    elif in_list and pa.types.is_int32(dtype):
        yield path, "ids"
    elif pa.types.is_float32(dtype) or pa.types.is_float64(dtype):
        yield path, "floats"
    else:
        is_text = pa.types.is_string(dtype) or pa.types.is_large_string(dtype)
        yield path, "text" if is_text else "others"
