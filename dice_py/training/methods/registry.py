"""The table of training methods. A method is one file beside this one and one line here.

A method sets the loss through arguments of TRL's DPOConfig. Its loss at step 0, where the policy is the reference, is
checked by training/step0.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dice_py.config.training import TrainConfig
from dice_py.training.methods import dpo

LossArguments = Callable[[TrainConfig, float], dict[str, Any]]
"""From the config and β to arguments of DPOConfig."""

METHODS: dict[str, LossArguments] = {"dpo": dpo.loss_arguments}
"""By name."""
