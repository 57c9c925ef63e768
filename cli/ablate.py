"""`dice ablate`: the loop with and without its parts, over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import (
    Config,
    Force,
    Json,
    Prompts,
    Replay,
    Rounds,
    RunPolicy,
    RunReference,
    Set,
    Sft,
    run_config,
)
from cli.output import pages, print_json
from cli.terminal import say
from dice_py.errors import UsageError

_ARMS = "neither,length,replay,both"
_SEEDS = "3,4,5,6,7"

Arms = Annotated[str, typer.Option(help="Arms: neither, length (penalty), replay, both, mpo, mpo-stage1.")]
Debias = Annotated[str | None, typer.Option(help="Ways of taking the length out: linear, per_token, bucket, matched.")]
Methods = Annotated[str | None, typer.Option(help="Training methods to cross the arms with (train.method).")]
Losses = Annotated[str | None, typer.Option(help="TRL's loss types to cross the arms with (train.loss).")]
Seeds = Annotated[str, typer.Option(help="Seeds, of the run and of the synthetic world.")]
AblationOut = Annotated[Path, typer.Option("--out", "-o", help="The folder of runs, results and page.")]
Jobs = Annotated[
    int | None, typer.Option(min=1, help="Runs of the world at a time; default: one per processor, one with GPUs.")
]
Change = Annotated[
    bool, typer.Option("--change", help="Go on in runs of other settings; what depends on them is made again.")
]


def ablate(
    arms: Arms = _ARMS,
    debias: Debias = None,
    methods: Methods = None,
    losses: Losses = None,
    rounds: Rounds = None,
    seeds: Seeds = _SEEDS,
    out: AblationOut = Path("runs/ablation"),
    jobs: Jobs = None,
    config: Config = None,
    assign: Set = None,
    policy: RunPolicy = None,
    reference: RunReference = None,
    sft: Sft = None,
    prompts: Prompts = None,
    replay: Replay = None,
    change: Change = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Run the loop with and without its parts, over seeds.

    It runs on the synthetic world, or on your model. Lists are separated by commas. Arms of one seed share what is the
    same in them: models, samples, scores. The same command continues what was stopped.
    """
    from cli.ablation_tables import print_ablation
    from cli.progress import Display
    from dice_py.ablation.arms import make_arms
    from dice_py.ablation.run import RESULTS, Ablation, run_ablation
    from dice_py.reporting.ablation_page import write_ablation_page

    base = run_config(config, assign, policy, reference, sft, prompts, replay, rounds, None, None)
    made = make_arms(base, _names(arms), _names(debias), _names(methods), _names(losses))
    ablation = Ablation(base, made, tuple(_seeds(seeds)), jobs)
    page = out / "ablation.html"
    with Display() as display:
        display.line(f"ablation: {out}")
        results = run_ablation(
            ablation,
            out,
            display,
            after_round=pages(display),
            publish=lambda results: write_ablation_page(results, page),
            force=force,
            change=change,
        )
    if as_json:
        print_json(results)
        return
    print_ablation(results)
    say(f"results: {out / RESULTS}\npage:    {page}")


def _names(text: str | None) -> list[str]:
    return [] if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _seeds(text: str) -> list[int]:
    parts = _names(text)
    wrong = [part for part in parts if not part.isdecimal()]
    if wrong:
        raise UsageError(f"--seeds {text:.80}: {wrong[0]!r:.40} is no seed; write them as --seeds 3,4,5,6,7")
    return [int(part) for part in parts]
