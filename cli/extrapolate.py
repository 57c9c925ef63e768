"""`dice extrapolate`: carry a training on in the direction that it went, without training (ExPO)."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import Config, Json, Out, Set, stage_config
from cli.output import model_folder, print_result, run_job
from dice_py.errors import DataError, UsageError


def extrapolate(
    start: Annotated[str, typer.Argument(metavar="START", help="θ₀, the model that a training started from.")],
    after: Annotated[str, typer.Argument(metavar="AFTER", help="θ₁, the model that it ended with.")],
    out: Out,
    alpha: Annotated[float, typer.Option(help="α: 0 gives AFTER, 0.3 goes on by 30 % of the change.")],
    config: Config = None,
    assign: Set = None,
    as_json: Json = False,
) -> None:
    """Extrapolate a training: θ₁ + α·(θ₁ − θ₀).

    ExPO (arXiv 2404.16792). The new model goes to OUT/model, with AFTER's config, tokenizer and dtypes. Both models
    are folders, GGUF files or Hugging Face ids; they are read part by part.
    """
    from math import isfinite

    from dice_py.stages.extrapolate import ExtrapolateJob

    if not isfinite(alpha):
        raise UsageError(f"--alpha is {alpha}; give a finite number, such as 0.3")
    resolved = stage_config(config, assign)
    for name, role in ((start, "START"), (after, "AFTER")):
        _refuse_adapter(name, role)
    job = ExtrapolateJob(
        models=resolved.model,
        start=model_folder(start, resolved.model.reference_revision, "START"),
        after=model_folder(after, resolved.model.policy_revision, "AFTER"),
        alpha=alpha,
        out=out,
    )
    result = run_job(job, out)
    print_result({"model": str(job.target), **result.counts}, as_json)


def _refuse_adapter(name: str, role: str) -> None:
    """Refuses an adapter: α·(θ₁ − θ₀) is of complete weights, in the dtype that its merge rounded them to."""
    from dice_py.models.sources import adapter_of

    folder = adapter_of(name, role)
    if folder is not None:
        raise DataError(
            f"{role}: {folder} is a LoRA adapter, and complete models are extrapolated: merge it into its base model "
            "first (PEFT's merge_and_unload, then save_pretrained), and give that folder. `dice train` and `dice run` "
            "keep the merged model beside the adapter, as train/model"
        )
