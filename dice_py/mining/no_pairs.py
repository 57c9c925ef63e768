"""Why no pair is left: the sentence for `dice mine` and the mine stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_REMEDIES = {
    "null": "rewards or lengths are missing",
    "not_finite": "score the responses again, or look at the reward column",
    "truncated": "raise generate.max_new_tokens, or keep cut-off responses (truncated_column)",
    "too_short": "lower min_length",
    "too_long": "raise max_length",
    "duplicate": "sample at a higher temperature",
    "too_few_responses": "lower min_responses, or sample more responses per prompt",
    "tied": "the rewards of a prompt are equal: use a finer reward, or sample more responses",
    "no_contrast": "let chosen_from and rejected_from overlap",
    "no_match": "raise length_tolerance or length_ratio",
    "below_min_margin": "lower min_margin",
    "below_quantile": "lower min_margin_quantile",
}
_KINDS = {"dropped": "responses", "dropped_prompts": "prompts", "dropped_pairs": "pairs"}


def explain_no_pairs(summary: Mapping[str, Any]) -> str:
    """Says that no pair is left, what took them (each filter with its count), and what to do about the greatest.

    Args:
        summary: that of `MinedPairs.summary`.
    """
    reasons = []
    # The last filter that took any has taken what the earlier ones left, so it comes first.
    for name in reversed(_KINDS):
        counts = [(count, reason) for reason, count in summary[name].items() if count]
        reasons += [(reason, f"{reason} {count} {_KINDS[name]}") for count, reason in sorted(counts, reverse=True)]
    taken = "; ".join(text for _, text in reasons) or "none was dropped"
    remedy = f". {_REMEDIES[reasons[0][0]]}" if reasons and reasons[0][0] in _REMEDIES else ""
    cut = summary["dropped"].get("truncated", 0)
    if reasons and reasons[0][0] != "truncated" and cut * 2 > summary["rows"]:
        remedy += f"; and most responses were cut off: {_REMEDIES['truncated']}"
    return f"no pair is left of {summary['rows']} responses to {summary['prompts']} prompts: {taken}{remedy}"
