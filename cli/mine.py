"""`dice mine`: the miner on files of the user's own, with every keyword of `dice_py.mine_pairs` as an option."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from cli.options import Json, Out
from cli.output import print_json
from dice_py.errors import InterruptedRunError, UsageError


class Panels(TyperCommand):
    """Help with the options under the headings that `rich_help_panel` names, without importing Rich."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes one section a heading, in the order of the parameters; options without one come last."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        general = []
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            if not isinstance(param, TyperOption):
                sections["Arguments"].append(record)
            elif param.rich_help_panel is None:
                general.append(record)
            else:
                sections.setdefault(param.rich_help_panel, []).append(record)
        for heading, records in {**sections, "Options": general}.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def _option(panel: str, text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=panel)


@contextlib.contextmanager
def _interrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM end it with the temporary files removed."""
    from dice_py.runs.loop import terminate_as_interrupt

    try:
        with terminate_as_interrupt():
            yield
    except KeyboardInterrupt:
        raise InterruptedRunError("interrupted; no pairs were written: start it again") from None


def mine(
    scored: Annotated[
        list[str], typer.Argument(help="Parquet with one row per response: files, a quoted pattern, or a folder.")
    ],
    out: Out,
    prompt_column: Annotated[str, _option("Columns", "Column that names the prompt.")] = "prompt_id",
    reward_column: Annotated[str, _option("Columns", "Column of rewards.")] = "reward",
    length_column: Annotated[str, _option("Columns", "Column of lengths.")] = "response_tokens",
    truncated_column: Annotated[
        str, _option("Columns", "Boolean column of cut-off responses. auto: finish_reason, if there; none: drop none.")
    ] = "auto",
    duplicate_column: Annotated[
        str | None, _option("Columns", "Text, token ids or hashes: equal responses of a prompt count once.")
    ] = None,
    policy_column: Annotated[
        str | None, _option("Columns", "Which policy or round sampled the response; greater is newer.")
    ] = None,
    second_reward_column: Annotated[
        str | None, _option("Columns", "Rewards of a second model: its agreement as the column consistency.")
    ] = None,
    debias: Annotated[str, _option("Length", "none, linear, per_token, bucket or matched.")] = "linear",
    alpha: Annotated[str, _option("Length", "The length penalty: auto, or a number ≥ 0.")] = "auto",
    buckets: Annotated[int, _option("Length", "Length quantiles of --debias bucket.")] = 10,
    bucket_scale: Annotated[bool, _option("Length", "Scale inside buckets too.")] = False,
    length_tolerance: Annotated[
        int | None, _option("Length", "Of --debias matched: largest difference of lengths.")
    ] = None,
    length_ratio: Annotated[
        float | None, _option("Length", "Of --debias matched: the same, as a share of the longer length.")
    ] = None,
    pairing: Annotated[
        str, _option("Pairs", "max_min, max_random, top_bottom, max_sweet_spot or all_pairs.")
    ] = "max_min",
    top_k: Annotated[int, _option("Pairs", "Of --pairing top_bottom: the K best.")] = 2,
    bottom_k: Annotated[int, _option("Pairs", "Of --pairing top_bottom: with the K worst.")] = 2,
    pairs_per_prompt: Annotated[
        int | None, _option("Pairs", "Of top_bottom and all_pairs: at most, greatest margins first.")
    ] = None,
    sweet_spot_deviations: Annotated[
        float, _option("Pairs", "Of max_sweet_spot: the rejected is this far below the mean.")
    ] = 2.0,
    seed: Annotated[int, _option("Pairs", "Of --pairing max_random.")] = 0,
    chosen_from: Annotated[str, _option("Pairs", "any, newest or oldest of --policy-column.")] = "any",
    rejected_from: Annotated[str, _option("Pairs", "any, newest or oldest of --policy-column.")] = "any",
    min_responses: Annotated[int, _option("Filters", "Usable responses that a prompt needs.")] = 2,
    min_length: Annotated[int | None, _option("Filters", "Shortest response to use.")] = None,
    max_length: Annotated[int | None, _option("Filters", "Longest response to use.")] = None,
    min_margin: Annotated[float | None, _option("Filters", "Drop pairs of a smaller margin.")] = None,
    min_margin_quantile: Annotated[
        float | None, _option("Filters", "Then drop pairs below this quantile of the margins.")
    ] = None,
    win_rates: Annotated[bool, _option("Labels", "Columns of SPPO's win rates.")] = False,
    soft_labels: Annotated[bool, _option("Labels", "Column soft_label: sigmoid(margin / scale).")] = False,
    label_scale: Annotated[float, _option("Labels", "The scale of both, in units of reward.")] = 1.0,
    difficulty_quantile: Annotated[
        float | None, _option("Labels", "Column difficulty: hard below this quantile of the margins.")
    ] = None,
    memory: Annotated[float, typer.Option(help="GiB to mine in; larger input is streamed.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Stage 3: pairs of chosen and rejected, less the length bias.

    Written to OUT (Parquet) with the row numbers of both responses in SCORED, counted through its files.
    """
    from cli.display import Display, mining_table, print_table
    from dice_py.mining.files import mine_files

    try:
        penalty: Any = "auto" if alpha == "auto" else float(alpha)
    except ValueError:
        raise UsageError(f"--alpha is {alpha!r}, but must be 'auto' or a finite number of zero or more") from None
    with _interrupted(), Display() as display:
        display("stage", stage="mine", status="running")
        summary = mine_files(
            scored,
            out,
            memory_gib=memory,
            report=display,
            prompt_column=prompt_column,
            reward_column=reward_column,
            length_column=length_column,
            truncated_column=None if truncated_column == "none" else truncated_column,
            duplicate_column=duplicate_column,
            policy_column=policy_column,
            second_reward_column=second_reward_column,
            debias=debias,
            alpha=penalty,
            buckets=buckets,
            bucket_scale=bucket_scale,
            length_tolerance=length_tolerance,
            length_ratio=length_ratio,
            pairing=pairing,
            top_k=top_k,
            bottom_k=bottom_k,
            pairs_per_prompt=pairs_per_prompt,
            sweet_spot_deviations=sweet_spot_deviations,
            seed=seed,
            chosen_from=chosen_from,
            rejected_from=rejected_from,
            min_responses=min_responses,
            min_length=min_length,
            max_length=max_length,
            min_margin=min_margin,
            min_margin_quantile=min_margin_quantile,
            win_rates=win_rates,
            soft_labels=soft_labels,
            label_scale=label_scale,
            difficulty_quantile=difficulty_quantile,
        )
    if as_json:
        print_json(summary)
    else:
        print_table(mining_table(summary, str(out)))
