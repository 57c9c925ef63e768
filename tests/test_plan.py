"""Plans: counts and prices by hand, what would fail first, what a user sees, and one real calibration."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from cli.main import main
from dice_py.config.loading import dump, resolve
from dice_py.config.run import RunConfig
from dice_py.data import Message, Pair, pairs_frame, prompts_frame
from dice_py.errors import DataError
from dice_py.models.sizes import ModelSize, model_size
from dice_py.planning import plan as plan_module
from dice_py.planning.costs import Estimator, Machine, make_record
from dice_py.planning.counts import Data, count_rounds, training_steps
from dice_py.planning.feasibility import Room, first_failure, peak_disk
from dice_py.planning.memory import (
    checkpoint_bytes,
    generate_memory,
    lora_parameters,
    score_memory,
    train_memory,
    train_state,
)
from dice_py.planning.plan import plan
from dice_py.planning.timeline import Task, decode_steps, draw_lengths, fit_decoding, timeline
from dice_py.runs.inputs import Inputs
from dice_py.runs.throughput import lengths_key, record_key, remember_run
from dice_py.storage.cache import recall
from dice_py.storage.files import Manifest, write_json
from dice_py.storage.parquet import write_parquet
from dice_py.storage.schemas import GENERATIONS, PROMPTS
from dice_py.training.parallelism import ProcessLayout

GIB = 2**30
OWN = ["model.policy=p", "model.reference=r", "data.prompts=x.jsonl", "data.replay=y.jsonl"]
SIZE = ModelSize(
    parameters=1000, stored_bytes=4200, hidden=8, layers=2, heads=4, kv_heads=2, head_size=2, inner=16, vocabulary=50,
    shape="shape",
)  # fmt: skip


def own(*assignments: str) -> RunConfig:
    return resolve([], [*OWN, *assignments])


def data(rounds: list[list[int]], tokens: dict[int, int], **changes: Any) -> Data:
    """Every response has 5 tokens."""
    return replace(Data(rounds, tokens, [1000] * len(rounds), [5], 1.0), **changes)


# --- time --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "rows", "joins", "want"),
    [
        ([], 4, True, 0),
        ([3, 9, 4], 4, True, 9),
        # Two rows: 5 and 1; 2 joins at 1, 4 at 3, and ends at 7.
        ([5, 1, 2, 4], 2, True, 7),
        # Two batches, each as long as its longest.
        ([5, 1, 2, 4], 2, False, 9),
        ([1] * 400_000, 1, True, 400_000),
    ],
)
def test_steps_of_a_decoding(lengths: list[int], rows: int, joins: bool, want: int) -> None:
    assert decode_steps(lengths, rows, joins) == want


def test_lengths_are_drawn_from_those_seen() -> None:
    assert set(draw_lengths([2, 7], 200)) == {2, 7}
    assert draw_lengths([2, 7], 200) == draw_lengths([2, 7], 200)


@pytest.mark.parametrize(("step", "token"), [(0.5, 0.01), (0.0, 0.02), (0.3, 0.0)])
def test_a_step_and_a_token_are_told_apart(step: float, token: float) -> None:
    runs = [(steps, tokens, step * steps + token * tokens) for steps, tokens in ((10, 40), (14, 400))]
    assert fit_decoding(runs) == pytest.approx((step, token))


def test_no_price_is_negative() -> None:
    # Ten times the tokens in less time: all of it is steps.
    assert fit_decoding([(10, 40, 2.0), (10, 400, 1.9)]) == (pytest.approx(0.19), 0.0)
    assert fit_decoding([(10, 40, 1.0), (20, 80, 2.0)]) == (0.0, pytest.approx(0.025))


def test_a_process_started_ahead_is_waited_for_only_as_long_as_it_still_imports() -> None:
    tasks = [Task("a", 4.0, 3.0, True), Task("b", 5.0, 1.0, True), Task("mine", None, 0.5), Task("c", 2.0, 1.0)]
    # a: 4 s, with b's import beside it, which is done in the first second of a's work. b: no wait; c's import has
    # 1 s of b's work and 0.5 s of mine's, so that 0.5 s are left.
    assert timeline(tasks) == [(7.0, 4.0), (1.0, 0.0), (0.5, 0.0), (1.5, 0.5)]


def test_few_cores_slow_work_and_import_down() -> None:
    # Half a second of work in the 4 s (2 / 0.5) of the import; the other 1.5 s after it.
    tasks = [Task("a", 0.0, 2.0, True, work_beside=0.125, start_beside=0.5), Task("b", 2.0, 1.0)]
    assert timeline(tasks) == [(5.5, 0.0), (1.0, 0.0)]
    # Work that stands still until the import is done.
    tasks[0] = replace(tasks[0], work_beside=0.0)
    assert timeline(tasks) == [(6.0, 0.0), (1.0, 0.0)]
    # Two imports at half the speed.
    both = [Task("a", 3.0, 0.0, True), Task("b", 3.0, 0.0)]
    assert timeline(both, starts=0.5) == [(6.0, 6.0), (0.0, 0.0)]


# --- counts ------------------------------------------------------------------------------------------------


def test_counts_by_hand() -> None:
    config = own("generate.samples=4", "generate.shard_prompts=2", "data.max_prompt_tokens=20", "train.batch_size=4")
    tokens = {0: 10, 1: 21, 2: 12, 3: 8}  # 1 is too long
    (found,) = count_rounds(config, data([[0, 1, 2, 3]], tokens))
    assert (found.prompts, found.prompts_too_long, found.shards, found.responses) == (3, 1, 2, 12)
    assert (found.prompt_tokens, found.response_tokens) == (30, 60)
    # γ = 0.5: as many replayed as mined; a pair is 2 × 10 of the prompt and 5 + 5.
    assert (found.mined, found.replay, found.pairs, found.steps) == (3, 3, 6, 2)
    assert (found.pair_tokens, found.replay_tokens) == (30.0, 90)


def test_each_round_has_its_own_prompts_and_the_pool_those_before() -> None:
    config = own("mine.pool_rounds=2", "generate.samples=2", "replay.gamma=0")
    tokens = dict.fromkeys(range(6), 10)
    first, second, third = count_rounds(config, data([[0, 1], [2, 3], [4, 0]], tokens))
    assert [first.pool_responses, second.pool_responses, third.pool_responses] == [4, 8, 8]
    assert second.pool_tokens == 2 * (20 + 20)
    assert [first.mined, second.mined, third.mined] == [2, 4, 4]


def test_replay_by_gamma_and_what_there_is() -> None:
    tokens = dict.fromkeys(range(70), 10)
    asked = data([list(range(70))], tokens, pair_tokens=(4.0, 6.0, 8.0))
    (found,) = count_rounds(own("replay.gamma=0.3"), asked)
    assert (found.mined, found.replay, found.replay_wanted) == (70, 30, 30)
    assert found.replay_tokens == 30 * (2 * 4 + 6 + 8)
    (short,) = count_rounds(own("replay.gamma=0.3"), replace(asked, offline=[12]))
    assert (short.replay, short.replay_wanted, short.pairs) == (12, 30, 82)
    (total,) = count_rounds(own("replay.gamma=0.25", "replay.total=40"), asked)
    assert (total.replay, total.pairs) == (10, 40)


def test_the_runs_own_buffer_is_empty_in_the_first_round() -> None:
    config = resolve([], [*OWN[:3], "replay.gamma=0.5", "replay.buffer.capacity=3"])
    asked = data([[0, 1], [2, 3], [4, 5]], dict.fromkeys(range(6), 10), offline=[0, 0, 0])
    assert [found.replay for found in count_rounds(config, asked)] == [0, 2, 2]
    assert [found.replay_wanted for found in count_rounds(config, asked)] == [0, 2, 2]


def test_unusable_responses_and_long_pairs_make_no_pairs() -> None:
    tokens = dict.fromkeys(range(100), 10)
    asked = data([list(range(100))], tokens, usable=0.25)
    (found,) = count_rounds(own("replay.gamma=0"), asked)
    assert found.mined == found.pairs == 25
    assert count_rounds(own("replay.gamma=0", "train.max_length=15"), asked)[0].pairs == 25
    assert count_rounds(own("replay.gamma=0", "train.max_length=14"), asked)[0].pairs == 0


def test_pairs_of_a_prompt() -> None:
    asked = data([[0, 1]], {0: 10, 1: 10})
    several = ["mine.pairing=top_bottom", "mine.top_k=2", "mine.bottom_k=3", "replay.gamma=0", "generate.samples=8"]
    assert count_rounds(own(*several), asked)[0].mined == 12
    assert count_rounds(own(*several, "mine.pairs_per_prompt=4"), asked)[0].mined == 8


@pytest.mark.parametrize(
    ("assignments", "pairs", "processes", "want"),
    [
        (["train.batch_size=32", "train.per_device_train_batch_size=32"], 854, 1, 27),
        (["train.batch_size=32", "train.per_device_train_batch_size=4"], 854, 1, 27),
        (["train.batch_size=32", "train.per_device_train_batch_size=4"], 854, 4, 27),
        (["train.batch_size=32", "train.per_device_train_batch_size=4", "train.num_train_epochs=2"], 64, 1, 4),
        (["train.batch_size=32", "train.per_device_train_batch_size=4"], 3, 1, 1),
        (["train.max_steps=7"], 854, 1, 7),
    ],
)
def test_training_steps(assignments: list[str], pairs: int, processes: int, want: int) -> None:
    assert training_steps(own(*assignments), pairs, processes) == want


# --- sizes -------------------------------------------------------------------------------------------------


def weights(file: Path, header: dict[str, Any]) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)


def test_a_models_size_from_headers_alone(tmp_path: Path) -> None:
    shape = {
        "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 16, "vocab_size": 50,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({**shape, "dtype": "bfloat16"}))
    weights(tmp_path / "a.safetensors", {"__metadata__": {"format": "pt"}, "w": {"dtype": "BF16", "shape": [50, 8]}})
    weights(tmp_path / "b.safetensors", {"v": {"dtype": "BF16", "shape": [3]}})
    found = model_size(tmp_path)
    assert (found.parameters, found.layers, found.kv_heads, found.head_size) == (403, 2, 2, 2)
    assert found.kv_bytes_per_token == 2 * 2 * 2 * 2
    assert found.stored_bytes == sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    # What is no size is no part of the shape.
    (tmp_path / "config.json").write_text(json.dumps({**shape, "dtype": "float32", "use_cache": False}))
    assert model_size(tmp_path).shape == found.shape
    (tmp_path / "config.json").write_text(json.dumps({**shape, "num_hidden_layers": 3}))
    assert model_size(tmp_path).shape != found.shape


def test_weights_that_are_cut_off(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 900) + b"{")
    with pytest.raises(DataError, match=r"model\.safetensors is not a complete safetensors file"):
        model_size(tmp_path)


def test_memory_by_hand() -> None:
    config = own(
        "generate.token_budget=100", "generate.max_new_tokens=10", "score.token_budget=64",
        "train.per_device_train_batch_size=2", "train.batch_size=4", "generate.vllm.gpu_memory_utilization=0.5",
    )  # fmt: skip
    # 5 rows of 20 tokens, 16 values each in 4 bytes; 20 bytes for each of 50 logits.
    assert generate_memory(SIZE, config, "transformers", "float32", 10, None) == 4000 + 5 * 20 * 16 * 4 + 5 * 50 * 20
    assert generate_memory(SIZE, config, "vllm", "bfloat16", 10, 1000) == 500
    assert generate_memory(SIZE, config, "vllm", "float32", 10, None) == 4000 + GIB
    larger = replace(SIZE, parameters=2000)
    assert score_memory([SIZE, larger], config, "float32", False) == 8000 + 64 * 4 * (64 + 64) + 8 * 2**20
    activations = 17 * 4 * (2 * 2 * 15) * 8 * 2
    assert train_memory(SIZE, config, "float32", 15, 1) == 16_000 + activations + 8 * 60 * 50
    assert train_memory(SIZE, config, "float32", 15, 4) == 4_000 + activations + 8 * 60 * 50
    checkpointed = config.model_copy(update={"train": config.train.model_copy(update={"gradient_checkpointing": True})})
    assert train_memory(SIZE, checkpointed, "float32", 15, 1) < train_memory(SIZE, config, "float32", 15, 1)


def test_training_states() -> None:
    config, lora = own(), own("train.lora.r=2")
    assert train_state(SIZE, config, "float32", 1) == 16_000
    assert train_state(SIZE, config, "bfloat16", 1) == 18_000
    assert train_state(SIZE, config, "bfloat16", 4) == 4_500
    # Seven matrices: queries and output 8 × 8, keys and values 8 × 4, three of 8 × 16.
    adapters = 2 * 2 * (2 * 16 + 2 * 12 + 3 * 24)
    assert lora_parameters(SIZE, 2) == adapters
    assert train_state(SIZE, lora, "bfloat16", 1) == 2_000 + 16 * adapters
    assert (checkpoint_bytes(SIZE, config), checkpoint_bytes(SIZE, lora)) == (12_000, 12 * adapters)


# --- prices ------------------------------------------------------------------------------------------------

RECORD: dict[str, Any] = {
    "source": "calibration",
    "start": dict.fromkeys(("generate", "score", "replay", "train", "evaluate"), 0.0),
    "starts": 1.0,
    "beside": {},
    "generate": {
        "load": 1.0, "first": 0.5, "per_step": 0.1, "per_token": 0.01, "per_response": 0.001, "rows": 1000,
        "joins": True, "bytes_per_response": 10.0, "peak": 0,
    },
    "score": {
        "load": 1.0, "first": 0.25, "fixed": 0.5, "per_token": 0.001, "per_response": 0.0, "token_ratio": 1.0,
        "gate_passed": True, "bytes_per_response": 8.0, "per_pair": 0.01, "pair_tokens": None, "bytes_per_pair": 20.0,
        "peak": 0,
    },
    "train": {
        "load": 1.0, "fixed": 2.0, "per_step": 0.5, "step_tokens": 120.0, "save": 0.25, "checkpoint_bytes": 700,
        "peak": 0,
    },
    "evaluate": None,
}  # fmt: skip
MACHINE = Machine(
    engine="transformers", dtype="float32", cuda=False, cores=2, groups=1, gpus=0, processes=1, shards=1,
    gpu_bytes=None, base_memory=1000, encode_seconds=0.01, tokenizer_seconds=0.2, mine_seconds=0.001,
    bootstrap_seconds=0.1,
)  # fmt: skip


def priced(
    config: RunConfig, asked: Data, record: dict[str, Any] = RECORD, machine: Machine = MACHINE, **more: Any
) -> dict[str, dict[str, Any]]:
    counts = count_rounds(config, asked, machine.processes)
    return Estimator(config, record, machine, SIZE, SIZE, asked).price(counts, more.get("check"))


def small(*assignments: str) -> tuple[RunConfig, Data]:
    """Four prompts of 10 tokens, 2 samples of 5."""
    config = own(
        "rounds=1", "generate.samples=2", "generate.shard_prompts=2", "train.batch_size=4", "train.save_steps=1",
        "evaluate.prompts=3", *assignments,
    )  # fmt: skip
    asked = data([[0, 1, 2, 3]], dict.fromkeys(range(4), 10), eval_prompts=(10, 10), pair_tokens=(10.0, 5.0, 5.0))
    return config, replace(asked, eval_pairs=6)


def test_prices_by_hand() -> None:
    config, asked = small()
    found = priced(config, asked)
    assert list(found) == [
        f"round-01/{stage}" for stage in ("generate", "score", "mine", "replay", "train", "evaluate")
    ]
    generate, score, mine, replay, train, evaluate = found.values()
    # Tokenizer 0.2, 4 prompts; 0.5 once; 5 steps, 40 tokens, 8 responses; a load.
    assert generate["work_seconds"] == pytest.approx(0.2 + 0.04 + 0.5 + 0.5 + 0.4 + 0.008)
    assert (generate["startup_seconds"], generate["tokens"], generate["disk_bytes"]) == (1.0, 80, 80)
    assert generate["seconds"] == pytest.approx(generate["work_seconds"] + 1.0)
    # The reference's 80 tokens, and the gate's: 8 responses with their prompts.
    assert score["tokens"] == 80 + 8 * 15
    assert score["work_seconds"] == pytest.approx(0.75 + 0.2)
    assert score["startup_seconds"] == 2.0
    assert mine["seconds"] == pytest.approx(0.008)
    # Four pairs of 30 tokens; γ = 0.5.
    assert replay["tokens"] == 120
    assert replay["work_seconds"] == pytest.approx(0.2 + 0.25 + 0.04 + 0.12)
    assert replay["disk_bytes"] == 8 * 20
    # 8 pairs in 2 steps as long as the calibration's, a checkpoint each.
    assert (train["steps"], train["checkpoints"], train["tokens"]) == (2, 2, 240)
    assert train["work_seconds"] == pytest.approx(2.0 + 2 * 0.5 + 2 * 0.25)
    assert (train["disk_bytes"], train["transient_disk_bytes"]) == (4200, 1400)
    # Two draws of 2 responses; 6 pairs of 30 tokens under the new policy, the first one and the reference.
    assert evaluate["tokens"] == 2 * (20 + 10) + 3 * 6 * 30
    assert evaluate["startup_seconds"] == 2 * 1.0 + 3 * 1.0
    draws = 2 * (0.2 + 0.02 + 0.5 + 0.1 + 0.002)
    assert evaluate["work_seconds"] == pytest.approx(0.5 + draws + 0.1 + 0.2 + 0.06 + 0.25 + 0.54)


def test_a_failed_gate_costs_the_policys_pass() -> None:
    config, asked = small()
    failed = RECORD | {"score": RECORD["score"] | {"gate_passed": False}}
    assert priced(config, asked, failed)["round-01/score"]["tokens"] == 2 * 80 + 8 * 15
    always, asked = small("score.policy_logps=recompute")
    assert priced(always, asked)["round-01/score"]["tokens"] == 2 * 80


def test_a_pool_is_scored_anew_but_for_its_own_round() -> None:
    config, asked = small("rounds=2", "mine.pool_rounds=2")
    two = replace(asked, rounds=asked.rounds * 2, offline=[1000, 1000])
    # Both rounds under the reference, the first round's also under the policy, and the gate.
    assert priced(config, two)["round-02/score"]["tokens"] == 160 + 80 + 8 * 15


def test_later_rounds_keep_what_is_known_of_the_start() -> None:
    config, asked = small("rounds=2")
    two = replace(asked, rounds=asked.rounds * 2, offline=[1000, 1000])
    found = priced(config, two)
    # One draw, and only the new policy's log-probabilities of the pairs.
    assert found["round-02/evaluate"]["tokens"] == 20 + 10 + 6 * 30
    assert found["round-02/evaluate"]["startup_seconds"] == 1.0 + 1.0


def test_a_step_costs_by_its_tokens() -> None:
    config, asked = small()
    half = RECORD | {"train": RECORD["train"] | {"step_tokens": 60.0}}
    assert priced(config, asked, half)["round-01/train"]["work_seconds"] == pytest.approx(2.0 + 2 * 1.0 + 0.5)


def test_no_checkpoints_no_disk_beside_the_model() -> None:
    config, asked = small("train.save_steps=null")
    train = priced(config, asked)["round-01/train"]
    assert (train["transient_disk_bytes"], train["checkpoints"]) == (0, 0)


def test_groups_share_the_shards_and_gpus_are_counted() -> None:
    config, asked = small()
    two = replace(MACHINE, cuda=True, groups=2, gpus=2, processes=2, shards=2, gpu_bytes=10**6)
    record = RECORD | {"start": dict.fromkeys(RECORD["start"], 3.0)}
    one, both = priced(config, asked, record), priced(config, asked, record, two)
    generate = both["round-01/generate"]
    # A shard each: 20 tokens and 4 responses less; processes of their own to start, 3 s.
    saved = 20 * 0.01 + 4 * 0.001
    assert generate["work_seconds"] == pytest.approx(one["round-01/generate"]["work_seconds"] - saved + 3.0)
    assert generate["gpu_hours"] == pytest.approx(2 * generate["seconds"] / 3600)
    assert both["round-01/mine"]["gpu_hours"] == 0.0
    assert all(stage["gpu_hours"] == 0.0 for stage in one.values())
    # States of one of two processes, in the GPU's memory alone.
    state, alone = both["round-01/train"]["peak_memory_bytes"], one["round-01/train"]["peak_memory_bytes"]
    assert alone - state == 8_000 + 2 * MACHINE.base_memory


def test_processes_on_the_host_add_up() -> None:
    config, asked = small()
    found = priced(config, asked, machine=replace(MACHINE, processes=2))["round-01/train"]
    one = priced(config, asked)["round-01/train"]
    assert found["peak_memory_bytes"] - 1000 == 2 * (one["peak_memory_bytes"] - 1000)


def test_what_was_measured_counts_where_it_is_more() -> None:
    config, asked = small()
    record = RECORD | {"score": RECORD["score"] | {"peak": 10**12}}
    assert priced(config, asked, record)["round-01/score"]["peak_memory_bytes"] == 10**12 + 1000


def test_lora_needs_less() -> None:
    (config, asked), (lora, _) = small(), small("train.lora.r=1")
    large = replace(SIZE, parameters=10**9)
    counts = count_rounds(config, asked)
    full, less = (Estimator(c, RECORD, MACHINE, large, large, asked).price(counts, None) for c in (config, lora))
    assert less["round-01/train"]["peak_memory_bytes"] < full["round-01/train"]["peak_memory_bytes"] / 3


def test_the_check_of_ones_own_data_is_part_of_the_first_stage() -> None:
    config, asked = small()
    record = RECORD | {"start": RECORD["start"] | {"generate": 5.0}}
    without, found = priced(config, asked, record), priced(config, asked, record, check=2.0)
    # Its process is started with the check, which takes 2 of its 5 seconds.
    assert found["round-01/generate"]["seconds"] == pytest.approx(without["round-01/generate"]["seconds"])


def test_figures_of_a_run_are_taken_as_they_were() -> None:
    config, asked = small()
    generate = RECORD["generate"] | {"first": 0.0, "per_prompt": 0.1}
    seen = {"of": [2, 1, 6], "work": [9.0, 4.0], "load": [2.0, 1.0]}
    run = RECORD | {"source": "run", "generate": generate, "evaluate": seen}
    found = priced(config, asked, run)
    assert found["round-01/generate"]["work_seconds"] == pytest.approx(0.4 + 0.5 + 0.4 + 0.008)
    # The only round is the last.
    assert (found["round-01/evaluate"]["work_seconds"], found["round-01/evaluate"]["startup_seconds"]) == (4.0, 1.0)
    other = run | {"evaluate": seen | {"of": [2, 1, 7]}}
    assert priced(config, asked, other)["round-01/evaluate"]["work_seconds"] < 4.0


def test_a_record_of_a_calibration() -> None:
    runs = [{"lengths": [4] * 10, "seconds": 4 * 0.1 + 40 * 0.01}, {"lengths": [4] * 100, "seconds": 0.4 + 4.0}]
    measured = {
        **{name: value for name, value in RECORD["generate"].items() if name not in ("per_step", "per_token")},
        "runs": runs,
        "beside": {"work": 0.25, "seconds": 8.0},
    }
    score = RECORD["score"] | {"beside": None}
    found = make_record(measured, score, RECORD["train"], {"generate": 5.0, "score": 4.0, "train": 6.0})
    assert (found["generate"]["per_step"], found["generate"]["per_token"]) == pytest.approx((0.1, 0.01))
    assert found["start"] == {"generate": 5.0, "score": 4.0, "replay": 4.0, "train": 6.0, "evaluate": 5.0}
    assert found["beside"]["evaluate"] == {"work": 0.25, "start": 0.5}
    assert found["beside"]["train"] == {"work": 1.0, "start": 1.0}
    assert "runs" not in found["generate"]
    json.dumps(found, allow_nan=False)


# --- whether it fits ---------------------------------------------------------------------------------------


def entries() -> dict[str, dict[str, Any]]:
    def entry(memory: int, disk: int, transient: int = 0) -> dict[str, Any]:
        return {"peak_memory_bytes": memory, "disk_bytes": disk, "transient_disk_bytes": transient}

    return {
        "round-01/generate": entry(50, 10),
        "round-01/train": entry(80, 20, 30),
        "round-02/generate": entry(50, 10),
        "round-02/train": entry(80, 20, 30),
    }


@pytest.mark.parametrize(
    ("disk", "memory", "want"),
    [
        (90, 80, None),
        (89, 80, ("round-02/train", "disk", 90, 89, "train.save_steps")),
        (59, 80, ("round-01/train", "disk", 60, 59, "train.save_steps")),
        (9, 80, ("round-01/generate", "disk", 10, 9, "rounds")),
        (90, 79, ("round-01/train", "memory", 80, 79, "train.per_device_train_batch_size")),
        # What comes first in the work is named first.
        (9, 49, ("round-01/generate", "memory", 50, 49, "generate.token_budget")),
    ],
)
def test_the_first_thing_that_would_fail(disk: int, memory: int, want: tuple[Any, ...] | None) -> None:
    found = first_failure(entries(), Room(disk, memory, "memory"))
    if want is None:
        assert found is None
    else:
        assert found is not None
        assert tuple(found[name] for name in ("stage", "what", "needed", "available", "setting")) == want
        assert found["remedy"]
        assert want[0] in found["text"]
    assert peak_disk(entries()) == 90


def test_vllm_has_another_setting() -> None:
    stages = entries()
    stages["round-01/generate"]["engine"] = "vllm"
    found = first_failure(stages, Room(90, 49, "GPU memory"))
    assert found is not None
    assert found["setting"] == "generate.vllm.gpu_memory_utilization"
    assert "GPU memory" in found["text"]


def test_what_the_data_lacks() -> None:
    config, asked = small("replay.on_shortfall=error")
    plenty = Room(10**15, 10**15, "memory")
    assert first_failure(priced(config, asked), plenty) is None
    found = first_failure(priced(config, replace(asked, offline=[3])), plenty)
    assert found is not None
    assert [found[name] for name in ("stage", "what", "needed", "available", "setting")] == [
        "round-01/replay", "data", 4, 3, "replay.gamma",
    ]  # fmt: skip
    recorded, _ = small()
    assert first_failure(priced(recorded, replace(asked, offline=[3])), plenty) is None
    nothing, _ = small("replay.gamma=0")
    found = first_failure(priced(nothing, replace(asked, usable=0.0)), plenty)
    assert found is not None
    assert (found["stage"], found["what"]) == ("round-01/train", "data")


# --- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def dice(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Calls `dice …` and returns (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dice", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return call


def made_plan(**changes: Any) -> dict[str, Any]:
    config, asked = small()
    stages = priced(config, asked)
    room = changes.pop("room", Room(50 * GIB, 20 * GIB, "memory"))
    failure = first_failure(stages, room)
    return {
        "total_seconds": 75.5,
        "gpu_hours": 0.0,
        "cpu_hours": 0.25,
        "disk_bytes": peak_disk(stages),
        "peak_memory_bytes": 3 * GIB,
        "free_disk_bytes": room.disk,
        "free_memory_bytes": room.memory,
        "fits": failure is None,
        "first_failure": failure,
        "calibration": {
            "source": "stored", "of": "calibration", "device": "a CPU", "dtype": "float32", "engine": "transformers",
            "responses": 8, "mean_response_tokens": 5.0, "usable_prompt_share": 1.0,
        },
        "start_seconds": 0.5,
        "rounds": 1,
        "stages": stages,
        **changes,
    }  # fmt: skip


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Plans without working: `found` is what they find, `given` what they were given."""
    state: dict[str, Any] = {"found": made_plan()}

    def fake(config: RunConfig, folder: Path, **options: Any) -> dict[str, Any]:
        state["given"] = (config, folder, options)
        options["report"]("note", text="calibrating: something")
        found: dict[str, Any] = state["found"]
        return found

    monkeypatch.setattr(plan_module, "plan", fake)
    monkeypatch.chdir(tmp_path)
    return state


def test_what_a_user_sees(dice, faked) -> None:
    code, out, err = dice("plan", "--rounds", 1, "--seed", 7)
    assert code == 0
    assert err == "  calibrating: something\n"
    lines = [re.sub("  +", "|", line) for line in out.splitlines()]
    assert lines[1].split("|")[-7:] == ["time", "start-up", "GPU h", "tokens", "disk", "peak memory", "counts"]
    assert lines[2].split("|")[:4] == ["round-01/generate", "2.6 s", "1.0 s", "0"]
    assert lines[2].endswith("shards 2, prompts 4, responses 8")
    assert lines[8].startswith("all|1 min 16 s|")
    assert lines[9:] == [
        "figures: remembered from a calibration, of this model shape in float32 on a CPU, engine transformers; "
        "responses of 5 tokens on average; pairs are an estimate",
        "no GPU is used: 0.25 core hours",
        "it fits: 50.0 GiB of disk and 20.0 GiB of memory are free",
    ]
    config, folder, options = faked["given"]
    assert (config.rounds, config.seed, folder, options["fresh"]) == (1, 7, Path("runs"), False)


def test_a_plan_that_does_not_fit_is_a_plan(dice, faked) -> None:
    faked["found"] = made_plan(room=Room(50 * GIB, 1500, "memory"))
    code, out, _ = dice("plan")
    assert code == 0
    assert "it does not fit: round-01/generate needs " in out
    assert "(generate.token_budget); lower generate.token_budget" in out
    code, out, _ = dice("plan", "--json", "--fresh")
    assert code == 0
    found = json.loads(out)
    assert found["fits"] is False
    assert found["first_failure"]["stage"] == "round-01/generate"
    assert faked["given"][2]["fresh"] is True


def test_a_dry_run_is_a_plan_and_writes_nothing(dice, faked, tmp_path: Path) -> None:
    code, out, _ = dice("run", "--dry-run", "--rounds", 3, "--run-dir", tmp_path / "there", "--json")
    assert code == 0
    assert json.loads(out)["total_seconds"] == 75.5
    assert (faked["given"][0].rounds, faked["given"][1]) == (3, tmp_path / "there")
    assert list(tmp_path.iterdir()) == []


def test_errors_are_those_of_the_run(dice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DICE_CACHE", str(tmp_path / "cache"))
    code, _, err = dice("plan", "--set", "generate.sampels=3")
    assert code == 2
    assert "did you mean 'generate.samples'" in err
    code, _, err = dice("plan", "--policy", "p", "--reference", "r", "--prompts", "x.jsonl", "--replay", "y.jsonl")
    assert code == 3
    assert "x.jsonl" in err
    assert not (tmp_path / "runs").exists()


# --- what is remembered ------------------------------------------------------------------------------------


@pytest.fixture
def remembering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A plan of a hand-made model and data, whose processes are faked: `asked` is what they were to do."""
    monkeypatch.setenv("DICE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "p"
    folder.mkdir()
    shape = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    (folder / "config.json").write_text(json.dumps(shape))
    weights(folder / "model.safetensors", {"w": {"dtype": "F32", "shape": [1000]}})
    prompts = [[{"role": "user", "content": f"question {n}"}] for n in range(4)]
    frame = prompts_frame(prompts)
    offline = pairs_frame([Pair(prompt=p, chosen=[ANSWER], rejected=[ANSWER]) for p in (*prompts[:1], *OTHERS)])
    inputs = Inputs(
        policy=folder,
        reference=folder,
        prompts=write_parquet(tmp_path / "prompts.parquet", frame, key="prompts", schema=PROMPTS),
        offline=write_parquet(tmp_path / "offline.parquet", offline, key="offline"),
        eval_prompts=None,
        eval_pairs=None,
    )
    config = own("rounds=1", "generate.samples=2", "train.batch_size=4", "model.device=cpu")
    state: dict[str, Any] = {"asked": [], "config": config, "inputs": inputs, "host": 10**12}

    def run(self: Any, stage: str, work: str, **given: Any) -> Any:
        state["asked"].append((work.rpartition(":")[2], given.get("measure")))
        self.starts[stage] = 3.0
        if stage == "score":
            return RECORD["score"] | {"beside": None}
        if stage == "train":
            return RECORD["train"]
        measured = RECORD["generate"] | {"beside": None, "runs": [{"lengths": [5] * n, "seconds": n} for n in (4, 8)]}
        if given["measure"] != "nothing":
            sampled = pl.DataFrame(
                {"prompt_id": [0, 0, 1, 1], "response_tokens": [5] * 4, "finish_reason": ["stop"] * 4}
            )
            write_parquet(given["out"] / "generations-00000.parquet", sampled, key="k")
        return {
            "engine": "transformers", "dtype": "float32", "device": "a CPU", "cuda": False, "groups": 1, "gpus": 0,
            "gpu_names": (), "threads": 1, "layout": ProcessLayout(), "base_memory_bytes": 1000,
            "room": {"host_free_bytes": state["host"], "gpu_free_bytes": None, "gpu_bytes": None},
            "prompt_ids": [0, 1, 2, 3], "prompt_tokens": [10] * 4, "eval_prompt_tokens": [], "tokenizer_seconds": 0.2,
            "encode_seconds": 0.01, "generate": None if given["measure"] == "nothing" else measured,
        }  # fmt: skip

    monkeypatch.setattr(plan_module._Apart, "run", run)
    monkeypatch.setattr(plan_module, "prepare", lambda this: inputs)
    return state


ANSWER: Message = {"role": "assistant", "content": "yes"}
OTHERS: list[list[Message]] = [[{"role": "user", "content": f"other {n}"}] for n in range(2)]
EVERYTHING = [("look", "all"), ("measure_score", None), ("measure_train", None)]


def test_figures_are_measured_once(remembering: dict[str, Any], tmp_path: Path) -> None:
    def planned(**options: Any) -> list[Any]:
        remembering["asked"].clear()
        found = plan(remembering["config"], tmp_path / "run", **options)
        json.dumps(found, allow_nan=False)
        return [found["calibration"]["source"], found["stages"]["round-01/replay"]["replayed"], *remembering["asked"]]

    # Of three offline pairs one is on a prompt of the round.
    assert planned() == ["measured", 2, *EVERYTHING]
    assert planned() == ["stored", 2, ("look", "nothing")]
    assert planned(fresh=True) == ["measured", 2, *EVERYTHING]
    # Other prompts may be answered at another length, at the same speed.
    key = lengths_key(remembering["config"], remembering["inputs"].policy, remembering["inputs"].prompts)
    stored = json.loads((tmp_path / "cache" / "remembered.json").read_text())
    del stored["response lengths"][key]
    (tmp_path / "cache" / "remembered.json").write_text(json.dumps(stored))
    assert planned() == ["stored", 2, ("look", "lengths")]


def test_a_full_disk_and_a_small_memory(
    remembering: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = remembering["config"]
    assert plan(config, tmp_path / "run")["fits"] is True
    remembering["host"] = 2000
    found = plan(config, tmp_path / "run")
    assert (found["fits"], found["first_failure"]["what"], found["free_memory_bytes"]) == (False, "memory", 2000)
    remembering["host"] = 10**12
    asked: list[Path] = []

    def disk_usage(place: Path) -> Any:
        asked.append(place)
        return shutil._ntuple_diskusage(100, 95, 5)  # type: ignore[attr-defined]

    monkeypatch.setattr(plan_module.shutil, "disk_usage", disk_usage)
    found = plan(config, tmp_path / "not" / "there" / "yet")
    assert (found["first_failure"]["what"], found["first_failure"]["available"]) == ("disk", 5)
    assert asked == [tmp_path]


def test_the_key_of_figures(remembering: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config, policy = remembering["config"], remembering["inputs"].policy
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    key = record_key(config, policy)

    def other(*assignments: str) -> str:
        return record_key(own("generate.samples=2", "train.batch_size=4", "model.device=cpu", *assignments), policy)

    # What only changes how much there is to do is no part of it.
    assert other("rounds=7", "data.prompts_per_round=3", "train.max_steps=9", "generate.temperature=0.5") == key
    changed = ["train.batch_size=8", "model.dtype=bfloat16", "train.lora.r=2", "generate.token_budget=77"]
    keys = {key, *map(other, changed)}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert len(keys | {record_key(config, policy)}) == 6


# --- what a run leaves -------------------------------------------------------------------------------------

TOOK = {"generate": 4.0, "score": 3.0, "mine": 0.5, "replay": 2.0, "train": 6.0, "evaluate": 5.0}
PARTS = {
    # spawn, import, load, work
    "generate": (0.0, 2.0, 0.5, 1.5),
    "score": (1.0, 0.0, 1.0, 1.0),
    "replay": (0.5, 0.0, 0.5, 1.0),
    "train": (2.0, 0.0, 0.5, 3.5),
    "evaluate": (0.0, 0.0, 1.0, 4.0),
}
"""Replay's process is started with score, and training's with replay."""


def made_run(folder: Path, remembering: dict[str, Any], **changes: Any) -> Path:
    """One round of 150 prompts of 10 tokens, 2 responses of 5."""
    inputs, config = remembering["inputs"], remembering["config"]
    base = folder / "round-01"
    count = changes.get("prompts", 150)
    manifest = Manifest(folder / "manifest.json")
    folder.mkdir()
    manifest.data["policy"] = {"folder": str(inputs.policy), "identity": "i"}
    (folder / "config.yaml").write_text(dump(config))
    (folder / "inputs").mkdir()
    shutil.copy(inputs.prompts, folder / "inputs" / "prompts.parquet")
    rows = [(p, s, [1] * 10, [2] * 5, "x", 5, 1, "stop", 0.0) for p in range(count) for s in range(2)]
    generations = pl.DataFrame(rows, schema=GENERATIONS, orient="row")
    write_parquet(base / "generate" / "generations-00000.parquet", generations, key="g")
    write_parquet(base / "score" / "scores-00000.parquet", pl.DataFrame({"reward": [0.0] * 2 * count}), key="s")
    write_parquet(base / "mine" / "mined.parquet", pl.DataFrame({"margin": [0.0] * count}), key="m")
    sides = {"prompt_ids": [[1] * 10] * 4, "chosen_ids": [[2] * 5] * 4, "rejected_ids": [[2] * 5] * 4}
    training = pl.DataFrame({**sides, "source": ["mined", "mined", "replay", "replay"]})
    write_parquet(base / "replay" / "training_set.parquet", training, key="t")
    (base / "train" / "model").mkdir(parents=True)
    write_json(base / "train" / "model" / "train_log.json", [{"loss": 0.5}, {"train_runtime": 3.0}])
    gate = {"responses": 256, "passed": True}
    counts: dict[str, Any] = {
        "generate": {"prompts": count, "responses": 2 * count},
        "score": {"policy_logps_gate": gate},
        "train": {"steps": 6},
        "evaluate": {"eval_prompts": 7, "eval_samples": 1, "eval_pairs": 3},
    }
    now, events = 100.0, [{"time": 100.0, "event": "started"}]
    files = {"generate": "generations-00000.parquet", "score": "scores-00000.parquet", "mine": "mined.parquet",
             "replay": "training_set.parquet", "train": "model", "evaluate": "metrics.json"}  # fmt: skip
    for stage, seconds in TOOK.items():
        name = f"round-01/{stage}"
        file = [{"file": f"round-01/{stage}/{files[stage]}", "key": "k"}]
        manifest.record(name, status="done", seconds=seconds, counts=counts.get(stage, {}), files=file)
        events.append({"time": now, "event": "stage", "stage": name, "status": "running"})
        if stage == "generate":
            told = {"file": "f", "sequences": 2 * count, "tokens": 10 * count, "seconds": 1.2}
            events.append({"time": now, "event": "throughput", "stage": stage, **told})
        if stage == "score":
            told = {"file": "f", "sequences": 2 * count, "tokens": 20 * count, "seconds": 0.3}
            events.append({"time": now, "event": "throughput", "stage": stage, **told})
        if stage in PARTS:
            parts = dict(zip(("spawn", "import", "load", "work"), PARTS[stage], strict=True))
            work = f"dice_py.{stage}:{stage}"
            events.append({"time": now + seconds, "event": "process", "work": work, "seconds": parts})
        now += seconds
        events.append({"time": now, "event": "stage", "stage": name, "status": "done", "seconds": seconds})
    events += changes.get("more", [])
    (folder / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    return folder


def test_a_run_leaves_its_figures(remembering: dict[str, Any], tmp_path: Path) -> None:
    config, policy = remembering["config"], remembering["inputs"].policy
    folder = made_run(tmp_path / "run", remembering)
    assert remember_run(folder) is True
    found = recall("throughput", record_key(config, policy))
    assert found["source"] == "run"
    # Score's process was ready 5 s after generate began, replay's 4 s after score, training's 4 s after replay.
    # Generate's own had 2 s of import; evaluation did not wait: no more than training took, and than the others do.
    start = {"generate": 2.0, "score": 4.0 + 1.0, "replay": 3.0 + 0.5 + 0.5, "train": 2.0 + 2.0}
    assert {name: found["start"][name] for name in start} == pytest.approx(start)
    assert found["start"]["evaluate"] == pytest.approx(sum(found["start"][name] for name in start) / 4)
    generate, score, train = found["generate"], found["score"], found["train"]
    assert generate["per_token"] == pytest.approx(1.2 / 1500)
    assert generate["per_prompt"] == pytest.approx((1.5 - 1.2) / 150)
    assert score["per_token"] == pytest.approx(0.3 / 3000)
    # Each prompt once is 10 tokens for 2 responses of 5.
    assert score["token_ratio"] == pytest.approx(1.0)
    assert score["fixed"] == pytest.approx(1.0 - (3000 + 256 * 10) * 1e-4)
    assert score["per_pair"] == pytest.approx((1.0 - 2 * 30 * 1e-4) / 2)
    assert (train["per_step"], train["fixed"], train["step_tokens"]) == pytest.approx((0.5, 0.5, 4 * 30))
    assert found["evaluate"] == {"of": [7, 1, 3], "work": [4.0], "load": [1.0]}
    # The next plan measures nothing.
    planned = plan(config, tmp_path / "next")
    assert [planned["calibration"]["of"], remembering["asked"]] == ["run", [("look", "nothing")]]


def test_a_run_replaces_nothing(remembering: dict[str, Any], tmp_path: Path) -> None:
    plan(remembering["config"], tmp_path / "next")
    assert remember_run(made_run(tmp_path / "run", remembering)) is False
    key = record_key(remembering["config"], remembering["inputs"].policy)
    assert recall("throughput", key)["source"] == "calibration"


def test_a_later_run_replaces_an_earlier_ones_figures(remembering: dict[str, Any], tmp_path: Path) -> None:
    key = record_key(remembering["config"], remembering["inputs"].policy)
    assert remember_run(made_run(tmp_path / "first", remembering)) is True
    assert remember_run(made_run(tmp_path / "second", remembering, prompts=300)) is True
    assert recall("throughput", key)["generate"]["per_token"] == pytest.approx(1.2 / 3000)


def test_a_busy_machine_is_told(remembering: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def notes(load: float) -> list[str]:
        monkeypatch.setattr(plan_module.os, "getloadavg", lambda: (load, 0.0, 0.0))
        told: list[str] = []
        plan(
            remembering["config"], tmp_path / "run", fresh=True,
            report=lambda event, **fields: told.append(fields.get("text", "")),
        )  # fmt: skip
        return [text for text in told if "busy" in text]

    assert len(notes(1000.0)) == 1
    assert notes(0.0) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"prompts": 100},
        {"more": [{"time": 200.0, "event": "started"}]},
        {"more": [{"time": 200.0, "event": "interrupted"}]},
        {"more": [{"time": 200.0, "event": "stage", "stage": "round-01/mine", "status": "kept"}]},
        {"more": [{"time": 200.0, "event": "group", "number": 1, "status": "started"}]},
    ],
    ids=["few responses", "resumed", "interrupted", "kept", "groups"],
)
def test_a_run_that_does_not_tell_leaves_nothing(
    remembering: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert remember_run(made_run(tmp_path / "run", remembering, **changes)) is False
    assert not (tmp_path / "cache").exists()


# --- for real ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_calibration_is_remembered_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_models import make_llama

    policy, reference = make_llama(tmp_path / "policy", seed=1), make_llama(tmp_path / "reference", seed=2)
    prompts, pairs = tmp_path / "prompts.jsonl", tmp_path / "pairs.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"question {n}"}) + "\n" for n in range(30)))
    rows = ({"prompt": f"asked {n}", "chosen": f"good {n}", "rejected": f"a bad one {n}"} for n in range(30))
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("DICE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    config = resolve(
        [],
        [
            f"model.policy={policy}", f"model.reference={reference}", f"data.prompts={prompts}",
            f"data.replay={pairs}", "model.device=cpu", "model.dtype=float32", "generate.engine=transformers",
            "generate.samples=4", "generate.max_new_tokens=64", "train.batch_size=4", "rounds=2",
            "data.prompts_per_round=10",
        ],
    )  # fmt: skip
    notes: list[str] = []
    found = plan(config, tmp_path / "run", report=lambda event, **fields: notes.append(fields.get("text", "")))
    assert any("calibrating: training" in note for note in notes)
    assert found["calibration"]["source"] == "measured"
    assert found["first_failure"] is None
    assert [found["rounds"], len(found["stages"]), found["fits"]] == [2, 12, True]
    generate = found["stages"]["round-02/generate"]
    assert (generate["prompts"], generate["responses"], generate["shards"]) == (10, 40, 1)
    for stage in found["stages"].values():
        for name in ("seconds", "startup_seconds", "tokens", "disk_bytes", "peak_memory_bytes"):
            assert math.isfinite(stage[name])
            assert stage[name] >= 0
    assert found["total_seconds"] == pytest.approx(sum(stage["seconds"] for stage in found["stages"].values()))
    assert generate["seconds"] > 0
    json.dumps(found, allow_nan=False)
    # Nothing is left but what is remembered, and the next plan needs no calibration.
    assert list(temporary.iterdir()) == []
    assert not (tmp_path / "run").exists()
    assert sorted(os.listdir(tmp_path / "cache")) == ["remembered.json", "remembered.lock"]  # noqa: PTH208
    assert recall("throughput", record_key(config, policy)) is not None
    # Another shape has other figures.
    shutil.rmtree(policy)
    make_llama(policy, seed=1, num_hidden_layers=1)
    assert recall("throughput", record_key(config, policy)) is None
