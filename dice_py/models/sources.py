"""Finds the folder of a model from the name that a user gave it: a folder, a GGUF file or a Hugging Face id."""

from __future__ import annotations

from pathlib import Path

from dice_py.errors import DataError
from dice_py.events import Report, no_report
from dice_py.models.folder_check import check_model_folder
from dice_py.models.gguf import converted_model, gguf_file
from dice_py.models.loading import require


def resolve_model(name: str, revision: str | None, *, role: str, report: Report = no_report) -> Path:
    """The local folder of a model: `name` itself if it is a folder, what a GGUF file was converted to, else a snapshot
    from the Hugging Face hub.

    A GGUF file is converted in this process if it was not converted before, which imports torch; `stages/convert.py`
    does it in another one.

    Args:
        name: a folder, a GGUF file or a Hugging Face id.
        revision: branch, tag or commit on the hub; None: the default branch.
        role: how error messages name the model, such as "--policy".
        report: receives a note on a GGUF file.

    Raises:
        DataError: the folder lacks a config or weights, the GGUF file cannot be converted, or the hub refuses the
            download.
        UsageError: a package that this needs is not installed.
    """
    file = gguf_file(name, role)
    if file is not None:
        return converted_model(file, report).resolve()
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or folder.exists():
            raise DataError(f"{role}: {name} is not a folder; give a model folder, a GGUF file or a Hugging Face id")
        folder = _snapshot(name, revision, role)
    check_model_folder(folder, role=role)
    return folder.resolve()


def _snapshot(name: str, revision: str | None, role: str) -> Path:
    require("huggingface_hub", extra="train")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "tokenizer*"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{role}: {name} is not a local folder, and cannot be downloaded from the Hugging Face hub ({first_line}); "
            "check the name, log in (hf auth login), or download it yourself and name its folder"
        ) from None
