"""What a run's rounds read: models found, a user's data read and checked, held-out parts split off.

Everything that can be refused is refused here, before anything is made from it. The data goes to `inputs/` in the
run folder, as artefacts with keys; the synthetic world's stays in its cache.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from dice_py.artefacts import (
    PROMPTS,
    digest,
    file_digest,
    parquet_key,
    read_json,
    read_parquet,
    seed_for,
    versions,
    write_json,
    write_parquet,
)
from dice_py.data import prompt_key, read_pairs, read_prompts
from dice_py.errors import DataError
from dice_py.models import model_identity, require, resolve_model
from dice_py.world import World, cache_folder, find_world

if TYPE_CHECKING:
    from dice_py.rounds import Run

_HELD_OUT = 0.1  # at most this share of a user's prompts or pairs is held out when no file of them is named


@dataclass(frozen=True)
class Inputs:
    """What every round reads, as artefacts in `inputs/`."""

    policy: Path
    reference: Path
    prompts: Path
    offline: Path | None
    eval_prompts: Path | None
    eval_pairs: Path | None


def _world(this: Run) -> World:
    found = find_world(this.config.world)
    if found is None:
        this.report("note", text=f"making the synthetic world in {cache_folder()} (once)")
        this.spawn("world", "dice_py.world:make_world", this.folder / "inputs", config=this.config.world)
        found = find_world(this.config.world)
        if found is None:
            raise RuntimeError("the world was made, but is not in the cache")
    return found


def prepare(this: Run) -> Inputs:
    """Models resolved, data read and checked, held-out parts split off; as files in `inputs/`."""
    config, folder = this.config, this.folder / "inputs"
    require("torch", "transformers", "trl", "accelerate", "datasets", extra="train")
    if config.is_world:
        world = _world(this)
        return Inputs(
            policy=world.policy,
            reference=world.reference,
            prompts=world.prompts,
            offline=world.offline_pairs,
            eval_prompts=world.eval_prompts,
            eval_pairs=world.eval_pairs,
        )
    model, data = config.model, config.data
    assert model.policy is not None
    assert model.reference is not None
    assert data.prompts is not None
    columns = [data.prompt_column, data.chosen_column, data.rejected_column, data.weight_column]
    named = [data.prompts, data.replay, data.eval_prompts, data.eval_pairs]
    files = [file_digest(Path(name)) if name else None for name in named]
    key = digest("inputs", columns, files, config.seed, config.evaluate.model_dump(), versions("polars"))
    outputs = {name: folder / f"{name}.parquet" for name in ("prompts", "offline", "eval_prompts", "eval_pairs")}
    # The models come after the data, since they may be a long download, and before anything is made.
    if parquet_key(outputs["prompts"]) != key:
        _split(this, outputs, key)

    def made(name: str) -> Path | None:
        return outputs[name] if parquet_key(outputs[name]) == key else None

    inputs = Inputs(
        policy=resolve_model(model.policy, model.policy_revision, role="model.policy (--policy)"),
        reference=resolve_model(model.reference, model.reference_revision, role="model.reference (--reference)"),
        prompts=outputs["prompts"],
        offline=made("offline"),
        eval_prompts=made("eval_prompts"),
        eval_pairs=made("eval_pairs"),
    )
    _check(this, inputs, key)
    return inputs


def _check(this: Run, inputs: Inputs, data_key: str) -> None:
    """Has models and data looked at together, once: what fails here would fail after hours."""
    models = [model_identity(inputs.policy), model_identity(inputs.reference)]
    key = digest("check", data_key, models, this.config.model_dump(), versions("transformers"))
    stamp = this.folder / "inputs" / "checked.json"
    if stamp.is_file() and read_json(stamp) == key:
        return
    this.spawn(
        "check",
        "dice_py.check:check",
        stamp.parent,
        config=this.config,
        policy=inputs.policy,
        reference=inputs.reference,
        prompts=[file for file in (inputs.prompts, inputs.eval_prompts) if file],
        pairs=[file for file in (inputs.offline, inputs.eval_pairs) if file],
    )
    write_json(stamp, key)


def _split(this: Run, outputs: dict[str, Path], key: str) -> None:
    """Reads the user's files and writes `inputs/`; the prompts last, since their key says that all are there."""
    config, data = this.config, this.config.data
    assert data.prompts is not None

    def pairs_of(name: str) -> pl.DataFrame:
        return read_pairs(
            Path(name),
            prompt_column=data.prompt_column,
            chosen_column=data.chosen_column,
            rejected_column=data.rejected_column,
            weight_column=data.weight_column if name == data.replay else None,
        )

    prompts = read_prompts(Path(data.prompts), data.prompt_column)
    offline = pairs_of(data.replay) if data.replay else None
    rng = random.Random(seed_for(config.seed, "held out"))
    eval_prompts = eval_pairs = None
    if data.eval_prompts:
        eval_prompts = read_prompts(Path(data.eval_prompts), data.prompt_column)
    elif config.evaluate.prompts:
        count = min(config.evaluate.prompts, int(prompts.height * _HELD_OUT))
        chosen = set(rng.sample(range(prompts.height), count))
        eval_prompts = prompts.filter(pl.col("prompt_id").is_in(list(chosen))) if count else None
    if data.eval_pairs:
        eval_pairs = pairs_of(data.eval_pairs)
    elif offline is not None and config.evaluate.pairs:
        count = min(config.evaluate.pairs, int(offline.height * _HELD_OUT))
        rows = sorted(rng.sample(range(offline.height), count))
        eval_pairs = offline[rows] if count else None
    held = set()
    if eval_prompts is not None:
        held |= {prompt_key(messages) for messages in eval_prompts["messages"].to_list()}
    if eval_pairs is not None:
        held |= set(eval_pairs["key"])
    before = prompts.height
    keys = pl.Series([prompt_key(messages) for messages in prompts["messages"].to_list()], dtype=pl.String)
    prompts = prompts.filter(~keys.is_in(list(held)))
    if prompts.is_empty():
        raise DataError(f"{data.prompts}: all of its {before} prompts are held out; give more, or data.eval_prompts")
    if offline is not None:
        offline = offline.filter(~pl.col("key").is_in(list(held)))
        write_parquet(outputs["offline"], offline, key=key)
    if eval_prompts is not None:
        write_parquet(outputs["eval_prompts"], eval_prompts, key=key, schema=PROMPTS)
    if eval_pairs is not None:
        write_parquet(outputs["eval_pairs"], eval_pairs, key=key)
    write_parquet(outputs["prompts"], prompts, key=key, schema=PROMPTS)
    this.report(
        "note",
        text=f"{prompts.height} prompts for the rounds, {0 if offline is None else offline.height} offline pairs; held "
        f"out: {0 if eval_prompts is None else eval_prompts.height} prompts, "
        f"{0 if eval_pairs is None else eval_pairs.height} pairs",
    )


def round_prompts(this: Run, inputs: Inputs, number: int, folder: Path) -> tuple[Path, str]:
    """The prompts of round `number` (from 1): all, or a fresh slice of the shuffled ones, going round at the end."""
    prompts = read_parquet(inputs.prompts, ["prompt_id", "messages"])
    per_round = this.config.data.prompts_per_round
    if per_round is not None and per_round < prompts.height:
        order = list(range(prompts.height))
        random.Random(seed_for(this.config.seed, "prompts")).shuffle(order)
        start = (number - 1) * per_round
        rows = sorted(order[at % prompts.height] for at in range(start, start + per_round))
        prompts = prompts[rows]
    key = digest("prompts", prompts.to_dict(as_series=False))
    path = folder / "prompts.parquet"
    if parquet_key(path) != key:
        write_parquet(path, prompts, key=key, schema=PROMPTS)
    return path, key
