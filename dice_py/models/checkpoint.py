"""Checks that a folder holds a causal language model with all of its weights, before any work is done with it.

Configs and headers come first (models/folder_check.py), then the model is built on the meta device and its weights'
names and shapes are compared (models/weight_names.py), and last the weights are read once, for NaN and
zeros (models/weight_records.py). What has passed is remembered under the model's content.
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_py.config.extras import require
from dice_py.config.shared import ModelConfig
from dice_py.errors import DataError, DiceError, UsageError
from dice_py.models.bin_weights import bin_records
from dice_py.models.folder_check import check_model_folder, read_object
from dice_py.models.identity import model_identity
from dice_py.models.loading import placement
from dice_py.models.weight_files import first_few, weight_files
from dice_py.models.weight_names import compare_weights, error_line, stored_tensors
from dice_py.models.weight_records import TensorRecord, tensor_records
from dice_py.storage.cache import recall, remember
from dice_py.storage.keys import digest, versions
from dice_py.timing import timed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_CHECKS = 3  # to be increased when what passed before need not pass now
_MOST_ZEROS = 0.1
"""Share of the matrices' values; in LLaMA Pro's added blocks, the matrices of zeros are a twentieth of the model."""
_WORDS = re.compile(r"(embed_tokens|word_embeddings|wte|embed_in|embed_out|lm_head)\.weight$")
_ENCODER = "which is no causal language model: it cannot generate text token by token"
_NOT_TEXT_ALONE = (
    "which reads more than text, and transformers has no causal language model of it; give one of text alone"
)


def check_checkpoint(folder: Path, role: str, config: ModelConfig) -> None:
    """Checks the model in a folder for every engine: configs, names and shapes of its weights, and their values.

    Args:
        role: how error messages name the model, such as "policy".
        config: device, attention implementation, whether code of the model may run.

    Raises:
        DataError: what the folder lacks or holds too much, naming file or tensor.
        UsageError: a device, an attention implementation or a package that is not here, or code of the model's own
            without model.trust_remote_code.
    """
    check_model_folder(folder, role=role)
    placement(config)
    require("accelerate", extra="train")
    key = digest(
        _CHECKS,
        model_identity(folder),
        config.model_dump(include={"device", "attn_implementation", "trust_remote_code"}),
        versions("torch", "transformers"),
    )
    if recall("checkpoint", key):
        return
    try:
        with timed("import"):
            import transformers  # noqa: F401 (timed apart from the check)
        with _quiet():
            transformers_config = _read_config(folder, config)
            _check_generation_config(folder)
            built = _build(folder, transformers_config, config)
            compare_weights(folder, built)
        _check_tied(folder, built.all_tied_weights_keys, check_values(folder))
    except DiceError as error:
        raise type(error)(f"{role}: {error}") from None
    remember("checkpoint", key, True)


def described_model(folder: Path, config: ModelConfig) -> PreTrainedModel:
    """The model that a folder's config.json describes, on the meta device: names and shapes, no values.

    Raises:
        DataError, UsageError: as of `check_checkpoint`.
    """
    with _quiet():
        return _build(folder, _read_config(folder, config), config)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and bars of transformers, whose findings are raised as errors."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def _read_config(folder: Path, config: ModelConfig) -> PreTrainedConfig:
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    file = folder / "config.json"
    content = read_object(file)
    kind = content.get("model_type")
    own_code = content.get("auto_map")
    if kind not in CONFIG_MAPPING and own_code and not config.trust_remote_code:
        raise UsageError(
            f"{file}: the model needs code that comes with it (auto_map); if you trust that code, let it run with "
            "--set model.trust_remote_code=true"
        )
    if kind not in CONFIG_MAPPING and not own_code:
        known = versions("transformers")["transformers"]
        raise DataError(
            f"{file}: transformers {known} knows no model_type {kind!r}; a newer version may, or the name is wrong"
        )
    try:
        read = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        layers = getattr(read.get_text_config(), "num_hidden_layers", None)
    except Exception as error:  # each config class checks in its own way
        raise _config_error(file, error) from None
    # A model that was trained to fill masks attends both ways, unless its config says that it is a decoder.
    encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and getattr(read, "is_decoder", None) is False
    if encoder or getattr(read, "is_encoder_decoder", False):
        raise DataError(f"{file}: a model of type {kind!r}, {_ENCODER}")
    stored = len(stored_tensors(folder))
    if isinstance(layers, int) and layers > stored:
        raise DataError(f"{file} says num_hidden_layers={layers}, but the folder holds only {stored} weights")
    return read


def _config_error(file: Path, error: Exception) -> DataError:
    cause = error_line(error)
    return DataError(
        f"{file}: transformers cannot build the model that it describes: {cause}; correct it, or download it again"
    )


def _check_generation_config(folder: Path) -> None:
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    if file.is_file():
        try:
            GenerationConfig.from_pretrained(folder)
        except Exception as error:  # raised for values by many kinds of checks
            raise DataError(
                f"{file}: transformers does not accept it: {error_line(error)}; correct or delete it"
            ) from None


def _build(folder: Path, read: PreTrainedConfig, config: ModelConfig) -> PreTrainedModel:
    """The model on the meta device, with the attention implementation that is asked for."""
    import torch
    from transformers import AutoModelForCausalLM

    def build(**options: Any) -> Any:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(read, trust_remote_code=config.trust_remote_code, **options)

    kernel = config.attn_implementation
    try:
        # Where one is asked for, not the one that config.json may name: that need not be installed.
        model = build() if kernel is None else build(attn_implementation="eager")
    except ImportError as error:
        raise UsageError(
            f"{folder}: the model needs a package that is not installed: {error_line(error)}; if that is an attention "
            "kernel that config.json names, choose another with --set model.attn_implementation=sdpa"
        ) from None
    except Exception as error:  # sizes that do not go together fail anywhere in the constructor
        if "Unrecognized configuration class" in str(error):
            senses = any(hasattr(read, name) for name in ("vision_config", "audio_config"))
            cause = _NOT_TEXT_ALONE if senses else _ENCODER
            raise DataError(f"{folder / 'config.json'}: a model of type {read.model_type!r}, {cause}") from None
        raise _config_error(folder / "config.json", error) from None
    if kernel is not None:
        try:
            model = build(attn_implementation=kernel)
        except Exception as error:  # a package, a GPU or a kernel that is missing, or a name that is not known
            raise UsageError(
                f"model.attn_implementation is {kernel!r}, which cannot be used here: {error_line(error)}; leave it "
                "out (--set model.attn_implementation=sdpa), or install what it needs"
            ) from None
    return model


def check_values(folder: Path) -> dict[str, TensorRecord]:
    """Reads all weights of a model folder. Returns the records of its tensors by name.

    Raises:
        DataError: tensors with NaN or infinities, or matrices that were never written.
    """
    held: dict[str, TensorRecord] = {}
    for file in weight_files(folder):
        records = bin_records(file) if file.suffix == ".bin" else tensor_records(file)
        broken = [name for name, record in records.items() if not record.finite]
        if broken:
            raise DataError(
                f"{file}: {len(broken)} tensors hold NaN or infinite numbers ({first_few(broken)}); the training that "
                "saved it diverged, or the file is damaged"
            )
        held |= records
    _check_written(folder, held)
    return held


def _check_written(folder: Path, held: dict[str, TensorRecord]) -> None:
    """Refuses a model of which the words' embeddings, the head, or a good part of all matrices are zeros.

    A few matrices of zeros are sound: blocks that are added to a model begin as the identity.
    """
    matrices = {name: math.prod(record.shape) for name, record in held.items() if len(record.shape) > 1}
    empty = [name for name in matrices if held[name].zero]
    share = sum(matrices[name] for name in empty) / max(1, sum(matrices.values()))
    words = [name for name in empty if _WORDS.search(name)]
    if words or share >= _MOST_ZEROS:
        raise DataError(
            f"{folder}: {len(empty)} of {len(matrices)} matrices hold nothing but zeros "
            f"({first_few([*words, *(name for name in empty if name not in words)])}), {share:.0%} of their values: "
            "they were never written, as where a download or a copy reserves the space first and is then cut off; "
            "download or save the model again"
        )


def _check_tied(folder: Path, tied: dict[str, str], held: dict[str, TensorRecord]) -> None:
    """Refuses weights that config.json ties and the files hold apart: transformers unties them, vLLM drops one.

    Args:
        tied: names of weights by the name of the weight that they are tied to, as transformers has them.
        held: the records of all tensors.
    """
    for name, other in tied.items():
        if name in held and other in held and held[name].digest != held[other].digest:
            raise DataError(
                f"{folder}: config.json says that {name} and {other} are one tensor (tie_word_embeddings), but the "
                "files hold two that differ, and libraries differ in which they use; if both are meant, set "
                "tie_word_embeddings to false in config.json, else delete one"
            )
