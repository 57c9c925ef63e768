"""DPO: −log σ(β·[(log π(y_w|x) − ref_w) − (log π(y_l|x) − ref_l)]) (Rafailov et al., arXiv 2305.18290, eq. 7).

With `train.sft_weight`, plus that weight × the mean negative log-likelihood of the chosen tokens.
"""

from __future__ import annotations

from typing import Any

from dice_py.config.training import TrainConfig


def loss_arguments(config: TrainConfig, beta: float) -> dict[str, Any]:
    """The arguments of TRL's DPOConfig that set the loss."""
    if config.sft_weight > 0:
        return {"beta": beta, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, config.sft_weight]}
    return {"beta": beta, "loss_type": ["sigmoid"], "loss_weights": [1.0]}
