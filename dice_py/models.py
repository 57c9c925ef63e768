"""Models and tokenizers: found, checked, identified, loaded; prompts and pairs as token ids.

Importing this file imports neither torch nor transformers; its functions do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from dice_py.artefacts import PAIRS, digest, file_digest
from dice_py.clock import clocked
from dice_py.config import ModelConfig
from dice_py.data import Message
from dice_py.errors import DataError, UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_HASHED_WHOLE = 64 * 2**20  # bytes; larger files count by name, size and time


def require(*modules: str, extra: str) -> None:
    """Checks that modules of an optional extra are installed.

    Raises:
        UsageError: naming what is missing and the command that adds it.
    """
    import importlib.util

    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"{', '.join(missing)} is not installed; add it with: pip install 'dice-align[{extra}]'")


def resolve_model(name: str, revision: str | None, *, role: str) -> Path:
    """The local folder of a model: `name` itself if it is one, else a snapshot from the Hugging Face hub.

    Raises:
        DataError: the folder lacks a config or weights, or the hub does not give the model.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or folder.exists():
            raise DataError(f"{role}: {name} is not a folder; give a model folder or a Hugging Face id")
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
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{role}: {name} is no folder here, and the Hugging Face hub does not give it ({first}); "
            "check the name, log in (hf auth login), or download it first and give its folder"
        ) from None


def check_model_folder(folder: Path, *, role: str) -> None:
    """Checks for config.json (or an adapter's) and for weights.

    Raises:
        DataError: naming what the folder lacks.
    """
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise DataError(f"{role}: {folder} has no config.json; it is not a model folder in the Hugging Face layout")
    if not any(True for pattern in _WEIGHTS for _ in folder.glob(pattern)):
        raise DataError(
            f"{role}: {folder} has a config but no weights (looked for {' and '.join(_WEIGHTS)}); "
            "was the download or the save cut off?"
        )


def model_identity(folder: Path) -> str:
    """A digest of what the folder holds: small files by content, large ones by name, size and time."""
    parts: list[Any] = []
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in (".json", ".safetensors", ".bin", ".model", ".jinja", ".txt"):
            stat = file.stat()
            content = file_digest(file) if stat.st_size <= _HASHED_WHOLE else [stat.st_size, stat.st_mtime_ns]
            parts.append([file.name, content])
    return digest(parts)


@dataclass(frozen=True)
class Placement:
    """Where a model is held and in which type: a device such as `cuda:0`, and a torch dtype's name."""

    device: str
    dtype: str


def placement(config: ModelConfig) -> Placement:
    """Resolves `auto`: the first GPU else the CPU; bfloat16 on a GPU that has it, else float32.

    Raises:
        UsageError: a device that this machine lacks.
    """
    require("torch", "transformers", extra="train")
    with clocked("import"):
        import torch

    device = config.device
    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"model.device is {device!r}, but torch sees no GPU here; set model.device=cpu or auto")
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"
    return Placement(device, dtype)


def load_model(folder: Path, config: ModelConfig, *, training: bool = False) -> PreTrainedModel:
    """A causal language model in evaluation mode on its device (left on the CPU for `training`).

    Raises:
        DataError: transformers cannot build it from the folder.
    """
    with clocked("import"):
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

    logging.disable_progress_bar()
    where = placement(config)
    check_model_folder(folder, role="model")
    options: dict[str, Any] = {}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    with clocked("load"):
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, where.dtype), trust_remote_code=config.trust_remote_code, **options
            )
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder}: transformers cannot load a causal language model from it: {error}") from None
        model.eval()
        return model if training else model.to(where.device)


_held: list[tuple[tuple[str, str, ModelConfig], PreTrainedModel]] = []


def held_model(folder: Path, config: ModelConfig) -> PreTrainedModel:
    """`load_model`, but the last one is held in this process, so that no weights are read twice in a row.

    Held until another is asked for, or `release_held`: whoever is about to fill the device otherwise calls that.
    """
    wanted = (str(folder.resolve()), model_identity(folder), config)
    if not _held or _held[0][0] != wanted:
        release_held()
        _held.append((wanted, load_model(folder, config)))
    return _held[0][1]


def release_held() -> None:
    """Gives the memory of the held model back."""
    if _held:
        device = _held[0][1].device
        _held.clear()
        release(device)


def load_tokenizer(folder: Path, config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with a chat template and a padding token.

    Raises:
        DataError: absent, or without a chat template or an end-of-sequence token.
    """
    require("transformers", extra="train")
    with clocked("import"):
        from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        raise DataError(f"{folder}: transformers cannot load a tokenizer from it: {first}") from None
    if not tokenizer.chat_template:
        raise DataError(
            f"{folder}: its tokenizer has no chat template, so a prompt cannot be rendered; save one with the "
            "tokenizer (tokenizer.chat_template = …), or use the instruction-tuned tokenizer of this model"
        )
    if tokenizer.eos_token_id is None:
        raise DataError(f"{folder}: its tokenizer has no end-of-sequence token, so a response cannot end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stop_token_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a response: the tokenizer's EOS and those of the model's generation config."""
    found = {int(tokenizer.eos_token_id)}
    file = folder / "generation_config.json"
    if file.is_file():
        listed = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        for token in listed if isinstance(listed, list) else [listed]:
            if isinstance(token, int):
                found.add(token)
    return sorted(found)


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str, **options: Any) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except TemplateError as error:
        raise DataError(f"{where}: the chat template refuses these messages: {error}") from None


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str = "prompt") -> list[int]:
    """Token ids of the prompt as the model sees it before it answers.

    The template writes its own BOS: none is added, so that none is doubled.
    """
    text = _render(tokenizer, messages, where, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def encode_response(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[Message],
    response: list[Message],
    stops: list[int],
    where: str = "pair",
) -> list[int]:
    """Token ids of an offline answer as the policy would have sampled it: up to its first stop token.

    What a template writes after the stop token (a line break, say) is cut off, since nothing samples it; a
    stop token is added where the template writes none. Text and prompt are tokenised apart, which is how a
    sampled response meets its prompt.

    Raises:
        DataError: the template renders the prompt differently once an answer follows.
    """
    before = _render(tokenizer, prompt, where, add_generation_prompt=True)
    whole = _render(tokenizer, [*prompt, *response], where)
    if not whole.startswith(before):
        raise DataError(
            f"{where}: the chat template renders the prompt differently once an answer follows it, so the "
            "answer's tokens cannot be told apart; use a template whose generation prompt is a prefix"
        )
    ids: list[int] = tokenizer(whole[len(before) :], add_special_tokens=False)["input_ids"]
    for index, token in enumerate(ids):
        if token in stops:
            return ids[: index + 1]
    return [*ids, int(tokenizer.eos_token_id)]


def encode_pairs(pairs: pl.DataFrame, tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> pl.DataFrame:
    """Adds `prompt_ids`, `chosen_ids`, `rejected_ids` (list i32) to pairs of messages."""
    encoded: dict[str, list[list[int]]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for row, (prompt, chosen, rejected) in enumerate(pairs.select("prompt", "chosen", "rejected").iter_rows()):
        encoded["prompt_ids"].append(encode_prompt(tokenizer, prompt, f"pair {row}"))
        encoded["chosen_ids"].append(encode_response(tokenizer, prompt, chosen, stops, f"pair {row}, chosen"))
        encoded["rejected_ids"].append(encode_response(tokenizer, prompt, rejected, stops, f"pair {row}, rejected"))
    columns = [pl.Series(name, ids, dtype=PAIRS[name]) for name, ids in encoded.items()]
    return pairs.with_columns(columns)


def release(device: torch.device) -> None:
    """Gives cached GPU memory back, after the last reference to a model was dropped."""
    import gc

    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
