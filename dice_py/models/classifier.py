"""Sequence classifiers with one label: models that read a conversation and give it one score.

A head that a checkpoint lacks would be random numbers, so its weights must all be there, as those of a policy must.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_py.config.shared import ModelConfig
from dice_py.errors import DataError, UsageError
from dice_py.models.checkpoint import check_values
from dice_py.models.folder_check import check_model_folder
from dice_py.models.limits import positions_limit, read_config
from dice_py.models.loading import placement
from dice_py.models.weight_names import check_loaded, error_line
from dice_py.timing import timed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_classifier(folder: Path, config: ModelConfig) -> PreTrainedModel:
    """Loads a sequence classifier with one label in evaluation mode, on its device.

    Args:
        folder: a model folder in the Hugging Face layout.
        config: dtype, device, attention implementation, whether code of the model may run.

    Raises:
        DataError: the folder is incomplete, its weights are not all there or hold NaN, it has several labels, or
            transformers cannot load it.
        UsageError: a device or a package that is not here, or code of the model's own without model.trust_remote_code.
    """
    place = placement(config)
    with timed("import"):
        import torch
        from transformers import AutoModelForSequenceClassification
        from transformers.utils import logging

    check_model_folder(folder, role="reward model", scores=True)
    _check_labels(folder, config)
    check_values(folder)
    logging.disable_progress_bar()
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    with timed("load"):
        try:
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                folder,
                dtype=getattr(torch, place.dtype),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, with names
                **options,
            )
        except Exception as error:  # each architecture checks in its own way
            if "trust_remote_code" in str(error):
                raise UsageError(
                    f"{folder}: the reward model needs code that comes with it; if you trust that code, let it run "
                    "with --set model.trust_remote_code=true"
                ) from None
            raise DataError(
                f"{folder}: transformers cannot load a sequence classifier from it: {error_line(error)}"
            ) from None
        check_loaded(folder, type(model).__name__, loading, {})
        model.config.get_text_config().use_cache = False
        return model.eval().to(place.device)


def _check_labels(folder: Path, config: ModelConfig) -> None:
    labels = getattr(read_config(folder, config), "num_labels", None)
    if labels != 1:
        raise DataError(
            f"{folder}: the model has {labels} labels, and a reward model has one, its score; give one that was "
            "trained with num_labels=1 (TRL's RewardTrainer does so)"
        )


def classifier_positions(model: PreTrainedModel) -> float | None:
    """Tokens that fit into a classifier's positions; None if there is no limit.

    RoBERTa and its kin count positions from behind the padding token, so that fewer fit than the config says.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return float(module.num_embeddings - module.padding_idx - 1)
    return positions_limit(model.config)
