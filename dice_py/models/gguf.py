"""Converts a GGUF file (llama.cpp's format) to a model folder in the Hugging Face layout, once, in the cache.

transformers reads the weights, the config, the tokenizer and the chat template, and dequantizes the weights; the
package `gguf` reads the file. The folder is `gguf/KEY` in the cache. Its key is a digest of the file's bytes and of the
versions that converted it, so a file that is moved or renamed is not converted again.

The weights are those of the file: what quantization has rounded stays rounded. They are stored in float32, or in the
file's own type if that is float16 or bfloat16.
"""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_py.config.extras import require
from dice_py.errors import DataError, UsageError
from dice_py.events import Report, no_report
from dice_py.models.saving import share_weights
from dice_py.storage.cache import cache_folder
from dice_py.storage.files import atomic, read_json, remove_temporaries
from dice_py.storage.integrity import damaged_in, read_stamp, set_aside, write_stamp
from dice_py.storage.keys import digest, file_digest, versions
from dice_py.storage.lock import exclusive_lock
from dice_py.timing import timed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MAGIC = b"GGUF"
_STAMP = "gguf.json"
"""In a converted folder: the key, the file's digest, and what the file holds."""
_OLDEST_TRANSFORMERS = (5, 19)
_RECIPE = 2  # to be increased when a change of code makes another folder, or another stamp, from the same file


def gguf_file(name: str, role: str) -> Path | None:
    """The path of the GGUF file that `name` means; None for folders and Hugging Face ids.

    Args:
        name: as the user gave it.
        role: how error messages name the model, such as "--policy".

    Raises:
        DataError: a path that ends in .gguf and is no file, or a file that is not a GGUF file.
    """
    try:
        path = Path(name).expanduser()
        path.exists()
    except RuntimeError:
        raise DataError(f"{role}: {name}: there is no such user or home folder; write the complete path") from None
    except OSError as error:  # a name that is too long for a file
        raise DataError(f"{role}: {name:.80}… cannot be a path ({error.strerror}); give a shorter one") from None
    named = path.suffix.lower() == ".gguf"
    if path.is_dir() or not (named or path.is_file()):
        return None
    if not path.is_file():
        raise DataError(f"{role}: {name} does not exist; give a GGUF file, a model folder or a Hugging Face id")
    try:
        with path.open("rb") as handle:
            magic = handle.read(len(_MAGIC))
    except OSError as error:
        raise DataError(f"{role}: {name} cannot be read: {error.strerror}") from None
    if magic != _MAGIC:
        raise DataError(
            f"{role}: {name} is not a GGUF file: it begins with {magic!r}, not with {_MAGIC!r}; was it downloaded "
            "completely? Give a GGUF file, a model folder or a Hugging Face id"
        )
    return path


def gguf_key(file: Path) -> str:
    """The key of the converted folder: a digest of the file's bytes and of the libraries that convert it."""
    return digest("gguf", file_digest(file), _RECIPE, versions("transformers", "gguf"))


def find_converted(file: Path) -> Path | None:
    """The folder that `file` was converted to, if the cache has it, every file as it was written. It reads them all."""
    folder = _folder(gguf_key(file))
    return folder if read_stamp(folder, _STAMP) is not None and not damaged_in(folder, _STAMP) else None


def _folder(key: str) -> Path:
    return cache_folder() / "gguf" / key


def converted_model(file: Path, report: Report = no_report) -> Path:
    """The model folder of a GGUF file, which is converted unless the cache has it. A note says which of the two.

    Of several processes one converts, and the others wait for it.

    Raises:
        UsageError: gguf, torch or transformers is not installed, or transformers is older than 5.19.
        DataError: a damaged file, one part of several, or a model that transformers cannot convert to a decoder.
    """
    found = find_converted(file)
    if found is None:
        require("gguf", "torch", "transformers", "accelerate", extra="train")
        folder = _folder(gguf_key(file))
        folder.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(folder.parent / ".lock"):
            found = find_converted(file)
            if found is None:
                remove_temporaries(folder.parent)
                if folder.exists():
                    set_aside(folder, report)
                _convert(file, folder, report)
                return folder
    report("note", text=f"{file.name} ({_described(read_json(found / _STAMP))}) was converted before: {found}")
    return found


@dataclass(frozen=True)
class _Header:
    """What conversion needs to know of a file beforehand."""

    architecture: str
    types: dict[str, int]
    """Values by the type of their tensor ("Q4_1"), the most frequent type first."""
    end_of_turn: int | None
    """Token that ends an assistant's turn, if the file names one apart from the end of the text."""

    @property
    def dtype(self) -> str:
        """Name of the torch dtype of the converted weights."""
        # Norms are F32 in all files; the type of the matrices is the model's.
        return {"F16": "float16", "BF16": "bfloat16"}.get(next(iter(self.types)), "float32")


def _read_header(file: Path) -> _Header:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        fields = {
            name: reader.fields[name].contents()
            for name in ("general.architecture", "split.count", "tokenizer.ggml.eot_token_id")
            if name in reader.fields
        }
        types: Counter[str] = Counter()
        for tensor in reader.tensors:
            types[tensor.tensor_type.name] += int(tensor.n_elements)
    except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
        raise DataError(
            f"{file} cannot be read as a GGUF file ({_first_line(error)}); it may be damaged or incomplete: download "
            "or copy it again"
        ) from None
    parts = int(fields.get("split.count", 1))
    if parts > 1:
        raise DataError(
            f"{file} is one of the {parts} parts of a model; merge them into one file with llama.cpp's "
            "llama-gguf-split --merge, and give that"
        )
    if "general.architecture" not in fields or not types:
        raise DataError(f"{file} holds no model: it lacks an architecture or weights (a vocabulary or an adapter?)")
    return _Header(
        architecture=str(fields["general.architecture"]),
        types=dict(types.most_common()),
        end_of_turn=fields.get("tokenizer.ggml.eot_token_id"),
    )


def _convert(file: Path, folder: Path, report: Report) -> None:
    header = _read_header(file)
    described = {
        "architecture": header.architecture,
        "types": header.types,
        "dtype": header.dtype,
    }
    report("note", text=f"converting {file.name} ({_described(described)}), once: {folder}")
    model, tokenizer = _load(file, header)
    _check_complete(file, header, model, report)
    if header.end_of_turn is not None:
        stops = model.generation_config.eos_token_id
        known = stops if isinstance(stops, list) else [] if stops is None else [stops]
        model.generation_config.eos_token_id = list(dict.fromkeys([*known, header.end_of_turn]))
    with atomic(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        share_weights(temporary)
        write_stamp(temporary, {"key": folder.name, "file": file_digest(file), **described}, _STAMP)


def _load(file: Path, header: _Header) -> tuple[PreTrainedModel, Any]:
    """The model, dequantized, and its tokenizer."""
    with timed("import"):
        import torch
        import transformers
        from transformers.utils import logging

    logging.disable_progress_bar()
    version = importlib.metadata.version("transformers")
    if tuple(map(int, version.split(".")[:2])) < _OLDEST_TRANSFORMERS:
        newer = ".".join(map(str, _OLDEST_TRANSFORMERS))
        # 5.17 reads the tokenizer of SmolLM2 with the wrong end token, so that no response would end.
        raise UsageError(
            f"{file}: transformers {version} does not read every GGUF file's tokenizer as it is; install transformers "
            f"{newer} or newer, or give the model's folder in the Hugging Face layout"
        )
    options: dict[str, Any] = {"dtype": getattr(torch, header.dtype), "output_loading_info": True}
    options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True, **options
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except MemoryError:
        raise
    except Exception as error:  # tokenizers raises no other class
        raise DataError(
            f"{file}: transformers {version} cannot convert it to a decoder; its architecture is "
            f"{header.architecture!r} ({_first_line(error)}). Give a file of another architecture, or the model's "
            "folder in the Hugging Face layout"
        ) from None
    if loading["missing_keys"] or loading["mismatched_keys"]:
        lacking = sorted({*loading["missing_keys"], *map(str, loading["mismatched_keys"])})
        raise DataError(
            f"{file}: {len(lacking)} of the weights that transformers {version} expects of a {header.architecture!r} "
            f"model are not in the file, or have another shape ({', '.join(lacking[:3])}, …); they would be random. "
            "Give the model's folder in the Hugging Face layout"
        )
    return model, tokenizer


def _check_complete(file: Path, header: _Header, model: PreTrainedModel, report: Report) -> None:
    """Reports a note where transformers left weights of the file out: the model may then answer differently."""
    stored, used = sum(header.types.values()), sum(parameter.numel() for parameter in model.parameters())
    if stored > used:
        report(
            "note",
            text=f"{file.name}: transformers has no place for {stored - used:,} of the file's {stored:,} weights "
            "(factors of the positions, for example), so that answers may differ from those of llama.cpp",
        )


def _described(stamp: dict[str, Any]) -> str:
    """ "llama, 134,515,008 weights, Q4_1 and F32, as float32"."""
    types = list(stamp["types"])
    named = types[0] if len(types) == 1 else f"{', '.join(types[:-1])} and {types[-1]}"
    return f"{stamp['architecture']}, {sum(stamp['types'].values()):,} weights, {named}, as {stamp['dtype']}"


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
