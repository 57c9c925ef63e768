"""Stage 6, evaluate: what a round changed, on held-out prompts and pairs that no round trains on.

For any model: response length against the policy that the run started from, and how often the implicit
reward of the new policy puts the chosen answer of a held-out pair first, beside the accuracy of length
alone. In the synthetic world its oracle adds accuracy, win rate against the start, and the reward's accuracy
on the new policy's own samples, where drift shows first. There is no judge for a model of one's own: bring
the samples (they are kept, as Parquet) to yours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from dice_py.config.shared import DevicesConfig, ModelConfig
from dice_py.config.stages import EvaluateConfig, GenerateConfig, ScoreConfig
from dice_py.evaluation.judges.oracle import oracle_metrics
from dice_py.evaluation.metrics import bootstrap_ci95, reward_accuracy
from dice_py.events import Report, no_report
from dice_py.models.loading import held_model, model_identity
from dice_py.models.tokenization import encode_pairs, load_tokenizer, stop_token_ids
from dice_py.scoring.pairs import score_pairs
from dice_py.scoring.shards import token_arrays
from dice_py.stages.generate import generate
from dice_py.storage.files import write_json
from dice_py.storage.keys import digest, versions
from dice_py.storage.parquet import parquet_key, read_parquet, write_parquet
from dice_py.timing import timed

_PAIR_LOGPS = pl.Schema({"chosen_logp": pl.Float32, "rejected_logp": pl.Float32})


def held_out_accuracy(
    config: EvaluateConfig,
    score_config: ScoreConfig,
    models: ModelConfig,
    *,
    policy: Path,
    references: dict[str, Path],
    pairs: pl.DataFrame,
    cache: Path,
    report: Report = no_report,
) -> dict[str, Any]:
    """`implicit_reward_accuracy` for each named reference, and `length_only_accuracy`, on held-out pairs.

    A model's log-probabilities of the pairs are kept under `cache`, so that each model is run over them once.
    """
    tokenizer = load_tokenizer(policy, models)
    encoded = encode_pairs(pairs.head(config.pairs), tokenizer, stop_token_ids(policy, tokenizer))
    content = digest(
        encoded["prompt_ids"].to_list(), encoded["chosen_ids"].to_list(), encoded["rejected_ids"].to_list()
    )

    def logps(model: Path) -> pl.DataFrame:
        identity = model_identity(model)
        key = digest("pair logps", identity, content, models.dtype, models.device, versions("torch", "transformers"))
        file = cache / f"pair-logps-{identity}.parquet"
        if parquet_key(file) != key:
            scored = score_pairs(score_config, models, policy=model, pairs=encoded, report=report)
            write_parquet(file, scored, key=key, schema=_PAIR_LOGPS)
        return read_parquet(file)

    ours = logps(policy)
    found: dict[str, Any] = {"eval_pairs": encoded.height}
    for name, folder in references.items():
        theirs = logps(folder)
        found[name] = reward_accuracy(
            ours["chosen_logp"] - theirs["chosen_logp"], ours["rejected_logp"] - theirs["rejected_logp"]
        )
    chosen, rejected = encoded["chosen_ids"].list.len(), encoded["rejected_ids"].list.len()
    found["length_only_accuracy"] = reward_accuracy(chosen.cast(pl.Int64), rejected.cast(pl.Int64))
    return found


def evaluate(
    config: EvaluateConfig,
    generate_config: GenerateConfig,
    score_config: ScoreConfig,
    models: ModelConfig,
    *,
    policy: Path,
    start: Path,
    reference: Path,
    initial_reference: Path,
    prompts: Path | None,
    pairs: Path | None,
    out: Path,
    shared: Path,
    seed: int,
    max_prompt_tokens: int,
    with_oracle: bool,
    devices: DevicesConfig | None = None,
    report: Report = no_report,
) -> dict[str, Any]:
    """Measures `policy` against `start` and writes `out/metrics.json`.

    Args:
        start: the policy that the run started from; its samples are drawn once and kept under `shared`.
        reference: π_ref of the next round's implicit reward, whose accuracy is measured.
        initial_reference: π_ref of round 1, for the same policy's reward against it.
        prompts, pairs: Parquet files, held out (None: that part is not measured).
        with_oracle: the prompts are the synthetic world's.
        devices: which devices sample; None for the defaults.

    Returns:
        The metrics, as written. Accuracies and rates lie in [0, 1]; lengths are in tokens and characters.
    """
    metrics: dict[str, Any] = {}
    if prompts is not None and config.prompts:
        held_out = read_parquet(prompts).head(config.prompts)
        settings = generate_config.model_copy(update={"samples": config.samples})
        drawn: dict[str, pl.DataFrame] = {}
        for name, model, folder in (("start", start, shared / "start"), ("policy", policy, out / "samples")):
            made = generate(
                settings,
                models,
                policy=model,
                prompts=held_out,
                out=folder,
                seed=seed,
                round_number=0,  # the same random numbers for both, in every round
                max_prompt_tokens=max_prompt_tokens,
                devices=devices,
                report=report,
            )
            drawn[name] = pl.concat([read_parquet(file) for file in made.files])
        ours, theirs = drawn["policy"], drawn["start"]
        per_prompt = ours.group_by("prompt_id", maintain_order=True).agg(pl.col("response_tokens").mean())
        metrics |= {
            "eval_prompts": per_prompt.height,
            "eval_samples": settings.samples,
            "mean_response_tokens": ours["response_tokens"].mean(),
            "mean_response_tokens_ci95": bootstrap_ci95(per_prompt["response_tokens"].to_list(), seed),
            "start_mean_response_tokens": theirs["response_tokens"].mean(),
            "mean_response_chars": ours["response_chars"].mean(),
            "start_mean_response_chars": theirs["response_chars"].mean(),
            "cut_off_share": float((ours["finish_reason"] == "length").mean()),  # type: ignore[arg-type]
        }
        if with_oracle:
            rewards = _sample_rewards(score_config, models, policy, reference, ours, report)
            metrics |= oracle_metrics(held_out, ours, theirs, rewards, seed)
    if pairs is not None and config.pairs:
        metrics |= held_out_accuracy(
            config,
            score_config,
            models,
            policy=policy,
            references={
                "implicit_reward_accuracy": reference,
                "implicit_reward_accuracy_initial_reference": initial_reference,
            },
            pairs=read_parquet(pairs),
            cache=shared,
            report=report,
        )
    write_json(out / "metrics.json", metrics)
    return metrics


def _sample_rewards(
    config: ScoreConfig,
    models: ModelConfig,
    policy: Path,
    reference: Path,
    samples: pl.DataFrame,
    report: Report,
) -> pl.Series:
    """log π − log π_ref of each sample (β leaves the order as it is)."""
    with timed("import"):
        from dice_py.scoring.scorer import Scorer

    prompts = list(token_arrays(samples, "prompt_token_ids", "the samples"))
    responses = list(token_arrays(samples, "token_ids", "the samples"))
    # The policy last: it is held, and goes on to the pairs.
    theirs, ours = (
        Scorer(held_model(folder, models), config, report).sums(prompts, responses) for folder in (reference, policy)
    )
    report("note", text=f"rewards of {samples.height} held-out samples computed")
    return pl.Series(ours) - pl.Series(theirs)
