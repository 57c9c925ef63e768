"""One epoch of DPO: a stock DPOTrainer with precompute_ref_log_probs against ours. `python benches/training.py --help`.

    stock            TRL as in its documentation: it tokenizes texts, computes the reference's log-probabilities in a
                     pass of its own, and trains
    ours             stages/train.py on the same pairs as tokens, with the reference log-probabilities that the score
                     stage computes for every mined pair anyway: their time is not counted
    ours_checkpoint  the same with train.gradient_checkpointing
    score            the extra cost of a replayed pair: its reference log-probabilities, by score_pairs. It is measured
                     on all pairs, so a share γ of replayed pairs costs γ times as much

The model has a named shape and random weights; lengths have a long tail; all ways train on the same batches in the
same order. Every way runs in a process of its own, and the ways take turns within each repeat. Figures are medians.
Stock and ours do the same work while they train, so `same_work` is 1 on a quiet machine; if it is far from 1, the
figures are noise. On a shared CPU, one thread (`--threads 1`, the default) has the least noise. Ours also checks the
loss at step 0 (`check`), on a number of pairs that does not grow with the epoch. TRL's hash of all weights, which names
a file of its cache, is left out (stock_trl.py). The peak of memory is that of the process (on a GPU, that of torch's
allocator). The losses of all ways are compared at every step: if they differ by more than rounding explains
(training_report.py), the status is 1 and nothing is written. Results: a table, and training.json in `--out`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import polars as pl
import torch
from rich.console import Console
from shapes import SHAPES, long_tailed_lengths, write_model
from stock_trl import weights_not_hashed
from training_report import SPANS, TRAINING, WAYS, compare, loss_tolerance, show, summarize

from dice_py.config.shared import ModelConfig
from dice_py.config.stages import ScoreConfig
from dice_py.config.training import LoraConfig, TrainConfig
from dice_py.storage.files import read_json, write_json
from dice_py.storage.parquet import write_parquet
from dice_py.storage.schemas import TRAINING_SET

BETA, SEED, EOS = 0.1, 7, 2
SMOKE = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.child:
        child(options.child, Path(options.folder), options)
        return 0
    log = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="bench-training-", dir=options.scratch) as scratch:
        folder = Path(scratch)
        lengths = prepare(folder, options)
        # Scoring runs first, since our ways train on its output.
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        runs["score"].append(start("score", folder, options))
        for repeat in range(options.repeats):
            turn = repeat % len(TRAINING)  # each way is first in turn
            for way in (*TRAINING[turn:], *TRAINING[:turn], *(["score"] if repeat else [])):
                log.print(f"repeat {repeat + 1}: {way}")
                runs[way].append(start(way, folder, options))
    tolerance = loss_tolerance(options, [run["step0"] for way in TRAINING for run in runs[way] if run["step0"]])
    difference = compare(runs)
    if tolerance is None or not difference <= tolerance:
        log.print(f"losses differ by up to {difference:.2g}, which is more than {tolerance}: nothing is written")
        return 1
    parity = {"max_loss_difference": difference, "tolerance": tolerance}
    results = summarize(runs, lengths, parity, options)
    show(results, Console())
    write_json(options.out / "training.json", results)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One epoch of DPO: stock TRL against ours.")
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=8, help="pairs per optimizer step")
    parser.add_argument("--per-device-train-batch-size", type=int, default=4, help="pairs per forward")
    parser.add_argument("--response-median", type=float, default=24.0, help="tokens; log-normal")
    parser.add_argument("--response-sigma", type=float, default=0.8, help="of the logarithm")
    parser.add_argument("--max-response", type=int, default=192, help="tokens; longer ones are truncated")
    parser.add_argument("--prompt-median", type=float, default=12.0, help="tokens; log-normal, with half the sigma")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--lora", type=int, metavar="R", help="train adapters of this rank")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch in every way")
    parser.add_argument("--tolerance", type=float, help="of losses; default: by training_report.py")
    parser.add_argument("--smoke", action="store_true", help="a model of a hundred thousand weights: for a test")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--scratch", default=None, help="folder for the models")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    return options


# --- model and pairs ------------------------------------------------------------------------------------------


def prepare(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Writes the model and the pairs, as texts and as tokens; returns statistics of the lengths."""
    changes = SMOKE if options.smoke else {}
    vocabulary = write_model(folder / "model", options.shape, options.dtype, options.device, **changes)
    count = options.pairs
    drawn = {
        name: long_tailed_lengths(count, median=median, sigma=sigma, low=low, high=high, seed=SEED + number)
        for number, (name, median, sigma, low, high) in enumerate(
            [
                ("prompt_ids", options.prompt_median, options.response_sigma / 2, 2, options.max_response),
                ("chosen_ids", options.response_median, options.response_sigma, 1, options.max_response),
                ("rejected_ids", options.response_median, options.response_sigma, 1, options.max_response),
            ]
        )
    }
    rng = np.random.default_rng(SEED)
    columns: dict[str, Any] = {}
    for name, lengths in drawn.items():
        end = [] if name == "prompt_ids" else [EOS]
        columns[name] = [[*rng.integers(3, vocabulary, length).tolist(), *end] for length in lengths]
    types = {name: TRAINING_SET[name] for name in columns}
    write_parquet(folder / "pairs.parquet", pl.DataFrame(columns, schema=types), key="bench")
    words = {
        name: [" ".join(f"t{token}" for token in ids if token != EOS) for ids in columns[name]] for name in columns
    }
    texts = {
        "prompt": words["prompt_ids"],
        "chosen": [" " + text for text in words["chosen_ids"]],  # TRL joins it to the prompt, and adds the EOS.
        "rejected": [" " + text for text in words["rejected_ids"]],
    }
    pl.DataFrame(texts).write_parquet(folder / "texts.parquet")
    return {
        name: {
            "median": float(np.median(lengths)),
            "mean": float(lengths.mean()),
            "largest": int(lengths.max()),
        }
        for name, lengths in drawn.items()
    }


# --- a way, in its own process --------------------------------------------------------------------------------


def start(way: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Runs a way in a process of its own, and returns its measurements."""
    began = time.time()
    arguments = [item for name, value in vars(options).items() for item in argument(name, value)]
    # Each process has a cache of its own, so that no repeat reuses the log-probabilities of another.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / f"cache-{began}")}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads))
    command = [sys.executable, __file__, *arguments, "--child", way, "--folder", str(folder)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wall = time.time() - began
    remove_made(folder)
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stdout[-4000:]}")
    measured: dict[str, Any] = read_json(folder / f"{way}.json")
    spans = {name: measured["spans"].get(name, 0.0) for name in SPANS}
    spans["startup"] = wall - sum(spans.values())  # the process, its imports, loading the model
    return {"wall_seconds": wall, "seconds": spans, **{k: v for k, v in measured.items() if k != "spans"}}


def remove_made(folder: Path) -> None:
    """Removes what a way made, its model above all: bytes for every weight. What `prepare` and `score` wrote stays."""
    for made in [*folder.glob("tmp*"), *folder.glob("cache-*"), folder / "stock", folder / "stock-model"]:
        shutil.rmtree(made, ignore_errors=True)


def argument(name: str, value: Any) -> list[str]:
    option = "--" + name.replace("_", "-")
    if name in ("child", "folder") or value is None or value is False:
        return []
    return [option] if value is True else [option, str(value)]


class Trained(NamedTuple):
    """What a way returns: the loss of each step, and `Step0` as a dict for our ways in training."""

    losses: list[float]
    step0: dict[str, Any] | None = None


def child(way: str, folder: Path, options: argparse.Namespace) -> None:
    spans: dict[str, float] = {}
    before = peak("cpu")
    work = {"stock": stock, "score": score}.get(way, ours)
    trained = work(folder, options, spans, way)
    measured = {
        "spans": spans,
        **trained._asdict(),
        "peak_memory_bytes": peak(options.device),
        "peak_before_bytes": before,
    }
    write_json(folder / f"{way}.json", measured)


def peak(device: str) -> int:
    """Bytes: the peak of this process's resident memory, or of what torch allocated on a GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


@contextlib.contextmanager
def timed(spans: dict[str, float], owner: Any, name: str, span: str) -> Iterator[list[Any]]:
    """Adds the seconds of each call of `owner.name` to `spans[span]`; yields a list of what the calls return."""
    function = getattr(owner, name)
    results: list[Any] = []

    def timed_function(*args: Any, **kwargs: Any) -> Any:
        began = time.monotonic()
        try:
            results.append(function(*args, **kwargs))
            return results[-1]
        finally:
            spans[span] = spans.get(span, 0.0) + time.monotonic() - began

    with mock.patch.object(owner, name, timed_function):
        yield results


def settings(options: argparse.Namespace, way: str) -> TrainConfig:
    return TrainConfig(
        learning_rate=options.learning_rate,
        warmup_steps=0,
        batch_size=options.batch_size,
        per_device_train_batch_size=options.per_device_train_batch_size,
        lora=None if options.lora is None else LoraConfig(r=options.lora),
        gradient_checkpointing=way == "ours_checkpoint",
        save_steps=None,
        logging_steps=1,
        step0_pairs=min(8, options.pairs),
    )


def models(options: argparse.Namespace) -> ModelConfig:
    return ModelConfig(device=options.device, dtype=options.dtype)


def stock(folder: Path, options: argparse.Namespace, spans: dict[str, float], way: str) -> Trained:
    """TRL's own trainer. It has our arguments, so that batches, seeds and steps are the same."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOTrainer

    from dice_py.training.lora import peft_config
    from dice_py.training.trainer import trainer_arguments

    config = settings(options, way)
    arguments = trainer_arguments(config, models(options), folder / "stock", BETA, SEED, pairs=options.pairs)
    held = options.dtype if options.lora else "float32"
    with (
        timed(spans, DPOTrainer, "_prepare_dataset", "tokenize"),
        timed(spans, DPOTrainer, "_precompute_ref_logps", "reference"),
        weights_not_hashed(),
        timed(spans, DPOTrainer, "train", "training"),
        timed(spans, DPOTrainer, "save_model", "save"),
    ):
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, held))
        trainer = DPOTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict(pl.read_parquet(folder / "texts.parquet").to_dict(as_series=False)),
            processing_class=AutoTokenizer.from_pretrained(folder / "model"),
            peft_config=None if config.lora is None else peft_config(config.lora, model),
        )
        trainer.train()
        trainer.save_model(str(folder / "stock-model"))
    seen = pl.DataFrame(trainer.train_dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).to_dict())
    same = pl.read_parquet(folder / "pairs.parquet").equals(seen.cast(pl.List(pl.Int32)))
    if not same:
        raise SystemExit("the stock way trains on other tokens than ours")
    return Trained([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def score(folder: Path, options: argparse.Namespace, spans: dict[str, float], way: str) -> Trained:
    """Computes the reference log-probabilities of all pairs."""
    from dice_py.scoring import pairs as scoring

    pairs = pl.read_parquet(folder / "pairs.parquet")
    with timed(spans, scoring, "score_pairs", "reference"):
        logps = scoring.score_pairs(ScoreConfig(), models(options), policy=folder / "model", pairs=pairs)
    scored = pairs.with_columns(ref_chosen_logps=logps["chosen_logp"], ref_rejected_logps=logps["rejected_logp"])
    write_parquet(folder / "training_set.parquet", scored, key="bench")
    return Trained([])


def ours(folder: Path, options: argparse.Namespace, spans: dict[str, float], way: str) -> Trained:
    """The train stage."""
    from trl import DPOTrainer

    from dice_py.stages.train import TrainJob
    from dice_py.training import trainer

    out = Path(tempfile.mkdtemp(dir=folder))
    with (
        timed(spans, DPOTrainer, "train", "training"),
        timed(spans, trainer, "measure_step0", "check") as measured,
        timed(spans, trainer, "save_model", "save"),
    ):
        job = TrainJob(
            settings(options, way),
            models(options),
            policy=folder / "model",
            training_set=folder / "training_set.parquet",
            training_set_key="bench",
            out=out,
            beta=BETA,
            seed=SEED,
        )
        job.run()
    spans["training"] -= spans["check"]  # which is part of it
    losses = [entry["loss"] for entry in read_json(out / "model" / "train_log.json") if "loss" in entry]
    return Trained(losses, measured[0]._asdict())


if __name__ == "__main__":
    sys.exit(main())
