"""Makes the pairs that ship with the demo: SmolLM2's own answers to our prompts, labeled by a rule.

    python -m dice_py.demo.make_pairs --model SmolLM2-135M-Instruct.Q4_1.gguf --work runs/demo-pairs

It writes dice_py/demo/pairs.jsonl and held_out_pairs.jsonl. The prompts are dice_py/demo/pair_prompts.jsonl and
held_out_prompts.jsonl, the rule is dice_py/demo/rule.py, the choice of pairs is `label_pairs` in dice_py/demo/data.py,
and the seeds are below. On another CPU, where sums are rounded in another order, a few answers can differ.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import polars as pl

from dice_py.config.shared import ModelConfig
from dice_py.config.stages import GenerateConfig
from dice_py.data import Message, prompts_frame
from dice_py.demo.data import (
    HELD_OUT_PAIRS,
    HELD_OUT_PROMPTS,
    PAIR_PROMPTS,
    PAIRS,
    SAMPLING,
    DemoPrompt,
    label_pairs,
    read_jsonl,
    with_rule,
    write_jsonl,
)
from dice_py.models.sources import resolve_model
from dice_py.stages.generate import GenerateJob
from dice_py.storage.parquet import read_parquet

ANSWERS = 4  # to each prompt
FILES = {"pairs": (PAIR_PROMPTS, PAIRS, 1), "held_out": (HELD_OUT_PROMPTS, HELD_OUT_PAIRS, 2)}
"""By use: the prompts, the file that their pairs go to, and the seed of the answers."""


def report(event: str, **fields: Any) -> None:
    if event == "note":
        print(fields["text"], flush=True)
    elif event == "shard":
        print(f"{fields['file']} is complete", flush=True)


def sample(model: Path, prompts: list[DemoPrompt], seed: int, folder: Path) -> pl.DataFrame:
    """The model's answers; finished shards are kept."""
    asked = [[Message(role="user", content=prompt["prompt"])] for prompt in prompts]
    job = GenerateJob(
        config=GenerateConfig(engine="transformers", samples=ANSWERS, shard_prompts=20, token_budget=6144, **SAMPLING),
        models=ModelConfig(device="cpu", dtype="float32"),
        policy=model,
        prompts=prompts_frame(asked),
        prompts_key="",  # the shards' keys hold the prompts
        out=folder,
        seed=seed,
        round_number=1,
        max_prompt_tokens=512,
    )
    return pl.concat([read_parquet(file) for file, _ in job.run(report).files])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="SmolLM2-135M-Instruct: a GGUF file or a model folder")
    parser.add_argument("--work", type=Path, default=Path("runs/demo-pairs"), help="where the answers are kept")
    args = parser.parse_args()

    model = resolve_model(args.model, None, role="--model", report=report)
    for use, (asked, file, seed) in FILES.items():
        prompts = read_jsonl(asked)
        answers = with_rule(sample(model, prompts, seed, args.work / use), prompts)
        pairs = label_pairs(answers)
        write_jsonl(file, pairs)
        kept, ended = (
            answers.filter(part).height / answers.height for part in ("keeps", pl.col("finish_reason") == "stop")
        )
        print(
            f"{use}: {answers.height} answers, {ended:.0%} ended, {kept:.0%} keep the rule; {len(pairs)} pairs: {file}"
        )


if __name__ == "__main__":
    main()
