"""What real.py times, each in a process of its own: `python benches/real_ways.py WAY FOLDER [NUMBER]`.

    score        the scorer, on the sampled responses
    score_trl    TRL's precompute of reference log-probabilities on the same tokens, in batches of NUMBER pairs
    train        the train stage
    train_trl    a stock DPOTrainer with precompute_ref_log_probs, in batches of NUMBER pairs; the reference pass is
                 not counted

Each prints one line of JSON. `prepare` in real.py has written the files that they read.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import polars as pl
import torch
from stock_trl import weights_not_hashed

from dice_py.config.shared import ModelConfig
from dice_py.config.training import TrainConfig
from dice_py.models.flops import matmul_rate, shape_of
from dice_py.models.packing import Batch, group_rows, seen_keys

CPU = ModelConfig(device="cpu", dtype="float32")
BETA, SEED, BATCH = 0.1, 7, 16


def peak_gb() -> float:
    """The peak of this process's resident memory, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def score(folder: Path, way: str, batch: int) -> dict[str, Any]:
    from scoring_ways import ours, trl_precompute

    from dice_py.models.loading import load_model

    model = load_model(folder / "model", CPU)
    rows = pl.read_parquet(folder / "responses.parquet")
    prompts, responses = rows["prompt_token_ids"].to_list(), rows["token_ids"].to_list()
    outcome = ours(model, prompts, responses) if way == "score" else trl_precompute(model, prompts, responses, batch)
    return {"seconds": outcome.seconds, "sums": outcome.sums, "peak_gb": peak_gb()}


def pair_flops(folder: Path) -> float:
    """Matrix and attention FLOPs of forward and backward over all pairs, each prompt once, nothing recomputed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        shape = shape_of(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "model")))
    total = 0.0
    for pair in pl.read_parquet(folder / "training_set.parquet").iter_rows(named=True):
        batch = Batch(group_rows([pair["prompt_ids"]] * 2, range(2)), [pair["chosen_ids"], pair["rejected_ids"]])
        total += 3.0 * shape.flops(len(batch.tokens), len(batch.targets), seen_keys(batch.layout))
    return total


def train(folder: Path, way: str, batch: int) -> dict[str, Any]:
    """The train stage; `seconds` are those of forward, backward and optimizer steps."""
    from training import timed

    from dice_py.stages.train import TrainJob
    from dice_py.training import trainer
    from dice_py.training.pair_trainer import PairTrainer

    spans: dict[str, float] = {}
    rate = matmul_rate(torch.device("cpu"), torch.float32)
    out = Path(tempfile.mkdtemp(dir=folder))
    config = TrainConfig(
        batch_size=BATCH, warmup_steps=0, save_steps=None, logging_steps=1, step0_pairs=4, learning_rate=1e-6
    )
    with timed(spans, PairTrainer, "train", "training"), timed(spans, trainer, "measure_step0", "check"):
        job = TrainJob(
            config,
            CPU,
            policy=folder / "model",
            training_set=folder / "training_set.parquet",
            training_set_key="bench",
            out=out,
            beta=BETA,
            seed=SEED,
        )
        counts = job.run().counts
    rate = max(rate, matmul_rate.__wrapped__(torch.device("cpu"), torch.float32))
    seconds = spans["training"] - spans["check"]
    log = json.loads((out / "model" / "train_log.json").read_text())
    return {
        "seconds": seconds,
        "matmul_gflops": rate / 1e9,
        "share_of_matrix_rate": pair_flops(folder) / seconds / rate,
        "peak_gb": peak_gb(),
        "losses": [entry["loss"] for entry in log if "loss" in entry],
        "step0_loss": counts["step0_loss"],
        "forwards": counts["forwards"],
        "model": str(out / "model"),
    }


def train_trl(folder: Path, way: str, batch: int) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    texts = pl.read_parquet(folder / "texts.parquet")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    arguments = DPOConfig(
        output_dir=tempfile.mkdtemp(dir=folder),
        beta=BETA,
        precompute_ref_log_probs=True,
        max_length=None,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=BATCH // batch,
        learning_rate=1e-6,
        lr_scheduler_type="constant_with_warmup",
        num_train_epochs=1,
        use_cpu=True,
        seed=SEED,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=False,
        bf16=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    with weights_not_hashed():
        trainer = DPOTrainer(
            model=model, args=arguments, train_dataset=Dataset(texts.to_arrow()), processing_class=tokenizer
        )
    seen = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in trainer.train_dataset)
    began = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - began
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": seconds, "peak_gb": peak_gb(), "losses": losses, "response_tokens": seen}


WAYS = {"score": score, "score_trl": score, "train": train, "train_trl": train_trl}


if __name__ == "__main__":
    name, place, *number = sys.argv[1:]
    print(json.dumps(WAYS[name](Path(place), name, int(number[0]) if number else 1)))
