"""Settings of a training that only the libraries can judge, tried before a run spends hours on what comes before it.

Each is tried by what the trainer itself will do with it: the optimizer is built and steps on one weight, the scheduler
is built on it, the adapters are put into the policy without its weights.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from dice_py.config.extras import EXTRAS, install
from dice_py.config.passthrough import refused_by
from dice_py.config.training import LoraConfig, TrainConfig
from dice_py.errors import UsageError
from dice_py.training.lora import layers_of, peft_config, special_layers


def check_training_settings(config: TrainConfig, policy: Path, *, section: str = "train", remote_code: bool) -> None:
    """Checks passed options, trackers, the optimizer, the scheduler, the LoRA targets and the layers beside them.

    Args:
        policy: the model's folder, of which only config.json is read.
        section: of the config, for error messages.
        remote_code: as model.trust_remote_code.

    Raises:
        UsageError: the message names the setting, what is missing, and the remedy.
    """
    check_trainer_args(config.trainer_args, section)
    if config.method == "mpo":
        kind = "GRPOConfig" if config.mpo.trainer == "grpo" else "RLOOConfig"
        check_trainer_args(config.mpo.trainer_args, f"{section}.mpo", kind)
    _check_trackers(config.report_to, section)
    optimizer = _check_optimizer(config, section)
    _check_scheduler(config, optimizer, section)
    if config.lora is not None:
        _check_adapters(config.lora, policy, section, remote_code)


def check_trainer_args(options: dict[str, Any], section: str = "train", kind: str = "DPOConfig") -> None:
    """Checks further options of a config of TRL's, by making one of them, and their values by its annotations.

    Args:
        kind: the name of its class.

    Raises:
        UsageError: with the library's own message, or the value and the type that it should have.
    """
    if not options:
        return
    import trl

    config, key = getattr(trl, kind), f"{section}.trainer_args"
    try:
        with tempfile.TemporaryDirectory() as folder:
            config(output_dir=folder, use_cpu=True, report_to="none", **options)
    except Exception as error:  # each check of the libraries has errors of its own
        raise refused_by(f"TRL's {kind}", key, error, [field.name for field in dataclasses.fields(config)]) from None
    # A dataclass takes a value of any type: training would meet it after hours.
    hints = get_type_hints(config)
    for name, value in options.items():
        try:
            TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
        except ValidationError as error:
            raise UsageError(f"{key}.{name} is {value!r}: {error.errors()[0]['msg']}") from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _check_trackers(names: list[str], section: str) -> None:
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    available = get_available_reporting_integrations()
    for name in names:
        if name in ("none", "all"):
            raise UsageError(f"{section}.report_to has {name!r}; name the trackers, or leave it empty for none")
        if name not in INTEGRATION_TO_CALLBACK:
            raise UsageError(
                f"{section}.report_to has {name!r}, which transformers does not know; it knows "
                f"{', '.join(INTEGRATION_TO_CALLBACK)}"
            )
        if name not in available:
            command = install("tracking") if name in EXTRAS["tracking"] else f"pip install {name}"
            raise UsageError(
                f"{section}.report_to has {name!r}, which is not installed; add it with: {command} (or leave it out of "
                f"{section}.report_to)"
            )


def _check_optimizer(config: TrainConfig, section: str) -> Any:
    """An optimizer as the trainer would build it, of one weight on the CPU."""
    import torch
    from transformers import Trainer
    from transformers.training_args import OptimizerNames
    from trl import DPOConfig

    known = [str(kind.value) for kind in OptimizerNames]
    if config.optim not in known:
        raise UsageError(
            f"{section}.optim is {config.optim!r}, which transformers does not know; it knows {', '.join(known)}"
        )
    weight = torch.nn.Parameter(torch.ones(8, 8))
    try:
        with tempfile.TemporaryDirectory() as folder:
            arguments = DPOConfig(
                output_dir=folder,
                optim=config.optim,
                learning_rate=config.learning_rate,
                weight_decay=config.weight_decay,
                adam_beta2=config.adam_beta2,
                use_cpu=True,
                report_to="none",
                **config.trainer_args,
            )
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = kind([weight], **options)
    except Exception as error:  # each library has errors of its own
        raise UsageError(
            f"{section}.optim is {config.optim!r}, which cannot be used here ({_first_line(error)}); set "
            f"{section}.optim=adamw_torch_fused"
        ) from None
    return optimizer


def _check_scheduler(config: TrainConfig, optimizer: Any, section: str) -> None:
    from transformers import SchedulerType, get_scheduler

    known = [str(kind.value) for kind in SchedulerType]
    name = config.lr_scheduler_type
    key = f"{section}.lr_scheduler_type"
    if name not in known:
        raise UsageError(f"{key} is {name!r}, which transformers does not know; it knows {', '.join(known)}")
    try:
        scheduler = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=config.trainer_args.get("lr_scheduler_kwargs"),
        )
    except Exception as error:
        raise UsageError(
            f"{key} is {name!r}, which needs further settings ({_first_line(error)}); set {key}=cosine, linear or "
            f"constant_with_warmup, or give them in {section}.trainer_args.lr_scheduler_kwargs"
        ) from None
    if not hasattr(scheduler, "get_last_lr") or not _steps_alone(scheduler):
        raise UsageError(
            f"{key} is {name!r}, which follows a metric of an evaluation during training, and there is none; set "
            f"{key}=cosine, linear or constant_with_warmup"
        )


def _steps_alone(scheduler: Any) -> bool:
    """Whether the scheduler needs nothing but the number of the step."""
    import inspect

    parameters = inspect.signature(scheduler.step).parameters
    return all(parameter.default is not inspect.Parameter.empty for parameter in parameters.values())


def _check_adapters(lora: LoraConfig, policy: Path, section: str, remote_code: bool) -> None:
    if importlib.util.find_spec("peft") is None:
        raise UsageError(f"{section}.lora is set, but peft is not installed; add it with: {install('train')}")
    import torch
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        config = AutoConfig.from_pretrained(policy, trust_remote_code=remote_code)
        # Eager, since an attention kernel that config.json names need not be installed.
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=remote_code, attn_implementation="eager")
    key = f"{section}.lora.target_modules"
    names = [name for name, _ in model.named_modules() if name]
    leaves = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "weight")})
    if lora.target_modules != "all-linear":
        for target in lora.target_modules:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                raise UsageError(
                    f"{key} has {target!r}, which is no module of {policy}; its modules with weights are "
                    f"{', '.join(leaves)}"
                )
    _check_modules_to_save(lora, model, policy, section, leaves)
    special = set(special_layers(model))
    try:
        wrapped = get_peft_model(model, peft_config(lora, model))
    except Exception as error:
        raise UsageError(
            f"{section}.lora cannot be put into {policy} ({_first_line(error)}); its modules with weights are "
            f"{', '.join(leaves)}"
        ) from None
    adapted = {name for name, module in wrapped.get_base_model().named_modules() if isinstance(module, BaseTunerLayer)}
    if adapted & special:
        raise UsageError(
            f"{key} has {min(adapted & special)!r} of {policy}, which returns more than a tensor, so that PEFT cannot "
            "add to it; leave it out"
        )
    head = wrapped.get_base_model().get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        name = next(name for name, module in wrapped.get_base_model().named_modules() if module is head)
        raise UsageError(
            f"{key} has the head of {policy}, {name!r}, which the trainer applies without its adapter, so that it "
            "would learn nothing; leave it out"
        )


def _check_modules_to_save(lora: LoraConfig, model: Any, policy: Path, section: str, leaves: list[str]) -> None:
    key = f"{section}.lora.modules_to_save"
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and (head.weight is embeddings.weight or bool(model.all_tied_weights_keys))
    for given in lora.modules_to_save:
        found = layers_of(given, model) if given else {}
        if not found:
            raise UsageError(
                f"{key} has {given!r}, which is no module of {policy}; its modules with weights are {', '.join(leaves)}"
            )
        for name, module in found.items():
            if next(module.children(), None) is not None or next(module.parameters(), None) is None:
                raise UsageError(
                    f"{key} has {given!r}, but {name} is no single layer with weights; name layers inside of it, of "
                    f"{', '.join(leaves)}"
                )
            if tied and (module is head or module is embeddings):
                raise UsageError(
                    f"{key} has {given!r}, but {policy} ties its head to its embeddings (tie_word_embeddings), and "
                    "training one of the two would part them; leave it out, or train all weights (without train.lora)"
                )
