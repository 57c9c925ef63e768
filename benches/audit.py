"""An audit of preference pairs against rewardbench's way for DPO models: `make bench-audit`, some minutes.

Both score the same tokens with the same two models of random weights. The audit is the complete job of `dice audit`,
from model folders and texts to figures: checks, loading, tokens, forwards, statistics; `forwards` are its packed
forwards alone. rewardbench's way is written here as its `DPOInference.inference_step` works (allenai/reward-bench,
scripts/run_dpo.py, batches of 6 pairs): chosen and rejected of a batch in one padded forward of the policy, then of the
reference, all logits, a log-softmax over them, and sums over the response's tokens. Of it only that is timed.

Seconds of the clock and of the processor are both kept, since other work on the machine changes only the former. The
bench ends with status 1 where the rewards differ by more than rounding. It prints a table and writes
results/audit.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table

from dice_py.data import pairs_frame
from dice_py.storage.files import write_json

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-5
"""Of a reward's difference, relative to the sum of its two log-probabilities plus its tokens."""
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def draw_pairs(args: argparse.Namespace, vocabulary: int) -> list[dict[str, str]]:
    """Pairs of random words of the bench's tokenizer (shapes.py), each of a prompt of its own, with long tails."""
    from shapes import long_tailed_lengths

    rng = np.random.default_rng(args.seed)
    prompts = long_tailed_lengths(
        args.pairs, median=args.prompt_median, sigma=0.6, low=4, high=args.longest, seed=args.seed
    )
    answers = long_tailed_lengths(
        2 * args.pairs, median=args.response_median, sigma=0.7, low=2, high=args.longest, seed=args.seed + 1
    )

    def text(count: int) -> str:
        return " ".join(f"t{token}" for token in rng.integers(3, vocabulary, count))

    return [
        {"prompt": text(prompts[n]), "chosen": text(answers[2 * n]), "rejected": text(answers[2 * n + 1])}
        for n in range(args.pairs)
    ]


def write_models(args: argparse.Namespace, folder: Path) -> list[Path]:
    """Two models of the shape: the policy, and the reference, whose weights are the policy's with noise."""
    import torch
    from shapes import make_model, make_tokenizer

    model = make_model(args.shape, torch.float32, "cpu", args.seed)
    tokenizer = make_tokenizer(int(model.config.vocab_size))
    tokenizer.chat_template = TEMPLATE
    folders = [folder / "policy", folder / "reference"]
    for place, name in enumerate(folders):
        if place:
            torch.manual_seed(args.seed + 1)
            with torch.no_grad():
                for weight in model.parameters():
                    weight += 0.05 * weight.std() * torch.randn_like(weight)
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    return folders


def as_messages(pairs: list[dict[str, str]]) -> pl.DataFrame:
    """The pairs as the job of an audit takes them."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    turns: list[Any] = [{name: [{"role": role, "content": row[name]}] for name, role in roles.items()} for row in pairs]
    return pairs_frame(turns).drop("key")


def audited(args: argparse.Namespace, folders: list[Path], pairs: list[dict[str, str]]) -> dict[str, Any]:
    """The job of `dice audit`: its seconds, those of its forwards, the rewards, and the token ids that it scored."""
    from dice_py.config.shared import ModelConfig
    from dice_py.config.stages import ScoreConfig
    from dice_py.models.loading import release_held
    from dice_py.models.tokenization import encode_pairs, load_tokenizer, stop_token_ids
    from dice_py.scoring import forwards
    from dice_py.stages.audit import AuditJob

    models = ModelConfig(device="cpu", dtype="float32")
    rows = as_messages(pairs)
    spent, plain = [0.0], forwards.packed_sums

    def timed_sums(*arguments: Any) -> list[float]:
        before = time.process_time()
        sums = plain(*arguments)
        spent[0] += time.process_time() - before
        return sums

    release_held()
    with tempfile.TemporaryDirectory() as out:
        job = AuditJob(
            config=ScoreConfig(),
            models=models,
            policy=folders[0],
            references={"previous": folders[1]},
            rows=rows,
            rows_key="bench",
            beta=1.0,
            alpha="auto",
            form="penalized",
            seed=0,
            out=Path(out),
        )
        forwards.packed_sums = timed_sums
        started, processor = time.perf_counter(), time.process_time()
        try:
            job.run()
        finally:
            forwards.packed_sums = plain
        seconds, processor = time.perf_counter() - started, time.process_time() - processor
        kept = pl.read_parquet(Path(out) / "pairs.parquet")
    tokenizer = load_tokenizer(folders[0], models)
    encoded = encode_pairs(rows, tokenizer, stop_token_ids(folders[0], tokenizer))
    sides = ("chosen", "rejected")
    return {
        "seconds": seconds,
        "processor_seconds": processor,
        "forwards": spent[0],
        "rewards": [kept[f"{side}_reward previous, sum"].to_numpy() for side in sides],
        "sums": [kept[f"{side}_logp policy"].to_numpy() + kept[f"{side}_logp previous"].to_numpy() for side in sides],
        "tokens": [kept[f"{side}_tokens"].to_numpy() for side in sides],
        "encoded": encoded,
    }


def rewardbench_way(args: argparse.Namespace, folders: list[Path], encoded: Any) -> dict[str, Any]:
    """Seconds of the forwards and sums, and the rewards."""
    import torch
    from transformers import AutoModelForCausalLM

    policy, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in folders)
    rows = list(encoded.select("prompt_ids", "chosen_ids", "rejected_ids").iter_rows())

    def summed(model: Any, batch: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        longest = max(len(prompt) + len(answer) for prompt, answer in batch)
        ids = torch.zeros((len(batch), longest), dtype=torch.long)
        mask = torch.zeros((len(batch), longest), dtype=torch.long)
        labels = torch.full((len(batch), longest), -100, dtype=torch.long)
        for row, (prompt, answer) in enumerate(batch):
            whole = torch.tensor([*prompt, *answer])
            ids[row, : len(whole)], mask[row, : len(whole)] = whole, 1
            labels[row, len(prompt) : len(whole)] = whole[len(prompt) :]
        logits = model(ids, attention_mask=mask).logits[:, :-1]
        labels = labels[:, 1:]
        counted = labels != -100
        logps = logits.log_softmax(-1).gather(2, labels.masked_fill(~counted, 0)[:, :, None]).squeeze(2)
        return (logps * counted).sum(-1)

    found: list[list[torch.Tensor]] = [[], []]
    started, processor = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        for start in range(0, len(rows), args.batch):
            part = rows[start : start + args.batch]
            both = [(prompt, chosen) for prompt, chosen, _ in part] + [(prompt, answer) for prompt, _, answer in part]
            rewards = summed(policy, both) - summed(reference, both)
            found[0].append(rewards[: len(part)])
            found[1].append(rewards[len(part) :])
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    return {"seconds": seconds, "processor_seconds": processor, "rewards": [torch.cat(side).numpy() for side in found]}


def compare(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Runs both ways by turns; the content of the results file."""
    from shapes import SHAPES, machine

    pairs = draw_pairs(args, SHAPES[args.shape]["vocab_size"])
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DICE_CACHE"] = folder
        folders = write_models(args, Path(folder))
        for repeat in range(args.repeats):
            console.print(f"[dim]{repeat + 1} of {args.repeats}: the audit[/dim]", highlight=False)
            ours.append(audited(args, folders, pairs))
            console.print(f"[dim]{repeat + 1} of {args.repeats}: rewardbench's way[/dim]", highlight=False)
            theirs.append(rewardbench_way(args, folders, ours[-1]["encoded"]))
    scale = [np.abs(sums) + tokens for sums, tokens in zip(ours[0]["sums"], ours[0]["tokens"], strict=True)]
    off = [np.abs(a - b) / one for a, b, one in zip(ours[0]["rewards"], theirs[0]["rewards"], scale, strict=True)]
    accuracy = {
        name: float(np.mean(run["rewards"][0] > run["rewards"][1]))
        for name, run in (("audit", ours[0]), ("rewardbench", theirs[0]))
    }
    runs = {"audit": ours, "rewardbench": theirs}
    spent = {
        kind: {name: statistics.median(run[kind] for run in each) for name, each in runs.items()}
        for kind in ("seconds", "processor_seconds")
    }
    prompt_tokens = [len(ids) for ids in ours[0]["encoded"]["prompt_ids"]]
    return {
        "shape": args.shape,
        "machine": machine(),
        "load": list(os.getloadavg()),
        "pairs": args.pairs,
        "batch": args.batch,
        "repeats": args.repeats,
        "prompt_tokens": {"median": float(np.median(prompt_tokens)), "sum": int(np.sum(prompt_tokens))},
        "response_tokens": {
            "median": float(np.median(ours[0]["tokens"])),
            "sum": int(np.sum(ours[0]["tokens"])),
        },
        **spent,
        "forward_processor_seconds": statistics.median(run["forwards"] for run in ours),
        "audit_over_forwards": statistics.median(run["processor_seconds"] / run["forwards"] for run in ours),
        "speedup_over_rewardbench": spent["processor_seconds"]["rewardbench"] / spent["processor_seconds"]["audit"],
        "accuracy": accuracy,
        "worst_relative_difference": float(max(one.max() for one in off)),
        "max_abs_difference": float(
            max(np.abs(a - b).max() for a, b in zip(ours[0]["rewards"], theirs[0]["rewards"], strict=True))
        ),
    }


def show(results: dict[str, Any], console: Console) -> None:
    """Prints the table."""
    table = Table(title=f"{results['pairs']} pairs, {results['shape']}, float32", box=None)
    for name in ("", "seconds", "of the processor"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    audit, other = (
        [f"{results[kind][name]:.1f}" for kind in ("seconds", "processor_seconds")] for name in ("audit", "rewardbench")
    )
    table.add_row("the audit: checks, loading, tokens, forwards, statistics", *audit)
    table.add_row("  its two forwards alone", "", f"{results['forward_processor_seconds']:.1f}")
    table.add_row("rewardbench's way: its two forwards and sums", *other)
    console.print(table)
    console.print(
        f"of the processor's time the audit takes {results['audit_over_forwards']:.2f} times its two forwards, and "
        f"rewardbench's way {results['speedup_over_rewardbench']:.2f} times the audit; rewards differ by at most "
        f"{results['max_abs_difference']:.2g} nats",
        highlight=False,
    )


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m", help="a shape of shapes.py")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--batch", type=int, default=6, help="pairs of a batch of rewardbench's way, as its default")
    parser.add_argument("--prompt-median", type=float, default=16, help="tokens")
    parser.add_argument("--response-median", type=float, default=24, help="tokens")
    parser.add_argument("--longest", type=int, default=200, help="largest number of tokens of a prompt or response")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    console = Console(width=max(Console().width, 120))
    results = compare(args, console)
    show(results, console)
    accuracy = results["accuracy"]
    if results["worst_relative_difference"] > TOLERANCE or accuracy["audit"] != accuracy["rewardbench"]:
        raise SystemExit("the rewards of the two ways differ by more than rounding")
    write_json(args.out / "audit.json", results)
    console.print(f"written to {args.out / 'audit.json'}")


if __name__ == "__main__":
    main()
