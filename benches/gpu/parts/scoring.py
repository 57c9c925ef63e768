"""Scoring: parity in bfloat16 with one sequence at a time, and the ways of benches/scoring.py on a large model."""

from __future__ import annotations

import statistics
import traceback
from typing import Any

from gpu.context import (
    Check,
    PartError,
    PeakMemory,
    differences,
    draw_sequences,
    first_line,
    free_memory,
    log,
    synchronized,
)


def parity(check: Check) -> None:
    """Packed sums in bfloat16 and one sequence at a time, both against float32; then memory that runs out."""
    import torch
    from scoring_ways import one_at_a_time
    from shapes import make_model

    from dice_py.config.stages import ScoreConfig
    from dice_py.scoring.scorer import Scorer

    figures = check.figures
    model = make_model(check.small, torch.bfloat16, check.device)
    longest, scale = (256, 0.1) if check.cpu else (2048, 1.0)
    prompts, responses = draw_sequences(8, 4 if check.cpu else 8, longest, model.config.vocab_size, scale)
    scorer = Scorer(model, ScoreConfig(), check.report)
    packed = scorer.sums(prompts, responses)
    figures |= {"packs": scorer.packs, "token_budget": scorer.budget.tokens, "same_twice": None}
    figures["same_twice"] = packed == scorer.sums(prompts, responses)
    order = sorted(range(len(responses)), key=lambda row: len(responses[row]))
    other = scorer.sums([prompts[row] for row in order], [responses[row] for row in order])
    figures["other_order"] = differences([other[order.index(row)] for row in range(len(order))], packed, responses)
    scorer.packs = False
    padded = scorer.sums(prompts, responses)
    alone = one_at_a_time(model, prompts, responses).sums
    del scorer
    exact_model = model.float()
    exact = one_at_a_time(exact_model, prompts, responses).sums
    exact_scorer = Scorer(exact_model, ScoreConfig(), check.report)
    figures["packed_float32"] = differences(exact_scorer.sums(prompts, responses), exact, responses)
    figures["packs_float32"] = exact_scorer.packs
    for name, sums in (("packed", packed), ("padded", padded), ("one_at_a_time", alone)):
        figures[f"{name}_bf16"] = differences(sums, exact, responses)
    figures["packed_bf16_from_one_at_a_time"] = differences(packed, alone, responses)
    del exact_scorer, exact_model, model
    check.save()
    _out_of_memory(check, prompts, responses, packed)
    if not figures["packs"]:
        raise PartError("the packed attention was refused")
    if "halving_error" in figures:
        raise PartError("scoring did not recover from memory that ran out")


def _out_of_memory(check: Check, prompts: list[list[int]], responses: list[list[int]], packed: list[float]) -> None:
    """Scores where two GiB are free with a budget that needs more: the batch is halved, and the sums stay.

    The model is made anew. One that was cast to float32 and back has its rotary frequencies in bfloat16, which moves
    the sums by far more than rounding.
    """
    import torch
    from shapes import make_model

    from dice_py.config.stages import ScoreConfig
    from dice_py.scoring.scorer import Scorer

    budget = 512 if check.cpu else 131072
    free_memory(check.cpu)
    model = make_model(check.small, torch.bfloat16, check.device)
    room = 0 if check.cpu else torch.cuda.mem_get_info()[0]
    ballast = torch.empty(max(0, room - 2 * 2**30), dtype=torch.uint8, device=check.device)
    scorer = Scorer(model, ScoreConfig(token_budget=budget), check.report)
    try:
        sums = scorer.sums(prompts * 4, responses * 4)[: len(responses)]
        check.figures["halved_from_packed"] = differences(sums, packed, responses)
    except Exception as error:
        check.figures["halving_error"] = first_line(error)
        traceback.print_exc()
    check.figures |= {"halved_to": scorer.budget.tokens, "halved": scorer.budget.tokens < budget}
    del ballast


SCORING_ORDER = ("ours", "authors", "trl_precompute", "trl_precompute_1", "ours_padded", "key_value_cache")
"""The ways of benches/scoring_ways.py, in the order of what must not be missed."""


def scoring(check: Check) -> None:
    """The ways of benches/scoring.py on one large model; each sum of some responses against float32."""
    import torch
    from scoring_ways import one_at_a_time
    from shapes import make_model

    from dice_py.models.flops import matmul_rate

    prompts_count, samples, longest, checked = (2, 4, 128, 4) if check.cpu else (16, 16, 2048, 16)
    began = synchronized(check.cpu)
    model = make_model(check.large, torch.bfloat16, check.device)
    figures = check.figures
    figures |= {"shape": check.large, "prompts": prompts_count, "samples": samples}
    figures["make_seconds"] = round(synchronized(check.cpu) - began, 1)
    scale = 0.1 if check.cpu else 1.0
    prompts, responses = draw_sequences(prompts_count, samples, longest, model.config.vocab_size, scale)
    figures["response_tokens"] = sum(map(len, responses))
    rate = matmul_rate(model.device, model.dtype)
    figures["matmul_tflops"] = round(rate / 1e12, 3)
    sums: dict[str, list[float]] = {}
    figures["ways"] = ways = {}
    peak = PeakMemory(check.cpu)
    for name in SCORING_ORDER:
        ways[name] = _run_way(check, name, model, prompts, responses, peak, sums)
        _ratios(figures, rate)
        check.save()
    # The shortest and the longest too.
    order = sorted(range(len(responses)), key=lambda row: len(responses[row]))
    rows = [*order[:: max(1, len(order) // checked)], order[-1]]
    model = model.float()
    truth = one_at_a_time(model, [prompts[row] for row in rows], [responses[row] for row in rows])
    figures["float32_seconds"] = round(truth.seconds, 2)
    picked = [responses[row] for row in rows]
    for name, given in sums.items():
        ways[name]["from_float32"] = differences([given[row] for row in rows], truth.sums, picked)
    if failed := [name for name, way in ways.items() if "error" in way]:
        raise PartError(f"ways failed: {', '.join(failed)}")


def _run_way(
    check: Check,
    name: str,
    model: Any,
    prompts: list[list[int]],
    responses: list[list[int]],
    peak: PeakMemory,
    sums: dict[str, list[float]],
) -> dict[str, Any]:
    """Seconds and peak of one way; ours is measured three times, since it is short."""
    from scoring_ways import WAYS

    what, way = WAYS[name]
    try:
        way(model, prompts[:2], responses[:2])
        free_memory(check.cpu)
        peak.start()
        outcomes = [way(model, prompts, responses) for _ in range(3 if name == "ours" else 1)]
    except Exception as error:
        traceback.print_exc()
        free_memory(check.cpu)
        return {"what": what, "error": first_line(error)}
    sums[name] = outcomes[-1].sums
    seconds = [outcome.seconds for outcome in outcomes]
    measured = {"what": what, "seconds": round(statistics.median(seconds), 4), "peak_gb": peak.gb()}
    measured |= {"all_seconds": [round(value, 4) for value in seconds], **outcomes[-1].extra}
    log(f"{name}: {measured['seconds']} s, peak {measured['peak_gb']} GB")
    free_memory(check.cpu)
    return measured


def _ratios(figures: dict[str, Any], rate: float) -> None:
    """The ratios of the ways measured so far."""
    ways = {name: way for name, way in figures["ways"].items() if "seconds" in way}
    if "ours" in ways:
        ours = ways["ours"]
        figures["share_of_matmul_rate"] = round(ours["flops"] / ours["seconds"] / rate, 4)
        figures["speedup_over"] = {name: round(way["seconds"] / ours["seconds"], 2) for name, way in ways.items()}
