"""Log-probabilities of preference pairs under one model, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from dice_py.config.shared import ModelConfig
from dice_py.config.stages import ScoreConfig
from dice_py.events import Report, no_report
from dice_py.models.loading import held_model
from dice_py.scoring.shards import token_arrays
from dice_py.timing import timed

if TYPE_CHECKING:
    from dice_py.models.packing import Tokens


def score_pairs(
    config: ScoreConfig,
    models: ModelConfig,
    *,
    policy: Path,
    pairs: pl.DataFrame,
    shared: bool = False,
    report: Report = no_report,
) -> pl.DataFrame:
    """Σ_t log π(y_t | x, y_<t) in nats of both responses of each pair.

    Args:
        policy: folder of the model.
        pairs: `prompt_ids`, `chosen_ids` and `rejected_ids`, lists of token ids.
        shared: also the sums over as many tokens of each response as the shorter one has, as LD-DPO needs them
            (arXiv 2409.06411). The longer response's start is scored as a sequence of its own.
        report: receives a `progress` event after each batch.

    Returns:
        `chosen_logp` and `rejected_logp` f32, one row per pair; with `shared` also `chosen_shared_logp` and
        `rejected_shared_logp`.

    Raises:
        DataError: a column is not a list of integers or holds nulls, or a sequence cannot be scored (`Scorer.sums`).
    """
    with timed("import"):
        from dice_py.scoring.scorer import Scorer

    scorer = Scorer(held_model(policy, models), config, report)
    vocabulary = scorer.shape.vocabulary
    prompts: list[Tokens] = list(token_arrays(pairs, "prompt_ids", "the pairs", vocabulary))
    sides = [token_arrays(pairs, f"{side}_ids", "the pairs", vocabulary) for side in ("chosen", "rejected")]
    responses: list[Tokens] = [*sides[0], *sides[1]]
    count = len(prompts)
    longer: list[tuple[int, int]] = []  # number of a response, and the tokens of the other one
    if shared:
        for number in range(2 * count):
            tokens = len(responses[(number + count) % (2 * count)])
            if len(responses[number]) > tokens:
                longer.append((number, tokens))
    starts = [responses[number][:tokens] for number, tokens in longer]
    done = 0

    def on_batch(scored: int) -> None:
        nonlocal done
        done += scored
        report("progress", stage="score pairs", done=done, total=2 * count + len(starts), unit="sequences")

    all_prompts = prompts * 2 + [prompts[number % count] for number, _ in longer]
    sums = scorer.sums(all_prompts, [*responses, *starts], on_batch)
    totals = sums[: 2 * count]
    columns = {"chosen_logp": totals[:count], "rejected_logp": totals[count:]}
    if shared:
        of_shared = list(totals)
        for (number, _), value in zip(longer, sums[2 * count :], strict=True):
            of_shared[number] = value
        columns |= {"chosen_shared_logp": of_shared[:count], "rejected_shared_logp": of_shared[count:]}
    return pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.Float32))
