"""Finds the folder of a model from the name that a user gave it: a folder, an adapter, a GGUF file or a hub id."""

from __future__ import annotations

from pathlib import Path

from dice_py.config.extras import require
from dice_py.errors import DataError
from dice_py.events import Report, no_report
from dice_py.models.adapters import base_name, find_merged, merge_key, merged_model
from dice_py.models.folder_check import check_model_folder, is_adapter
from dice_py.models.gguf import converted_model, find_converted, gguf_file, gguf_key
from dice_py.models.identity import model_identity

_WANTED = (
    *("*.json", "*.safetensors", "adapter_model.bin", "*.model", "*.jinja", "*.txt", "tokenizer*", "*.tiktoken"),
    *("*.py", "README.md"),
)
"""Of a repository on the hub; code is run with model.trust_remote_code alone. README.md names the model's license."""
_TWICE = ["original/*", "consolidated*"]
"""The same weights in another layout."""


def resolve_model(name: str, revision: str | None, *, role: str, report: Report = no_report) -> Path:
    """The local folder of a model: `name` itself if it is a folder, what a GGUF file was converted to or an adapter was
    merged into, else a snapshot from the Hugging Face hub.

    What `needs_conversion` is converted in this process, which imports torch; `stages/convert.py` does it in another.

    Args:
        name: a folder, a GGUF file or a Hugging Face id.
        revision: branch, tag or commit on the hub; None: the default branch.
        role: how error messages name the model, such as "--policy".
        report: receives a note on a GGUF file or an adapter.

    Raises:
        DataError: the folder is no complete model (`check_model_folder`), the GGUF file cannot be converted, the
            adapter's base model is not there, or the hub refuses the download.
        UsageError: a package that this needs is not installed.
    """
    file = gguf_file(name, role)
    if file is not None:
        return converted_model(file, report).resolve()
    folder = _local_folder(name, revision, role)
    if is_adapter(folder):
        return merged_model(folder, _base(folder, role), report).resolve()
    check_model_folder(folder, role=role)
    return folder.resolve()


def resolve_classifier(name: str, revision: str | None, *, role: str) -> Path:
    """The local folder of a sequence classifier: `name` itself if it is a folder, else a snapshot from the hub.

    Args:
        role: how error messages name the model, such as "--model".

    Raises:
        DataError: it is no complete sequence classifier, or the hub refuses the download.
        UsageError: a package that this needs is not installed.
    """
    folder = _local_folder(name, revision, role)
    check_model_folder(folder, role=role, scores=True)
    return folder.resolve()


def needs_conversion(name: str, revision: str | None, role: str) -> bool:
    """True for a GGUF file or an adapter whose model folder is not in the cache yet. Arguments as of `resolve_model`.

    Raises:
        DataError: as of `resolve_model`, as far as it is known without converting.
    """
    file = gguf_file(name, role)
    if file is not None:
        return find_converted(file) is None
    folder = _local_folder(name, revision, role)
    return is_adapter(folder) and find_merged(folder, _base(folder, role)) is None


def adapter_of(name: str, role: str) -> Path | None:
    """The folder here of an adapter that `name` means; None for all other models, and for ids of the hub.

    Raises:
        DataError: a path that is neither a folder nor a GGUF file.
    """
    if gguf_file(name, role) is not None:
        return None
    folder = Path(name).expanduser()
    return folder if is_adapter(folder) else None


def source_key(name: str, revision: str | None, role: str) -> str:
    """A key of what a model is converted from. Arguments as of `resolve_model`."""
    file = gguf_file(name, role)
    if file is not None:
        return gguf_key(file)
    folder = _local_folder(name, revision, role)
    return merge_key(folder, _base(folder, role)) if is_adapter(folder) else model_identity(folder)


def _local_folder(name: str, revision: str | None, role: str) -> Path:
    try:
        folder = Path(name).expanduser()
    except RuntimeError:
        raise DataError(f"{role}: {name}: there is no such user or home folder; write the complete path") from None
    if folder.is_dir():
        return folder
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or folder.exists():
        raise DataError(f"{role}: {name} is not a folder; give a model folder, a GGUF file or a Hugging Face id")
    return _snapshot(name, revision, role)


def _base(adapter: Path, role: str) -> Path:
    """The folder of an adapter's base model: as a path from here, or from the adapter's folder or the one above it,
    else a snapshot from the hub."""
    try:
        name, revision = base_name(adapter)
        named = Path(name).expanduser()
        folder = next((place / named for place in (Path(), adapter, adapter.parent) if (place / named).is_dir()), None)
        base = folder if folder is not None else _local_folder(name, revision, role)
        if is_adapter(base):
            raise DataError(f"{base} is an adapter itself; merge the two yourself, and give the folder of the result")
        check_model_folder(base, role="its base model")
    except DataError as error:
        text = str(error).removeprefix(f"{role}: ")
        raise DataError(
            f"{role}: {adapter} is an adapter whose base model cannot be used ({text}). Put the base model where "
            "base_model_name_or_path in adapter_config.json says, change that entry, or merge the adapter yourself"
        ) from None
    return base.resolve()


def _snapshot(name: str, revision: str | None, role: str) -> Path:
    require("huggingface_hub", extra="train")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=_TWICE))

    try:
        folder = fetch(*_WANTED)
        if any(folder.glob("*.safetensors")) or is_adapter(folder):
            return folder
        return fetch(*_WANTED, "pytorch_model*.bin*")  # many older models have no other weights
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{role}: {name} is not a local folder, and cannot be downloaded from the Hugging Face hub ({first_line}); "
            "check the name, log in (hf auth login), or download it yourself and name its folder"
        ) from None
