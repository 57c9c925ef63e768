"""What the cards of a round say, from the run folder: parents, data, settings, metrics. All texts are safe in Markdown.

Nothing is computed here that a stage has not measured, and no text of a user's prompts or responses is in a card.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dice_py.config.run import RunConfig
from dice_py.models.identity import model_identity
from dice_py.reporting.foreign_text import markdown_text, visible
from dice_py.reporting.formatting import evaluation_notes, evaluation_rows, number
from dice_py.runs.folder import round_name
from dice_py.runs.round_models import model_stages, models_of_round
from dice_py.stages.benchmark import benchmark_metrics
from dice_py.storage.digests import file_state
from dice_py.storage.files import read_json
from dice_py.storage.integrity import read_stamp
from dice_py.storage.removed import was_removed

Entry = dict[str, Any]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "batch_size",
    "sft_weight",
)
_LONGEST = 300  # characters of a name or a value


@dataclass(frozen=True)
class RunFacts:
    """A run folder, and what its manifest and config say."""

    folder: Path
    config: RunConfig
    manifest: dict[str, Any]

    def stage(self, name: str, stage: str) -> Entry:
        """The manifest's entry of a stage of a round such as "round-01"; empty if there is none."""
        entry = self.manifest["stages"].get(f"{name}/{stage}")
        return entry if isinstance(entry, dict) else {}

    def counts(self, name: str, stage: str) -> dict[str, Any]:
        """The counts of a stage; empty if there are none."""
        return self.stage(name, stage).get("counts") or {}


def safe(value: Any) -> str:
    """A name or value in one line, cut, as `markdown_text`."""
    return markdown_text(str(value), _LONGEST)


def rounds_of(run: RunFacts) -> list[str]:
    """The rounds whose training is done, in order."""
    names = sorted({name.split("/")[0] for name in run.manifest["stages"]})
    return [name for name in names if run.stage(name, "train").get("status") == "done"]


def models_of(run: RunFacts, name: str) -> list[Path]:
    """The model folders that a round has made, in order of work; the last is its new policy."""
    folders = [run.folder / model for model in models_of_round(run.manifest["stages"], name, model_stages(run.config))]
    return [folder for folder in folders if read_stamp(folder) is not None]


def base_model(config: RunConfig) -> str | None:
    """The id on the Hugging Face Hub of the model that all began with; None if it was a folder or a file."""
    name = config.model.sft or config.model.policy
    return name if name is not None and _HUB_ID.fullmatch(name) else None


def inherited(run: RunFacts) -> dict[str, Any]:
    """`license` and `base_model` of the card in the first policy's folder, as far as it has them."""
    from huggingface_hub import ModelCard

    folder = (run.manifest.get("policy") or {}).get("folder")
    found: dict[str, Any] = {}
    card = Path(str(folder)) / "README.md"
    if folder is None or not card.is_file():
        return found
    with contextlib.suppress(Exception):  # a card of somebody else's, in any state: nothing is known then
        data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
        if isinstance(data.get("license"), str) and re.fullmatch(r"[a-z0-9.+-]{1,60}", data["license"]):
            found["license"] = data["license"]
            for name in ("license_name", "license_link"):
                if isinstance(data.get(name), str):
                    found[name] = visible(data[name])[:_LONGEST]
        if isinstance(data.get("base_model"), str) and _HUB_ID.fullmatch(data["base_model"]):
            found["base_model"] = data["base_model"]
    return found


def parents(run: RunFacts, name: str, model: Path) -> list[dict[str, str]]:
    """The model that the round began with, and those that the run did."""
    rows = [_row("policy that the round started from", _before(run, name), (read_stamp(model) or {}).get("start"))]
    for role, words in (("policy", "policy of the run"), ("reference", "reference of its first round")):
        known = run.manifest.get(role) or {}
        named = run.config.model.policy if role == "policy" else run.config.model.sft or run.config.model.reference
        rows.append(_row(words, named or known.get("folder") or "not known", known.get("identity")))
    return rows


def _row(role: str, name: Any, identity: Any) -> dict[str, str]:
    return {"role": role, "name": safe(name), "identity": safe(identity or "not known")}


def _before(run: RunFacts, name: str) -> str:
    number_of = int(name.removeprefix("round-"))
    if number_of == 0:
        return str(run.config.model.sft or "the SFT model")
    earlier = round_name(number_of - 1)
    if run.stage(earlier, "train"):
        return f"the policy of {earlier}"
    return str(run.config.model.policy or (run.manifest.get("policy") or {}).get("folder") or "not known")


def data_of(run: RunFacts, name: str) -> list[dict[str, str]]:
    """Files and digests: the run's own copies of prompts and pairs, and the round's training set."""
    rows = [{"name": safe(file), "digest": safe(digest)} for file, digest in run.manifest.get("others", {}).items()]
    for made in run.stage(name, "replay").get("files", []):
        rows.append({"name": safe(made["file"]), "digest": safe(made.get("digest"))})
    return rows


def pairs_text(run: RunFacts, name: str) -> str:
    """How many pairs there are, and how they were made."""
    replay, mine = run.counts(name, "replay"), run.counts(name, "mine")
    parts = [f"{number(replay.get('mined', 0))} pairs were mined from the policy's own samples"]
    if mine.get("alpha") is not None:
        unit = "token" if mine.get("length") == "tokens" else "character"
        parts.append(f"with a length penalty of {number(mine['alpha'])} per {unit}")
    return safe(f"{' '.join(parts)}, and {number(replay.get('replay', 0))} pairs were replayed.")


def settings_of(run: RunFacts, name: str) -> list[dict[str, str]]:
    """What decided the training."""
    train = run.config.train if name != round_name(0) else run.config.round0.training(run.config.train)
    values: dict[str, Any] = {"method": train.method, "beta": run.config.beta}
    values |= {key: getattr(train, key) for key in _SETTINGS}
    counts = run.counts(name, "train")
    if train.method == "mpo" and name != round_name(0):
        mpo, reinforced = train.mpo, run.counts(name, "reinforce")
        values |= {"stage 2": mpo.trainer, "stage 2 steps": reinforced.get("steps"), "stage 2 KL weight": mpo.kl_beta}
        values |= {"stage 2 reward": mpo.reward, "hard prompts": reinforced.get("hard_prompts")}
    values |= {"pairs": counts.get("pairs"), "steps": counts.get("steps"), "seed of the run": run.config.seed}
    if train.lora is not None:
        values |= {"lora.r": train.lora.r, "lora.alpha": train.lora.alpha}
    rows = {"learning rate": values.pop("learning_rate"), **values, "key": run.stage(name, "train").get("key")}
    return [
        {"name": safe(key.replace("_", " ")), "value": safe(f"{value:g}" if isinstance(value, float) else value)}
        for key, value in rows.items()
        if value is not None
    ]


def metrics_of(run: RunFacts, name: str) -> tuple[list[dict[str, str]], list[str]]:
    """The round's evaluation as rows, with intervals, and its notes; empty if there is none."""
    file = run.folder / name / "evaluate" / "metrics.json"
    if run.stage(name, "evaluate").get("status") != "done" or file_state(file) != "intact":
        return [], []
    metrics = read_json(file)
    benchmark = run.folder / name / "benchmark" / "benchmark.json"
    if run.stage(name, "benchmark").get("status") == "done" and file_state(benchmark) == "intact":
        metrics |= benchmark_metrics(read_json(benchmark))
    values = {name: metrics}
    rows = [{"name": safe(row[0]), "value": safe(row[1])} for row in evaluation_rows(values)]
    return rows, [safe(note) for note in evaluation_notes(values)]


def identity_of(model: Path) -> str:
    """The identity of a model folder."""
    return model_identity(model)


def removed_text_of(model: Path) -> str | None:
    """That a model cannot be loaded, since its weights were removed to free their space; None where they were not."""
    removed = was_removed(model)
    return None if removed is None else safe(f"It cannot be loaded: its weights were removed by {removed.by}.")


def made_with(run: RunFacts) -> str:
    """Versions of this program and of the libraries."""
    known = run.manifest.get("versions") or {}
    return safe(", ".join(f"{name} {version}" for name, version in known.items()) or "versions are not known")
