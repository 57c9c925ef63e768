"""`dice`: the loop, each of its stages alone, and commands that show their results.

Heavy modules are imported inside the commands, so that `dice --help` answers at once. Results go to stdout
(one JSON object with --json), everything else to stderr. Exit codes: 0 done, 2 usage or config, 3 bad input
data, 4 out of memory, 5 interrupted and resumable, 1 a bug.
"""

from __future__ import annotations

import io
import re
import sys
import traceback
from typing import Any

import typer
from typer import Abort
from typer.core import TyperGroup

from cli.ablate import ablate
from cli.audit import audit
from cli.clean import clean
from cli.demo import demo
from cli.evidence import evidence
from cli.extrapolate import extrapolate
from cli.inspect import InspectCommand, inspect
from cli.judge import judge_app
from cli.mine import MineCommand, mine
from cli.options import Config, Json, Panels, Set
from cli.output import print_json, print_result, run_job
from cli.plan import plan
from cli.reinforce import reinforce
from cli.replay import replay
from cli.report import ReportCommand, report
from cli.runs import resume, run, status
from cli.samples import samples
from cli.stages import evaluate, generate, score, train
from cli.terminal import prepare_streams, say
from cli.winrate import WinrateCommand, winrate
from dice_py.compute.interrupts import settle, stopped_by_signals
from dice_py.config.extras import missing_module
from dice_py.errors import DiceError, InterruptedRunError, OutOfMemoryError, StoppedTrainingError, UsageError

# Typer has Click's errors, under a path that depends on its version.
_WRONG_CALL: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

_NO_ROOM = ("failed to map segment", "cannot allocate memory", "Cannot allocate memory")
"""What the loader of shared libraries says where `ulimit -v` is too low for them."""


def _sentence_of(error: Exception) -> DiceError | None:
    """The error to show for one of the system or the installation that the user can mend; None for all others."""
    text = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, ImportError) and any(part in text for part in _NO_ROOM)):
        return OutOfMemoryError(f"there is not enough memory ({text or 'MemoryError'}); free some, or raise the limit")
    if not isinstance(error, OSError):
        return missing_module(error)
    from dice_py.storage.files import path_error

    if isinstance(error, FileNotFoundError) and error.filename is None:  # of os.getcwd
        return UsageError("the working directory was removed: change to one that is there, and start again")
    return path_error(error)


class _Commands(TyperGroup):
    """Turns interruptions, and errors of paths, into a `DiceError` before Typer picks an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise InterruptedRunError(
                "interrupted; completed shards are kept: repeat the command to continue"
            ) from None
        except StoppedTrainingError as stopped:
            raise InterruptedRunError(f"{stopped}: repeat the command to continue") from None
        except UnicodeEncodeError as error:
            if not isinstance(error.object, str) or not "\ud800" <= error.object[error.start] <= "\udfff":
                raise
            # Python passes bytes of a path or an argument that are not UTF-8 on as surrogates; libraries refuse them.
            raise UsageError(
                f"{error.object[:200]} is not UTF-8 text; rename the file or folder, or convert the argument"
            ) from None
        except OSError as error:
            sentence = _sentence_of(error)
            if sentence is None:
                raise
            raise sentence from None


app = typer.Typer(
    name="dice",
    cls=_Commands,
    rich_markup_mode=None,  # Rich would be imported for every --help, and takes longer than all the rest
    help="Self-alignment of language models with DPO implicit rewards (DICE).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (run, resume, status, clean):
    app.command()(command)
app.command(cls=ReportCommand)(report)
for shown in (samples, plan, demo, ablate, evidence):
    app.command()(shown)
app.command(cls=Panels)(generate)
app.command(cls=Panels)(score)
app.command(cls=MineCommand)(mine)
for stage in (replay, train, reinforce, evaluate, extrapolate, audit):
    app.command(cls=Panels)(stage)
app.command(cls=InspectCommand)(inspect)
app.command(cls=WinrateCommand)(winrate)
app.add_typer(judge_app, name="judge", short_help="Compare two models' responses by a judge.")


@app.command()
def world(config: Config = None, assign: Set = None, as_json: Json = False) -> None:
    """Make the synthetic world, if the cache has none, and show it."""
    from dice_py.config.loading import resolve
    from dice_py.stages.world import WorldJob
    from dice_py.storage.cache import cache_folder
    from dice_py.synthetic.world import World, find_world

    job = WorldJob(resolve(config or [], assign or []).world)
    made = find_world(job.config) or World(run_job(job, cache_folder() / "log").files[0][0])
    print_result({"folder": str(made.folder), **made.info()}, as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show installed packages, devices, and what is missing."""
    from dice_py.doctor import examine

    state = examine()
    if as_json:
        print_json(state)
        return
    for name, version in state["packages"].items():
        say(f"{name:<14}{version or 'not installed'}")
    say(f"{'python':<14}{state['python']}")
    say(f"{'devices':<14}{', '.join(state['devices'])}")
    say(f"{'engine':<14}{state['engine'] or 'none'} ({state['engine_reason']})")
    say(f"{'cache':<14}{state['cache']}")
    for missing in state["missing"]:
        say(f"missing: {missing['what']}; add it with: {missing['command']}")
    if not state["missing"]:
        say("nothing is missing")


def _check_arguments(arguments: list[str]) -> None:
    """Refuses an empty argument, as of a shell variable that is not set: a path or a number of no characters."""
    for position, argument in enumerate(arguments):
        if not argument or re.fullmatch(r"--[\w-]+=", argument):
            option = argument or (f"after {arguments[position - 1]}" if position else "the first")
            raise UsageError(f"an argument is empty ({option}): give it a value (is a shell variable not set?)")


def main() -> None:
    """Runs the application and turns errors into sentences and exit codes."""
    prepare_streams()
    sys.exit(_run())


def _run() -> int:
    """The exit code of the command line."""
    try:
        with stopped_by_signals():
            _check_arguments(sys.argv[1:])
            code = app(prog_name="dice", standalone_mode=False)
    except _WRONG_CALL as error:
        text = io.StringIO()
        error.show(file=text)
        say(text.getvalue().rstrip("\n"), err=True)
        return int(error.exit_code)
    except DiceError as error:
        say(f"error: {error}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, Abort):
        say("error: interrupted", err=True)
        return InterruptedRunError.exit_code
    except Exception as error:
        sentence = _sentence_of(error)
        if sentence is not None:
            say(f"error: {sentence}", err=True)
            return sentence.exit_code
        say(traceback.format_exc().rstrip("\n"), err=True)
        return 1
    if code == 130:  # from Typer, where a signal came before a command began
        say("error: interrupted", err=True)
        return InterruptedRunError.exit_code
    return int(code or 0)


def console_script() -> None:
    """`dice`: `main` as a process's whole work. The end of the process, seconds with torch, is part of it."""
    with stopped_by_signals():
        try:
            main()
        except SystemExit as ended:
            settle(int(ended.code or 0))
            raise
        except KeyboardInterrupt:  # while an error was told
            sys.exit(InterruptedRunError.exit_code)


if __name__ == "__main__":
    console_script()
