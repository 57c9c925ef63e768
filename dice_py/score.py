"""Stage 2, score: log π(y|x) and log π_ref(y|x) over the stored token ids, and r = β·(log π − log π_ref).

The log-probabilities are dice_py/logps.py's. Shards are dealt over groups of devices (dice_py/groups.py), first under
the reference, then under the policy, each model read once by each group. Nothing is decoded or tokenised again.

Where the policy itself has sampled the responses, its log-probabilities came with them. Whether they are the
scorer's is measured in every stage on a sample of responses; only if they are, the policy's own pass is left out
(`score.policy_logps`).

Source: Chen et al., arXiv 2406.09760, eq. 3 (Rafailov et al., arXiv 2305.18290, eq. 5, without the partition
function, which is equal for the responses of one prompt).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl

from dice_py.artefacts import (
    SCORES,
    Report,
    digest,
    no_report,
    parquet_key,
    parquet_rows,
    read_json,
    read_parquet,
    seed_for,
    write_json,
    write_parquet,
)
from dice_py.clock import clocked
from dice_py.config import DevicesConfig, ModelConfig, ScoreConfig
from dice_py.errors import DataError
from dice_py.groups import Items, device_in_group, find_groups, over_groups
from dice_py.models import held_model, release_held

if TYPE_CHECKING:
    from dice_py.packing import Tokens

Role = Literal["reference", "policy"]


@dataclass(frozen=True)
class Shard:
    """One file of generations on its way: `halves` keep a model's sums until both are there."""

    generations: Path
    out: Path
    half: Path
    key: str
    sampled: bool
    """True when the policy that scores is the one that sampled it."""


@dataclass(frozen=True)
class Scored:
    """What the stage leaves: one file for each shard, and how the policy's log-probabilities were had."""

    files: list[Path]
    gate: dict[str, Any] | None
    """Figures of the gate; None where it was not asked for, or nothing had to be scored."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns of token ids."""

    prompt: str = "prompt_token_ids"
    response: str = "token_ids"


def token_arrays(frame: pl.DataFrame, column: str, place: Path | str) -> list[np.ndarray]:
    """A column of lists of token ids as arrays, which share their memory.

    Raises:
        DataError: the column is no list of integers, or holds nulls.
    """
    series = frame[column]
    if not (isinstance(series.dtype, pl.List) and series.dtype.inner.is_integer()):
        raise DataError(
            f"{place}: column {column!r} is {series.dtype}, not a list of token ids; the scorer takes "
            "the tokens as they were sampled, and never tokenises text again"
        )
    flat = series.explode(empty_as_null=False)
    if series.null_count() or flat.null_count():
        raise DataError(f"{place}: column {column!r} holds nulls; every response needs its token ids")
    values = flat.cast(pl.Int64).to_numpy()
    if not len(series):
        return []
    return np.split(values, series.list.len().to_numpy().cumsum()[:-1])


def _sums(
    shard: Shard, scorer: Any, columns: Columns, on_batch: Callable[[int], None], rows: Sequence[int] | None = None
) -> list[float]:
    """log-probabilities of a shard's responses, or of some of its rows."""
    frame = read_parquet(shard.generations, [columns.prompt, columns.response])
    if rows is not None:
        frame = frame[list(rows)]
    prompts: list[Tokens] = list(token_arrays(frame, columns.prompt, shard.generations))
    responses: list[Tokens] = list(token_arrays(frame, columns.response, shard.generations))
    # A response of no tokens has nothing to sum; the miner drops it as too short.
    answered = [row for row, response in enumerate(responses) if len(response)]
    found = scorer.sums([prompts[row] for row in answered], [responses[row] for row in answered], on_batch)
    if len(answered) < len(responses):
        on_batch(len(responses) - len(answered))
    sums = np.zeros(len(responses))
    sums[answered] = found
    return sums.tolist()


def score_shards(
    items: Items,
    *,
    report: Report,
    config: ScoreConfig,
    models: ModelConfig,
    folder: Path,
    role: Role,
    shards: list[Shard],
    columns: Columns,
    beta: float,
) -> None:
    """The working half: one model over the shards that `items` deals.

    Under the reference a shard's half is written, under the policy its scores.
    """
    with clocked("import"):
        from dice_py.logps import Scorer

    scorer: Scorer | None = None
    while (number := items.take(wait=True)) is not None:
        if scorer is None:
            scorer = Scorer(held_model(folder, models), config, report)
        shard = shards[number]
        logps = _sums(shard, scorer, columns, lambda count: report("advance", count=count))
        if role == "reference":
            write_parquet(shard.half, pl.DataFrame({"ref_logp": logps}, schema=_HALF), key=shard.key)
        else:
            _finish(shard, pl.Series("logp", logps, dtype=pl.Float64), beta, report)
        report("throughput", stage="score", model=role, file=shard.out.name, **scorer.take_work())
        report("item", number=number)


_HALF = {"ref_logp": pl.Float64}


def _finish(shard: Shard, logps: pl.Series, beta: float, report: Report) -> None:
    """Writes a shard's scores from its half and the policy's sums."""
    frame = read_parquet(shard.half, ["ref_logp"]).with_columns(logps.cast(pl.Float64).alias("logp"))
    # The difference is taken before rounding to f32: two sums of -1000 share most of their digits.
    frame = frame.with_columns(reward=beta * (pl.col("logp") - pl.col("ref_logp")))
    write_parquet(shard.out, frame, key=shard.key, schema=SCORES, meta={"beta": beta})
    shard.half.unlink()
    report("shard", file=shard.out.name, key=shard.key, rows=frame.height)


def measure_gate(
    items: Items,
    *,
    report: Report,
    config: ScoreConfig,
    models: ModelConfig,
    folder: Path,
    shards: list[Shard],
    columns: Columns,
    beta: float,
    out: Path,
    key: str,
) -> None:
    """Compares the log-probabilities that came with the samples with the scorer's, on a sample of responses.

    Writes to `out`: `responses`; `mean_abs_difference` and `max_abs_difference` of the implicit reward; `reward_std`,
    its spread on the same responses; `share`, the first over the spread; `passed`, whether that is within
    `score.gate_tolerance`.
    """
    with clocked("import"):
        from dice_py.logps import Scorer

    while (number := items.take(wait=True)) is not None:
        scorer = Scorer(held_model(folder, models), config, report)
        sampled, scored, rewards = [np.zeros(0)], [np.zeros(0)], [np.zeros(0)]
        for shard, rows in _gate_rows(config.gate_responses, shards, columns, key):
            ours = np.array(_sums(shard, scorer, columns, lambda _: None, rows))
            scored.append(ours)
            sampled.append(read_parquet(shard.generations, ["sampled_logp"])["sampled_logp"].to_numpy()[rows])
            rewards.append(beta * (ours - read_parquet(shard.half, ["ref_logp"])["ref_logp"].to_numpy()[rows]))
        apart = beta * np.abs(np.concatenate(sampled).astype(np.float64) - np.concatenate(scored))
        spread = float(np.concatenate(rewards).std()) if len(apart) else 0.0
        known = bool(np.isfinite(apart).all() and np.isfinite(spread) and spread > 0)
        figures = {
            "responses": len(apart),
            "mean_abs_difference": float(apart.mean()) if known else None,
            "max_abs_difference": float(apart.max()) if known else None,
            "reward_std": spread if known else None,
            "share": float(apart.mean()) / spread if known else None,
            "tolerance": config.gate_tolerance,
            "passed": known and float(apart.mean()) <= config.gate_tolerance * spread,
        }
        write_json(out, {"key": key, "gate": figures})
        report("item", number=number)


def _stored_gate(file: Path, key: str) -> dict[str, Any] | None:
    stored = read_json(file) if file.is_file() else {}
    return stored["gate"] if stored.get("key") == key else None


def _gate_rows(count: int, shards: list[Shard], columns: Columns, key: str) -> list[tuple[Shard, list[int]]]:
    """`count` responses drawn from all that have tokens, seeded by the key; by shard."""
    places = []
    for number, shard in enumerate(shards):
        lengths = read_parquet(shard.generations, [columns.response])[columns.response].list.len()
        places += [(number, row) for row in (lengths > 0).arg_true()]
    drawn = random.Random(seed_for("gate", key)).sample(places, min(count, len(places)))
    found: dict[int, list[int]] = {}
    for number, row in sorted(drawn):
        found.setdefault(number, []).append(row)
    return [(shards[number], rows) for number, rows in found.items()]


def _told(gate: dict[str, Any]) -> str:
    if gate["share"] is None:
        return "the policy's log-probabilities are scored: those of the samples, or the rewards, are not finite numbers"
    figures = (
        f"{gate['mean_abs_difference']:.2g} on average over {gate['responses']} responses, "
        f"{100 * gate['share']:.2g} % of the reward's standard deviation (allowed: {100 * gate['tolerance']:g} %)"
    )
    if gate["passed"]:
        return f"the policy's log-probabilities are those that came with the samples: the reward differs by {figures}"
    return f"the policy's log-probabilities are scored: with those of the samples the reward differs by {figures}"


def score(
    config: ScoreConfig,
    models: ModelConfig,
    *,
    policy: Path,
    reference: Path,
    generations: list[Path],
    out: Path,
    keys: list[str],
    beta: float,
    sampled: Sequence[bool] | None = None,
    devices: DevicesConfig | None = None,
    prompt_column: str = "prompt_token_ids",
    response_column: str = "token_ids",
    report: Report = no_report,
) -> Scored:
    """Scores shards of generations: one file of scores for each, row-aligned with it.

    The reference's sums of a shard are kept in a file until the policy's are there, so that neither pass is lost to a
    kill. A shard whose file already carries its key is left as it is.

    Args:
        generations: Parquet files with token ids, in `prompt_column` and `response_column`.
        out: folder for `scores-NNNNN.parquet`, columns `logp`, `ref_logp`, `reward` (f32).
        keys: one key for each shard.
        beta: β of the implicit reward.
        sampled: for each shard, whether this policy has sampled it, with `sampled_logp`; none did when left out.
        devices: which devices work; None for the defaults.

    Raises:
        DataError: a shard that lacks its columns or whose tokens the models do not know.
    """
    devices = devices or DevicesConfig()
    columns = Columns(prompt_column, response_column)
    shards = [
        Shard(
            generations=file,
            out=out / f"scores-{number:05d}.parquet",
            half=out / f"ref-logps-{number:05d}.parquet",
            key=keys[number],
            sampled=sampled is not None and sampled[number],
        )
        for number, file in enumerate(generations)
    ]
    left = [number for number, shard in enumerate(shards) if parquet_key(shard.out) != shard.key]
    # Of all shards, so that what a resume finds to do is done as what was done before.
    gate_file, gate_key = out / "gate.json", digest("gate", [shard.key for shard in shards if shard.sampled])
    gate = _stored_gate(gate_file, gate_key) if config.policy_logps == "gate" else None
    if not left:
        return Scored([shard.out for shard in shards], gate)
    groups = find_groups(devices, models, report=report)
    rows = {number: parquet_rows(shards[number].generations) for number in left}
    done, total = 0, 2 * sum(rows.values())

    def advance(count: int) -> None:
        nonlocal done
        done = min(done + count, total)
        report("progress", stage="score", done=done, total=total, unit="sequences")

    def hear(event: str, **fields: Any) -> None:
        if event == "advance":
            advance(fields["count"])
        else:
            report(event, **fields)

    def run(work: str, items: list[int], is_whole: Callable[[int], bool], folder: Path, **more: Any) -> None:
        # The gate is one piece of work: with several groups it is done right here, by the first one's device.
        over_groups(
            f"dice_py.score:{work}",
            {
                "config": config,
                "models": device_in_group(models),
                "folder": folder,
                "shards": shards,
                "columns": columns,
                "beta": beta,
                **more,
            },
            items=items,
            groups=groups if work == "score_shards" else groups[:1],
            is_whole=is_whole,
            devices=devices,
            logs=out,
            report=hear,
        )

    def whole_half(number: int) -> bool:
        return parquet_key(shards[number].half) == keys[number]

    def whole(number: int) -> bool:
        return parquet_key(shards[number].out) == keys[number]

    unread = [number for number in left if not whole_half(number)]
    advance(sum(rows[number] for number in left if number not in unread))
    run("score_shards", unread, whole_half, reference, role="reference")
    trusted = [number for number in left if shards[number].sampled] if config.policy_logps == "gate" else []
    if trusted:
        if gate is None:
            run(
                "measure_gate",
                [0],
                lambda _: _stored_gate(gate_file, gate_key) is not None,
                policy,
                shards=[shards[number] for number in trusted],
                out=gate_file,
                key=gate_key,
            )
            gate = _stored_gate(gate_file, gate_key)
            if len(groups) > 1:
                release_held()  # the first group's process needs the room
        assert gate is not None
        report("note", text=_told(gate))
        if gate["passed"]:
            for number in trusted:
                came = read_parquet(shards[number].generations, ["sampled_logp"])["sampled_logp"]
                if not came.is_finite().fill_null(False).all():
                    continue  # scored: the gate has not seen all of them
                _finish(shards[number], came.alias("logp"), beta, report)
                advance(rows[number])
                left.remove(number)
    run("score_shards", left, whole, policy, role="policy")
    return Scored([shard.out for shard in shards], gate)


def score_pairs(
    config: ScoreConfig,
    models: ModelConfig,
    *,
    policy: Path,
    pairs: pl.DataFrame,
    report: Report = no_report,
) -> pl.DataFrame:
    """`chosen_logp` and `rejected_logp` f32 of pairs with `prompt_ids`, `chosen_ids`, `rejected_ids`."""
    with clocked("import"):
        from dice_py.logps import Scorer

    prompts: list[Tokens] = list(token_arrays(pairs, "prompt_ids", "the pairs"))
    sides: list[Tokens] = [
        tokens for side in ("chosen_ids", "rejected_ids") for tokens in token_arrays(pairs, side, "the pairs")
    ]
    done = 0

    def on_batch(count: int) -> None:
        nonlocal done
        done += count
        report("progress", stage="score pairs", done=done, total=len(sides), unit="sequences")

    scorer = Scorer(held_model(policy, models), config, report)
    sums = scorer.sums(prompts * 2, sides, on_batch)
    half = len(prompts)
    return pl.DataFrame(
        {"chosen_logp": sums[:half], "rejected_logp": sums[half:]},
        schema={"chosen_logp": pl.Float32, "rejected_logp": pl.Float32},
    )
