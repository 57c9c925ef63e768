"""Metrics of a policy's own samples: lengths, entropy, diversity, and how far it is from other policies.

All are means over responses or prompts, with 95 % intervals by a bootstrap over prompts. Log-probabilities are those of
the sampling engine, before temperature and top-p, so that entropy and KL need no further pass of the policy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import polars as pl

from dice_py.evaluation.metrics import bootstrap_ci95

_DISTINCT = (1, 2)


def sample_metrics(samples: pl.DataFrame, seed: int) -> dict[str, Any]:
    """Metrics that need the samples only.

    Args:
        samples: storage.schemas.GENERATIONS, one row or more.
        seed: of the bootstrap.

    Returns:
        mean_response_tokens, mean_response_chars: means over samples.
        cut_off_share: share of the samples that the token limit ended.
        entropy_per_token: −Σ log π(y|x) / Σ |y| in nats. For samples of the policy itself (temperature 1, no
            truncation) an unbiased estimate of the entropy per token, up to the ratio of two means.
        distinct_1, distinct_2: distinct n-grams of token ids over all n-grams, of a prompt's samples together; mean
            over prompts (Li et al., arXiv 1510.03055). None where no response has n tokens.
        duplicate_share: share of the samples whose text is also that of another sample, of any prompt.
        Each with its interval, "…_ci95".
    """
    by_prompt = samples.group_by("prompt_id", maintain_order=True)
    metrics: dict[str, Any] = {}
    for name, values in (
        ("mean_response_tokens", pl.col("response_tokens")),
        ("mean_response_chars", pl.col("response_chars")),
        ("cut_off_share", pl.col("finish_reason") == "length"),
        ("duplicate_share", pl.col("response").is_duplicated()),
    ):
        rows = samples.select("prompt_id", value=values.cast(pl.Float64))
        metrics[name] = rows["value"].mean()
        metrics[f"{name}_ci95"] = mean_ci95(rows["prompt_id"], rows["value"], seed)
    sums = by_prompt.agg(-pl.col("sampled_logp").cast(pl.Float64).sum(), pl.col("response_tokens").sum())
    metrics |= _ratio("entropy_per_token", sums.drop("prompt_id"), seed)
    ids = by_prompt.agg("token_ids")["token_ids"].to_list()
    for n in _DISTINCT:
        shares = [share for responses in ids if (share := distinct_share(responses, n)) is not None]
        metrics[f"distinct_{n}"] = sum(shares) / len(shares) if shares else None
        metrics[f"distinct_{n}_ci95"] = bootstrap_ci95(shares, seed) if shares else None
    return metrics


def distinct_share(responses: Sequence[Sequence[int]], n: int) -> float | None:
    """Distinct n-grams over all n-grams, of several responses together; None where they have none."""
    grams = [tuple(response[at : at + n]) for response in responses for at in range(len(response) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def kl_metrics(name: str, logps: pl.Series, other_logps: pl.Series, samples: pl.DataFrame, seed: int) -> dict[str, Any]:
    """The KL divergence of the policy from another one, from the policy's samples: mean of log π − log π_other.

    Args:
        name: of the metric.
        logps, other_logps: log π and log π_other of each sample, in nats.
        samples: `prompt_id`.

    Returns:
        The mean over samples, in nats a response, and its interval over prompts; None where a log-probability is not
        finite. Of samples at another temperature
        than 1, or with truncation (top-p, top-k), it is the mean over those samples, and not the policy's KL.
    """
    ratios = logps.cast(pl.Float64) - other_logps.cast(pl.Float64)
    if not ratios.is_finite().all():  # JSON has no NaN, and a mean that leaves them out would look sound
        return {name: None, f"{name}_ci95": None}
    return {name: ratios.mean(), f"{name}_ci95": mean_ci95(samples["prompt_id"], ratios, seed)}


def reward_length_metrics(samples: pl.DataFrame, rewards: pl.Series, seed: int) -> dict[str, Any]:
    """How much of the reward length alone explains, over the policy's own samples.

    Args:
        samples: `prompt_id` and `response_tokens`.
        rewards: of each sample.

    Returns:
        reward_length_r2: R² of a straight line from length to reward, 0 to 1, and its interval over prompts; None
        where all rewards or all lengths are equal.
    """
    from dice_py.evaluation.resampling import r_squared, statistic_ci95

    rows = pl.DataFrame({"prompt_id": samples["prompt_id"], "x": samples["response_tokens"], "y": rewards})
    centered = rows.with_columns(pl.col(axis).cast(pl.Float64) - pl.col(axis).cast(pl.Float64).mean() for axis in "xy")
    x, y = pl.col("x"), pl.col("y")
    sums = (
        centered.group_by("prompt_id", maintain_order=True)
        .agg(pl.len().cast(pl.Float64), x.sum(), y.sum(), xx=(x * x).sum(), yy=(y * y).sum(), xy=(x * y).sum())
        .drop("prompt_id")
        .to_numpy()
    )
    value = float(r_squared(sums.sum(axis=0, keepdims=True))[0])
    if not math.isfinite(value):
        return {"reward_length_r2": None, "reward_length_r2_ci95": None}
    return {"reward_length_r2": value, "reward_length_r2_ci95": statistic_ci95(sums, r_squared, seed)}


def mean_ci95(items: pl.Series, values: pl.Series, seed: int) -> list[float] | None:
    """95 % interval of the mean over all rows, by a bootstrap over items; all rows of an item stay together.

    Args:
        items: of each row, a prompt_id for example.
        values: of each row.
    """
    from dice_py.evaluation.resampling import column_ratio, statistic_ci95

    rows = pl.DataFrame({"item": items, "value": values.cast(pl.Float64)})
    by_item = rows.group_by("item", maintain_order=True)
    sums = by_item.agg(pl.col("value").sum(), count=pl.len().cast(pl.Float64)).drop("item")
    return statistic_ci95(sums.to_numpy(), column_ratio, seed)


def _ratio(name: str, sums: pl.DataFrame, seed: int) -> dict[str, Any]:
    """Σ of the first column over Σ of the second, with its interval; None where the second is zero."""
    from dice_py.evaluation.resampling import column_ratio, statistic_ci95

    table = sums.cast(pl.Float64).to_numpy()
    above, below = table.sum(axis=0)
    if not below or not math.isfinite(above):
        return {name: None, f"{name}_ci95": None}
    return {name: float(above / below), f"{name}_ci95": statistic_ci95(table, column_ratio, seed)}


def sampling_note(temperature: float, top_p: float, top_k: int, others: Iterable[str] = ()) -> str | None:
    """A sentence where samples are not of the policy's own distribution; None where they are.

    Args:
        others: names of further options of sampling that are set.
    """
    settings = [f"temperature {temperature:g}"] if temperature != 1.0 else []
    settings += [f"top_p {top_p:g}"] if top_p < 1.0 else []
    settings += [f"top_k {top_k}"] if top_k > 0 else []
    settings += others
    if not settings:
        return None
    truncated = top_p < 1.0 or top_k > 0
    return (
        f"KL and entropy are means over samples of the {'truncated' if truncated else 'changed'} distribution "
        f"({', '.join(settings)}) of log-probabilities without these settings: compare them between rounds, and do not "
        "read them as the policy's own"
    )
