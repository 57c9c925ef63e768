"""`dice mine`: the miner on files of the user's own, with every keyword of `dice_py.mine_pairs` as an option.

The options come from the fields of `MiningOptions`. They are added when the command is parsed, and not on import, since
pydantic would double the time of `dice --help`.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import types
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from typer.main import get_command

from cli.options import Json, Panels
from cli.output import echo_warnings, print_json
from cli.terminal import say
from dice_py.errors import InterruptedRunError, UsageError


class MineCommand(Panels):
    """`dice mine`: a command that also has an option for every field of `MiningOptions`."""

    out_is_file = True

    @cached_property
    def mining_params(self) -> list[Any]:
        """One Typer option per field, ordered by help panel."""
        from dice_py.config.mining import PANELS, MiningOptions

        parameters = [_parameter(name, field) for name, field in MiningOptions.model_fields.items()]

        def options(**_: Any) -> None: ...

        options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app = typer.Typer(add_completion=False)
        app.command()(options)
        params = [param for param in get_command(app).params if param.name in MiningOptions.model_fields]
        return sorted(params, key=lambda param: PANELS.index(param.rich_help_panel))

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters of the function, and those of mining."""
        return [*super().get_params(ctx), *self.mining_params]

    def invoke(self, ctx: Any) -> Any:
        """Moves the mining options from the function's arguments to `ctx.obj`, a dict by field name."""
        ctx.obj = {param.name: ctx.params.pop(param.name) for param in self.mining_params}
        return super().invoke(ctx)


def _parameter(name: str, field: Any) -> inspect.Parameter:
    """A field of `MiningOptions` as a parameter for Typer."""
    # Options of the same command are in backquotes: `debias=bucket` becomes --debias bucket.
    text = re.sub(
        r"`(\w+)(?:=(\w+))?`",
        lambda match: " ".join(filter(None, [f"--{match[1].replace('_', '-')}", match[2]])),
        field.description,
    )
    option = typer.Option(field.default, help=text, rich_help_panel=field.json_schema_extra["panel"])
    kind = _flag_type(field.annotation, field.default)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind)


def _flag_type(annotation: Any, default: Any) -> Any:
    """The type that Typer parses: words for Literals, which the model checks."""
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    if any(get_origin(member) is Literal for member in members):
        return str
    kind = next(member for member in members if member is not types.NoneType)
    return kind | None if default is None else kind


@contextlib.contextmanager
def _interrupted() -> Iterator[None]:
    """Turns Ctrl-C and SIGTERM into an error, after temporary files are removed."""
    from dice_py.compute.interrupts import stopped_by_signals

    try:
        with stopped_by_signals():
            yield
    except KeyboardInterrupt:
        raise InterruptedRunError("interrupted; no pairs were written: start it again") from None


Compare = Annotated[
    list[str] | None,
    typer.Option(
        metavar="OPTION=VALUE,…",
        help="Mine once for each value, and print one table; several: for all combinations. Nothing is written without "
        "--out, which then gets the pairs of all variants. The rows have to fit in --memory.",
    ),
]


def mine(
    ctx: typer.Context,
    scored: Annotated[
        list[str], typer.Argument(help="Parquet with one row per response: files, a quoted pattern, or a folder.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where the pairs go; required without --compare.")
    ] = None,
    compare: Compare = None,
    memory: Annotated[float, typer.Option(help="GiB to mine in; larger input is streamed.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Stage 3: preference pairs, corrected for length bias.

    Written to OUT (Parquet) with the row numbers of both responses in SCORED, counted through its files. Where no pair
    is left, OUT has no rows, and a warning says what took them.
    """
    if compare:
        _compare(ctx, scored, compare, out, memory, as_json)
        return
    if out is None:
        raise UsageError("Missing option --out (-o): name the file for the pairs (only --compare needs none)")
    from cli.progress import Display
    from cli.tables import mining_table, print_table
    from dice_py.config.mining import MiningOptions
    from dice_py.config.rounds import WarningsConfig
    from dice_py.mining.files import mine_files
    from dice_py.mining.no_pairs import explain_no_pairs
    from dice_py.runs.warnings import mining_warnings

    options = MiningOptions(**_parse_words(ctx.obj))
    with _interrupted(), Display() as display:
        display("stage", stage="mine", status="running")
        summary = mine_files(scored, out, options, memory_gib=memory, report=display)
    if not summary["pairs"]:
        typer.echo(f"warning: {explain_no_pairs(summary)}", err=True)
    else:
        echo_warnings(mining_warnings(summary, options.debias, WarningsConfig()))
    if as_json:
        print_json(summary)
    else:
        print_table(mining_table(summary, str(out)))


def _parse_words(values: dict[str, Any]) -> dict[str, Any]:
    """The values of options that are a word or something else: `--alpha auto`, `--truncated-column none`."""
    alpha, truncated = values["alpha"], values["truncated_column"]
    try:
        penalty = "auto" if alpha == "auto" else float(alpha)
    except ValueError:
        raise UsageError(f"--alpha is {alpha!r}, but must be 'auto' or a finite number of zero or more") from None
    return {**values, "alpha": penalty, "truncated_column": None if truncated == "none" else truncated}


def _compare(
    ctx: typer.Context, scored: list[str], compare: list[str], out: Path | None, memory: float, as_json: bool
) -> None:
    """`dice mine --compare`: one table of all variants."""
    from cli.progress import Display
    from cli.tables import comparison_lines, comparison_table, print_table
    from dice_py.mining.comparison import compare_files
    from dice_py.mining.files import source_name
    from dice_py.mining.variants import combinations, parse_axes

    axes = parse_axes(compare)
    for name in axes:
        if (source := ctx.get_parameter_source(name)) is not None and source.name != "DEFAULT":
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} is given together with --compare {name}=…: leave out {flag}")
    with _interrupted(), Display() as display:
        display("stage", stage="mine", status="running")
        compared = compare_files(
            scored, _parse_words(ctx.obj), combinations(axes), out=out, memory_gib=memory, report=display
        )
        summary = compared.summary()
    if as_json:
        print_json(summary)
        return
    print_table(comparison_table(summary, source_name(scored)))
    for line in comparison_lines(summary):
        say(line)
