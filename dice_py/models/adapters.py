"""Merges a PEFT adapter (LoRA and its kin) into its base model, once, in the cache.

Sampling, scoring and training all need one model folder: engines differ in what they make of an adapter's. The folder
is `merged/KEY` in the cache; its key is a digest of both contents and of the versions that merge them. The sum is taken
in float32 and stored in the base's own type, as peft's `merge_and_unload` and our trainer do; in float32 where rounding
would take away most of what the adapter changes.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from dice_py.config.extras import require
from dice_py.config.shared import ModelConfig
from dice_py.errors import DataError
from dice_py.events import Report, no_report
from dice_py.models.adapter_sum import add_adapter, share_kept
from dice_py.models.checkpoint import check_checkpoint
from dice_py.models.folder_check import read_object
from dice_py.models.identity import MERGED_STAMP, model_identity
from dice_py.models.rounding import ENOUGH
from dice_py.models.saving import share_weights
from dice_py.models.weight_files import check_is_weights, read_header
from dice_py.models.weight_names import stored_tensors
from dice_py.models.weight_records import file_content, tensor_records
from dice_py.storage.cache import cache_folder
from dice_py.storage.files import atomic, remove_temporaries
from dice_py.storage.integrity import damaged_in, read_stamp, set_aside, write_stamp
from dice_py.storage.keys import digest, versions
from dice_py.storage.lock import exclusive_lock
from dice_py.timing import timed

_CONFIG = "adapter_config.json"
_WEIGHTS, _WEIGHTS_BIN = "adapter_model.safetensors", "adapter_model.bin"
_RECIPE = 3  # to be increased when a change of code makes another folder from the same adapter and base
_TEXT_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
)


def base_name(adapter: Path) -> tuple[str, str | None]:
    """What adapter_config.json names as the base model, a folder or a Hugging Face id, and the latter's revision.

    Raises:
        DataError: the adapter's files are missing or cut off, no base is named, or the folder holds a full model too.
    """
    config = read_object(adapter / _CONFIG)
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise DataError(
            f"{adapter / _CONFIG} names no base model (base_model_name_or_path), so the adapter is of no use"
        )
    if any((adapter / file).is_file() for file in ("model.safetensors", "model.safetensors.index.json")):
        raise DataError(
            f"{adapter} holds an adapter ({_CONFIG}) and a full model's weights; libraries differ in which they read. "
            f"Delete {_CONFIG} if the adapter is merged into the weights, else the weights"
        )
    _adapter_weights(adapter)
    revision = config.get("revision")
    return name, revision if isinstance(revision, str) else None


def _adapter_weights(adapter: Path) -> Path:
    for name in (_WEIGHTS, _WEIGHTS_BIN):
        file = adapter / name
        if file.is_file():
            if name == _WEIGHTS:
                read_header(file)
            else:
                check_is_weights(file)
            return file
    raise DataError(f"{adapter} has {_CONFIG}, but not the adapter's weights ({_WEIGHTS}); download or save it again")


def find_merged(adapter: Path, base: Path) -> Path | None:
    """The folder that an adapter was merged into, if the cache has it, every file as it was written; it reads all."""
    folder = _folder(adapter, base)
    return folder if read_stamp(folder, MERGED_STAMP) is not None and not damaged_in(folder, MERGED_STAMP) else None


def merge_key(adapter: Path, base: Path) -> str:
    """A digest of the contents of adapter and base, and of the libraries that merge them."""
    contents = [file_content(_adapter_weights(adapter)), file_content(adapter / _CONFIG)]
    texts = [[file.name, file_content(file)] for file in _text_files(adapter)]
    return digest("merge", contents, texts, model_identity(base), _RECIPE, versions("torch", "transformers", "peft"))


def _folder(adapter: Path, base: Path) -> Path:
    return cache_folder() / "merged" / merge_key(adapter, base)


def _text_files(folder: Path) -> list[Path]:
    """The files of a tokenizer and its template."""
    return sorted({file for pattern in _TEXT_FILES for file in folder.glob(pattern) if file.is_file()})


def merged_model(adapter: Path, base: Path, report: Report = no_report) -> Path:
    """The model folder of an adapter and its base, which are merged unless the cache has it. A note says which.

    Raises:
        DataError: the adapter does not fit the base, or is of a kind that cannot be merged; NaN in its weights.
        UsageError: peft, torch or transformers is not installed.
    """
    found = find_merged(adapter, base)
    if found is None:
        require("peft", "torch", "transformers", "accelerate", extra="train")
        folder = _folder(adapter, base)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(folder.parent / ".lock"):
            found = find_merged(adapter, base)
            if found is None:
                remove_temporaries(folder.parent)
                if folder.exists():
                    set_aside(folder, report)
                report("note", text=f"merging the adapter {adapter} into its base model {base}, once: {folder}")
                _merge(adapter, base, folder, report)
                return folder
    report("note", text=f"the adapter {adapter} was merged into its base model {base} before: {found}")
    return found


def _merge(adapter: Path, base: Path, folder: Path, report: Report) -> None:
    with timed("import"):
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

    _check_finite(adapter)
    logging.disable_progress_bar()
    check_checkpoint(base, "its base model", ModelConfig(device="cpu"))
    types = Counter[Any]()
    for tensor in stored_tensors(base).values():
        types[tensor.dtype] += tensor.numel()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model, dtype = add_adapter(model, adapter, base), types.most_common(1)[0][0]
    kept = share_kept(model, base, dtype)
    if kept < ENOUGH:
        report(
            "note",
            text=f"rounding to {str(dtype).removeprefix('torch.')}, the type of {base}, would leave "
            f"{max(0.0, kept):.0%} of what the adapter changes, so the merged model is stored in float32",
        )
        dtype = torch.float32
    model = model.to(dtype=dtype)
    # The adapter's tokenizer, where it has one: training may have added a template.
    texts = _text_files(adapter) if any(file.name.startswith("tokenizer") for file in _text_files(adapter)) else []
    with atomic(folder) as temporary:
        model.save_pretrained(temporary)
        source = next((place for place in (adapter, base) if (place / "generation_config.json").is_file()), None)
        if source is not None:
            shutil.copy(source / "generation_config.json", temporary)
        for file in texts or _text_files(base):
            shutil.copy(file, temporary)
        share_weights(temporary)
        origin = {"adapter": str(adapter), "base": str(base), "start": model_identity(base)}
        write_stamp(temporary, {"key": folder.name, **origin}, MERGED_STAMP)


def _check_finite(adapter: Path) -> None:
    file = _adapter_weights(adapter)
    if file.suffix == ".safetensors":
        broken = [name for name, record in tensor_records(file).items() if not record.finite]
        if broken:
            raise DataError(f"{file}: {broken[0]} holds NaN or infinite numbers; the training that saved it diverged")
