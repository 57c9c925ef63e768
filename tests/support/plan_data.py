"""A hand-made model, data, machine and costs, for the tests of the plan."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

from dice_py.config.loading import resolve
from dice_py.config.run import RunConfig
from dice_py.models.sizes import ModelSize
from dice_py.planning.costs import Estimator
from dice_py.planning.counts import Data, count_rounds
from dice_py.planning.machine import Machine
from dice_py.runs.measured_costs import GenerateCosts, ScoreCosts, StageCosts, TrainCosts

GIB = 2**30
OWN = ["model.policy=p", "model.reference=r", "data.prompts=x.jsonl", "data.replay=y.jsonl"]
SIZE = ModelSize(
    parameters=1000, stored_bytes=4200, hidden=8, layers=2, heads=4, kv_heads=2, head_size=2, inner=16, vocabulary=50,
    shape="shape",
)  # fmt: skip


def own(*assignments: str) -> RunConfig:
    """The config of a run of the user's own models and data."""
    return resolve([], [*OWN, *assignments])


def data(rounds: list[list[int]], tokens: dict[int, int], **changes: Any) -> Data:
    """Every response has 5 tokens."""
    return replace(Data(rounds, tokens, [1000] * len(rounds), [5], 1.0), **changes)


def write_weights(file: Path, header: dict[str, Any]) -> None:
    """Writes a safetensors file that ends after its header."""
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)


COSTS = StageCosts(
    source="calibration",
    when=0.0,
    startup=dict.fromkeys(("generate", "score", "replay", "train", "evaluate"), 0.0),
    generate=GenerateCosts(
        load=1.0, warm_up=0.5, per_step=0.1, per_token=0.01, per_response=0.001, rows=1000, continuous=True,
        bytes_per_response=10.0, peak_bytes=0,
    ),
    score=ScoreCosts(
        load=1.0, warm_up=0.25, fixed=0.5, per_token=0.001, per_response=0.0, token_ratio=1.0, gate_passed=True,
        bytes_per_response=8.0, per_pair=0.01, pair_tokens=None, bytes_per_pair=20.0, peak_bytes=0,
    ),
    train=TrainCosts(
        load=1.0, fixed=2.0, per_token=0.003, per_update=0.14, check_per_token=0.001, save=0.25, checkpoint_bytes=700,
        peak_bytes=0,
    ),
    evaluate=None,
)  # fmt: skip
MACHINE = Machine(
    engine="transformers", dtype="float32", cuda=False, cores=2, groups=1, gpus=0, processes=1, shards=1,
    gpu_bytes=None, base_memory=1000, encode_seconds=0.01, tokenizer_seconds=0.2, mine_seconds=0.001,
    bootstrap_seconds=0.1,
)  # fmt: skip


def changed(costs: StageCosts, stage: str, **changes: Any) -> StageCosts:
    """`costs` with other costs of one stage."""
    return costs.model_copy(update={stage: getattr(costs, stage).model_copy(update=changes)})


def estimated(
    config: RunConfig, run_data: Data, costs: StageCosts = COSTS, machine: Machine = MACHINE, check: float | None = None
) -> dict[str, dict[str, Any]]:
    """The entries of all stages, both models of `SIZE`."""
    counts = count_rounds(config, run_data, machine.processes)
    return Estimator(config, costs, machine, SIZE, SIZE, run_data).estimate(counts, check)


def small(*assignments: str) -> tuple[RunConfig, Data]:
    """Four prompts of 10 tokens, 2 samples of 5."""
    config = own(
        "rounds=1", "generate.samples=2", "generate.shard_prompts=2", "train.batch_size=4", "train.save_steps=1",
        "evaluate.prompts=3", *assignments,
    )  # fmt: skip
    run_data = data([[0, 1, 2, 3]], dict.fromkeys(range(4), 10), eval_prompts=(10, 10), pair_tokens=(10.0, 5.0, 5.0))
    return config, replace(run_data, eval_pairs=6)
