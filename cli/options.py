"""The options that several commands share, the configs that they resolve to, and how help lists them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperOption

from cli.paths import PathCommand

if TYPE_CHECKING:
    from dice_py.config.run import RunConfig

Config = Annotated[list[Path] | None, typer.Option("--config", "-c", help="YAML file; several are merged in order.")]
Set = Annotated[list[str] | None, typer.Option("--set", "-s", help="One config value: section.key=value.")]
Force = Annotated[bool, typer.Option("--force", help="Start also where the check finds too little memory.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, on stdout.")]

# of a stage alone
Out = Annotated[Path, typer.Option("--out", "-o", help="Where the result goes.")]
Policy = Annotated[str, typer.Option(help="The policy: a model folder, a GGUF file or a Hugging Face id.")]
Reference = Annotated[str, typer.Option(help="The model that the policy's DPO training started from.")]
Method = Annotated[
    str | None,
    typer.Option("--method", help="Training method: dpo, rdpo, sppo, cream, spa, soft or mpo (train.method)."),
]
StageSeed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="The seed.")]

# of a run
RunPolicy = Annotated[
    str | None, typer.Option("--policy", help="π_1, a DPO-tuned model: folder, GGUF file or Hugging Face id.")
]
RunReference = Annotated[str | None, typer.Option("--reference", help="The model that its DPO training started from.")]
Sft = Annotated[
    str | None,
    typer.Option("--sft", help="Instead of both: the SFT model, from which round 0 makes π_1 by DPO."),
]
Prompts = Annotated[Path | None, typer.Option(help="Prompts: a file, folder, pattern or hub id (docs/data.md).")]
Replay = Annotated[Path | None, typer.Option(help="Offline pairs, likewise.")]
Generations = Annotated[
    list[Path] | None,
    typer.Option(
        "--generations",
        help="Responses sampled elsewhere, in place of round 1's sampling: Parquet or JSONL, or patterns of files.",
    ),
]
Rounds = Annotated[int | None, typer.Option(help="Rounds of generate, score, mine, replay, train.")]
Seed = Annotated[int | None, typer.Option(help="The run's seed.")]
RunDir = Annotated[Path | None, typer.Option(help="The run folder; default: a new one under runs/.")]

DEFAULT_RUNS = Path("runs")


def overrides(**values: Any) -> dict[str, Any]:
    """`model__policy="x"` and the like as nested keys; None means that the option was not given."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        if value is not None:
            section, _, key = name.partition("__")
            if key:
                nested.setdefault(section, {})[key] = value
            else:
                nested[section] = value
    return nested


def stage_config(config: list[Path] | None, assign: list[str] | None, **options: Any) -> RunConfig:
    """The config of a stage that is called alone."""
    from dice_py.config.loading import resolve

    return resolve(config or [], assign or [], overrides(**options), one_stage=True)


def run_config(
    config: list[Path] | None,
    assign: list[str] | None,
    policy: str | None,
    reference: str | None,
    sft: str | None,
    prompts: Path | None,
    replay: Path | None,
    rounds: int | None,
    method: str | None,
    seed: int | None,
    generations: list[Path] | None = None,
) -> RunConfig:
    """The config of `dice run` and `dice plan`. They make no folder where the extra `train` is missing."""
    from dice_py.config.extras import TRAINING, require
    from dice_py.config.loading import resolve

    require(*TRAINING, extra="train")
    return resolve(
        config or [],
        assign or [],
        overrides(
            model__policy=policy,
            model__reference=reference,
            model__sft=sft,
            data__prompts=None if prompts is None else str(prompts),
            generate__from_files=[str(file) for file in generations] if generations else None,
            data__replay=None if replay is None else str(replay),
            rounds=rounds,
            train__method=method,
            seed=seed,
        ),
    )


class Panels(PathCommand):
    """A command whose help lists the options under the headings of `rich_help_panel`, without importing Rich."""

    sources = ("prompts", "pairs", "file")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes a section per heading, in the order of the parameters; options without a heading come last."""
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
