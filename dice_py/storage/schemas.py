"""Columns and dtypes of every artifact that stages exchange."""

from __future__ import annotations

import polars as pl

MESSAGES = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))
# Where any turn says more than its content: `extra` is JSON text or null (rows/messages.py).
MESSAGES_WITH_EXTRA = pl.List(pl.Struct({"role": pl.String, "content": pl.String, "extra": pl.String}))

PLACE = "where"
"""The column with the row's place in the user's file ("pairs.jsonl, line 20"), in prompts and pairs that were read."""


def _schema(**columns: pl.DataType | type[pl.DataType]) -> pl.Schema:
    return pl.Schema(columns)


PROMPTS = _schema(prompt_id=pl.UInt32, messages=MESSAGES)
PROMPTS_READ = _schema(**PROMPTS, **{PLACE: pl.String})

GENERATIONS = _schema(
    prompt_id=pl.UInt32,
    sample_id=pl.UInt16,
    prompt_token_ids=pl.List(pl.Int32),
    token_ids=pl.List(pl.Int32),
    response=pl.String,
    response_tokens=pl.UInt32,
    response_chars=pl.UInt32,
    finish_reason=pl.String,
    # Σ_t log π(y_t | x, y_<t) in nats from the sampling engine, before temperature and top-p.
    sampled_logp=pl.Float32,
)

# Of an evaluation: a policy's samples with their prompts, and Σ log π in nats under the policy itself, π_ref of the
# reward, the policy of the round before and the start (null: not measured). log_ratio is log π − log π_ref.
EVALUATED_SAMPLES = _schema(
    prompt_id=pl.UInt32,
    sample_id=pl.UInt16,
    messages=MESSAGES,
    response=pl.String,
    response_tokens=pl.UInt32,
    finish_reason=pl.String,
    sampled_logp=pl.Float64,
    ref_logp=pl.Float64,
    previous_logp=pl.Float64,
    start_logp=pl.Float64,
    initial_ref_logp=pl.Float64,
    log_ratio=pl.Float64,
)

SCORES = _schema(logp=pl.Float32, ref_logp=pl.Float32, reward=pl.Float32)
# The reward of the round before, for mine.second_reward=previous.
SCORES_WITH_PREVIOUS = _schema(**SCORES, previous_reward=pl.Float32)

MINED = _schema(
    prompt_id=pl.UInt32,
    chosen_row=pl.UInt64,
    rejected_row=pl.UInt64,
    chosen_reward=pl.Float32,
    rejected_reward=pl.Float32,
    margin=pl.Float32,
    chosen_length=pl.UInt32,
    rejected_length=pl.UInt32,
)

# Columns that mining adds to `MINED` on request. A policy is the number of the round that sampled the response.
MINED_LABELS = _schema(
    chosen_win_rate=pl.Float32,
    rejected_win_rate=pl.Float32,
    soft_label=pl.Float32,
    difficulty=pl.String,
    consistency=pl.Float32,
    chosen_policy=pl.UInt32,
    rejected_policy=pl.UInt32,
)

PAIRS = _schema(
    prompt=MESSAGES,
    chosen=MESSAGES,
    rejected=MESSAGES,
    prompt_ids=pl.List(pl.Int32),
    chosen_ids=pl.List(pl.Int32),
    rejected_ids=pl.List(pl.Int32),
)

TRAINING_SET = _schema(
    **PAIRS,
    ref_chosen_logps=pl.Float32,
    ref_rejected_logps=pl.Float32,
    source=pl.String,
)

# Of the inspect stage: pairs to read, with what decided them. Rewards are β(log π − log π_ref) in nats, credits their
# parts by token (null: no models were given). What is not known of a replayed pair is null.
CANDIDATE = pl.Struct(
    {
        "sample_id": pl.UInt16,
        "response": pl.String,
        "reward": pl.Float32,
        # reward − penalty of the length, by which the candidates are ranked.
        "penalized_reward": pl.Float32,
        "response_tokens": pl.UInt32,
        "finish_reason": pl.String,
        "role": pl.String,  # "chosen", "rejected", or null
    }
)
TOKEN_CREDIT = pl.Struct({"text": pl.String, "logp": pl.Float32, "ref_logp": pl.Float32, "credit": pl.Float32})
INSPECTED_PAIRS = _schema(
    # Unique in a run and the same in every report of it: "r01-mined-17", "r01-replay-3", "file-3".
    pair_id=pl.String,
    round=pl.UInt32,
    source=pl.String,  # "mined", or the training set's, or that of the user's file
    prompt=MESSAGES,
    chosen=MESSAGES,
    rejected=MESSAGES,
    chosen_tokens=pl.UInt32,
    rejected_tokens=pl.UInt32,
    chosen_finish_reason=pl.String,
    rejected_finish_reason=pl.String,
    chosen_reward=pl.Float32,
    rejected_reward=pl.Float32,
    chosen_penalized_reward=pl.Float32,
    rejected_penalized_reward=pl.Float32,
    margin=pl.Float32,
    labels=pl.String,  # a JSON object of what mining or the user's file says besides, or null
    candidates=pl.List(CANDIDATE),  # all responses to the prompt, best first; empty of a replayed pair
    chosen_credit=pl.List(TOKEN_CREDIT),
    rejected_credit=pl.List(TOKEN_CREDIT),
)

# Of an evaluation, by metric and item: a prompt_id, or the row number of a held-out pair. `start` is the value of the
# policy that the run started from.
METRIC_VALUES = _schema(metric=pl.String, item=pl.UInt32, value=pl.Float64, start=pl.Float64)

START_LOGPS = ("start_chosen_logps", "start_rejected_logps")
"""Further columns of a training set whose reference is not the policy that training starts from: Σ log π of that
policy, f32 in nats. The check at step 0 compares with them."""

TRAINING_LABELS = _schema(margin=pl.Float32, **{n: t for n, t in MINED_LABELS.items() if not n.endswith("_policy")})
"""Further columns of a training set, where the mined pairs have them: null for replayed pairs of files."""
SHARED_LOGPS = ("ref_chosen_shared_logps", "ref_rejected_shared_logps")
"""Further columns of a training set for train.ld_alpha: Σ log π_ref over as many tokens of each response as the shorter
one has, f32 in nats."""


def training_schema(frame: pl.DataFrame) -> pl.Schema:
    """The schema of a training set: `TRAINING_SET`, and the further columns that are there."""
    logps = dict.fromkeys([*START_LOGPS, *SHARED_LOGPS], pl.Float32())
    further = {name: dtype for name, dtype in (logps | TRAINING_LABELS).items() if name in frame.columns}
    return pl.Schema(TRAINING_SET | further)


def fit(frame: pl.DataFrame, schema: pl.Schema) -> pl.DataFrame:
    """Selects the columns of a schema and casts them to it. Messages keep the field `extra` where they have it."""
    dtypes = {
        name: MESSAGES_WITH_EXTRA if dtype == MESSAGES and frame.schema[name] == MESSAGES_WITH_EXTRA else dtype
        for name, dtype in schema.items()
    }
    return frame.select(schema.names()).cast(dtypes)  # type: ignore[arg-type]
