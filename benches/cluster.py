"""A round of an 8B model on 8, 64 and 512 GPUs, on paper: the plan's own arithmetic on costs of one H100.

    python benches/cluster.py [--sampling TOKENS_PER_SECOND] [--filesystem GB/S] [--network GB/S]

Scoring's rate is that of benches/results/gpu-h100.json (packed, llama3-8b shape). Training's is that of LoRA there,
times 2/3: full training computes the gradients of the weights too, a third of its work. The rate of sampling is an
assumption, since no run of vLLM on a GPU is on record here; so are the rates of the file system and the network.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from dice_py.config.loading import resolve
from dice_py.config.run import RunConfig
from dice_py.models.sizes import ModelSize
from dice_py.planning.cluster import on_cluster, summary
from dice_py.planning.costs import Estimator
from dice_py.planning.counts import Data, count_rounds
from dice_py.planning.machine import FILESYSTEM, NETWORK, Cluster, Machine
from dice_py.runs.measured_costs import GenerateCosts, ScoreCosts, StageCosts, TrainCosts

RESULTS = Path(__file__).parent / "results"
PROMPTS, SAMPLES, PROMPT_TOKENS, RESPONSE_TOKENS = 1_000_000, 16, 150, 500
SIZE = ModelSize(
    parameters=8_030_261_248, stored_bytes=16_060_522_496, hidden=4096, layers=32, heads=32, kv_heads=8, head_size=128,
    inner=14336, vocabulary=128256, shape="llama3-8b",
)  # fmt: skip
LOAD = 15.0  # seconds for the weights from a fast local disk; the file system's share comes on top
ROWS = 512  # responses that are decoded at the same time on one GPU


def config(nodes: int) -> RunConfig:
    """The run: one round, one pass over a million mined pairs, which 512 pairs a step allow 512 GPUs to share."""
    return resolve(
        [],
        [
            "model.policy=p", "model.reference=r", "data.prompts=x.jsonl", "rounds=1", f"generate.samples={SAMPLES}",
            "generate.engine=vllm", "generate.max_new_tokens=2048", "generate.shard_prompts=256", "replay.gamma=0",
            "train.batch_size=512", "train.per_device_train_batch_size=1", "train.save_steps=500",
            f"train.nodes={nodes}",
        ],
    )  # fmt: skip


def costs(sampling: float) -> StageCosts:
    """Of one H100. `sampling`: tokens per second of one GPU with all its rows."""
    measured = json.loads((RESULTS / "gpu-h100.json").read_text())
    scoring = 1.0 / measured["scoring"]["ways"]["ours"]["tokens_per_second"]
    training = 1.5 / measured["lora"]["ways"]["ours"]["pair_tokens_per_second"]
    return StageCosts(
        source="calibration",
        when=0.0,
        startup=dict.fromkeys(("generate", "score", "replay", "train", "evaluate"), 30.0),
        generate=GenerateCosts(
            load=LOAD, warm_up=30.0, per_prompt_token=scoring, per_step=0.0, per_token=1.0 / sampling,
            per_response=1e-5, rows=ROWS, continuous=True, bytes_per_response=4.0 * RESPONSE_TOKENS, peak_bytes=0,
        ),
        score=ScoreCosts(
            load=LOAD, warm_up=5.0, fixed=5.0, per_token=scoring, per_response=0.0, token_ratio=1.0, gate_passed=False,
            bytes_per_response=12.0, per_pair=1e-3, pair_tokens=None, bytes_per_pair=4000.0, peak_bytes=0,
        ),
        train=TrainCosts(
            load=LOAD, fixed=30.0, per_token=training, per_update=0.05, check_per_token=training / 3, save=30.0,
            checkpoint_bytes=0, peak_bytes=0,
        ),
        evaluate=None,
    )  # fmt: skip


def machine(mine_seconds: float) -> Machine:
    """One GPU of 80 GB."""
    return Machine(
        engine="vllm", dtype="bfloat16", cuda=True, cores=64, groups=1, gpus=1, processes=1, shards=1,
        gpu_bytes=80 * 2**30, base_memory=2**30, encode_seconds=1e-4, tokenizer_seconds=1.0,
        mine_seconds=mine_seconds, bootstrap_seconds=0.0,
    )  # fmt: skip


def data() -> Data:
    """A million prompts; responses of 500 tokens on average, most of them shorter."""
    rng = np.random.default_rng(0)
    drawn = rng.lognormal(np.log(RESPONSE_TOKENS) - 0.32, 0.8, 4096)
    lengths = np.clip(drawn, 8, 2048)
    lengths = np.clip(lengths * RESPONSE_TOKENS / lengths.mean(), 8, 2048).astype(int).tolist()
    tokens = dict.fromkeys(range(PROMPTS), PROMPT_TOKENS)
    return Data([list(range(PROMPTS))], tokens, [0], lengths, 1.0)


def estimate(gpus: int, sampling: float, network: float, filesystem: float, run_data: Data) -> dict[str, Any]:
    """The plan of the round on nodes of eight GPUs."""
    nodes = gpus // 8
    cluster = Cluster(nodes, 8, network, filesystem)
    settings = config(nodes)
    stream = json.loads((RESULTS / "stream-grouped.json").read_text())
    here = on_cluster(machine(stream["seconds"] / stream["rows"]), settings, cluster)
    counts = count_rounds(settings, run_data, here.processes)
    stages = Estimator(settings, costs(sampling), here, SIZE, SIZE, run_data).estimate(counts, None)
    seconds = sum(stage["seconds"] for stage in stages.values())
    return {
        "gpus": gpus,
        "hours": seconds / 3600,
        "stage_hours": {name.partition("/")[2]: stage["seconds"] / 3600 for name, stage in stages.items()},
        "loading_hours": sum(stage["startup_seconds"] for stage in stages.values()) / 3600,
        "disk_tb": sum(stage["disk_bytes"] for stage in stages.values()) / 1e12,
        **summary(cluster, stages, seconds),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sampling", type=float, default=8000.0, help="tokens per second of one GPU (assumed)")
    parser.add_argument("--network", type=float, default=NETWORK, help="GB/s between a node and the others (assumed)")
    parser.add_argument("--filesystem", type=float, default=FILESYSTEM, help="GB/s of the shared file system (assumed)")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    run_data = data()
    found = [estimate(gpus, options.sampling, options.network, options.filesystem, run_data) for gpus in options.gpus]
    first = found[0]
    print("| GPUs | generate | score | replay | train | round | loading | GPU hours | idle | speed-up |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for row in found:
        hours = row["stage_hours"]
        times = " | ".join(f"{hours[name]:.2f} h" for name in ("generate", "score", "replay", "train"))
        gain = first["hours"] / row["hours"]
        print(
            f"| {row['gpus']} | {times} | {row['hours']:.2f} h | {60 * row['loading_hours']:.0f} min | "
            f"{row['reserved_gpu_hours']:,.0f} | {100 * row['idle_share']:.0f} % | {gain:.1f} × of "
            f"{row['gpus'] / first['gpus']:.0f} |"
        )
    for row in found:
        print(
            f"{row['gpus']} GPUs: {1000 * row['disk_tb']:.0f} GB stay on the disk, "
            f"{row['filesystem_bytes'] / 1e12:.1f} TB over the file system, "
            f"{row['network_bytes'] / 1e12:,.0f} TB between nodes"
        )
    assumed = {name: getattr(options, name) for name in ("sampling", "network", "filesystem")}
    results = {"assumed": assumed, "prompts": PROMPTS, "samples": SAMPLES, "rows": found}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "cluster.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
