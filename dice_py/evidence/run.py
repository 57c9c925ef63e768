"""The evidence on a real model: the controlled-sentiment task of arXiv 2305.18290, section 6.1, in small.

SmolLM2-135M-Instruct writes short reviews; an oracle says how positive each is. A noisy, length-biased annotator labels
pairs of the model's own answers, from which round 0 makes π_1 by DPO. Two rounds follow in four arms: with and without
the length penalty, with and without replayed offline pairs.

    OUT/evidence.json, OUT/evidence.html    the results
    OUT/data/, OUT/start/                   the data, and the evaluation of π_1 against the SFT model
    OUT/ablation/                           as of `dice ablate`, with the runs

A second call keeps what is complete.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dice_py.ablation.arms import make_arms
from dice_py.ablation.run import Ablation, run_ablation
from dice_py.errors import UsageError
from dice_py.events import Report, no_report
from dice_py.evidence.annotator import Annotator, measured_bias
from dice_py.evidence.data import data_files, make_data
from dice_py.evidence.oracle import require_oracle
from dice_py.evidence.results import ABLATION, evidence_results
from dice_py.evidence.settings import ANNOTATOR, ARMS, FULL, SEED, Sizes, task_config
from dice_py.evidence.start import evaluate_start
from dice_py.runs.loop import AfterRound
from dice_py.storage.files import make_folder, write_json
from dice_py.storage.lock import exclusive_lock

RESULTS = "evidence.json"
_LOCK = ".lock"


def run_evidence(
    model: str,
    out: Path,
    report: Report = no_report,
    *,
    sizes: Sizes = FULL,
    annotator: Annotator = ANNOTATOR,
    arms: Sequence[str] = ARMS,
    seed: int = SEED,
    assignments: Sequence[str] = (),
    after_round: AfterRound | None = None,
) -> dict[str, Any]:
    """Makes the data, the runs and the results in `out`; returns the results (`evidence_results`).

    Args:
        model: the SFT model: a GGUF file, a folder or a Hugging Face id.
        arms: of ablation.arms.ARMS.
        seed: of prompts, annotator and runs.
        assignments: changed settings of the runs, "section.key=value".
        after_round: as of `runs.loop.run`.

    Raises:
        UsageError: the oracle is not installed, a setting does not fit, or another process works in the folder.
        DataError: the model cannot be used, or its answers make no pair.
        InterruptedRunError: Ctrl-C or SIGTERM; the same command continues.
    """
    require_oracle()
    out = out.absolute()
    config = task_config(model, data_files(out), sizes, seed, assignments)
    ablation = Ablation(config, make_arms(config, arms), (seed,))
    folder = out / ABLATION
    planned = ablation.planned(folder)  # finds settings that do not go together before anything is made
    make_folder(out)
    with _alone(out):
        pairs = make_data(config, sizes, annotator, out, report)
        report("note", text=_annotator_note(measured_bias(pairs, seed)))
        found = run_ablation(ablation, folder, report, after_round=after_round)
        start = evaluate_start(planned[0].config, planned[0].folder, out, report)
        results = evidence_results(
            found, start, out, pairs=pairs, annotator=annotator, sizes=sizes, model=model, seed=seed
        )
        write_json(out / RESULTS, results)
        return results


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Another process would replace the data under the runs of this one."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(exclusive_lock(out / _LOCK, wait=False))
        except BlockingIOError:
            raise UsageError(
                f"{out} is in use by another `dice evidence`; wait for it, or give another --out"
            ) from None
        yield


def _annotator_note(bias: dict[str, Any]) -> str:
    shares = (bias[name] for name in ("agreement", "prefers_longer"))
    agreement, longer = ("none" if share is None else f"{share:.0%}" for share in shares)
    return (
        f"{bias['pairs']} offline pairs; the annotator agrees with the oracle in {agreement}, and prefers the longer "
        f"answer in {longer}"
    )
