"""Stage 2, score: log π(y|x) and log π_ref(y|x) over the stored token ids, and r = β·(log π − log π_ref).

One forward per response and model: sequences sorted by length, batches under a token budget, hidden states
kept only at response positions, and the head applied to a chunk of positions at a time with a float32
log-sum-exp, so that memory does not grow with vocabulary × length. Nothing is decoded or tokenised again.

Source: Chen et al., arXiv 2406.09760, eq. 3 (Rafailov et al., arXiv 2305.18290, eq. 5, without the partition
function, which is equal for the responses of one prompt).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from dice_py.artefacts import (
    SCORES,
    Report,
    no_report,
    parquet_key,
    parquet_rows,
    read_parquet,
    write_parquet,
)
from dice_py.config import ModelConfig, ScoreConfig
from dice_py.errors import DataError
from dice_py.models import load_model, release

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def batches_by_budget(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Row numbers in batches whose padded size (rows × longest) is within `token_budget`.

    Sorted by length, longest first, so that padding is small and the largest batch comes first: what does
    not fit in memory fails at once. A sequence longer than the budget gets a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batch: list[int] = []
    for row in order:
        longest = lengths[batch[0]] if batch else lengths[row]
        if batch and (len(batch) + 1) * longest > token_budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


class LogitHead:
    """Hidden states to log-probabilities of given tokens, a chunk of positions at a time.

    Handles what models do to their logits after the last matrix product, as their configs say: a factor
    (`logit_scale`, `logits_scaling`) and soft capping. `check` compares it with the model's own logits once,
    so that an architecture which does something else is refused, not scored wrongly.
    """

    def __init__(self, model: PreTrainedModel, chunk: int) -> None:
        text = model.config.get_text_config()
        scale = getattr(text, "logit_scale", None)
        if scale is None and getattr(text, "logits_scaling", None):
            scale = 1.0 / text.logits_scaling
        self.model = model
        self.backbone = model.base_model
        self.head = model.get_output_embeddings()
        self.scale = 1.0 if scale is None else float(scale)
        self.cap = getattr(text, "final_logit_softcapping", None)
        self.chunk = chunk

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(positions, hidden) to float32 (positions, vocabulary)."""
        import torch

        logits = self.head(hidden).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.cap:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits

    def token_logps(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """float32 log-probability of each token (positions,) under its hidden state (positions, hidden)."""
        import torch

        parts = []
        for start in range(0, len(tokens), self.chunk):
            logits = self.logits(hidden[start : start + self.chunk])
            picked = logits.gather(1, tokens[start : start + self.chunk, None]).squeeze(1)
            parts.append(picked - torch.logsumexp(logits, dim=-1))
        return torch.cat(parts)

    def check(self, token_ids: Sequence[int]) -> None:
        """Compares with the model's own logits on one short sequence.

        Raises:
            DataError: they differ by more than the type's rounding.
        """
        import torch

        device = self.model.device
        ids = torch.tensor([list(token_ids[:32])], device=device)
        with torch.inference_mode():
            own = self.model(input_ids=ids, use_cache=False).logits[0].float()
            ours = self.logits(self.backbone(input_ids=ids, use_cache=False).last_hidden_state[0])
        allowed = (1e-4 if self.model.dtype == torch.float32 else 0.05) * max(1.0, own.abs().max().item())
        apart = (own - ours).abs().max().item()
        if not apart <= allowed:
            raise DataError(
                f"{type(self.model).__name__} changes its logits in a way that the scorer does not know "
                f"(largest difference {apart:.3g}); its rewards would be wrong, so it is not scored"
            )


def sequence_logps(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    config: ScoreConfig,
    on_batch: Callable[[int], None] = lambda _: None,
) -> list[float]:
    """Σ_t log π(y_t | x, y_<t) for each (prompt, response) of token ids, in float32, in the given order.

    Args:
        prompts, responses: token ids; the sum is over the response's tokens, EOS included when it is there.
        on_batch: called with the number of sequences done since the last call.

    Raises:
        DataError: an empty prompt or response, or a token outside the model's vocabulary.
    """
    import torch

    device = model.device
    vocabulary = model.get_output_embeddings().weight.shape[0]
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        if not prompt or not response:
            raise DataError(f"row {row}: an empty {'prompt' if not prompt else 'response'} cannot be scored")
        if max(max(prompt), max(response)) >= vocabulary or min(min(prompt), min(response)) < 0:
            raise DataError(
                f"row {row}: a token id lies outside the model's vocabulary of {vocabulary}; policy and "
                "reference must share the tokenizer that the responses were sampled with"
            )
    head = LogitHead(model, config.logit_chunk)
    if prompts:
        head.check([*prompts[0], *responses[0]])
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    sums: list[float] = [0.0] * len(lengths)
    with torch.inference_mode():
        for rows in batches_by_budget(lengths, config.token_budget):
            longest = lengths[rows[0]]
            # Padded on the right: with causal attention no real token sees the padding, so the padding
            # token's id does not matter, and positions count from 0 in every row.
            ids = torch.zeros((len(rows), longest), dtype=torch.long)
            mask = torch.zeros((len(rows), longest), dtype=torch.long)
            predicts = torch.zeros((len(rows), longest), dtype=torch.bool)
            for at, row in enumerate(rows):
                ids[at, : lengths[row]] = torch.tensor([*prompts[row], *responses[row]])
                mask[at, : lengths[row]] = 1
                predicts[at, len(prompts[row]) - 1 : lengths[row] - 1] = True
            hidden = head.backbone(
                input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
            ).last_hidden_state
            targets = ids.roll(-1, dims=1)[predicts].to(device)
            logps = head.token_logps(hidden[predicts.to(device)], targets)
            row_of = torch.repeat_interleave(
                torch.arange(len(rows)), torch.tensor([len(responses[row]) for row in rows])
            ).to(device)
            totals = torch.zeros(len(rows), dtype=torch.float32, device=device).index_add_(0, row_of, logps)
            for row, total in zip(rows, totals.tolist(), strict=True):
                sums[row] = total
            on_batch(len(rows))
    return sums


def score_pairs(
    config: ScoreConfig,
    models: ModelConfig,
    *,
    policy: Path,
    pairs: pl.DataFrame,
    report: Report = no_report,
) -> pl.DataFrame:
    """`chosen_logp` and `rejected_logp` f32 of pairs with `prompt_ids`, `chosen_ids`, `rejected_ids`."""
    prompts = pairs["prompt_ids"].to_list()
    done = 0
    model = load_model(policy, models)

    def on_batch(count: int) -> None:
        nonlocal done
        done += count
        report("progress", stage="score pairs", done=done, total=2 * len(prompts), unit="sequences")

    sums = sequence_logps(
        model, prompts * 2, pairs["chosen_ids"].to_list() + pairs["rejected_ids"].to_list(), config, on_batch
    )
    device = model.device
    del model
    release(device)
    half = len(prompts)
    return pl.DataFrame(
        {"chosen_logp": sums[:half], "rejected_logp": sums[half:]},
        schema={"chosen_logp": pl.Float32, "rejected_logp": pl.Float32},
    )


def score(
    config: ScoreConfig,
    models: ModelConfig,
    *,
    policy: Path,
    reference: Path,
    generations: list[Path],
    out: Path,
    keys: list[str],
    beta: float,
    prompt_column: str = "prompt_token_ids",
    response_column: str = "token_ids",
    report: Report = no_report,
) -> list[Path]:
    """Scores shards of generations: one file of scores for each, row-aligned with it.

    The two models are held one after the other, by the same engine and in the same type. The policy's sums
    of a shard are kept in a file until the reference's are there, so that neither pass is lost to a kill. A
    shard whose file already carries its key is left as it is.

    Args:
        generations: Parquet files with token ids, in `prompt_column` and `response_column`.
        out: folder for `scores-NNNNN.parquet`, columns `logp`, `ref_logp`, `reward` (f32).
        keys: one key for each shard.
        beta: β of the implicit reward.

    Raises:
        DataError: a shard that lacks its columns or whose tokens the models do not know.
    """
    outputs = [out / f"scores-{number:05d}.parquet" for number in range(len(generations))]
    halves = [out / f"policy-logps-{number:05d}.parquet" for number in range(len(generations))]
    open_shards = [i for i, file in enumerate(outputs) if parquet_key(file) != keys[i]]
    total = sum(2 * parquet_rows(generations[i]) for i in open_shards)
    done = 0

    def on_batch(count: int) -> None:
        nonlocal done
        done += count
        report("progress", stage="score", done=done, total=total, unit="sequences")

    def pass_over(folder: Path, shards: list[int], finish: Callable[[int, list[float]], None]) -> None:
        if not shards:
            return
        model = load_model(folder, models)
        for i in shards:
            frame = read_parquet(generations[i], [prompt_column, response_column])
            for column, dtype in frame.schema.items():
                if not (isinstance(dtype, pl.List) and dtype.inner.is_integer()):
                    raise DataError(
                        f"{generations[i]}: column {column!r} is {dtype}, not a list of token ids; the scorer takes "
                        "the tokens as they were sampled, and never tokenises text again"
                    )
            lengths = frame[response_column].list.len().to_list()
            # A response of no tokens has nothing to sum; the miner drops it as too short.
            answered = frame.filter(pl.col(response_column).list.len() > 0)
            sums = iter(
                sequence_logps(
                    model,
                    answered[prompt_column].to_list(),
                    answered[response_column].to_list(),
                    config,
                    on_batch,
                )
            )
            if answered.height < frame.height:
                on_batch(frame.height - answered.height)
            finish(i, [next(sums) if length else 0.0 for length in lengths])
        device = model.device
        del model
        release(device)

    def keep_policy(i: int, logps: list[float]) -> None:
        write_parquet(halves[i], pl.DataFrame({"logp": logps}, schema={"logp": pl.Float64}), key=keys[i])

    def keep_scores(i: int, logps: list[float]) -> None:
        frame = read_parquet(halves[i], ["logp"]).with_columns(pl.Series("ref_logp", logps, dtype=pl.Float64))
        # The difference is taken before rounding to f32: two sums of -1000 share most of their digits.
        frame = frame.with_columns(reward=beta * (pl.col("logp") - pl.col("ref_logp")))
        write_parquet(outputs[i], frame, key=keys[i], schema=SCORES, meta={"beta": beta})
        halves[i].unlink()
        report("shard", file=outputs[i].name, key=keys[i], rows=frame.height)

    unfinished = [i for i in open_shards if parquet_key(halves[i]) != keys[i]]
    done = 0 if not open_shards else sum(parquet_rows(generations[i]) for i in open_shards if i not in unfinished)
    pass_over(policy, unfinished, keep_policy)
    pass_over(reference, open_shards, keep_scores)
    return outputs
