"""The inputs of a run: its models, and the user's data, checked and split into training and held-out parts.

Errors in them are found here, before anything is computed. The data goes to `inputs/` in the run folder, as artifacts
with keys; the synthetic world's stays in its cache.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from dice_py.config.run import RunConfig
from dice_py.config.stages import BufferConfig, ReplayConfig
from dice_py.data import prompt_key, read_pairs, read_prompts
from dice_py.errors import DataError
from dice_py.models.loading import require
from dice_py.models.sources import needs_conversion, resolve_model
from dice_py.models.template_time import FILE, with_template_time
from dice_py.runs.measured_costs import recall_lengths
from dice_py.runs.throughput import lengths_key
from dice_py.stages.convert import ConvertJob
from dice_py.stages.preflight import PreflightJob
from dice_py.stages.world import WorldJob
from dice_py.storage.cache import cache_folder
from dice_py.storage.files import atomic, read_sealed, write_sealed
from dice_py.storage.integrity import damaged_in, is_kept, read_stamp, set_aside
from dice_py.storage.keys import digest, file_digest, seed_for, versions
from dice_py.storage.parquet import intact_key, parquet_key, parquet_meta, read_parquet, write_parquet
from dice_py.storage.schemas import PLACE, PROMPTS, PROMPTS_READ
from dice_py.synthetic.world import WORLD_STAMP, World, find_world, world_key

if TYPE_CHECKING:
    from dice_py.runs.folder import Run


_HELD_OUT = 0.1  # at most this share of a user's prompts or pairs is held out when no file of them is named


@dataclass(frozen=True)
class Inputs:
    """The models and data that every round reads."""

    policy: Path
    """π_1. With model.sft, before round 0: the SFT model."""
    reference: Path
    prompts: Path
    offline: Path | None
    eval_prompts: Path | None
    eval_pairs: Path | None
    buffers: dict[str, Path] = field(default_factory=dict)
    """The named buffers of replay.buffers, as `offline`."""


def _world(run: Run) -> World:
    """The run's own copy of the world, so that it does not depend on what happens to the cache."""
    own, key = World(run.folder / "inputs" / "world"), world_key(run.config.world)
    if own.is_intact(key):
        return own
    stamp = read_stamp(own.folder, WORLD_STAMP)
    if own.folder.exists() and (stamp is None or stamp.get("key") == key):
        damaged = damaged_in(own.folder, WORLD_STAMP)[0]
        set_aside(own.folder, run.report, f"cannot be used: {damaged.name} is damaged or missing")
    world = find_world(run.config.world)
    if world is None:
        run.report("note", text=f"making the synthetic world in {cache_folder()} (once)")
        world = World(run.spawn(WorldJob(run.config.world), run.folder / "inputs").files[0][0])
    with atomic(own.folder) as temporary:
        shutil.copytree(world.folder, temporary)
    return own


def prepare(run: Run) -> Inputs:
    """Resolves the models, reads and checks the data, and splits held-out parts off, into `inputs/`."""
    config, folder = run.config, run.folder / "inputs"
    require("torch", "transformers", "trl", "accelerate", "datasets", extra="train")
    if config.is_world:
        world = _world(run)
        inputs = Inputs(
            policy=world.policy,
            reference=world.reference,
            prompts=world.prompts,
            offline=world.offline_pairs,
            eval_prompts=world.eval_prompts,
            eval_pairs=world.eval_pairs,
        )
        _check(run, inputs, digest("world", config.world.model_dump()))
        return inputs
    buffers = list(config.replay.buffers)
    outputs = {name: folder / f"{name}.parquet" for name in ("prompts", "offline", "eval_prompts", "eval_pairs")}
    outputs |= {f"buffer {name}": folder / f"buffer-{name}.parquet" for name in buffers}
    # The data first: the models may be a long download.
    key = _own_copies(run, outputs)

    def made(name: str) -> Path | None:
        return outputs[name] if parquet_key(outputs[name]) == key else None

    policy, reference = _models(run)
    models = with_template_time(config.model, policy, folder / FILE, run.report)
    run.config = config.model_copy(update={"model": models})
    inputs = Inputs(
        policy=policy,
        reference=reference,
        prompts=outputs["prompts"],
        offline=made("offline"),
        eval_prompts=made("eval_prompts"),
        eval_pairs=made("eval_pairs"),
        buffers={name: outputs[f"buffer {name}"] for name in buffers},
    )
    _check(run, inputs, key)
    return inputs


def _own_copies(run: Run, outputs: dict[str, Path]) -> str:
    """Brings the run's copies of the user's data up to date, and returns their key.

    A source that is gone does not matter while the copies are whole, since they keep its digest.

    Raises:
        DataError: a source is gone, and a copy is not there or damaged.
    """
    config, data = run.config, run.config.data
    buffers = {name: buffer.path for name, buffer in config.replay.buffers.items()}
    sources = {
        "prompts": _prompts_file(config),
        "replay": data.replay,
        "eval_prompts": data.eval_prompts,
        "eval_pairs": data.eval_pairs,
        **{f"buffer {name}": path for name, path in buffers.items()},
    }
    stored = _kept_sources(outputs)
    contents: dict[str, str] = {}
    for name, file in sources.items():
        if file is not None:
            gone = name in stored and not Path(file).is_file()
            contents[name] = stored[name] if gone else file_digest(Path(file))
    columns = [data.prompt_column, data.chosen_column, data.rejected_column, *pool_columns(config).values()]
    held_out = [config.evaluate.prompts, config.evaluate.pairs]
    rows = [data.on_bad_row, data.max_bad_rows, data.ignored_keys]
    key = digest("inputs", columns, contents, config.seed, held_out, rows, versions("polars"))
    # Every file is looked at, so that each damaged one is set aside.
    kept = {name: is_kept(file, key, run.report) for name, file in outputs.items()}
    listed = (parquet_meta(outputs["prompts"]) or {}).get("files", []) if kept["prompts"] else []
    if kept["prompts"] and all(kept[name] for name in listed):
        return key
    changed = sorted(name for name, content in contents.items() if stored and stored.get(name) != content)
    if changed:
        run.report("note", text=f"the data of the run is read again: {', '.join(changed)} changed")
    for name, file in sources.items():
        if file is not None and not Path(file).is_file():
            raise DataError(
                f"{file} is gone, and the run's own copy of the data in {outputs['prompts'].parent} is damaged or not "
                f"complete; bring {name} back to that place, and resume"
            )
    _split(run, outputs, key, contents)
    return key


def _kept_sources(outputs: dict[str, Path]) -> dict[str, str]:
    """The digests of the sources, as any of the run's copies that is whole keeps them."""
    for file in outputs.values():
        meta = parquet_meta(file) if intact_key(file) is not None else None
        if isinstance(meta, dict) and isinstance(meta.get("sources"), dict):
            return dict(meta["sources"])
    return {}


def _prompts_file(config: RunConfig) -> str:
    """The file of the prompts. Where round 0 makes the policy, the offline pairs' prompts serve if none is named."""
    file = config.data.prompts or config.data.replay
    assert file is not None
    return file


def _models(run: Run) -> tuple[Path, Path]:
    """The folders of the policy and the reference; before round 0 both are the SFT model."""
    model = run.config.model
    if model.sft is not None:
        sft = _model(run, model.sft, model.sft_revision, "model.sft (--sft)")
        return sft, sft
    assert model.policy is not None
    assert model.reference is not None
    return (
        _model(run, model.policy, model.policy_revision, "model.policy (--policy)"),
        _model(run, model.reference, model.reference_revision, "model.reference (--reference)"),
    )


def _model(run: Run, name: str, revision: str | None, role: str) -> Path:
    """The folder of a model. What has to be converted is so in a process of its own, since that imports torch."""
    if needs_conversion(name, revision, role):
        return run.spawn(ConvertJob(name, revision, role), run.folder / "inputs").files[0][0]
    return resolve_model(name, revision, role=role, report=run.report)


def _check(run: Run, inputs: Inputs, data_key: str) -> None:
    """Checks models and data together, once. Its errors would otherwise come after hours."""
    sampled = recall_lengths(lengths_key(run.config, inputs.policy, inputs.prompts))
    job = PreflightJob(
        config=run.config,
        longest_response=max(sampled.lengths, default=1) if sampled else 1,
        policy=inputs.policy,
        reference=inputs.reference,
        prompts=[file for file in (inputs.prompts, inputs.eval_prompts) if file],
        pairs=[file for file in (inputs.offline, *inputs.buffers.values(), inputs.eval_pairs) if file],
        data_key=data_key,
        force=run.force,
    )
    key = job.key()
    stamp = run.folder / "inputs" / "checked.json"
    if read_sealed(stamp, key) is not None:
        return
    run.spawn(job, stamp.parent, following="replay" if run.config.has_round_zero else None)
    write_sealed(stamp, {}, key)


def _split(run: Run, outputs: dict[str, Path], key: str, sources: dict[str, str]) -> None:
    """Reads the user's files and writes `inputs/`; the prompts last, since their key marks all of them as complete.

    Args:
        sources: the digests of the user's files, which the copies keep.
    """
    config, data = run.config, run.config.data
    prompts_file = Path(_prompts_file(config))

    def pairs_of(name: str, pool: str | None = None) -> pl.DataFrame:
        more = {} if pool is None else pools[pool]
        return read_pairs(
            Path(name),
            prompt_column=data.prompt_column,
            chosen_column=data.chosen_column,
            rejected_column=data.rejected_column,
            # The first round draws first, and a pair of a later round would stop it.
            current_round=1,
            **more,
            **reading,
        )

    pools = pool_columns(config)
    reading: dict[str, Any] = {"rule": data.bad_rows, "ignored": data.ignored_keys, "report": run.report}
    prompts = read_prompts(prompts_file, data.prompt_column, **reading)
    offline = pairs_of(data.replay, "replay") if data.replay else None
    buffers = {name: pairs_of(buffer.path, name) for name, buffer in config.replay.buffers.items()}
    rng = random.Random(seed_for(config.seed, "held out"))
    eval_prompts = eval_pairs = None
    if data.eval_prompts:
        eval_prompts = read_prompts(Path(data.eval_prompts), data.prompt_column, **reading)
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
    held = set() if eval_prompts is None else set(_keys(eval_prompts))
    if eval_pairs is not None:
        held |= set(eval_pairs["key"])
    before = prompts.height
    prompts = prompts.filter(~_keys(prompts).is_in(list(held)))
    if prompts.is_empty():
        raise DataError(f"{prompts_file}: all of its {before} prompts are held out; give more, or data.eval_prompts")
    if offline is not None:
        offline = _not_held_out(offline, held, f"data.replay ({data.replay})")
    for name, pairs in buffers.items():
        buffers[name] = _not_held_out(pairs, held, f"replay.buffers.{name}")
    copies = {"offline": offline, "eval_prompts": eval_prompts, "eval_pairs": eval_pairs}
    copies |= {f"buffer {name}": pairs for name, pairs in buffers.items()}
    _write_copies(outputs, key, copies, prompts, sources)
    counts = [("prompts for the rounds", prompts), ("offline pairs", offline)]
    text = ", ".join(f"{0 if frame is None else frame.height} {noun}" for noun, frame in counts)
    text += "".join(f", {pairs.height} in buffer {name}" for name, pairs in buffers.items())
    held_out = [("prompts", eval_prompts), ("pairs", eval_pairs)]
    text += "; held out: " + ", ".join(f"{0 if frame is None else frame.height} {noun}" for noun, frame in held_out)
    run.report("note", text=text)


def _keys(prompts: pl.DataFrame) -> pl.Series:
    return pl.Series([prompt_key(messages) for messages in prompts["messages"].to_list()], dtype=pl.String)


def _not_held_out(pairs: pl.DataFrame, held: set[str], name: str) -> pl.DataFrame:
    """The pairs on prompts that are not held out."""
    kept = pairs.filter(~pl.col("key").is_in(list(held)))
    if kept.is_empty():
        raise DataError(
            f"all {pairs.height} offline pairs of {name} are on prompts that are held out (data.eval_pairs, "
            "data.eval_prompts), so none is left to replay: give other files, or leave data.eval_pairs out to have a "
            "share held out"
        )
    return kept


def _write_copies(
    outputs: dict[str, Path],
    key: str,
    copies: dict[str, pl.DataFrame | None],
    prompts: pl.DataFrame,
    sources: dict[str, str],
) -> None:
    """Writes the copies that there are, then the prompts, which name the others."""
    made = {name: frame for name, frame in copies.items() if frame is not None}
    for name, frame in made.items():
        schema = PROMPTS_READ if name == "eval_prompts" else None
        write_parquet(outputs[name], frame, key=key, schema=schema, meta={"sources": sources})
    meta = {"sources": sources, "files": list(made)}
    write_parquet(outputs["prompts"], prompts, key=key, schema=PROMPTS_READ, meta=meta)


def pool_columns(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The columns that the draw needs of each file of pairs, as keywords of `read_pairs`.

    By the buffer's name; "replay" is data.replay.
    """
    data, replay = config.data, config.replay

    def columns(pool: ReplayConfig | BufferConfig, weight_column: str | None) -> dict[str, Any]:
        return {
            "weight_column": weight_column,
            "margin_column": data.margin_column if pool.margin_power > 0 else None,
            "round_column": data.round_column if pool.half_life is not None else None,
            "source_column": data.source_column if replay.stratify_by == "source" else None,
        }

    named = {
        name: columns(buffer, buffer.weight_column) | {"weight_key": f"replay.buffers.{name}.weight_column"}
        for name, buffer in replay.buffers.items()
    }
    return {"replay": columns(replay, data.weight_column), **named}


def round_prompts(run: Run, inputs: Inputs, number: int, folder: Path) -> tuple[Path, str]:
    """The prompts of round `number` (from 1): all of them, or the next slice of the shuffled ones, cyclically."""
    prompts = read_parquet(inputs.prompts)
    per_round = run.config.data.prompts_per_round
    if per_round is not None and per_round < prompts.height:
        order = list(range(prompts.height))
        random.Random(seed_for(run.config.seed, "prompts")).shuffle(order)
        start = (number - 1) * per_round
        rows = sorted(order[at % prompts.height] for at in range(start, start + per_round))
        prompts = prompts[rows]
    key = digest("prompts", prompts.select("prompt_id", "messages").to_dict(as_series=False))
    path = folder / "prompts.parquet"
    if not is_kept(path, key, run.report):
        write_parquet(path, prompts, key=key, schema=PROMPTS_READ if PLACE in prompts.columns else PROMPTS)
    return path, key
