"""An oracle for `mine_pairs`: a second implementation in plain Polars, slow, complete, without the extension.

Every rule is a join, a sort or a `group_by` here. A penalized reward `r - alpha * l` is compared exactly: as rewards
and alpha are binary fractions, it is a 128-bit integer after a common shift. Columns: `row` (number in the frame), `p`
prompt, `r` reward, `l` length, `s` score as float64, `x` score as it is compared. `C` are the responses that may be
chosen, `R` those that may be rejected.
"""

from __future__ import annotations

import math
from typing import Any

import polars as pl

BASE = [
    "prompt_id", "chosen_row", "rejected_row", "chosen_reward", "rejected_reward", "margin", "chosen_length",
    "rejected_length",
]  # fmt: skip
REASONS = ["null", "not_finite", "truncated", "too_short", "too_long", "duplicate", "too_few_responses"]
CHOICES = ("chosen", "rejected")
QUANTILES = ["min", "0.05", "0.25", "0.5", "0.75", "0.95", "max"]
DEFAULTS: dict[str, Any] = {
    "prompt_column": "prompt_id", "reward_column": "reward", "length_column": "response_tokens",
    "truncated_column": "auto", "debias": "linear", "alpha": "auto", "min_responses": 2, "min_length": 1,
    "max_length": None, "buckets": 10, "bucket_scale": False, "length_tolerance": None, "length_ratio": None,
    "pairing": "max_min", "top_k": 2, "bottom_k": 2, "pairs_per_prompt": None, "sweet_spot_deviations": 2.0,
    "seed": 0, "min_margin": None, "min_margin_quantile": None, "duplicate_column": None, "policy_column": None,
    "chosen_from": "any", "rejected_from": "any", "second_reward_column": None, "win_rates": False,
    "soft_labels": False, "label_scale": 1.0, "difficulty_quantile": None,
}  # fmt: skip
MASK = 2**64 - 1


def with_defaults(options: dict[str, Any]) -> dict[str, Any]:
    unknown = options.keys() - DEFAULTS.keys()
    assert not unknown, f"the oracle knows no {unknown}"
    return DEFAULTS | options


# --- usable responses ---------------------------------------------------------------------------------------


def _plain(frame: pl.DataFrame, name: str) -> pl.Expr:
    """Categories are ordered by their text."""
    return pl.col(name).cast(pl.String) if frame.schema[name] in (pl.Categorical, pl.Enum) else pl.col(name)


def usable_rows(frame: pl.DataFrame, o: dict[str, Any]) -> tuple[pl.DataFrame, pl.DataFrame, dict[str, int]]:
    """The usable responses; the same with those of prompts that have too few; rows dropped for each reason."""
    if o["truncated_column"] == "auto":
        has = "finish_reason" in frame.columns
        truncated = pl.col("finish_reason").cast(pl.String) == "length" if has else pl.lit(False)
    else:
        truncated = pl.lit(False) if o["truncated_column"] is None else pl.col(o["truncated_column"])
    columns = {
        "p": _plain(frame, o["prompt_column"]),
        "r": pl.col(o["reward_column"]).cast(pl.Float64),
        "l": pl.col(o["length_column"]).cast(pl.Int64),
        "finite": pl.col(o["reward_column"]).cast(pl.Float32, strict=False).is_finite(),
        "truncated": truncated.fill_null(False),
    }
    for role in ("duplicate", "policy", "second_reward"):
        if o[f"{role}_column"] is not None:
            columns[role] = _plain(frame, o[f"{role}_column"])
    least = o["min_length"] or 0
    if o["debias"] == "per_token":
        least = max(least, 1)
    most = 2**32 if o["max_length"] is None else o["max_length"]
    rows = frame.select(**columns).with_row_index("row").with_columns(pl.col("row").cast(pl.UInt64))
    rows = rows.with_columns(h=tie_hashes(frame, o))
    tests = {
        "null": pl.col("r").is_null() | pl.col("l").is_null(),
        "not_finite": ~pl.col("finite"),
        "truncated": pl.col("truncated"),
        "too_short": pl.col("l") < least,
        "too_long": pl.col("l") > most,
    }
    dropped = {}
    for reason, test in tests.items():
        kept = rows.filter(~test)
        dropped[reason] = rows.height - kept.height
        rows = kept
    kept = rows
    if o["duplicate_column"] is not None:
        first = pl.col("row") == pl.col("row").min().over("p", "duplicate")
        kept = rows.filter(pl.col("duplicate").is_null() | first)
    dropped["duplicate"] = rows.height - kept.height
    enough = kept.filter(pl.len().over("p") >= o["min_responses"])
    dropped["too_few_responses"] = kept.height - enough.height
    return enough, kept, dropped


# --- scores and orders --------------------------------------------------------------------------------------


def exact_score(rows: pl.DataFrame, alpha: float) -> pl.Series:
    """`r - alpha * l` times a power of two, as integers in the order of the exact scores and of their differences."""
    if rows.is_empty():
        return pl.Series([], dtype=pl.Int128)
    shift = max(value.as_integer_ratio()[1].bit_length() - 1 for value in rows["r"].unique())
    longest = int(rows["l"].max()).bit_length()  # type: ignore[arg-type]
    if 0 < alpha < 2.0 ** -(shift + longest + 1):
        # Less than half a unit of the rewards for the longest: rewards come first, whatever alpha is (5e-324, say).
        alpha = 2.0 ** -(shift + longest + 1)
    over, under = alpha.as_integer_ratio()
    power = under.bit_length() - 1
    integers = (rows["r"] * 2.0**shift).cast(pl.Int64)
    widest = max(abs(v) for v in (integers.min(), integers.max())).bit_length()  # type: ignore[arg-type]
    assert max(widest + power, longest + over.bit_length() + shift) < 126, "too wide for 128 bits"
    wide = rows.select(integers.cast(pl.Int128).alias("w"), pl.col("l").cast(pl.Int128))
    left = pl.col("w") * pl.lit(2**power, dtype=pl.Int128)
    return wide.select(left - pl.col("l") * pl.lit(over * 2**shift, dtype=pl.Int128)).to_series()


def _bucket_score(rows: pl.DataFrame, kept: pl.DataFrame, buckets: int, scale: bool) -> pl.Series:
    lengths = kept["l"].sort()
    cuts = [lengths[math.ceil(j * kept.height / buckets) - 1] for j in range(1, buckets)] if kept.height else []
    number = sum(((pl.col("l") > cut).cast(pl.Int32) for cut in cuts), pl.lit(0, dtype=pl.Int32))
    stats = kept.group_by(number.alias("b")).agg(m=pl.col("r").mean(), d=pl.col("r").std(ddof=0))
    joined = rows.with_columns(number.alias("b")).join(stats, on="b", how="left", maintain_order="left")
    centred = pl.col("r") - pl.col("m")
    scaled = pl.when(pl.col("d") > 0).then(centred / pl.col("d")).otherwise(centred)
    return joined.select(scaled if scale else centred).to_series()


def scored(rows: pl.DataFrame, kept: pl.DataFrame, o: dict[str, Any]) -> pl.DataFrame:
    """`rows` with `s` and `x`."""
    debias = o["debias"]
    if debias == "linear":
        return rows.with_columns(s=pl.col("r") - o["alpha"] * pl.col("l"), x=exact_score(rows, o["alpha"]))
    if debias == "bucket":
        score = _bucket_score(rows, kept, o["buckets"], o["bucket_scale"])
        return rows.with_columns(s=score, x=score)
    score = pl.col("r") / pl.col("l") if debias == "per_token" else pl.col("r")
    return rows.with_columns(s=score, x=score)


def best_first(rows: pl.DataFrame) -> pl.DataFrame:
    """Responses of equal score and reward stand together, where the shortest of them would, in the order of hashes."""
    group = pl.col("l").min().over("p", "x", "r")
    order = rows.sort("p", 0 - pl.col("x"), group, -pl.col("r"), "h", "row")
    return order.with_columns(rank=pl.int_range(pl.len()).over("p"))


def worst_first(rows: pl.DataFrame) -> pl.DataFrame:
    group = pl.col("l").max().over("p", "x", "r")
    order = rows.sort("p", "x", -group, "r", "h", "row")
    return order.with_columns(rank=pl.int_range(pl.len()).over("p"))


def sides(rows: pl.DataFrame, o: dict[str, Any]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """C and R."""
    tests = {
        "any": pl.lit(True),
        "newest": pl.col("policy") == pl.col("policy").max().over("p") if "policy" in rows.columns else pl.lit(True),
        "oldest": pl.col("policy") == pl.col("policy").min().over("p") if "policy" in rows.columns else pl.lit(True),
    }
    return rows.filter(tests[o["chosen_from"]]), rows.filter(tests[o["rejected_from"]])


BEATS = (pl.col("r") != pl.col("r_r")) & (
    (pl.col("x") > pl.col("x_r"))
    | (
        (pl.col("x") == pl.col("x_r"))
        & ((pl.col("l") < pl.col("l_r")) | ((pl.col("l") == pl.col("l_r")) & (pl.col("r") > pl.col("r_r"))))
    )
)
TIED = (pl.col("r") == pl.col("r_r")) & (pl.col("row") != pl.col("row_r"))


def _meet(chosen: pl.DataFrame, rejected: pl.DataFrame) -> pl.DataFrame:
    """Each of `chosen` with each of `rejected` of its prompt that it beats."""
    return chosen.join(rejected, on="p", suffix="_r").filter(BEATS)


# --- pairs --------------------------------------------------------------------------------------------------


def splitmix64(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def _keys(frame: pl.DataFrame, o: dict[str, Any]) -> pl.DataFrame:
    """`p` and `key`, its number, for each row."""
    ids = frame.select(p=_plain(frame, o["prompt_column"]))
    return ids.with_columns(
        key=pl.col("p") if ids.schema["p"].is_integer() else pl.col("p").rank("dense").cast(pl.Int64)
    )


def tie_hashes(frame: pl.DataFrame, o: dict[str, Any]) -> pl.Series:
    """Of each row: the hash that decides among responses of equal score and reward."""
    places = _keys(frame, o).select("key", place=pl.int_range(pl.len()).over("p"))
    salt = splitmix64(o["seed"])
    hashes = [splitmix64(splitmix64(salt ^ (key & MASK)) ^ place) for key, place in places.iter_rows()]
    return pl.Series(hashes, dtype=pl.UInt64)


def _draw(met: pl.DataFrame, frame: pl.DataFrame, o: dict[str, Any]) -> pl.DataFrame:
    """Of each prompt's rejected, worst first, the one at its random index."""
    keys = dict(_keys(frame, o).unique().iter_rows())
    counts = met.group_by("p").len()
    index = [
        splitmix64(splitmix64(o["seed"]) ^ (keys[prompt] & MASK)) * count >> 64 for prompt, count in counts.iter_rows()
    ]
    chance = counts.select("p", at=pl.Series(index, dtype=pl.Int64))
    numbered = met.sort("p", "rank_r").with_columns(place=pl.int_range(pl.len()).over("p"))
    return numbered.join(chance, on="p").filter(pl.col("place") == pl.col("at"))


def max_min(c: pl.DataFrame, r: pl.DataFrame, allowed: pl.Expr = BEATS) -> pl.DataFrame:
    """The first of both orders; if they are of equal reward, the first of one order with the first of another reward in
    the other order: the pair of the greater margin, then of the lesser gap of lengths, then that with the best."""
    best, worst = c.filter(pl.col("rank") == 0), r.filter(pl.col("rank") == 0)
    ends = best.join(worst, on="p", suffix="_r")
    same = ends.filter(pl.col("r") == pl.col("r_r")).select("p", same="r")
    others = (side.join(same, on="p").filter(pl.col("r") != pl.col("same")).drop("same") for side in (c, r))
    other_c, other_r = (side.sort("p", "rank").group_by("p", maintain_order=True).head(1) for side in others)
    with_best, with_worst = best.join(other_r, on="p", suffix="_r"), other_c.join(worst, on="p", suffix="_r")
    found = pl.concat([ends.with_columns(order=pl.lit(0)), with_best.with_columns(order=pl.lit(1)),
                       with_worst.with_columns(order=pl.lit(2))], how="diagonal").filter(allowed)  # fmt: skip
    order = ["p", pl.col("x_r") - pl.col("x"), pl.col("l") - pl.col("l_r"), "order"]
    return found.sort(*order).group_by("p", maintain_order=True).head(1).drop("order")


def tied_pairs(c: pl.DataFrame, r: pl.DataFrame) -> int:
    """Pairs of equal reward, without regard to order."""
    met = c.join(r, on="p", suffix="_r").filter(TIED)
    return met.select(a=pl.min_horizontal("row", "row_r"), b=pl.max_horizontal("row", "row_r")).unique().height


def near_lengths(o: dict[str, Any]) -> pl.Expr:
    longer = pl.max_horizontal("l", "l_r")
    most = longer * o["length_ratio"] if o["length_tolerance"] is None else pl.lit(o["length_tolerance"])
    return (pl.col("l") - pl.col("l_r")).abs() <= most


def tied_prompts(rows: pl.DataFrame, picked: pl.DataFrame, o: dict[str, Any]) -> int:
    """Prompts without a pair that have two responses of equal reward where a pair is looked for."""
    c, r = sides(rows, o)
    met = c.join(r, on="p", suffix="_r").filter(TIED)
    if o["debias"] == "matched":
        met = met.filter(near_lengths(o))
    return met.join(picked, on="p", how="anti")["p"].n_unique()


def _pairs(rows: pl.DataFrame, frame: pl.DataFrame, o: dict[str, Any]) -> tuple[pl.DataFrame, int]:
    """The pairs, and how many were left out where a prompt can have several, since their rewards are equal."""
    c, r = sides(rows, o)
    c, r = best_first(c), worst_first(r)
    best = c.filter(pl.col("rank") == 0)
    gain = pl.col("r") - pl.col("r_r")
    if o["debias"] == "linear":
        margin = gain - o["alpha"] * (pl.col("l") - pl.col("l_r"))
    else:
        margin = gain if o["debias"] == "matched" else pl.col("s") - pl.col("s_r")
    pairing = o["pairing"]
    if o["debias"] == "matched":
        abs_diff = (pl.col("l") - pl.col("l_r")).abs()
        met = _meet(c, r).filter(near_lengths(o)).with_columns(margin=margin, abs_diff=abs_diff)
        order = met.sort("p", -pl.col("margin"), "abs_diff", "h", "row", "h_r", "row_r")
        return order.group_by("p", maintain_order=True).head(1), 0
    tied = 0
    if pairing == "max_min":
        met = max_min(c, r)
    elif pairing == "max_random":
        met = _draw(_meet(best, r), frame, o)
    elif pairing == "max_sweet_spot":
        middle = rows.group_by("p").agg(m=pl.col("s").mean(), d=pl.col("s").std(ddof=0))
        target = pl.col("m") - o["sweet_spot_deviations"] * pl.col("d")
        met = _meet(best, r).join(middle, on="p").with_columns(off=(pl.col("s_r") - target).abs())
        met = met.sort("p", "off", "rank_r").group_by("p", maintain_order=True).head(1)
    else:
        if pairing == "top_bottom":
            c, r = c.filter(pl.col("rank") < o["top_k"]), r.filter(pl.col("rank") < o["bottom_k"])
        met, tied = _meet(c, r), tied_pairs(c, r)
    met = met.with_columns(margin=margin).sort("p", "margin", "rank", "rank_r", descending=[False, True, False, False])
    if o["pairs_per_prompt"] is None:
        return met, tied
    return met.group_by("p", maintain_order=True).head(o["pairs_per_prompt"]), tied


def _consistency(rows: pl.DataFrame) -> pl.DataFrame:
    known = rows.with_columns(z=pl.col("second_reward").cast(pl.Float64)).filter(pl.col("z").is_finite())
    two = known.join(known, on="p", suffix="_b").filter(pl.col("row") < pl.col("row_b"))
    sign = (pl.col("r") - pl.col("r_b")).sign() * (pl.col("z") - pl.col("z_b")).sign()
    return two.group_by("p").agg(consistency=(sign.mean() + 1) / 2)


def _win_rates(rows: pl.DataFrame, scale: float) -> pl.DataFrame:
    each = rows.join(rows, on="p", suffix="_b")
    win = 1 / (1 + (-(pl.col("s") - pl.col("s_b")) / scale).exp())
    return each.group_by("row").agg(win=win.mean().cast(pl.Float32))


def _mean(series: pl.Series) -> float:
    return float(series.mean()) if series.count() else math.nan  # type: ignore[arg-type]


def expected(frame: pl.DataFrame, **options: Any) -> dict[str, Any]:
    """Everything of `MinedPairs` by its name. With debias="linear", `alpha` is a number: that of the miner."""
    o = with_defaults(options)
    assert o["debias"] != "linear" or isinstance(o["alpha"], float)
    rows, kept, dropped = usable_rows(frame, o)
    all_kept, rows = scored(kept, kept, o), scored(rows, kept, o)
    picked, tied = _pairs(rows, frame, o)
    ids = frame.select(p=_plain(frame, o["prompt_column"]))["p"]
    without = rows["p"].n_unique() - picked["p"].n_unique()
    pairs = picked.select(
        p="p", chosen_row="row", rejected_row="row_r",
        chosen_reward=pl.col("r").cast(pl.Float32), rejected_reward=pl.col("r_r").cast(pl.Float32),
        margin=pl.col("margin").cast(pl.Float32),
        chosen_length=pl.col("l").cast(pl.UInt32), rejected_length=pl.col("l_r").cast(pl.UInt32),
    )  # fmt: skip
    lost = {"tied": tied, "below_min_margin": 0, "below_quantile": 0}
    margin = pl.col("margin").cast(pl.Float64)
    if o["min_margin"] is not None:
        left = pairs.filter(margin >= o["min_margin"])
        lost["below_min_margin"], pairs = pairs.height - left.height, left
    if o["min_margin_quantile"] is not None and pairs.height:
        left = pairs.filter(margin >= margin.quantile(o["min_margin_quantile"], interpolation="linear"))
        lost["below_quantile"], pairs = pairs.height - left.height, left
    if o["win_rates"]:
        rates = _win_rates(rows, o["label_scale"])
        for side in ("chosen", "rejected"):
            named = rates.rename({"row": f"{side}_row", "win": f"{side}_win_rate"})
            pairs = pairs.join(named, on=f"{side}_row", how="left", maintain_order="left")
    if o["soft_labels"]:
        label = 1 / (1 + (-margin / o["label_scale"]).exp())
        pairs = pairs.with_columns(soft_label=label.cast(pl.Float32))
    if o["difficulty_quantile"] is not None:
        share = o["difficulty_quantile"]
        hard = margin < (float("inf") if share == 1 else margin.quantile(share, interpolation="linear"))
        label = pl.when(hard).then(pl.lit("hard")).otherwise(pl.lit("easy"))
        pairs = pairs.with_columns(difficulty=label.cast(pl.Enum(["easy", "hard"])))
    consistency = None
    if o["second_reward_column"] is not None:
        pairs = pairs.join(_consistency(rows), on="p", how="left", maintain_order="left")
        consistency = _mean(pairs.unique("p")["consistency"])
        pairs = pairs.with_columns(pl.col("consistency").cast(pl.Float32))
    if o["policy_column"] is not None:
        names = {f"{side}_policy": frame[o["policy_column"]].gather(pairs[f"{side}_row"]) for side in CHOICES}
        pairs = pairs.with_columns(**names)
    ids_of_pairs = frame[o["prompt_column"]].gather(pairs["chosen_row"]).alias("prompt_id")
    gap = pairs["chosen_length"].cast(pl.Int64) - pairs["rejected_length"].cast(pl.Int64)
    c, r = sides(rows, o)
    best = c.sort("p", -pl.col("r"), "l").group_by("p", maintain_order=True).head(1)
    worst = r.sort("p", "r", -pl.col("l")).group_by("p", maintain_order=True).head(1)
    by_reward = best.join(worst, on="p", suffix="_r").filter(pl.col("r") > pl.col("r_r"))
    tied_away = tied_prompts(rows, picked, o)
    name = "no_match" if o["debias"] == "matched" else "no_contrast"
    return {
        "pairs": pairs.drop("p").insert_column(0, ids_of_pairs),
        "dropped": dropped,
        "dropped_prompts": {
            "too_few_responses": ids.n_unique() - rows["p"].n_unique(),
            "tied": tied_away,
            name: without - tied_away,
        },
        "dropped_pairs": lost,
        "mean_length_gap_before": _mean(by_reward["l"] - by_reward["l_r"]),
        "mean_length_gap_after": _mean(gap),
        "chosen_longer_share": _mean((gap > 0).cast(pl.Float64)),
        "reward_length_correlation_before": all_kept.select(pl.corr("r", "l")).item() if all_kept.height else math.nan,
        "reward_length_correlation_after": all_kept.select(pl.corr("s", "l")).item() if all_kept.height else math.nan,
        "mean_consistency": consistency,
        "margin_quantiles": {k: _quantile(pairs["margin"], k) for k in QUANTILES},
        "prompts": ids.n_unique(),
        "rows": frame.height,
    }


def _quantile(margins: pl.Series, name: str) -> float:
    at = {"min": 0.0, "max": 1.0}.get(name)
    value = margins.cast(pl.Float64).quantile(float(name) if at is None else at, interpolation="linear")
    return math.nan if value is None else value
