"""The sum of an adapter and its base model's weights, by peft, with what peft leaves undone.

peft adds to tied embeddings and head as if they were two, though they are one tensor; ignores tensors of the adapter
that the base has no place for; and does not give the base the rows of tokens that the adapter's training added.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dice_py.errors import DataError
from dice_py.models.bin_weights import bin_tensors
from dice_py.models.rounding import measure_change
from dice_py.models.weight_files import first_few, weight_files
from dice_py.models.weight_names import error_line


def add_adapter(model: Any, adapter: Path, base: Path) -> Any:
    """The model with the adapter added to its weights.

    Args:
        model: the base model in float32, which is changed.
        adapter: the folder of the adapter.
        base: the folder of the base model, for error messages.

    Raises:
        DataError: the adapter does not fit the base, or is of a kind that cannot be merged.
    """
    from peft import PeftConfig, PeftModel

    try:
        config = PeftConfig.from_pretrained(adapter)
        _check_kind(config)
        _resize(model, adapter)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            wrapped = PeftModel.from_pretrained(model, adapter)
            absent = [str(each.message) for each in caught if "missing adapter keys" in str(each.message)]
        if absent:
            raise ValueError(absent[0])
        _check_all_used(wrapped, adapter)
        return merge(wrapped, safe=True)
    except MemoryError:
        raise
    except Exception as error:  # peft and torch raise many kinds for what does not fit
        text = str(error) if isinstance(error, DataError) else error_line(error)
        raise DataError(
            f"{adapter}: the adapter cannot be merged into its base model {base} ({text}); check that this is the base "
            "it was trained on, or give the folder of a model that you merged yourself"
        ) from None


def merge(wrapped: Any, *, safe: bool = False) -> Any:
    """The model of a PeftModel, with its adapter added to the weights.

    Tied embeddings and head stay tied only if both are still equal, and config.json says it.

    Args:
        safe: whether NaN is an error.

    Raises:
        ValueError: NaN, with `safe`.
    """
    import torch

    model = wrapped.get_base_model()
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and _weight(head) is _weight(embeddings)
    if tied and (head.__class__ is not torch.nn.Linear or embeddings.__class__ is not torch.nn.Embedding):
        _set_weight(head, torch.nn.Parameter(_weight(head).detach().clone(), requires_grad=False))
    merged = wrapped.merge_and_unload(safe_merge=safe)
    _tie_what_is_equal(merged)
    return merged


def share_kept(model: Any, base: Path, dtype: Any) -> float:
    """The share of an adapter's changes Δ that rounding to `dtype` leaves, as models/rounding.py measures it.

    Tensors that the base's files hold by other names are left out.
    """
    state = model.state_dict()
    stored = ((name, before) for file in weight_files(base) for name, before in _each_tensor(file))
    pairs = ((before, state[name]) for name, before in stored if name in state and before.shape == state[name].shape)
    return measure_change(pairs, dtype).kept


def _each_tensor(file: Path) -> Iterator[tuple[str, Any]]:
    """The tensors of a file of weights by name, one at a time in memory where its format allows it."""
    from safetensors import safe_open

    if file.suffix == ".bin":
        yield from bin_tensors(file, "cpu").items()
        return
    with safe_open(file, framework="pt") as handle:
        for name in handle.keys():  # noqa: SIM118 (the handle is no mapping)
            yield name, handle.get_tensor(name)


def _check_kind(config: Any) -> None:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning:
        raise DataError(f"{kind} puts learned vectors before the prompt, which no weight of a model can hold")
    if getattr(config, "layer_replication", None):
        raise DataError("its layer_replication repeats layers of the base")


def _names(model: Any, module: Any) -> str | None:
    return next((name for name, each in model.named_modules() if each is module), None)


def _resize(model: Any, adapter: Path) -> None:
    """Gives the base as many rows as the adapter has for embeddings and head, where training added tokens."""
    from peft.utils.save_and_load import load_peft_weights

    stored = load_peft_weights(str(adapter), device="cpu")
    rows = {}
    parts = {"embeddings": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    for part, module in parts.items():
        name = _names(model, module)
        for key, value in stored.items():
            if name and key.endswith((f".{name}.weight", f".{name}.base_layer.weight")):
                rows[part] = int(value.shape[0])
    has = int(parts["embeddings"].weight.shape[0])
    wanted = set(rows.values()) - {has}
    if not wanted:
        return
    tied = parts["head"] is not None and parts["head"].weight is parts["embeddings"].weight
    if len(wanted) > 1 or (not tied and set(rows) != {"embeddings", "head"}):
        raise DataError(f"it has {max(wanted)} rows of {' and '.join(rows)}, and the base has {has}")
    model.resize_token_embeddings(wanted.pop(), mean_resizing=False)


def _check_all_used(wrapped: Any, adapter: Path) -> None:
    """Refuses tensors of the adapter that the base has no place for: it was trained on another."""
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    stored = load_peft_weights(str(adapter), device="cpu")
    result = set_peft_model_state_dict(wrapped, stored)
    # peft saves a resized module that is trained as a whole under two names, and reads one.
    twins = {name for name in stored if ".modules_to_save." in name and name.replace(".modules_to_save", "") in stored}
    unused = sorted(set(result.unexpected_keys) - twins)
    if unused:
        raise DataError(f"the base has no place for {len(unused)} of its tensors: {first_few(unused)}")


def _weight(module: Any) -> Any:
    """The weight of a module, or of the one that an adapter wraps."""
    return module.get_base_layer().weight if hasattr(module, "get_base_layer") else module.weight


def _set_weight(module: Any, weight: Any) -> None:
    (module.get_base_layer() if hasattr(module, "get_base_layer") else module).weight = weight


def _tie_what_is_equal(model: Any) -> None:
    """config.json says of a model's head what its weights say: engines go by it, and differ in what else they do."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    text = model.config.get_text_config()
    if head is None or not getattr(text, "tie_word_embeddings", getattr(model.config, "tie_word_embeddings", False)):
        return
    if head.weight is embeddings.weight:
        return
    if head.weight.shape == embeddings.weight.shape and bool((head.weight == embeddings.weight).all()):
        head.weight = embeddings.weight
        return
    model.config.tie_word_embeddings = text.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
