"""A real chat model, SmolLM2-135M-Instruct, on a CPU: `make bench-real` (`benches/real.py --help`).

    generation   `dice generate` with the transformers engine and with vLLM, with their start: prompts × 8 × 128 tokens
    scoring      the sampled responses: the scorer, and TRL's precompute of reference log-probabilities
    training     an epoch of pairs: the train stage, and a stock DPOTrainer at batch sizes 1 and 8 (its default);
                 forward, backward and steps, without the reference pass
    allocator    generate, score and train with the settings of the C allocator that a stage's process gets, and with
                 glibc's own: seconds, system time and peak of memory
    plan         `dice plan` with a fresh calibration for a round, and that round run by `dice run`

Every measurement is a process of its own, one after the other; all in one run, so that ratios count on a noisy machine.
The model and the prompts are the demo's (docs/demo.md): the GGUF file is converted if it was not before. Pairs are two
sampled answers to a prompt. Results: a table, and real.json and real.png in `--out`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from real_report import draw, show
from rich.console import Console
from shapes import machine

from dice_py.compute.allocator import allocator_settings
from dice_py.demo.data import PAIR_PROMPTS
from dice_py.demo.model import demo_model
from dice_py.models.sources import resolve_model
from dice_py.storage.files import write_json
from dice_py.storage.parquet import write_parquet
from dice_py.storage.schemas import TRAINING_SET

HERE = Path(__file__).resolve().parent
SAMPLES, NEW_TOKENS, PLANNED_PROMPTS = 8, 128, 16


DEFAULTS_OF_GLIBC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""Where a user has set these, `dice` leaves them as they are."""


@dataclass
class Ended:
    """What a command printed, and what it and its processes took."""

    output: str
    seconds: float
    system_seconds: float
    peak_gb: float
    """Of the largest process."""

    @property
    def costs(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("seconds", "system_seconds", "peak_gb")}


def run(command: list[str], cache: Path, variables: dict[str, str] | None = None) -> Ended:
    """Runs a command with the package of this repository, and further environment variables."""
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "DICE_CACHE": str(cache)}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *command], env=environment | (variables or {}), stdout=output, stderr=errors
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        printed = output.read()
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{(errors.read() + printed)[-3000:]}")
    return Ended(printed, seconds, usage.ru_stime, usage.ru_maxrss * 1024 / 1e9)


def way(name: str, folder: Path, number: int = 1, variables: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs a way of real_ways.py. Ours get the allocator's settings that a stage's process gets."""
    if variables is None:
        variables = {} if name.endswith("_trl") else allocator_settings(os.environ)
    ended = run([str(HERE / "real_ways.py"), name, str(folder), str(number)], folder / "cache", variables)
    found: dict[str, Any] = json.loads(ended.output.strip().splitlines()[-1])
    return found | {"process": ended.costs}


def generate(folder: Path, prompts: Path, engine: str, out: str, variables: dict[str, str] | None = None) -> Ended:
    """`dice generate`, with its start."""
    settings = [f"generate.engine={engine}", f"generate.samples={SAMPLES}", f"generate.max_new_tokens={NEW_TOKENS}"]
    command = ["-m", "cli.main", "generate", "--policy", str(folder / "model"), "--prompts", str(prompts)]
    command += ["-o", str(folder / out), *(f"--set={one}" for one in (*settings, "model.device=cpu"))]
    return run(command, folder / "cache", variables)


def prepare(folder: Path, pairs: int) -> None:
    """Writes the responses, and `pairs` pairs of two answers to a prompt, as tokens and as texts."""
    from transformers import AutoTokenizer

    files = sorted((folder / "transformers").glob("generations-*.parquet"))
    rows = pl.concat([pl.read_parquet(file) for file in files]).filter(pl.col("token_ids").list.len() > 1)
    rows.select("prompt_token_ids", "token_ids").write_parquet(folder / "responses.parquet")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    end = tokenizer.eos_token_id
    made: list[tuple[Any, ...]] = []
    texts: list[tuple[str, str, str]] = []
    # One pair for each prompt, then a second one.
    for offset in range(0, SAMPLES - 1, 2):
        for _, group in rows.group_by("prompt_id", maintain_order=True):
            answers = group["token_ids"].to_list()[offset : offset + 2]
            if len(made) < pairs and len(answers) == 2:
                # TRL ends an answer with EOS, so ours do too.
                closed = [[*(ids[:-1] if ids[-1] == end else ids), end] for ids in answers]
                prompt = group["prompt_token_ids"][0].to_list()
                made.append((prompt, *closed))
                texts.append((tokenizer.decode(prompt), *(tokenizer.decode(ids[:-1]) for ids in closed)))
    names = ["prompt_ids", "chosen_ids", "rejected_ids"]
    frame = pl.DataFrame(made, schema={name: TRAINING_SET[name] for name in names}, orient="row")
    pl.DataFrame(texts, schema=["prompt", "chosen", "rejected"], orient="row").write_parquet(folder / "texts.parquet")
    frame.write_parquet(folder / "pairs.parquet")


def add_reference(folder: Path) -> None:
    """Writes the training set: the pairs with the model's own log-probabilities."""
    from real_ways import CPU

    from dice_py.config.stages import ScoreConfig
    from dice_py.scoring.pairs import score_pairs

    pairs = pl.read_parquet(folder / "pairs.parquet")
    logps = score_pairs(ScoreConfig(), CPU, policy=folder / "model", pairs=pairs)
    scored = pairs.with_columns(ref_chosen_logps=logps["chosen_logp"], ref_rejected_logps=logps["rejected_logp"])
    write_parquet(folder / "training_set.parquet", scored, key="bench")


def measure_plan(folder: Path, prompts: Path, policy: str) -> dict[str, float]:
    """A plan with a fresh calibration, and the run that it plans."""
    settings = [
        f"generate.samples={SAMPLES}",
        f"generate.max_new_tokens={NEW_TOKENS}",
        f"data.prompts_per_round={PLANNED_PROMPTS}",
        "model.device=cpu",
        "replay.gamma=0",
    ]
    arguments = ["--rounds", "1", "--policy", policy, "--reference", str(folder / "model"), "--prompts", str(prompts)]
    arguments += [f"--set={one}" for one in settings]
    planning = run(["-m", "cli.main", "plan", "--fresh", "--json", *arguments], folder / "cache")
    planned = json.loads(planning.output)["total_seconds"]
    running = ["-m", "cli.main", "run", "--run-dir", str(folder / "run"), *arguments]
    taken = run(running, folder / "cache-of-run").seconds
    return {
        "seconds": planning.seconds,
        "planned_seconds": planned,
        "taken_seconds": taken,
        "planned_over_taken": planned / taken,
    }


def measure(args: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """All parts; those whose figures others need come first."""
    prompts = folder / "prompts.jsonl"
    lines = [json.loads(line) for line in args.prompts.read_text(encoding="utf-8").splitlines()]
    prompts.write_text("".join(json.dumps({"prompt": line["prompt"]}) + "\n" for line in lines[: args.count]))
    result: dict[str, Any] = {"model": args.name, "prompts": args.count}
    console.print("[dim]generation[/dim]")
    sampled = generate(folder, prompts, "transformers", "transformers")
    vllm = generate(folder, prompts, "vllm", "vllm").seconds
    result["generation"] = {
        "seconds": sampled.seconds, "vllm_seconds": vllm, "time_over_vllm": sampled.seconds / vllm,
    }  # fmt: skip
    prepare(folder, args.pairs)
    add_reference(folder)
    show_part(result, "generation", console)
    console.print("[dim]scoring[/dim]")
    ours, trl = way("score", folder), way("score_trl", folder, 8)
    apart = max(abs(one - other) for one, other in zip(ours["sums"], trl["sums"], strict=True))
    result["scoring"] = {
        "responses": len(ours["sums"]), "seconds": ours["seconds"], "trl_seconds": trl["seconds"],
        "speedup_over_trl": trl["seconds"] / ours["seconds"], "largest_difference": apart,
    }  # fmt: skip
    show_part(result, "scoring", console)
    console.print("[dim]training[/dim]")
    train = way("train", folder)
    stock = {size: way("train_trl", folder, size) for size in (1, 8)}
    tuned = way("train_trl", folder, 1, allocator_settings(os.environ))
    best = min(stock, key=lambda size: stock[size]["seconds"])
    result["training"] = {
        "pairs": args.pairs, "seconds": train["seconds"], "trl_best_seconds": stock[best]["seconds"],
        "trl_default_seconds": stock[8]["seconds"], "trl_best_batch": best, "speedup_over_trl_best":
        stock[best]["seconds"] / train["seconds"], "speedup_over_trl_default": stock[8]["seconds"] / train["seconds"],
        "share_of_matrix_rate": train["share_of_matrix_rate"], "matmul_gflops": train["matmul_gflops"],
        "peak_gb": train["peak_gb"], "trl_best_peak_gb": stock[best]["peak_gb"],
        "trl_default_peak_gb": stock[8]["peak_gb"], "step0_loss": train["step0_loss"],
        "trl_batch_1_same_allocator_seconds": tuned["seconds"], "losses": train["losses"],
        "trl_losses": stock[best]["losses"],
    }  # fmt: skip
    show_part(result, "training", console)
    console.print("[dim]the allocator[/dim]")
    result["allocator"] = {
        "generate": {
            "set": sampled.costs,
            "glibc": generate(folder, prompts, "transformers", "glibc", DEFAULTS_OF_GLIBC).costs,
        },
        "score": {"set": ours["process"], "glibc": way("score", folder, 1, DEFAULTS_OF_GLIBC)["process"]},
        "train": {"set": train["process"], "glibc": way("train", folder, 1, DEFAULTS_OF_GLIBC)["process"]},
    }
    show_part(result, "allocator", console)
    console.print("[dim]plan[/dim]")
    result["plan"] = measure_plan(folder, prompts, train["model"])
    return result


def show_part(result: dict[str, Any], part: str, console: Console) -> None:
    """Prints a part's figures at once: the run takes minutes, and may be interrupted."""
    console.print(f"[dim]{json.dumps({part: result[part]})}[/dim]", highlight=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder or a GGUF file; default: the demo's")
    parser.add_argument("--name", default="SmolLM2-135M-Instruct", help="the model's name in the results")
    parser.add_argument("--prompts", type=Path, default=PAIR_PROMPTS, help="JSON lines with `prompt`")
    parser.add_argument("--count", type=int, default=24, help="prompts")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args(arguments)
    console = Console(width=max(Console().width, 110))
    with tempfile.TemporaryDirectory(prefix="bench-real-") as temporary:
        folder = Path(temporary)
        model = resolve_model(args.model or str(demo_model()), None, role="--model")
        (folder / "model").symlink_to(model, target_is_directory=True)
        result = measure(args, folder, console) | {"machine": machine()}
    show(result, console)
    write_json(args.out / "real.json", result)
    draw(result, args.out / "real.png")
    console.print(f"written to {args.out}/real.json and real.png")


if __name__ == "__main__":
    main()
