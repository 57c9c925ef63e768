"""The part of each token in a response's implicit reward: β·(log π(y_t | x, y_<t) − log π_ref(y_t | x, y_<t)).

The reward is their sum (Rafailov et al., arXiv 2305.18290, equation 5, without its term of the prompt). By token it is
that of Rafailov et al., arXiv 2404.12358: the credit of a token given what stands before it, and not of the word or the
thought that it is a part of.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_py.config.shared import ModelConfig
from dice_py.config.stages import ScoreConfig
from dice_py.errors import DataError
from dice_py.events import Report
from dice_py.models.loading import held_model, release_held
from dice_py.models.token_pieces import TokenPieces
from dice_py.timing import timed

if TYPE_CHECKING:
    import numpy as np

    from dice_py.models.packing import Tokens

TokenLogps = list["np.ndarray"]
"""For each response (tokens,) float32, in nats."""


def policy_and_reference_logps(
    config: ScoreConfig,
    models: ModelConfig,
    *,
    policy: Path,
    reference: Path,
    prompts: Sequence[Tokens],
    responses: Sequence[Tokens],
    report: Report,
) -> tuple[TokenLogps, TokenLogps]:
    """log π(y_t | x, y_<t) of each token of each response, under the policy and under the reference.

    One model is in memory at a time, and none afterwards.

    Raises:
        DataError: as of `Scorer.sums`, or a log-probability is not finite.
    """
    with timed("import"):
        import numpy as np

        from dice_py.scoring.scorer import Scorer

    done = 0

    def on_batch(scored: int) -> None:
        nonlocal done
        done += scored
        report("progress", stage="inspect", done=done, total=2 * len(responses), unit="sequences")

    found = []
    try:
        for role, folder in (("policy", policy), ("reference", reference)):
            scorer = Scorer(held_model(folder, models), config, report)
            logps = scorer.token_logps(prompts, responses, on_batch)
            if not all(np.isfinite(each).all() for each in logps):
                raise DataError(
                    f"the log-probabilities of the {role} ({folder}) are not finite; its weights are damaged, or "
                    "model.dtype is too small for it: try --set model.dtype=float32"
                )
            report("throughput", stage="inspect", model=role, **scorer.take_work())
            found.append(logps)
            del scorer
    finally:
        release_held()
    return found[0], found[1]


def summed_credit(logps: np.ndarray, ref_logps: np.ndarray, beta: float) -> float:
    """The implicit reward of a response: the sum of its tokens' credits, in float64."""
    return beta * float(logps.sum(dtype="float64") - ref_logps.sum(dtype="float64"))


def credit_pieces(
    pieces: TokenPieces, ids: Tokens, logps: np.ndarray, ref_logps: np.ndarray, beta: float
) -> list[dict[str, Any]]:
    """The credits of a response by pieces of its text, as rows of TOKEN_CREDIT (storage/schemas.py).

    Where several tokens make one character, the piece has the sums of theirs.

    Args:
        ids, logps, ref_logps: (tokens,) of one response.
    """
    rows = []
    for text, first, last in pieces.of(list(ids)):
        logp, ref_logp = (float(each[first:last].sum(dtype="float64")) for each in (logps, ref_logps))
        rows.append({"text": text, "logp": logp, "ref_logp": ref_logp, "credit": beta * (logp - ref_logp)})
    return rows
