"""Mined pairs joined with the token ids that were sampled, as rows of a training set and of the replay buffer."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from dice_py.data import prompt_key
from dice_py.events import Report, no_report
from dice_py.replay.buffer import ReplayBuffer
from dice_py.storage.integrity import check_intact
from dice_py.storage.parquet import read_parquet
from dice_py.storage.schemas import PAIRS, fit

BUFFER = pl.Schema(
    {
        "key": pl.String(),
        **PAIRS,
        "margin": pl.Float32(),
        "chosen_length": pl.UInt32(),
        "rejected_length": pl.UInt32(),
        "source": pl.String(),
    }
)
"""The columns that a run appends to its buffer: the key of the prompt, the pair with its token ids, its margin, its
lengths (in the unit of mine.length), and its round as `source`. The buffer adds `round`, `index` and `priority`."""


def append_mined(
    buffer: ReplayBuffer,
    round_number: int,
    *,
    mined: Path,
    generations: list[Path],
    scores: list[Path],
    prompts: Path,
    key: str,
    report: Report = no_report,
) -> None:
    """Appends the mined pairs of a round to the buffer of a run (columns: `BUFFER`).

    Nothing is read if the round was appended with the same key.

    Args:
        mined: the mined pairs (schema MINED).
        generations, scores: the shards that the row numbers of `mined` count through, in order (schemas GENERATIONS
            and SCORES).
        prompts: the prompts that were sampled on (schema PROMPTS).
        key: the key of the mined pairs.
        report: receives a note with the number of pairs written.

    Raises:
        UsageError, DataError: as `ReplayBuffer.append`.
    """
    if buffer.is_appended(round_number, key, report):
        return
    check_intact([mined, *generations, *scores, prompts])
    pairs = read_parquet(mined)
    gathered = gather_mined(pairs, generations, scores, read_parquet(prompts, ["prompt_id", "messages"]))
    keys = [prompt_key(messages) for messages in gathered["prompt"].to_list()]
    appended = gathered.select(PAIRS.names()).with_columns(
        pl.Series("key", keys, dtype=pl.String),
        *(pairs[name] for name in ("margin", "chosen_length", "rejected_length")),
        pl.lit(f"round-{round_number:02d}").alias("source"),
    )
    written = buffer.append(round_number, fit(appended, BUFFER), key)
    report("note", text=f"replay buffer: {written} of {pairs.height} mined pairs written")


def gather_mined(
    mined: pl.DataFrame, generations: list[Path], scores: list[Path], prompts: pl.DataFrame
) -> pl.DataFrame:
    """The mined pairs as rows of a training set (the columns of TRAINING_SET, source "mined"), in the order of `mined`.

    Token ids and log-probabilities are those of the generate and score stages; nothing is tokenized or scored again.
    The policy that scored the responses is the one that training starts from, so its `logp` is the log-probability
    of the reference in DPO (`ref_chosen_logps`, `ref_rejected_logps`; f32, nats).

    Args:
        mined: `prompt_id`, `chosen_row` and `rejected_row`; the row numbers count through all shards.
        generations, scores: the shards, in order (schemas GENERATIONS and SCORES).
        prompts: `prompt_id` and `messages`.
    """
    needed = pl.concat([mined["chosen_row"], mined["rejected_row"]]).cast(pl.UInt32).unique().to_frame("row")
    columns = ["prompt_token_ids", "token_ids", "response"]
    sampled = pl.scan_parquet(generations, glob=False, row_index_name="row").select("row", *columns)
    logps = pl.scan_parquet(scores, glob=False, row_index_name="row").select("row", "logp")
    rows = sampled.join(needed.lazy(), on="row", how="semi").join(logps, on="row", how="left").collect()
    answer = pl.concat_list(pl.struct(role=pl.lit("assistant"), content="response"))

    def side(name: str, logp: str) -> pl.DataFrame:
        picked = rows.select(
            "row", pl.col("token_ids").alias(f"{name}_ids"), answer.alias(name), pl.col("logp").alias(logp)
        )
        keys = mined.select(pl.col(f"{name}_row").cast(pl.UInt32).alias("row"))
        return keys.join(picked, on="row", how="left", maintain_order="left").drop("row")

    prompt_ids = mined.select(pl.col("chosen_row").cast(pl.UInt32).alias("row")).join(
        rows.select("row", prompt_ids="prompt_token_ids"), on="row", how="left", maintain_order="left"
    )
    messages = mined.select("prompt_id").join(
        prompts.select("prompt_id", prompt="messages"), on="prompt_id", how="left", maintain_order="left"
    )
    return pl.concat(
        [
            messages.select("prompt"),
            prompt_ids.select("prompt_ids"),
            side("chosen", "ref_chosen_logps"),
            side("rejected", "ref_rejected_logps"),
        ],
        how="horizontal",
    ).with_columns(source=pl.lit("mined"))
