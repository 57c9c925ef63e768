"""README.md beside each round's model and training set, in Hugging Face's form of model and dataset cards.

A card carries its digest of itself in its last line. One that still has it is written anew when its content changes,
as after a new evaluation; any other README.md is its owner's, and left as it is. A model's card is no part of the
model: not of its identity, nor of its stamp.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from dice_py.events import Report
from dice_py.reporting.cards import facts
from dice_py.reporting.cards.facts import RunFacts, safe
from dice_py.runs.stored_config import stored_config
from dice_py.storage.digests import file_state
from dice_py.storage.files import Manifest, write_sealed_text
from dice_py.storage.parquet import read_parquet

CARD = "README.md"

_Card = Callable[[RunFacts, str, Path], str]
"""The text of a card, from the run, the round and the folder."""

_TEMPLATES = Path(__file__).parent
_OURS = (
    "`dice` wrote this file, and writes it anew when what it says changes. Edit it, and it is yours: it stays as it is."
)
_METHODS = {"dpo": "DPO (Direct Preference Optimization)", "mpo": "DPO on the easy pairs (MPO)"}
_LABEL = "a label of mining; null for replayed pairs"
_WHAT = {
    "prompt": "the messages that were asked",
    "chosen": "the response that is preferred, as messages",
    "rejected": "the other response, as messages",
    "prompt_ids": "token ids of the prompt, with the chat template",
    "chosen_ids": "token ids of the response, as it was sampled",
    "rejected_ids": "token ids of the response, as it was sampled",
    "ref_chosen_logps": "log π\\_ref of the chosen response, in nats, summed over its tokens",
    "ref_rejected_logps": "log π\\_ref of the rejected response, in nats, summed over its tokens",
    "source": "`mined`, `replay`, or `replay:NAME` of a buffer",
    "margin": "difference of the rewards, after the length penalty; null for replayed pairs",
}


def write_cards(folder: Path, report: Report) -> None:
    """Writes the cards of all rounds of the run in `folder`. A card that cannot be written is a note."""
    try:
        run = RunFacts(folder, stored_config(folder)[0], Manifest(folder / "manifest.json").data)
        rounds = facts.rounds_of(run)
    except Exception as error:  # a run of hours does not end because a card is missing
        report("note", text=f"warning: no cards are written: {type(error).__name__}: {error}")
        return
    for name in rounds:
        made: list[tuple[Path, _Card]] = [(model / CARD, model_card) for model in facts.models_of(run, name)]
        made += [(run.folder / name / "replay" / CARD, dataset_card)]
        for path, card in made:
            try:
                _write(path, card(run, name, path.parent), report)
            except Exception as error:
                text = f"warning: the card {path} is not written: {type(error).__name__}: {error}"
                report("note", text=text[:1000])


def _write(path: Path, text: str, report: Report) -> None:
    """Writes a card, unless it is there, or another file is."""
    state = file_state(path)
    if state not in ("absent", "intact") or (state == "absent" and path.is_symlink()):
        report("note", text=f"{path} is not as dice wrote it, and stays as it is: the card is not written")
        return
    if state == "intact" and path.read_text(encoding="utf-8").rpartition("<!-- ")[0] == text:
        return
    write_sealed_text(path, text, "<!-- {} -->")


def model_card(run: RunFacts, name: str, model: Path) -> str:
    """The card of the model in a folder, which a round has made."""
    from huggingface_hub import ModelCard, ModelCardData

    known: dict[str, Any] = facts.inherited(run)
    base = facts.base_model(run.config) or known.get("base_model")
    further: Any = {name: value for name, value in known.items() if name != "base_model"}
    if base is not None:
        further["base_model_relation"] = "finetune"
    data = ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["dice", "dpo", "preference-optimization", "self-alignment", "arxiv:2406.09760"],
        **further,
    )
    rows, notes = facts.metrics_of(run, name) if _is_kept(run, name, model) else ([], [])
    method = _METHODS.get(run.config.train.method, f"the method {run.config.train.method}")
    if model.is_relative_to(run.folder / name / "reinforce"):
        method += f", and by reinforcement learning on the hard prompts ({run.config.train.mpo.trainer.upper()})"
    if model.is_relative_to(run.folder / name / "extrapolate"):
        method += f", and by carrying its change on (ExPO, α = {run.counts(name, 'extrapolate').get('alpha')})"
    return _rendered(
        ModelCard,
        data,
        "model_card.md.j2",
        title=safe(f"{run.folder.resolve().name}, {name}"),
        method=safe(method),
        round=int(name.removeprefix("round-")),
        parents=facts.parents(run, name, model),
        identity=facts.identity_of(model),
        files=facts.data_of(run, name),
        pairs=facts.pairs_text(run, name),
        settings=facts.settings_of(run, name),
        metrics=rows,
        notes=notes,
        not_evaluated="This model was not evaluated: the round has no evaluation, or went on with another model.",
        removed=facts.removed_text_of(model),
        made_with=facts.made_with(run),
        what_may_change=_OURS,
    )


def _is_kept(run: RunFacts, name: str, model: Path) -> bool:
    """Whether the round's evaluation is of this model: the extrapolated one, where there is one."""
    return model == facts.models_of(run, name)[-1]


def dataset_card(run: RunFacts, name: str, folder: Path) -> str:
    """The card of a round's training set, in the folder of the replay stage."""
    from huggingface_hub import DatasetCard, DatasetCardData

    file = folder / "training_set.parquet"
    schema = pq.read_schema(file.absolute())
    sources = read_parquet(file, ["source"]).group_by("source").len().sort("source")
    (made,) = run.stage(name, "replay")["files"]
    data = DatasetCardData(
        task_categories=["text-generation"],
        size_categories=_size(int(sources["len"].sum())),
        tags=["dice", "dpo", "preference", "trl"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": file.name}]}],
    )
    return _rendered(
        DatasetCard,
        data,
        "dataset_card.md.j2",
        title=safe(f"Preference pairs of {run.folder.resolve().name}, {name}"),
        model=f"{name}/train/model",
        pairs=facts.pairs_text(run, name),
        columns=[
            {"name": column.name, "type": str(column.type), "what": _WHAT.get(column.name, _LABEL)} for column in schema
        ],
        sources=[{"name": safe(source), "pairs": f"{count:,}"} for source, count in sources.iter_rows()],
        digest=safe(made.get("digest")),
        made_with=facts.made_with(run),
        what_may_change=_OURS,
    )


def _size(pairs: int) -> str:
    """The Hub's name of a size."""
    for limit, name in ((1000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")):
        if pairs < limit:
            return name
    return "1M<n<10M"


def _rendered(kind: Any, metadata: Any, template: str, **values: Any) -> str:
    """The text of a card. Its values are safe in Markdown already; the library writes the YAML."""
    card = kind.from_template(metadata, template_path=str(_TEMPLATES / template), **values)
    return str(card).rstrip() + "\n\n"
