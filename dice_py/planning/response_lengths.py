"""Lengths of a calibration's responses, where it sampled fewer of a prompt than the run will, or cut them.

A cut response is censored: it would have gone on. That it ends at its next token has the probability (responses that
stopped) / (tokens sampled), the maximum likelihood of a geometric distribution. It is taken over the second half of the
tokens before the cut, since those that are still going on there are the longer ones; half a stop is added, so that a
sample without any gives lengths too.
"""

from __future__ import annotations

import math

import numpy as np
import polars as pl

from dice_py.config.run import RunConfig
from dice_py.runs.measured_costs import ResponseLengths
from dice_py.runs.measured_lengths import response_lengths, usable_responses


def calibrated_lengths(config: RunConfig, responses: pl.DataFrame, cut_at: int | None) -> ResponseLengths:
    """As `response_lengths`, of responses that a calibration sampled.

    Args:
        responses: `prompt_id`, `response_tokens`, `finish_reason`.
        cut_at: tokens at which the calibration cut responses; None: generate.max_new_tokens.
    """
    extended, extrapolated = responses, 0
    if cut_at is not None and cut_at < config.generate.max_new_tokens:
        extended, extrapolated = extend(responses, cut_at, config.generate.max_new_tokens)
    lengths = response_lengths(config, extended)
    if extended.height < extended["prompt_id"].n_unique() * config.generate.samples:
        share = float(extended.select(usable_responses(config).mean()).item())
        usable = share_with_enough(share, config.generate.samples, config.mine.min_responses)
        lengths = lengths.model_copy(update={"usable": usable})
    return lengths.model_copy(update={"extrapolated": extrapolated, "cut_at": cut_at if extrapolated else None})


def extend(responses: pl.DataFrame, cut_at: int, limit: int) -> tuple[pl.DataFrame, int]:
    """Extends the responses that were cut at `cut_at` tokens, to at most `limit`; returns them and their number.

    The further tokens are drawn from a geometric distribution, the same ones in every call.
    """
    cut = (responses["finish_reason"] == "length") & (responses["response_tokens"] >= cut_at)
    count = int(cut.sum())
    if not count:
        return responses, 0
    late = responses["response_tokens"].cast(pl.Int64) - cut_at // 2
    stops, tokens = int((late > 0).sum()) - count, int(late.clip(lower_bound=0).sum())
    hazard = min(1.0, (stops + 0.5) / max(1, tokens))
    more = np.zeros(responses.height, dtype=np.int64)
    more[cut.to_numpy()] = np.random.default_rng(0).geometric(hazard, count)
    lengths = responses["response_tokens"].cast(pl.Int64) + pl.Series(more)
    reason = pl.when(~pl.lit(cut)).then("finish_reason").otherwise(
        pl.when(pl.lit(lengths <= limit)).then(pl.lit("stop")).otherwise(pl.lit("length"))
    )  # fmt: skip
    return responses.with_columns(response_tokens=lengths.clip(upper_bound=limit), finish_reason=reason), count


def share_with_enough(share: float, samples: int, enough: int) -> float:
    """Probability that at least `enough` of `samples` responses are usable, each with probability `share`."""
    if not 0.0 < share < 1.0:
        return float(share >= 1.0 and samples >= enough)
    # By logarithms, since a factor alone may be too large for a float.
    logs = (
        math.lgamma(samples + 1) - math.lgamma(count + 1) - math.lgamma(samples - count + 1)
        + count * math.log(share) + (samples - count) * math.log1p(-share)
        for count in range(enough, samples + 1)
    )  # fmt: skip
    return min(1.0, math.fsum(map(math.exp, logs)))
