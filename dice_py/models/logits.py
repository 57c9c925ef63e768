"""What a model's config says of its logits, beyond the product of hidden states and the head's weights."""

from __future__ import annotations

from typing import Any


def logit_transform(config: Any) -> tuple[float, float | None]:
    """The factor of the logits, and the cap c of the soft capping c·tanh(logits / c); None without capping.

    Args:
        config: a transformers config; of a model with several parts, its text config is read.
    """
    text = config.get_text_config()
    scale = getattr(text, "logit_scale", None)
    for name in ("output_multiplier", "lm_head_multiplier"):  # of Muse Glimmer and Falcon-H1
        scale = getattr(text, name, None) if scale is None else scale
    scaling = getattr(text, "logits_scaling", None)
    if scale is None and scaling:
        scale = scaling if text.model_type == "hyperclovax" else 1.0 / scaling  # Granite and MiniCPM3 divide
    # The last two are RecurrentGemma's and xLSTM's.
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    cap = next((value for name in names if (value := getattr(text, name, None))), None)
    return 1.0 if scale is None else float(scale), cap
