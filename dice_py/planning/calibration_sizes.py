"""How much a calibration samples, scores and trains, so that it ends within its seconds. Arithmetic only.

Where as many units as a run's own fit, they are measured. Else fewer are, down to a least size without which the
measurement would say nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

SAMPLING_SECONDS = 12.0
"""For all samples of a calibration."""
SCORING_SECONDS = 4.0
"""For all scoring passes but the first ones."""
TRAINING_SECONDS = 7.0
"""For the forward and backward passes of all steps."""
STEPS = 6
"""Optimizer steps of a calibration's training."""
_LEAST_STEPS = 3
_ROW_FACTOR = 1.5  # seconds that a row may take over the budget, since a short row shows a higher cost of a token
_LEAST_PROMPTS = 16  # of the sampling: further rows take little of a step's seconds
_LEAST_TOKENS = 8  # of a response
_LEAST_RESPONSES = 4  # of the scoring
_TRAINED = 4  # a forward and a backward pass, in forwards: three by their work, up to four on a CPU


class Step(NamedTuple):
    """Seconds of one decoding step with a number of rows."""

    rows: int
    seconds: float


class Sampling(NamedTuple):
    """Prompts to sample responses to, and the most tokens of a response."""

    prompts: int
    tokens: int


def complete_sampling_fits(few: Step, tokens: int, seconds: float = SAMPLING_SECONDS) -> bool:
    """Whether `few.rows` complete responses can be sampled, and then twice as many.

    Args:
        few: seconds of a step with that many rows.
        tokens: most tokens of a response.
    """
    return 3 * tokens * few.seconds <= seconds


def reduced_sampling(
    steps: Sequence[Step], prefill: float, tokens: int, samples: int, prompts: int, seconds: float
) -> Sampling:
    """As many prompts as can be answered completely; else the fewest prompts, with a limit on the tokens.

    Responses to many prompts say more about lengths than many responses to one: lengths depend on the prompt.

    Args:
        steps: two measured steps, the one with fewer rows first.
        prefill: seconds for a prompt.
        tokens: most tokens of a response in the run.
        samples: responses to each prompt.
        prompts: the most prompts.
        seconds: to spend.
    """
    small, large = steps
    per_row = max(0.0, (large.seconds - small.seconds) / max(1, large.rows - small.rows))
    fixed = max(0.0, small.seconds - per_row * small.rows)

    def affordable(count: int) -> int:
        step = fixed + per_row * count * samples
        return int(max(0.0, seconds - count * prefill) / max(step, 1e-9))

    least = min(prompts, _LEAST_PROMPTS)
    complete = [count for count in range(least, prompts + 1) if affordable(count) >= tokens]
    if complete:
        return Sampling(max(complete), tokens)
    return Sampling(least, min(tokens, max(_LEAST_TOKENS, affordable(least))))


def first_prompts(prompt_tokens: Sequence[int], samples: int, responses: int, most_tokens: int) -> int:
    """How many prompts come first, of which nothing is known yet: `responses` responses, and few tokens of prompts."""
    count = total = 0
    for tokens in prompt_tokens:
        total += tokens
        if count and (total > most_tokens or count * samples >= responses):
            break
        count += 1
    return count


def scored_responses(responses: int, response_seconds: float, passes: int, seconds: float = SCORING_SECONDS) -> int:
    """Responses for `passes` scoring passes of these `response_seconds` each."""
    affordable = int(seconds / max(passes * response_seconds, 1e-9))
    return min(responses, max(_LEAST_RESPONSES, affordable))


class Training(NamedTuple):
    """The steps of a calibration's training."""

    batch: int
    """Pairs of a step."""
    steps: int
    processes: int


def training_size(
    batch_size: int,
    processes: int,
    *,
    pair_tokens: float,
    per_token: float,
    row_tokens: int,
    seconds: float = TRAINING_SECONDS,
) -> Training:
    """The run's own batch where six steps fit; else fewer pairs, but a full row for each process; else fewer steps.

    Where not even that fits, a step has fewer pairs, but one for each process.

    Args:
        batch_size: of the run, a multiple of `processes`.
        pair_tokens: of a pair in a forward.
        per_token: seconds of a token when it is scored; training takes four times as long.
        row_tokens: of a packed row, which a short row would not represent.
    """
    pair = _TRAINED * per_token * pair_tokens / processes
    fitting = int(seconds / max(STEPS * pair, 1e-9)) // processes * processes
    if fitting >= batch_size:
        return Training(batch_size, STEPS, processes)
    full = min(batch_size, processes * max(1, int(row_tokens // max(1.0, pair_tokens))))
    batch = max(full, fitting)
    steps = max(_LEAST_STEPS, min(STEPS, int(seconds / (batch * pair))))
    if _LEAST_STEPS * batch * pair > _ROW_FACTOR * seconds:
        affordable = int(_ROW_FACTOR * seconds / (_LEAST_STEPS * pair)) // processes * processes
        batch, steps = max(processes, affordable), _LEAST_STEPS
    return Training(batch, steps, processes)


def per_device_pairs(batch: int, processes: int, configured: int) -> int:
    """Pairs of a padded forward that divide a smaller batch: as configured where they do."""
    each = batch // processes
    return next(count for count in range(min(configured, each), 0, -1) if each % count == 0)
