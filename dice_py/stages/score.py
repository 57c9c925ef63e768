"""Stage 2, score: log π(y|x) and log π_ref(y|x) over the stored token ids, and r = β·(log π − log π_ref).

The log-probabilities are scoring/scorer.py's. Shards are dispatched to groups of devices (compute/dispatch.py), first
under the reference, then under the policy; each group reads each model once. Nothing is decoded or tokenized again.

Where the policy itself has sampled the responses, its log-probabilities came with them. In every stage a sample of
responses is compared with the scorer (scoring/gate.py); only if they are equal is the policy's own pass left out
(`score.policy_logps`).

Source: Chen et al., arXiv 2406.09760, eq. 3 (Rafailov et al., arXiv 2305.18290, eq. 5, without the partition
function, which is equal for the responses of one prompt).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.compute.dispatch import dispatch_shards, open_executor
from dice_py.compute.executor import Executor
from dice_py.compute.shard_queue import ShardWork
from dice_py.config.shared import DevicesConfig, ModelConfig
from dice_py.config.stages import ScoreConfig
from dice_py.events import Report, no_report
from dice_py.models.checkpoint import check_checkpoint
from dice_py.models.comparison import check_distinct, warn_of_unrelated
from dice_py.models.identity import model_identity
from dice_py.models.loading import placement, release_held
from dice_py.models.same_tokenizer import check_same_tokenizer
from dice_py.scoring.gate import MeasureGate, gate_note, stored_gate
from dice_py.scoring.shards import Columns, PreviousModel, Role, ScoreShards, Shard, check_lengths, write_scores
from dice_py.stages.job import Job, StageResult, model_key_fields
from dice_py.storage.files import write_sealed
from dice_py.storage.integrity import check_intact, is_kept, kept_json
from dice_py.storage.keys import digest, versions
from dice_py.storage.parquet import parquet_key, parquet_meta, parquet_rows, read_parquet


@dataclass(frozen=True)
class ScoreJob(Job):
    """Scores shards of generations: `scores-NNNNN.parquet` for each, row-aligned with it.

    Columns of the scores: `logp`, `ref_logp`, `reward` (f32), and with `previous` also `previous_reward`. The counts:
    `responses`, `mean_reward` and `reward_std` (of the finite rewards), `dtype` (that the models compute in),
    `policy_logps_gate` (scoring/gate.py; None where the gate was not asked for, or nothing had to be scored).

    Raises, when run:
        DataError: an unusable model (`check_checkpoint`), or a shard that lacks its columns or whose tokens the models
            do not know.
        UsageError: policy and reference are the same model, and `config.allow_same_model` is false.
    """

    config: ScoreConfig
    models: ModelConfig
    policy: Path
    reference: Path
    generations: list[Path]
    """Parquet files with token ids, in the columns `prompt_column` and `response_column`."""
    generation_keys: list[str]
    """A key of the content of each."""
    out: Path
    beta: float
    """β of the implicit reward."""
    sampled: tuple[bool, ...] = ()
    """For each shard, whether this policy sampled it (it then has `sampled_logp`); empty: it sampled none."""
    devices: DevicesConfig = field(default_factory=DevicesConfig)
    prompt_column: str = "prompt_token_ids"
    response_column: str = "token_ids"
    previous: PreviousModel | None = None
    """A third model: the reward of the round before is β·(log π_previous − log π_ref) where it was that round's policy,
    β·(log π_ref − log π_previous) where it was its reference."""

    def key_fields(self) -> dict[str, Any]:
        """The generations, the settings, both models and versions."""
        return {
            "generations": self.generation_keys,
            "score": self.config.model_dump(),
            "model": model_key_fields(self.models),
            "policy": model_identity(self.policy),
            "reference": model_identity(self.reference),
            "beta": self.beta,
            "columns": [self.prompt_column, self.response_column],
            "versions": versions("torch", "transformers", "vllm"),
            **({} if self.previous is None else {"previous": [model_identity(self.previous[0]), self.previous[1]]}),
        }

    def models_to_run(self) -> dict[Role, Path]:
        """The model of each pass, in order."""
        previous: dict[Role, Path] = {} if self.previous is None else {"previous": self.previous[0]}
        return {"reference": self.reference, **previous, "policy": self.policy}

    def shard_keys(self) -> list[str]:
        """The key of each shard's scores."""
        settings = {name: value for name, value in self.key_fields().items() if name != "generations"}
        return [digest("score", key, settings) for key in self.generation_keys]

    def run(self, report: Report = no_report) -> StageResult:
        """Scores the shards that have no scores under their key."""
        check_intact([*self.generations, *self.models_to_run().values()])
        for role, folder in reversed(self.models_to_run().items()):
            check_checkpoint(folder, role, self.models)
            if role != "policy":
                check_same_tokenizer(self.policy, folder, self.models, report)
        check_distinct(self.policy, self.reference, allowed=self.config.allow_same_model, report=report)
        scoring = _Scoring(self, report)
        gate = scoring.run()
        files = [shard.out for shard in scoring.shards]
        for stale in set(self.out.glob("scores-*.parquet")) - set(files):
            stale.unlink()  # of more shards, once; whoever reads the folder would take them for these
        rewards = pl.scan_parquet(files, glob=False).select("reward").collect()["reward"]
        finite = rewards.filter(rewards.is_finite())
        counts = {
            "responses": len(rewards),
            "mean_reward": finite.mean(),
            "reward_std": finite.std(),
            "dtype": placement(self.models).dtype,
            "policy_logps_gate": gate,
        }
        made = [(shard.out, shard.key) for shard in scoring.shards]
        return StageResult(made if gate is None else [*made, (scoring.gate_file, scoring.gate_key)], counts)


class _Scoring:
    """One run of a job: its shards, and the passes over those that have no scores yet."""

    def __init__(self, job: ScoreJob, report: Report) -> None:
        self.job, self.report = job, report
        self.columns = Columns(job.prompt_column, job.response_column)
        self.shards = [
            Shard(
                generations=file,
                out=job.out / f"scores-{number:05d}.parquet",
                ref_logps_file=job.out / f"ref-logps-{number:05d}.parquet",
                key=key,
                sampled=bool(job.sampled) and job.sampled[number],
            )
            for number, (file, key) in enumerate(zip(job.generations, job.shard_keys(), strict=True))
        ]
        self.gate_file = job.out / "gate.json"
        # From all sampled shards, scored or not: a resume uses the gate that the first attempt measured.
        self.gate_key = digest("gate", [shard.key for shard in self.shards if shard.sampled])
        self.previous_role = None if job.previous is None else job.previous[1]
        self.rows: dict[int, int] = {}  # responses of each shard without scores
        self.done = 0

    def is_scored(self, number: int) -> bool:
        return parquet_key(self.shards[number].out) == self.shards[number].key

    def has_ref_logps(self, number: int) -> bool:
        return parquet_key(self.shards[number].ref_logps_file) == self.shards[number].key

    def has_previous_logps(self, number: int) -> bool:
        return parquet_key(self.shards[number].previous_logps_file) == self.shards[number].key

    def run(self) -> dict[str, Any] | None:
        """All passes; the figures of the gate."""
        reuses = self.job.config.policy_logps == "reuse_if_equal"
        left = [at for at, shard in enumerate(self.shards) if not is_kept(shard.out, shard.key, self.report)]
        gate = self._known_gate(left) if reuses else None
        if not left:
            return gate
        warn_of_unrelated(self.job.policy, self.job.reference, self.report)
        for folder in self.job.models_to_run().values():
            for number in left:
                check_lengths(self.shards[number].generations, self.columns, folder, self.job.models)
        self.rows = {number: parquet_rows(self.shards[number].generations) for number in left}
        needs = list(self.job.models_to_run().values())
        with open_executor(
            self.job.devices, self.job.models, folder=self.job.out, needs=needs, report=self.report
        ) as executor:
            return self._run_passes(executor, left, gate)

    def _run_passes(self, executor: Executor, left: list[int], gate: dict[str, Any] | None) -> dict[str, Any] | None:
        """The passes over the shards `left`, which have no scores; the figures of the gate (`gate`: known ones)."""
        reuses = self.job.config.policy_logps == "reuse_if_equal"
        halves = [(number, self.shards[number]) for number in left]
        unread = [at for at, shard in halves if not is_kept(shard.ref_logps_file, shard.key, self.report)]
        self._advance(sum(self.rows[number] for number in left if number not in unread))
        self._pass(executor, "reference", self.job.reference, unread, self.has_ref_logps)
        if self.job.previous is not None:
            unread = [at for at, shard in halves if not is_kept(shard.previous_logps_file, shard.key, self.report)]
            self._advance(sum(self.rows[number] for number in left if number not in unread))
            self._pass(executor, "previous", self.job.previous[0], unread, self.has_previous_logps)
        trusted = [number for number in left if self.shards[number].sampled] if reuses else []
        if trusted:
            gate = gate or self._measure_gate(executor, trusted)
            self.report("note", text=gate_note(gate))
            if gate["passed"]:
                left = [number for number in left if number not in trusted or not self._reuse(number, gate)]
        self._pass(executor, "policy", self.job.policy, left, self.is_scored, gate)
        return gate

    def _known_gate(self, left: list[int]) -> dict[str, Any] | None:
        """The gate that an earlier attempt measured: of its file, else of a shard that was scored after it."""
        stored = kept_json(self.gate_file, self.gate_key, self.report)
        if stored is not None:
            return dict(stored["gate"])
        for number, shard in enumerate(self.shards):
            kept = (parquet_meta(shard.out) or {}).get("gate") if shard.sampled and number not in left else None
            if kept is not None and kept["key"] == self.gate_key:
                write_sealed(self.gate_file, {"gate": kept["figures"]}, self.gate_key)
                return dict(kept["figures"])
        return None

    def _pass(
        self,
        executor: Executor,
        role: Role,
        folder: Path,
        numbers: list[int],
        is_complete: Callable[[int], bool],
        gate: dict[str, Any] | None = None,
    ) -> None:
        job = self.job
        models = executor.models(job.models)
        kept = None if gate is None else {"key": self.gate_key, "figures": gate}
        before = self.previous_role
        work = ScoreShards(job.config, models, folder, role, self.shards, self.columns, job.beta, kept, before)
        self._dispatch(executor, work, numbers, is_complete)

    def _measure_gate(self, executor: Executor, trusted: list[int]) -> dict[str, Any]:
        """The gate is one piece of work: the first group does it, even where there are several."""
        job = self.job
        work = MeasureGate(
            config=job.config,
            models=executor.models(job.models),
            folder=job.policy,
            shards=[self.shards[number] for number in trusted],
            columns=self.columns,
            beta=job.beta,
            out=self.gate_file,
            key=self.gate_key,
        )
        self._dispatch(
            executor, work, [0], lambda _: stored_gate(self.gate_file, self.gate_key) is not None, most_groups=1
        )
        if not executor.runs_here(executor.groups()):
            release_held()  # the first group's process needs the memory
        gate = stored_gate(self.gate_file, self.gate_key)
        assert gate is not None
        return gate

    def _reuse(self, number: int, gate: dict[str, Any]) -> bool:
        """Writes a shard's scores from its `sampled_logp`; does nothing and returns False where one is not finite."""
        sampled = read_parquet(self.shards[number].generations, ["sampled_logp"])["sampled_logp"]
        if not sampled.is_finite().fill_null(False).all():
            return False  # the gate saw only a sample of them
        kept = {"key": self.gate_key, "figures": gate}
        shard, logps = self.shards[number], sampled.alias("logp")
        write_scores(shard, logps, self.job.beta, kept, self.report, self.previous_role)
        self._advance(self.rows[number])
        return True

    def _dispatch(
        self,
        executor: Executor,
        work: ShardWork,
        numbers: list[int],
        is_complete: Callable[[int], bool],
        most_groups: int | None = None,
    ) -> None:
        dispatch_shards(
            work,
            shards=numbers,
            executor=executor,
            is_complete=is_complete,
            devices=self.job.devices,
            logs=self.job.out,
            report=self._on_event,
            most_groups=most_groups,
        )

    def _on_event(self, event: str, **fields: Any) -> None:
        if event == "advance":
            self._advance(fields["count"])
        else:
            self.report(event, **fields)

    def _advance(self, count: int) -> None:
        total = len(self.job.models_to_run()) * sum(self.rows.values())
        self.done = min(self.done + count, total)
        self.report("progress", stage="score", done=self.done, total=total, unit="sequences")
