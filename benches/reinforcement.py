"""Stage 2 of MPO against its parts measured alone: `make bench-reinforcement`, some ten minutes.

    step       a step of the stage: sampling, rewards, update; the mean over a training
    sampling   the same responses, sampled again by the engine alone
    rewards    two forwards: the policy's and the reference's packed scorer over the same tokens
    update     TRL's training step and the optimizer's, on the same responses with the same advantages
    kl         with --kl-beta above 0: the forward of the reference of the KL divergence

The weights do not move (a learning rate of 1e-30), so that every part does the same work again: that the responses are
the same is checked, and ends the bench with status 1 where they are not. The parts take turns with the trainings, and
figures are medians over the repeats. The target is a step of at most 1.2 times the sum of its parts. Models have a
named shape and random weights; a share of the vocabulary stops a response, so that lengths have a tail. Results: a
table, and reinforcement.json (with a KL divergence reinforcement-kl.json) in `--out`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from rich.console import Console
from rich.table import Table
from shapes import long_tailed_lengths, machine, write_model
from transformers import TrainerCallback

from dice_py.config.mpo import MpoConfig
from dice_py.config.shared import ModelConfig
from dice_py.config.stages import GenerateConfig, ScoreConfig
from dice_py.config.training import TrainConfig
from dice_py.reinforcement.rank import ReinforceSettings, build_trainer
from dice_py.reinforcement.rewards import ImplicitRewards, LengthPenalty, Responses
from dice_py.reinforcement.trainer import OnPolicy
from dice_py.storage.files import read_sealed, write_json
from dice_py.storage.parquet import write_parquet
from dice_py.storage.schemas import MESSAGES
from dice_py.training.checkpoints import STEP0_FILE

TARGET = 1.2
"""Of the sum of the parts."""
STILL = 1e-30
"""A learning rate that moves no weight."""


class Recorder:
    """What each step of a training did, and how long it took."""

    def __init__(self, trainer: OnPolicy) -> None:
        self.trainer = trainer
        self.prompts: list[list[list[int]]] = []
        self.seeds: list[list[int]] = []
        self.sampled: list[list[list[int]]] = []
        self.rewarded: list[Responses] = []
        self.outputs: list[dict[str, Any]] = []
        sampler, rewards = trainer.rollouts.sampler, trainer.rollouts.rewards
        assert sampler is not None
        sample, score = sampler.sample, trainer._generate_and_score_completions

        def sample_and_keep(prompts: Any, seeds: Any) -> Any:
            samples = sample(prompts, seeds)
            self.prompts.append(list(prompts))
            self.seeds.append(list(seeds))
            self.sampled.append([each.token_ids for each in samples])
            return samples

        def reward_and_keep(sampled: Responses, report: Any) -> list[float]:
            self.rewarded.append(sampled)
            return rewards(sampled, report)

        def score_and_keep(inputs: Any) -> dict[str, Any]:
            output = score(inputs)
            self.outputs.append(dict(output))
            return output

        sampler.sample = sample_and_keep  # type: ignore[method-assign]
        object.__setattr__(trainer.rollouts, "rewards", reward_and_keep)
        trainer._generate_and_score_completions = score_and_keep  # type: ignore[method-assign]


def timed(work: Callable[[], object]) -> float:
    """Seconds of the clock; on a GPU, of all work that was queued."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def settings(args: argparse.Namespace, folder: Path) -> ReinforceSettings:
    """A training on the files of `prepare`."""
    models = ModelConfig(device=args.device, dtype=args.dtype)
    mpo = MpoConfig(
        trainer=args.trainer,
        steps=args.steps,
        kl_beta=args.kl_beta,
        num_generations=args.num_generations,
        batch_size=args.batch,
        per_device_train_batch_size=args.micro_batch,
    )
    config = TrainConfig(
        method="mpo", learning_rate=STILL, lr_scheduler_type="constant", warmup_steps=0, save_steps=None, mpo=mpo
    )
    stops = list(range(3, args.vocabulary, args.mean_length))
    return ReinforceSettings(
        config=config.of_reinforcement(args.steps),
        models=models,
        generate=GenerateConfig(
            engine="transformers",
            temperature=1.0,
            max_new_tokens=args.longest,
            sampling_params={"stop_token_ids": stops},
        ),
        uses_vllm=False,
        rewards=ImplicitRewards(
            folder / "policy",
            folder / "reference",
            ScoreConfig(token_budget=args.token_budget),
            models,
            0.1,
            LengthPenalty("linear", "tokens", 0.01),
        ),
        policy=folder / "policy",
        training_set=folder / "set.parquet",
        out=folder / "out",
        seed=args.seed,
        key="bench",
    )


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Writes two models and hard prompts."""
    for seed, name in enumerate(("policy", "reference")):
        args.vocabulary = write_model(folder / name, args.shape, "float32", "cpu", seed)
    rng = np.random.default_rng(args.seed)
    count = args.batch // args.num_generations * args.steps
    lengths = long_tailed_lengths(count, median=args.prompt, sigma=0.5, low=4, high=4 * args.prompt, seed=args.seed)
    frame = pl.DataFrame(
        {
            "prompt": [[{"role": "user", "content": f"t{number}"}] for number in range(3, count + 3)],
            "prompt_ids": [rng.integers(3, args.vocabulary, length).tolist() for length in lengths],
            "source": ["mined"] * count,
            "difficulty": ["hard"] * count,
        },
        schema={"prompt": MESSAGES, "prompt_ids": pl.List(pl.Int32), "source": pl.String, "difficulty": pl.String},
    )
    write_parquet(folder / "set.parquet", frame, key="bench")


def ends_of_steps(trainer: OnPolicy) -> list[float]:
    """Trains; the time at which each step ended."""
    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    return ends


def measure(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Seconds of a mean step, and of its parts; the first step, which warms up, is left out of all of them.

    Besides, `tokens` of a mean response, and `first_rms_difference`: nats between the trainer's and the sampler's log π
    of the first responses.
    """
    trainer = build_trainer(settings(args, folder))
    recorder = Recorder(trainer)
    ends = ends_of_steps(trainer)
    steps = range(1, args.steps)
    found = {"step": (ends[-1] - ends[0]) / len(steps)}
    sampler = trainer.rollouts.sampler
    assert sampler is not None

    def sample() -> None:
        again = [
            [each.token_ids for each in type(sampler).sample(sampler, recorder.prompts[at], recorder.seeds[at])]
            for at in steps
        ]
        if again != [recorder.sampled[at] for at in steps]:
            raise SystemExit("the responses are others when they are sampled again: nothing is written")

    found["sampling"] = timed(sample) / len(steps)
    rewards = settings(args, folder).rewards.load()
    rewards(recorder.rewarded[0])
    found["rewards"] = timed(lambda: [rewards(recorder.rewarded[at]) for at in steps]) / len(steps)
    found["update"] = update_alone(args, folder, recorder)
    if args.kl_beta:
        found["kl"] = timed(lambda: [kl_forward(trainer, recorder.outputs[at]) for at in steps]) / len(steps)
    found["tokens"] = statistics.fmean(len(ids) for at in steps for ids in recorder.sampled[at])
    first = read_sealed(folder / "out" / "checkpoints" / STEP0_FILE, settings(args, folder).key)
    assert first is not None
    found["first_rms_difference"] = first["rms_difference"]
    return found


def parts_of(found: dict[str, float]) -> list[str]:
    """The parts of a step that were measured alone."""
    return [name for name in ("sampling", "rewards", "update", "kl") if name in found]


def ratio(found: dict[str, float]) -> float:
    """A step over the sum of its parts."""
    return found["step"] / sum(found[name] for name in parts_of(found))


def update_alone(args: argparse.Namespace, folder: Path, recorder: Recorder) -> float:
    """Seconds of a mean step of a trainer that is given the responses, log-probabilities and advantages of another."""
    trainer = build_trainer(settings(args, folder))
    outputs = iter(recorder.outputs)
    trainer._generate_and_score_completions = lambda _: dict(next(outputs))  # type: ignore[method-assign]
    ends = ends_of_steps(trainer)
    return (ends[-1] - ends[0]) / (args.steps - 1)


def kl_forward(trainer: Any, output: dict[str, Any]) -> None:
    """The forward of the reference of the KL divergence over a step's responses."""
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    width = output["completion_ids"].size(1)
    with torch.no_grad():
        trainer._get_per_token_logps_and_entropies(
            trainer.ref_model, ids, mask, width, trainer.args.per_device_train_batch_size
        )


def main(arguments: list[str] | None = None) -> int:
    """The bench."""
    args = parse(arguments)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    log = Console(stderr=True)
    runs = []
    with tempfile.TemporaryDirectory(prefix="bench-reinforcement-") as scratch:
        folder = Path(scratch)
        prepare(args, folder)
        for repeat in range(args.repeats):
            log.print(f"repeat {repeat + 1} of {args.repeats}")
            runs.append(measure(args, folder))
    parts = parts_of(runs[0])
    ratios = [ratio(run) for run in runs]
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    results = {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "target": TARGET,
        "seconds": medians,
        "options": {name: value for name, value in vars(args).items() if name != "out"},
        "machine": machine(),
    }
    write_json(Path(args.out) / ("reinforcement-kl.json" if args.kl_beta else "reinforcement.json"), results)
    table = Table("part", "seconds a step", "share of the sum")
    total = sum(medians[name] for name in parts)
    for name in (*parts, "step"):
        table.add_row(name, f"{medians[name]:.3f}", f"{medians[name] / total:.0%}")
    Console().print(table)
    Console().print(
        f"a step takes {results['ratio']:.2f} times the sum of its parts (target: {TARGET}); responses have "
        f"{medians['tokens']:.0f} tokens"
    )
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tiny", help="of the models (shapes.py)")
    parser.add_argument("--trainer", default="grpo", choices=["grpo", "rloo"])
    parser.add_argument("--steps", type=int, default=3, help="of a training; the first is not counted")
    parser.add_argument("--batch", type=int, default=16, help="responses of a step")
    parser.add_argument("--num-generations", type=int, default=4)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--kl-beta", type=float, default=0.0, help="above 0: with the forward of the KL divergence")
    parser.add_argument("--prompt", type=int, default=64, help="median tokens of a prompt")
    parser.add_argument("--mean-length", type=int, default=64, help="about the mean tokens of a response")
    parser.add_argument("--longest", type=int, default=256, help="most tokens of a response")
    parser.add_argument("--token-budget", type=int, default=8192, help="of the scorer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: as many as processors")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", default=Path(__file__).resolve().parent / "results", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
