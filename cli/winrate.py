"""`dice winrate`: win rates against a baseline, plain and length-controlled, from files of verdicts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from cli.options import Json, Panels
from cli.output import print_json
from cli.terminal import say
from dice_py.errors import DataError, UsageError

if TYPE_CHECKING:
    from dice_py.evaluation.winrate.difficulty import Difficulty
    from dice_py.evaluation.winrate.responses import Scale

_ROWS, _DIFFICULTY, _ALPACA_EVAL = "One row per response", "Difficulty of prompts", "AlpacaEval's tool"
_OF_ROWS = (
    "prompt_column",
    "model_column",
    "preference_column",
    "preference_scale",
    "length_column",
    "response_column",
)
_SCALES = ("auto", "1", "100")

Files = Annotated[
    list[Path],
    typer.Argument(
        help="Verdicts: one row per response (Parquet, JSONL, JSON), AlpacaEval's annotations.json, or Arena-Hard's "
        "judgments. Several files are of one kind.",
    ),
]
Baseline = Annotated[str | None, typer.Option(help="The model that the others were compared with.")]
Outputs = Annotated[
    list[Path] | None,
    typer.Option(help="Outputs, for lengths that FILES lack: model_outputs.json, or Arena-Hard's model_answer files."),
]
PromptColumn = Annotated[str, typer.Option(help="The prompt's id.", rich_help_panel=_ROWS)]
ModelColumn = Annotated[str, typer.Option(help="The model's name.", rich_help_panel=_ROWS)]
PreferenceColumn = Annotated[
    str, typer.Option(help="The preference over the baseline's response.", rich_help_panel=_ROWS)
]
PreferenceScale = Annotated[
    str,
    typer.Option(
        help="The best preference: 1, 100, or auto (100 where one is above 1).", metavar="SCALE", rich_help_panel=_ROWS
    ),
]
LengthColumn = Annotated[
    str | None,
    typer.Option(help="Characters of the response.  [default: response_chars, or the text]", rich_help_panel=_ROWS),
]
ResponseColumn = Annotated[str, typer.Option(help="The response's text.", rich_help_panel=_ROWS)]
GivenDifficulty = Annotated[
    Path | None, typer.Option("--difficulty", help="That of an earlier fit.", rich_help_panel=_DIFFICULTY)
]
WriteDifficulty = Annotated[
    Path | None, typer.Option(help="Where that of this fit goes (JSON).", rich_help_panel=_DIFFICULTY)
]
WriteAnnotations = Annotated[
    Path | None,
    typer.Option(
        help="A folder for annotations.json and model_outputs.json of each model.", rich_help_panel=_ALPACA_EVAL
    ),
]
Resamples = Annotated[int, typer.Option(min=0, max=100_000, help="Of the bootstrap; 0: no intervals.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The bootstrap's seed.")]


class WinrateCommand(Panels):
    """A command that writes a file and a folder that are no --out."""

    files_out = ("write_difficulty",)
    folders_out = ("write_annotations",)


def winrate(
    ctx: typer.Context,
    files: Files,
    baseline: Baseline = None,
    outputs: Outputs = None,
    prompt_column: PromptColumn = "prompt_id",
    model_column: ModelColumn = "model",
    preference_column: PreferenceColumn = "score",
    preference_scale: PreferenceScale = "auto",
    length_column: LengthColumn = None,
    response_column: ResponseColumn = "response",
    difficulty: GivenDifficulty = None,
    write_difficulty: WriteDifficulty = None,
    write_annotations: WriteAnnotations = None,
    resamples: Resamples = 500,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Win rates against a baseline, plain and length-controlled.

    Rates are in percent, with 95 % intervals over prompts. The length-controlled win rate is AlpacaEval 2's: what the
    judge would say if both responses were equally long.
    """
    from cli.progress import Display
    from cli.tables import print_table, winrate_table
    from dice_py.config.extras import require
    from dice_py.evaluation.winrate.difficulty import read_difficulty
    from dice_py.evaluation.winrate.export import write_alpaca_eval
    from dice_py.evaluation.winrate.length_control import estimate_win_rates
    from dice_py.evaluation.winrate.reading import read_comparisons
    from dice_py.evaluation.winrate.responses import Columns
    from dice_py.evaluation.winrate.summary import summarize

    require("numpy", "scipy", "threadpoolctl", extra="judge")
    scale = _check_options(ctx, files, preference_scale)
    _check_difficulty(difficulty, write_difficulty)
    given = None if difficulty is None else read_difficulty(difficulty)
    columns = Columns(prompt_column, model_column, preference_column, length_column, response_column)
    comparisons = read_comparisons(files, baseline, columns, scale, outputs or [])
    notes = [] if write_annotations is None else write_alpaca_eval(write_annotations, comparisons)
    with Display() as display:
        display("stage", stage="winrate", status="running")
        rates = estimate_win_rates(comparisons, given, resamples=resamples, seed=seed, report=display)
    if write_difficulty is not None:
        _write_difficulty(write_difficulty, rates.difficulty)
    summary = {**summarize(comparisons, rates, given), "resamples": resamples, "seed": seed}
    summary["notes"] += notes
    for note in summary["notes"]:
        say(f"note: {note}", err=True)
    if as_json:
        print_json(summary)
    else:
        print_table(winrate_table(summary))


def _check_options(ctx: typer.Context, files: list[Path], scale: str) -> Scale:
    """Refuses options of another kind of file than is given, and unknown scales."""
    from dice_py.evaluation.winrate.reading import file_form

    if scale not in _SCALES:
        raise UsageError(f"--preference-scale is {scale!r}; give one of {', '.join(_SCALES)}")
    form = file_form(files[0])
    for name in _OF_ROWS:
        source = ctx.get_parameter_source(name)
        if form != "responses" and source is not None and source.name != "DEFAULT":
            raise UsageError(
                f"--{name.replace('_', '-')} is for files with one row per response, and {files[0]} holds {form}: "
                "leave it out"
            )
    return cast("Scale", scale)


def _check_difficulty(given: Path | None, target: Path | None) -> None:
    """Refuses --write-difficulty where nothing is fitted, or where it would replace a file of the user's."""
    from dice_py.evaluation.winrate.difficulty import check_replaceable

    if target is None:
        return
    if given is not None:
        raise UsageError("--write-difficulty writes what is fitted, and --difficulty is given: leave out one")
    check_replaceable(target)


def _write_difficulty(target: Path, fitted: Difficulty | None) -> None:
    from dice_py.evaluation.winrate.difficulty import write_difficulty

    if fitted is None:
        raise DataError("--write-difficulty: no lengths are known, so the difficulty of prompts was not fitted")
    write_difficulty(target, fitted)
