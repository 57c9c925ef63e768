"""The rewards of an audit by pair or by response, as a table to be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from dice_py.evaluation.audit.choices import LENGTH_ONLY, Reward
from dice_py.evaluation.audit.inputs import SIDES, AuditInputs


def rewards_frame(
    inputs: AuditInputs, logps: Mapping[str, np.ndarray], rewards: Sequence[Reward], outcomes: Mapping[str, np.ndarray]
) -> pl.DataFrame:
    """The rows of an audit with what was computed of them.

    Returns:
        Of preference pairs, for each row: its texts, `chosen_tokens` and `rejected_tokens`, for each model
        `chosen_logp ROLE` and `rejected_logp ROLE` (nats), for each choice `chosen_reward CHOICE`, `rejected_reward
        CHOICE` and `outcome CHOICE` (1, 0.5 or 0), and the outcome of length alone. Of scored responses, for each:
        `prompt_number`, its texts, score and model, `response_tokens`, `logp ROLE` and `reward CHOICE`.
    """
    data = inputs.data
    texts = inputs.rows.drop(name for name in inputs.rows.columns if name.endswith("_ids"))
    values = {"tokens": data.tokens} | {f"logp {role}": sums for role, sums in logps.items()}
    values |= {f"reward {reward.choice.name}": reward.values for reward in rewards}
    if data.is_scored:
        columns = [pl.Series(_name("response", name), column) for name, column in values.items()]
        return texts.with_columns(columns).insert_column(0, pl.Series("prompt_number", data.prompt))
    added = [
        pl.Series(_name(side, name), column[at::2]) for name, column in values.items() for at, side in enumerate(SIDES)
    ]
    names = [*(reward.choice.name for reward in rewards), LENGTH_ONLY]
    return texts.with_columns(*added, *(pl.Series(f"outcome {name}", outcomes[name]) for name in names))


def _name(side: str, name: str) -> str:
    """`chosen_tokens`, but `reward CHOICE` for the only response of a row."""
    return name if side == "response" and name != "tokens" else f"{side}_{name}"
