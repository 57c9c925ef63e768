"""Token ids that `generate.sampling_params` names, and that a policy may lack. Without torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dice_py.config.shared import ModelConfig
from dice_py.errors import UsageError
from dice_py.models.limits import vocabulary_size


def check_token_ids(ids: Iterable[int], models: ModelConfig, policy: Path) -> None:
    """Checks ids against the policy's vocabulary.

    Args:
        policy: the model's folder.

    Raises:
        UsageError: one of them is not in it.
    """
    size = vocabulary_size(policy, models)
    wrong = [token for token in ids if token < 0 or (size is not None and token >= size)]
    if wrong:
        raise UsageError(
            f"generate.sampling_params names token {wrong[0]}, but the vocabulary of {policy} has {size} entries: "
            "use ids of the policy's own tokenizer"
        )
