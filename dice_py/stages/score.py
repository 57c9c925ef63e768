"""Stage 2, score: log π(y|x) and log π_ref(y|x) over the stored token ids, and r = β·(log π − log π_ref).

The log-probabilities are scoring/scorer.py's. Shards are dealt over groups of devices, first under
the reference, then under the policy, each model read once by each group. Nothing is decoded or tokenised again.

Where the policy itself has sampled the responses, its log-probabilities came with them. Whether they are the
scorer's is measured in every stage on a sample of responses; only if they are, the policy's own pass is left out
(`score.policy_logps`).

Source: Chen et al., arXiv 2406.09760, eq. 3 (Rafailov et al., arXiv 2305.18290, eq. 5, without the partition
function, which is equal for the responses of one prompt).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_py.compute.devices import device_in_group, find_groups
from dice_py.compute.dispatch import over_groups
from dice_py.config.shared import DevicesConfig, ModelConfig
from dice_py.config.stages import ScoreConfig
from dice_py.events import Report, no_report
from dice_py.models.loading import release_held
from dice_py.storage.keys import digest
from dice_py.storage.parquet import parquet_key, parquet_rows, read_parquet

if TYPE_CHECKING:
    pass
from dice_py.scoring.gate import gate_note, stored_gate
from dice_py.scoring.shards import Columns, Shard, write_scores


@dataclass(frozen=True)
class Scored:
    """What the stage leaves: one file for each shard, and how the policy's log-probabilities were had."""

    files: list[Path]
    gate: dict[str, Any] | None
    """Figures of the gate; None where it was not asked for, or nothing had to be scored."""


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
    gate = stored_gate(gate_file, gate_key) if config.policy_logps == "reuse_if_equal" else None
    if not left:
        return Scored([shard.out for shard in shards], gate)
    groups = find_groups(devices, models, report=report)
    rows = {number: parquet_rows(shards[number].generations) for number in left}
    done, total = 0, 2 * sum(rows.values())

    def advance(count: int) -> None:
        nonlocal done
        done = min(done + count, total)
        report("progress", stage="score", done=done, total=total, unit="sequences")

    def on_event(event: str, **fields: Any) -> None:
        if event == "advance":
            advance(fields["count"])
        else:
            report(event, **fields)

    def run(work: str, items: list[int], is_whole: Callable[[int], bool], folder: Path, **more: Any) -> None:
        # The gate is one piece of work: with several groups it is done right here, by the first one's device.
        over_groups(
            f"dice_py.stages.score:{work}",
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
            report=on_event,
        )

    def whole_half(number: int) -> bool:
        return parquet_key(shards[number].half) == keys[number]

    def whole(number: int) -> bool:
        return parquet_key(shards[number].out) == keys[number]

    unread = [number for number in left if not whole_half(number)]
    advance(sum(rows[number] for number in left if number not in unread))
    run("score_shards", unread, whole_half, reference, role="reference")
    trusted = [number for number in left if shards[number].sampled] if config.policy_logps == "reuse_if_equal" else []
    if trusted:
        if gate is None:
            run(
                "measure_gate",
                [0],
                lambda _: stored_gate(gate_file, gate_key) is not None,
                policy,
                shards=[shards[number] for number in trusted],
                out=gate_file,
                key=gate_key,
            )
            gate = stored_gate(gate_file, gate_key)
            if len(groups) > 1:
                release_held()  # the first group's process needs the room
        assert gate is not None
        report("note", text=gate_note(gate))
        if gate["passed"]:
            for number in trusted:
                came = read_parquet(shards[number].generations, ["sampled_logp"])["sampled_logp"]
                if not came.is_finite().fill_null(False).all():
                    continue  # scored: the gate has not seen all of them
                write_scores(shards[number], came.alias("logp"), beta, report)
                advance(rows[number])
                left.remove(number)
    run("score_shards", left, whole, policy, role="policy")
    return Scored([shard.out for shard in shards], gate)
