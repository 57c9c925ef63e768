"""`dice inspect`: the pairs of any preference file as a page, with the part that each token has in the reward."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import Config, Json, Panels, Set, StageSeed, stage_config
from cli.output import echo_note, model_folder, models_at, print_json, prompt_settings, reading, run_job
from cli.terminal import say
from dice_py.errors import UsageError

if TYPE_CHECKING:
    import polars as pl

    from dice_py.config.run import RunConfig
    from dice_py.rows.sources import Source
    from dice_py.stages.inspect_file import Scoring


class InspectCommand(Panels):
    """A command that writes one file."""

    out_is_file = True


def _column(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel="Columns")


def inspect(
    file: Annotated[
        Path,
        typer.Argument(metavar="PAIRS", help="Preference pairs: a file, folder, pattern or hub id (docs/data.md)."),
    ],
    policy: Annotated[str | None, typer.Option(help="The policy: folder, GGUF file or Hugging Face id.")] = None,
    reference: Annotated[str | None, typer.Option(help="The model that its DPO training started from.")] = None,
    beta: Annotated[float | None, typer.Option(help="β of the implicit reward.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page; default: the name of PAIRS with .html, here.")
    ] = None,
    pairs: Annotated[int, typer.Option(min=1, max=2000, help="How many pairs; of more, a stratified sample.")] = 200,
    prompt_column: Annotated[str, _column("The prompt.")] = "prompt",
    chosen_column: Annotated[str, _column("The preferred response.")] = "chosen",
    rejected_column: Annotated[str, _column("The other response.")] = "rejected",
    source_column: Annotated[str | None, _column("Where a pair is from; default: none.")] = None,
    seed: StageSeed = 0,
    config: Config = None,
    assign: Set = None,
    as_json: Json = False,
) -> None:
    """Read the pairs of a preference file, with credit by token.

    Writes one page that opens from disk. With --policy and --reference, rewards and the part of each token in them;
    without models, the texts. A file that is no page of this command is not replaced.
    """
    from dice_py.rows.sources import find_source

    if (policy is None) != (reference is None):
        given, lacking = ("--policy", "--reference") if reference is None else ("--reference", "--policy")
        raise UsageError(f"{given} needs {lacking}: the reward is that of the one against the other (or give neither)")
    if beta is not None and policy is None:
        raise UsageError("--beta is of the reward: give --policy and --reference too")
    page = _page(file, out)
    resolved = stage_config(config, assign, **({} if beta is None else {"beta": beta}))
    columns = {"prompt_column": prompt_column, "chosen_column": chosen_column, "rejected_column": rejected_column}
    source = find_source(file, echo_note)
    drawn, total = _drawn(source, {**columns, "source_column": source_column}, resolved, pairs, seed)
    scoring = None if policy is None or reference is None else _scoring(resolved, policy, reference)
    frame, counts = _inspected(source, drawn, scoring)
    from dice_py.reporting.inspect_page import write_inspect_page

    facts = [("file", str(file)), ("pairs", f"{frame.height:,} of {total:,}")]
    if scoring is not None:
        models = [("policy", str(policy)), ("reference", str(reference))]
        facts += [*models, ("β", f"{scoring.beta:g}"), ("tokens", f"{counts['tokens']:,}")]
    write_inspect_page(frame, page, title=file.name, facts=facts)
    if as_json:
        print_json({"file": str(file), "page": str(page), "of": total, **counts})
        return
    say(f"{counts['pairs']} of {total} pairs\npage: {page}")


def _page(file: Path, out: Path | None) -> Path:
    """Where the page goes.

    Raises:
        UsageError: a file is there that is no page of this command; or it is not named as a page.
    """
    from cli.paths import check_output_file
    from dice_py.reporting.inspect_page import is_inspect_page

    page = out or Path(re.sub(r"[:\[\]*?%@+]+", "-", file.stem).strip("-") + ".html")  # of owner/name:train[:100] too
    if page.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out: {page} is to be a page: give it a name that ends in .html")
    check_output_file(page, "--out")
    if page.exists() and not is_inspect_page(page):
        raise UsageError(
            f"--out: {page} is there, and is no page that dice inspect wrote (or was changed since): give another "
            "name, or remove it"
        )
    return page


def _drawn(
    file: Source, columns: dict[str, Any], resolved: RunConfig, count: int, seed: int
) -> tuple[pl.DataFrame, int]:
    """The pairs to show with their number in the file, `row`, and how many pairs the file has."""
    import polars as pl

    from dice_py.data import read_pairs
    from dice_py.mining.pair_sample import draw_pairs

    pairs = prompt_settings(resolved).of_pairs(read_pairs(file, **columns, **reading(resolved)))
    read = pairs.with_row_index("row")
    # In characters: a file has no tokens before a model is named.
    lengths = [
        pl.col(side).list.get(0).struct.field("content").str.len_chars().alias(f"{side}_tokens")
        for side in ("chosen", "rejected")
    ]
    source = pl.col("source") if columns["source_column"] is not None else pl.lit("file")
    rows = draw_pairs(read.select(source.alias("source"), *lengths), count, seed)
    return read[rows], read.height


def _scoring(resolved: RunConfig, policy: str, reference: str) -> Scoring:
    from dice_py.stages.inspect_file import Scoring

    folder = model_folder(policy, resolved.model.policy_revision, "--policy")
    return Scoring(
        config=resolved.score,
        models=models_at(resolved, folder, None),
        policy=folder,
        reference=model_folder(reference, resolved.model.reference_revision, "--reference"),
        beta=resolved.beta,
        bad_rows=resolved.data.bad_rows,
    )


def _inspected(file: Source, drawn: pl.DataFrame, scoring: Scoring | None) -> tuple[pl.DataFrame, dict[str, Any]]:
    """The pairs as the page takes them, and the counts of the job."""
    import tempfile

    from dice_py.stages.inspect_file import InspectFileJob
    from dice_py.storage.cache import cache_folder
    from dice_py.storage.parquet import read_parquet

    with tempfile.TemporaryDirectory(prefix="dice-inspect-") as folder:
        job = InspectFileJob(drawn, file.digest(), scoring, Path(folder))
        # Without models there is nothing that a process of its own would be for.
        result = job.run(echo_note) if scoring is None else run_job(job, cache_folder() / "log")
        return read_parquet(result.files[0][0]), result.counts
