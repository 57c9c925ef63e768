"""The user's data in a run: read, checked and split into training and held-out parts, as copies in `inputs/`.

The copies are artifacts under one key, and keep the digests of the sources that they were made from. So a run goes on
without its sources, and notices when one of them changes. Of a data set of the hub they keep the commit: the run stays
with it, and does not ask the hub again, until the config names another.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from dice_py.config.prompt_settings import PromptSettings
from dice_py.config.run import RunConfig
from dice_py.config.stages import BufferConfig, ReplayConfig
from dice_py.data import prompt_key, read_pairs, read_prompts
from dice_py.errors import DataError
from dice_py.events import notes_once
from dice_py.generation.given import read_given_prompts
from dice_py.rows.data_sets import commit_of
from dice_py.rows.sources import Source, find_source, is_there
from dice_py.runs.given import given_content, given_files, given_reading
from dice_py.storage.integrity import is_kept, set_aside
from dice_py.storage.keys import digest, seed_for, versions
from dice_py.storage.parquet import intact_key, parquet_meta, write_parquet
from dice_py.storage.schemas import PROMPTS_READ

if TYPE_CHECKING:
    from dice_py.runs.folder import Run

_HELD_OUT = 0.1  # at most this share of a user's prompts or pairs is held out when no file of them is named


def own_copies(run: Run, outputs: dict[str, Path]) -> str:
    """Brings the run's copies of the user's data up to date, and returns their key.

    A source that is gone does not matter while the copies are whole, since they keep its digest.

    Raises:
        DataError: a source is gone, and a copy is not there or damaged.
    """
    config, data = run.config, run.config.data
    written, report = _written(config), notes_once(run.report)
    stored, stored_written = _kept_sources(outputs)
    sources: dict[str, Source] = {}
    contents: dict[str, str] = {}
    for name, text in written.items():
        known, same = stored.get(name), stored_written.get(name, text) == text
        commit = commit_of(known, text) if known is not None else None
        if known is not None and commit is None and same and not is_there(text):
            contents[name] = known  # the source is gone
            continue
        sources[name] = find_source(text, report, commit)
        contents[name] = known if known is not None and commit is not None else sources[name].digest()
    if "prompts" not in written:
        contents["generations"] = given_content(config, stored.get("generations"))
    columns = [data.prompt_column, data.chosen_column, data.rejected_column, *pool_columns(config).values()]
    held_out = [config.evaluate.prompts, config.evaluate.pairs]
    rows = [data.on_bad_row, data.max_bad_rows, data.ignored_keys]
    variables = config.model.chat_template_kwargs
    of_all = PromptSettings(data.system_prompt, None if isinstance(data.tools, str) else data.tools, variables)
    rows += of_all.key_fields()
    key = digest("inputs", columns, contents, config.seed, held_out, rows, versions("polars"))
    # Every file is looked at, so that each damaged one is set aside.
    kept = {name: is_kept(file, key, run.report) and _is_named(file, name, run) for name, file in outputs.items()}
    listed = (parquet_meta(outputs["prompts"]) or {}).get("files", []) if kept["prompts"] else []
    if kept["prompts"] and all(kept[name] for name in listed):
        return key
    changed = sorted(name for name, content in contents.items() if stored and stored.get(name) != content)
    if changed:
        run.report("note", text=f"the data of the run is read again: {', '.join(changed)} changed")
    for name, text in written.items():
        if name not in sources:
            raise DataError(
                f"{text} is gone, and the run's own copy of the data in {outputs['prompts'].parent} is damaged or not "
                f"complete; bring {name} back to that place, and resume"
            )
    _split(run, outputs, key, sources, {"sources": contents, "written": written})
    return key


def _written(config: RunConfig) -> dict[str, str]:
    """What the config names, by what it is for.

    Without data.prompts, the prompts are those of the given responses (generate.from_files), which are none of these,
    or where round 0 makes the policy those of the offline pairs.
    """
    data = config.data
    named = {
        "prompts": data.prompts or (data.replay if config.generate.from_files is None else None),
        "replay": data.replay,
        "eval_prompts": data.eval_prompts,
        "eval_pairs": data.eval_pairs,
        **{f"buffer {name}": buffer.path for name, buffer in config.replay.buffers.items()},
        "tools": data.tools if isinstance(data.tools, str) else None,
    }
    return {name: text for name, text in named.items() if text is not None}


def _kept_sources(outputs: dict[str, Path]) -> tuple[dict[str, str], dict[str, str]]:
    """The digests of the sources, and how the config named them, as any of the run's copies that is whole keeps them.

    Earlier versions did not keep the names.
    """
    for file in outputs.values():
        meta = parquet_meta(file) if intact_key(file) is not None else None
        if isinstance(meta, dict) and isinstance(meta.get("sources"), dict):
            return dict(meta["sources"]), dict(meta.get("written", {}))
    return {}, {}


def _is_named(file: Path, name: str, run: Run) -> bool:
    """Whether a copy is the one that its place is for: all have one key. Another is set aside."""
    meta = parquet_meta(file)
    made_as = meta.get("name", name) if isinstance(meta, dict) else name  # earlier versions wrote no name
    if made_as != name:
        set_aside(file, run.report, f"holds the run's {made_as}, not its {name}")
    return bool(made_as == name)


def _split(
    run: Run, outputs: dict[str, Path], key: str, sources: dict[str, Source], made_from: dict[str, dict[str, str]]
) -> None:
    """Reads the user's data and writes `inputs/`; the prompts last, since their key marks all of them as complete.

    Args:
        made_from: what the copies keep: `sources`, the digests, and `written`, the names in the config.
    """
    config, data = run.config, run.config.data

    def pairs_of(name: str, pool: str | None = None) -> pl.DataFrame:
        more = {} if pool is None else pools[pool]
        read = read_pairs(
            sources[name],
            prompt_column=data.prompt_column,
            chosen_column=data.chosen_column,
            rejected_column=data.rejected_column,
            # The first round draws first, and a pair of a later round would stop it.
            current_round=1,
            **more,
            **reading,
        )
        return settings.of_pairs(read)

    pools = pool_columns(config)
    settings = PromptSettings.of(config)
    # Offline pairs may be read for their prompts too.
    reading: dict[str, Any] = {
        "rule": data.bad_rows,
        "ignored": data.ignored_keys,
        "report": notes_once(run.report),
    }
    if "prompts" in sources:
        prompts = settings.of_prompts(read_prompts(sources["prompts"], data.prompt_column, **reading))
    else:
        prompts = read_given_prompts(given_files(config), given_reading(run))
    offline = pairs_of("replay", "replay") if data.replay else None
    buffers = {name: pairs_of(f"buffer {name}", name) for name in config.replay.buffers}
    rng = random.Random(seed_for(config.seed, "held out"))
    if data.eval_prompts:
        read = read_prompts(sources["eval_prompts"], data.prompt_column, **reading)
        eval_prompts: pl.DataFrame | None = settings.of_prompts(read)
    else:
        eval_prompts = _drawn(prompts, config.evaluate.prompts, rng)
    eval_pairs = pairs_of("eval_pairs") if data.eval_pairs else _drawn(offline, config.evaluate.pairs, rng)
    held = set() if eval_prompts is None else set(_keys(eval_prompts))
    if eval_pairs is not None:
        held |= set(eval_pairs["key"])
    before = prompts.height
    prompts = prompts.filter(~_keys(prompts).is_in(list(held)))
    if prompts.is_empty():
        of = sources.get("prompts", "the given responses")
        raise DataError(f"{of}: all of its {before} prompts are held out; give more, or data.eval_prompts")
    if offline is not None:
        offline = _not_held_out(offline, held, f"data.replay ({data.replay})")
    for name, pairs in buffers.items():
        buffers[name] = _not_held_out(pairs, held, f"replay.buffers.{name}")
    copies = {"offline": offline, "eval_prompts": eval_prompts, "eval_pairs": eval_pairs}
    copies |= {f"buffer {name}": pairs for name, pairs in buffers.items()}
    _write_copies(outputs, key, copies, prompts, made_from)
    counts = [("prompts for the rounds", prompts), ("offline pairs", offline)]
    text = ", ".join(f"{0 if frame is None else frame.height} {noun}" for noun, frame in counts)
    text += "".join(f", {pairs.height} in buffer {name}" for name, pairs in buffers.items())
    held_out = [("prompts", eval_prompts), ("pairs", eval_pairs)]
    text += "; held out: " + ", ".join(f"{0 if frame is None else frame.height} {noun}" for noun, frame in held_out)
    run.report("note", text=text)


def _drawn(frame: pl.DataFrame | None, most: int, rng: random.Random) -> pl.DataFrame | None:
    """Rows to hold out, at most `most` and `_HELD_OUT` of all; None for no row."""
    if frame is None or not most:
        return None
    rows = sorted(rng.sample(range(frame.height), min(most, int(frame.height * _HELD_OUT))))
    return frame[rows] if rows else None


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
    made_from: dict[str, dict[str, str]],
) -> None:
    """Writes the copies that there are, then the prompts, which name the others."""
    made = {name: frame for name, frame in copies.items() if frame is not None}
    for name, frame in made.items():
        schema = PROMPTS_READ if name == "eval_prompts" else None
        write_parquet(outputs[name], frame, key=key, schema=schema, meta={**made_from, "name": name})
    meta = {**made_from, "name": "prompts", "files": list(made)}
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
