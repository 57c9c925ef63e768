"""`generate.sampling_params` on the transformers engine, checked before a run. Without torch."""

from __future__ import annotations

from pathlib import Path

from dice_py.config.sampling_options import SamplingOptions
from dice_py.config.shared import ModelConfig
from dice_py.config.stages import GenerateConfig
from dice_py.errors import UsageError
from dice_py.generation.engines.token_ids import check_token_ids


def check_options(config: GenerateConfig, models: ModelConfig, policy: Path) -> SamplingOptions:
    """Checks names, ranges, and that the policy has the token ids that are named.

    Raises:
        UsageError: naming the option, and the remedy.
    """
    try:
        options = config.transformers_options()
    except ValueError as error:
        raise UsageError(f"generate.sampling_params: {error}") from None
    if options.token_ids:
        check_token_ids(options.token_ids, models, policy)
    return options
