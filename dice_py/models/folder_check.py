"""What can be told of a model folder from its small files and headers: is it a complete model that can be trained on?

Imports neither torch nor transformers, so that the process that starts a stage does it too. models/checkpoint.py goes
on from here.
"""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from dice_py.errors import DataError
from dice_py.models.weight_files import check_is_weights, first_few, is_lfs_pointer, read_header, weight_files
from dice_py.storage.removed import check_not_removed

_QUANTIZED = ("quantization_config", "compression_config")
_QUANTIZED_FILES = ("quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json")
_READ_IF_THERE = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.jinja")
"""Without one of these, a model is another: it stops elsewhere, or its prompts read otherwise."""
_FLOATS = ("F64", "F32", "BF16", "F16")
_NOT_ENCODERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_ENCODERS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def is_adapter(folder: Path) -> bool:
    """True for the folder of a PEFT adapter without a model's weights."""
    return (folder / "adapter_config.json").is_file()


def check_model_folder(folder: Path, *, role: str, scores: bool = False) -> None:
    """Checks a folder's config.json, generation_config.json and the files and headers of its weights.

    Args:
        role: how error messages name the model, such as "--policy".
        scores: the model is to be a sequence classifier, which scores texts, and not one that generates them.

    Raises:
        DataError: a file is missing, cut off, no JSON object, or a link to nothing; the model is quantized, of the
            other kind, or an adapter that was not merged.
        RemovedError: its weights were removed to free their space.
    """
    check_not_removed(folder)
    try:
        _check(folder, scores)
    except DataError as error:
        raise DataError(f"{role}: {_broken_links(folder, '*') or error}") from None


def _broken_links(folder: Path, *patterns: str) -> str | None:
    """What is wrong with a copy of a folder of the Hugging Face cache, whose files are links to others beside it."""
    links = (file for file in folder.glob("*") if any(fnmatch(file.name, pattern) for pattern in patterns))
    broken = sorted(file.name for file in links if file.is_symlink() and not file.exists())
    if not broken:
        return None
    target = (folder / broken[0]).readlink()
    return (
        f"{folder}: {first_few(broken)} {'are links' if broken[1:] else 'is a link'} to what is not there ({target}); "
        "copy the model with the files that its links point to (cp -rL), or download it again"
    )


def _check(folder: Path, scores: bool) -> None:
    if is_adapter(folder):
        raise DataError(f"{folder} is an adapter (adapter_config.json) that is not merged into its base model")
    if not (folder / "config.json").is_file():
        inside = sorted(str(file.parent.relative_to(folder)) for file in folder.glob("*/*config.json"))
        inside += sorted(str(file.parent.relative_to(folder)) for file in folder.glob("snapshots/*/config.json"))
        hint = f"; give one that it holds: {first_few(list(dict.fromkeys(inside)))}" if inside else ""
        raise DataError(f"{folder} has no config.json; it is not a model folder in the Hugging Face layout{hint}")
    broken = _broken_links(folder, *_READ_IF_THERE)
    if broken is not None:
        raise DataError(broken)
    config = read_object(folder / "config.json")
    _check_not_quantized(folder, config)
    files = weight_files(folder)
    _check_type(folder, config, scores)
    if (folder / "generation_config.json").is_file():
        read_object(folder / "generation_config.json")
    for file in sorted(folder.glob("*.json")) + sorted(folder.glob("*.model")):
        if file.is_file() and is_lfs_pointer(file):
            raise DataError(f"{file} is a git-lfs pointer; install git-lfs, then run `git lfs pull` in that folder")
    for file in files:
        if file.suffix != ".safetensors":
            check_is_weights(file)
            continue
        for name, tensor in read_header(file).items():
            if tensor.dtype not in _FLOATS and name.endswith((".weight", "weight_packed", ".qweight", ".qzeros")):
                raise DataError(f"{file}: {name} is stored as {tensor.dtype}: a quantized model, {_NEED}")


_NEED = (
    "which can be neither trained nor scored exactly; give the model in float32, bfloat16 or float16 "
    "(dequantize it, or take the one that it was quantized from)"
)


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object of a file of a model.

    Raises:
        DataError: the file is cut off, no JSON, or no object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"), parse_constant=_constant)
    except (OSError, ValueError, RecursionError) as error:
        cause = "it is a git-lfs pointer" if file.is_file() and is_lfs_pointer(file) else str(error)
        raise DataError(f"{file} is not complete JSON ({cause}); download or copy it again") from None
    if not isinstance(content, dict):
        raise DataError(f"{file} holds a JSON {type(content).__name__}, not an object; download or copy it again")
    return content


def _constant(text: str) -> float:
    """A number that JSON does not have. Infinity is a limit that some models' configs set; NaN is never meant."""
    if text == "NaN":
        raise ValueError("it has the number NaN")
    return float(text)


def _check_type(folder: Path, config: dict[str, Any], scores: bool) -> None:
    kind, code = config.get("model_type"), config.get("auto_map")
    if not isinstance(kind, str) and not (kind is None and code):
        raise DataError(
            f"{folder / 'config.json'} has no model_type, so its architecture is not known (it is that of "
            'transformers: "llama", "qwen2", …)'
        )
    architectures = config.get("architectures") or []
    names = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    if scores:
        if names and not code and not any(name.endswith("ForSequenceClassification") for name in names):
            raise DataError(
                f"{folder / 'config.json'}: the model is a {names[0]}, which has no head that scores a text; a "
                "sequence classifier is needed (…ForSequenceClassification)"
            )
        return
    if any(name.endswith(_ENCODERS) for name in names) and not any(name.endswith(_NOT_ENCODERS) for name in names):
        raise DataError(
            f"{folder / 'config.json'}: the model is a {names[0]}, which does not generate text; a causal language "
            "model is needed"
        )


def _check_not_quantized(folder: Path, config: dict[str, Any]) -> None:
    found = _quantization(config)
    if found is not None:
        method = found.get("quant_method") or found.get("quant_algo") if isinstance(found, dict) else None
        raise DataError(
            f"{folder}: config.json has a quantization_config: a quantized model ({method or 'no method is named'}), "
            f"{_NEED}"
        )
    for name in _QUANTIZED_FILES:
        if (folder / name).is_file():
            raise DataError(f"{folder} has {name}: a quantized model, {_NEED}")


def _quantization(config: dict[str, Any]) -> Any:
    """The value of a quantization's key, here or in a nested config (text_config)."""
    for name in _QUANTIZED:
        if config.get(name) is not None:
            return config[name]
    for value in config.values():
        if isinstance(value, dict) and (found := _quantization(value)) is not None:
            return found
    return None
