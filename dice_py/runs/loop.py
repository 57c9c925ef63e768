"""The loop: rounds of generate, score, mine, replay, train and evaluate, in a run folder that survives a kill.

A stage runs when its key is not the manifest's, or its files are not complete; so `resume` is `run` on a folder that
is there already. Model-holding stages run in a process of their own (compute/stage_process.py); this one imports
neither torch nor transformers.

With an SFT model (`model.sft`) the run has a round 0 that makes the policy: DPO from that model on the offline pairs,
with the same trainer. Its stages are replay (the pairs, scored by the SFT model) and train.

The reference moves: in round 1 π_ref is the model that the policy's DPO training started from; in round t>1
it is the policy that round t−1 started from (`reward_reference: previous`), or stays the first one
(`initial`). Chen et al., arXiv 2406.09760, algorithm 1.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dice_py.compute.gpu_monitor import GpuMonitor, usable_gpus
from dice_py.compute.interrupts import stopped_by_signals
from dice_py.config.loading import reassigned
from dice_py.config.run import RunConfig
from dice_py.errors import DamagedError, DataError, DiceError, InterruptedRunError, StoppedTrainingError, UsageError
from dice_py.events import Report, no_report
from dice_py.models.identity import model_identity
from dice_py.rows.sources import find_source
from dice_py.runs.adoption import adopt_evaluated
from dice_py.runs.best import Outcome
from dice_py.runs.extrapolation import check_held_out, choose_policy
from dice_py.runs.folder import Run, end_torn_line, locked, round_name
from dice_py.runs.inputs import check_judges, prepare
from dice_py.runs.keeping import drop
from dice_py.runs.profile import write_profile
from dice_py.runs.round import evaluate_round, evaluation_of, previous_model, run_round, run_round_zero
from dice_py.runs.stored_config import (
    CONFIG_FILE,
    check_folder,
    has_config,
    store_config,
    stored_config,
    with_absolute_paths,
)
from dice_py.runs.throughput import remember_run
from dice_py.scoring.shards import PreviousModel
from dice_py.stages.benchmark import check_command
from dice_py.storage.files import make_folder, remove_temporaries
from dice_py.storage.keys import versions

AfterRound = Callable[[Path], object]
"""Called with the run folder after each round, to write a report, say, and before a round trains: its pairs can be read
by then, and hours of training may lie ahead."""


def run(
    config: RunConfig,
    folder: Path,
    report: Report = no_report,
    *,
    after_round: AfterRound | None = None,
    force: bool = False,
    siblings: Sequence[Path] = (),
    in_process: bool = False,
    may_differ: bool = False,
) -> dict[str, Any]:
    """Runs `config` in `folder`, keeping completed work; returns the metrics of each round.

    Args:
        after_round: the command line passes `dice_py.reporting.html.write_report`.
        force: training that does not fit into memory is warned of, and tried all the same.
        siblings: folders of other runs, from which stages with the same key are taken over.
        in_process: stages run in this process, and not in one of their own each.
        may_differ: a run of another config in `folder` goes on with this one, as `resume` does with changed settings.

    Raises:
        UsageError: the folder holds a run of another config, or another process works in it.
        InterruptedRunError: Ctrl-C, SIGTERM or SIGUSR1; `dice resume` continues.
        DiceError: raised by a stage.
    """
    config = with_absolute_paths(config)
    if not (may_differ and has_config(folder)):
        check_folder(config, folder)
    make_folder(folder)
    return _run(config, folder, report, after_round, force, siblings=siblings, in_process=in_process)


def _run(
    config: RunConfig,
    folder: Path,
    report: Report,
    after_round: AfterRound | None,
    force: bool,
    *,
    siblings: Sequence[Path] = (),
    in_process: bool = False,
) -> dict[str, Any]:
    with locked(folder), stopped_by_signals(), GpuMonitor(usable_gpus(config.devices, config.model)) as monitor:
        remove_temporaries(folder)
        end_torn_line(folder / "events.jsonl")
        run = Run(folder, config, report, monitor, force=force, siblings=siblings, in_process=in_process)
        try:
            run.report("started", pid=os.getpid())
            changed = store_config(run.folder, run.config, run.manifest, run.report)
            metrics = _checked_rounds(run, after_round)
            if changed and not run.remade:
                run.report("note", text="the changed settings touch no stage that was done before")
            return metrics
        except KeyboardInterrupt:
            run.report("interrupted")
            _write_profile_of_stopped(folder)
            raise InterruptedRunError(
                f"interrupted; completed shards are kept. Continue with: dice resume {folder}"
            ) from None
        except StoppedTrainingError as stopped:
            run.report("interrupted")
            _write_profile_of_stopped(folder)
            raise InterruptedRunError(f"{stopped}. Continue with: dice resume {folder}") from None
        except BaseException as error:
            with contextlib.suppress(OSError):
                run.report("failed", text=f"{type(error).__name__}: {error}"[:2000])
            _write_profile_of_stopped(folder)
            raise
        finally:
            run.close()


def _checked_rounds(run: Run, after_round: AfterRound | None) -> dict[str, Any]:
    """All rounds. When a stage meets a damaged artifact of the run, they begin again, so that its stage makes it."""
    met: set[str] = set()
    while True:
        try:
            return _rounds(run, after_round)
        except DamagedError as error:
            if str(error) in met:
                raise
            met.add(str(error))
            run.report("note", text=f"{error}. The files of the run are checked again")


def _write_profile_of_stopped(folder: Path) -> None:
    with contextlib.suppress(Exception):  # the error that stopped the run is the one to report
        write_profile(folder)


def resume(
    folder: Path,
    report: Report = no_report,
    *,
    assignments: Sequence[str] = (),
    after_round: AfterRound | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Resumes the run in `folder`: redoes nothing that is complete, reuses nothing whose key differs.

    Args:
        assignments: changed settings, "section.key=value". The run goes on from the first stage whose key has them;
            notes say which stages are made again, and because of what.
        after_round, force: as in `run`.

    Raises:
        UsageError: no run is there, or a setting is unknown or out of its range.
    """
    if not (folder / CONFIG_FILE).is_file() and not has_config(folder):
        raise UsageError(f"{folder} holds no run (no config.yaml); `dice status` lists runs, `dice run` starts one")
    before = with_absolute_paths(stored_config(folder)[0])
    config = with_absolute_paths(reassigned(before, assignments))
    _check_named_files(before, config)
    return _run(config, folder, report, after_round, force)


def _check_named_files(before: RunConfig, after: RunConfig) -> None:
    """A source that is gone does not matter to a run, which has its own copy; but one that was just named does.

    Raises:
        DataError: a changed setting names data that is not there.
    """

    def files(config: RunConfig) -> dict[str, str | None]:
        data = {
            f"data.{name}": getattr(config.data, name) for name in ("prompts", "replay", "eval_prompts", "eval_pairs")
        }
        return data | {f"replay.buffers.{name}.path": buffer.path for name, buffer in config.replay.buffers.items()}

    known = files(before)
    for name, file in files(after).items():
        if file is not None and file != known.get(name):
            try:
                find_source(file)
            except DataError as error:
                raise DataError(f"--set {name}: {error}; without it the run keeps its copy") from None


def _rounds(run: Run, after_round: AfterRound | None) -> dict[str, Any]:
    config = run.config
    if config.evaluate.command is not None:
        check_command(config.evaluate.command, Path(config.evaluate.command_folder or "."))
    inputs = prepare(run)
    check_judges(run)
    check_held_out(run, inputs)
    adopt_evaluated(run.siblings, run.folder)
    outcome = Outcome(run, inputs)
    files = [inputs.prompts, inputs.offline, inputs.eval_prompts, inputs.eval_pairs]
    run.list_files(*files, *inputs.buffers.values(), *(inputs.given or ()))
    run.manifest.data["versions"] = versions("torch", "transformers", "trl", "vllm", "polars", "pyarrow")
    if config.has_round_zero:
        inputs = replace(inputs, policy=run_round_zero(run, inputs))
    # The models of this run, for people who read the folder.
    for role, model in (("policy", inputs.policy), ("reference", inputs.reference)):
        run.manifest.data[role] = {"folder": str(model), "identity": model_identity(model)}
    run.manifest.save()
    policy, reference = inputs.policy, inputs.reference
    previous: PreviousModel | None = None
    metrics: dict[str, Any] = {}
    for number in range(1, config.rounds.count + 1):
        run.report_gpus(None)
        run.report("round", number=number, rounds=config.rounds.count)
        show = partial(_show, run, after_round)
        next_policy = run_round(run, inputs, number, policy, reference, previous, before_training=show)
        previous = previous_model(config, policy, reference)
        next_reference = policy if config.reward_reference == "previous" else inputs.reference
        trained = evaluation_of(run, inputs, number, next_policy, next_reference, policy)
        chosen = choose_policy(run, number, policy, trained)
        evaluated = evaluate_round(run, inputs, number, chosen.policy, next_reference, policy)
        metrics[round_name(number)] = evaluated | chosen.metrics
        policy, reference = chosen.policy, next_reference
        ends = outcome.add(number, policy, metrics[round_name(number)])
        show()
        run.report_gpus(None)
        write_profile(run.folder)
        if not run.in_process:  # beside other runs, on other threads than a run of its own has
            _remember(run)
        if drop(run, number):
            show()
        if ends:
            break
    run.report("finished", **outcome.finish(), report=str(run.folder / "report.html"))
    write_profile(run.folder)  # the end of the last round is known now
    return metrics


def _show(run: Run, after_round: AfterRound | None) -> None:
    """Calls `after_round`, whose own failure is a note: a run of hours does not end because of a page."""
    if after_round is None:
        return
    try:
        after_round(run.folder)
    except DiceError:  # a full disk, or a folder that may not be written: the next stage would meet it, too
        raise
    except Exception as error:
        text = f"warning: the report is not written: {type(error).__name__}: {error}"[:2000]
        run.report("note", text=f"{text}. What the run makes is whole; to try again: dice report {run.folder}")


def _remember(run: Run) -> None:
    """Keeps the figures of the run for the next `dice plan`."""
    try:
        remember_run(run.folder)
    except Exception as error:  # a run of hours does not end because a plan would have to measure again
        text = f"the round's figures are not kept for `dice plan`: {type(error).__name__}: {error}"
        run.report("note", text=text)
