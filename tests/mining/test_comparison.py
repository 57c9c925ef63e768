"""Comparisons of minings: each variant is what `mine_pairs` makes, the overlaps are those of the sets of pairs, and the
options that only some variants take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import dice_py
from dice_py.config.mining import MiningOptions
from dice_py.errors import DataError, UsageError
from dice_py.mining.comparison import compare_files, compare_mining
from dice_py.mining.parquet_input import ScoredFiles
from dice_py.mining.variants import combinations, make_variants, parse_axes
from dice_py.storage.parquet import parquet_meta, read_parquet

DEBIAS = [{"debias": name} for name in ("none", "linear", "bucket", "matched")]


def scored(prompts: int = 40, samples: int = 8) -> pl.DataFrame:
    """Responses whose reward grows with their length, in random order; two columns of rewards and one of text."""
    rng = np.random.default_rng(7)
    rows = prompts * samples
    length = rng.integers(1, 60, rows)
    return pl.DataFrame(
        {
            "prompt_id": rng.permutation(np.arange(rows) // samples),
            "reward": (rng.normal(size=rows) + 0.05 * length).round(2),
            "other": rng.normal(size=rows),
            "response_tokens": length,
            "response": [f"answer {n}" for n in rng.integers(0, 30, rows)],
        }
    )


def pair_set(pairs: pl.DataFrame) -> set[tuple[Any, ...]]:
    return set(pairs.select("prompt_id", "chosen_row", "rejected_row").iter_rows())


@pytest.mark.parametrize(
    ("options", "variants"),
    [
        ({"length_tolerance": 3}, DEBIAS),
        ({}, [{"pairing": "max_min"}, {"pairing": "all_pairs", "pairs_per_prompt": 5}, {"pairing": "top_bottom"}]),
        ({}, [{"reward_column": "reward"}, {"reward_column": "other"}, {"prompt_column": "response"}]),
        ({"min_responses": 3}, [{"duplicate_column": None}, {"duplicate_column": "response"}, {"max_length": 20}]),
        ({"second_reward_column": "other"}, [{"win_rates": True, "soft_labels": True}, {"min_margin_quantile": 0.5}]),
        ({}, [{"min_length": 1000}, {"min_length": 0}]),
    ],
)
def test_each_variant_is_what_mine_pairs_makes(options: dict[str, Any], variants: list[dict[str, Any]]) -> None:
    frame = scored()
    compared = dice_py.compare_mining(frame, options, variants)
    assert [variant.settings for variant in compared.variants] == variants
    sets, chosen = [], []
    for variant, mined in zip(variants, compared.mined, strict=True):
        given = {**options, **variant}
        if given.get("debias", "matched") != "matched":
            given.pop("length_tolerance", None)
        alone = dice_py.mine_pairs(frame, **given)
        assert mined is not None
        assert mined.pairs.equals(alone.pairs)
        assert mined.summary() == alone.summary()
        sets.append(pair_set(alone.pairs))
        best: dict[Any, set[int]] = {}
        for prompt, row, _ in sets[-1]:
            best.setdefault(prompt, set()).add(row)
        chosen.append(best)
    for at, one in enumerate(variants):
        for to, other in enumerate(variants):
            union = sets[at] | sets[to]
            if one.get("prompt_column") == other.get("prompt_column"):  # else the rows are the same, but no prompt is
                assert compared.overlap[at][to] == (len(sets[at] & sets[to]) / len(union) if union else None)
                both = chosen[at].keys() & chosen[to].keys()
                same = sum(bool(chosen[at][prompt] & chosen[to][prompt]) for prompt in both)
                assert compared.same_chosen[at][to] == (same / len(both) if both else None)
            else:
                assert compared.same_chosen[at][to] is None
    summary = json.loads(json.dumps(compared.summary(), allow_nan=False))
    assert [entry["prompts_with_pair"] for entry in summary["variants"]] == list(map(len, chosen))


def test_a_variant_that_contradicts_itself_does_not_hide_the_others() -> None:
    compared = compare_mining(scored(), None, DEBIAS)
    assert [mined is None for mined in compared.mined] == [False, False, False, True]
    assert compared.variants[3].error == (
        "debias 'matched' needs one of length_tolerance and length_ratio: set one of them"
    )
    assert [row[3] for row in compared.overlap] == [row[3] for row in compared.same_chosen] == [None] * 4
    assert compared.summary()["variants"][3] == {
        "variant": "debias=matched", "settings": {"debias": "matched"}, "error": compared.variants[3].error,
    }  # fmt: skip


def test_options_that_a_variant_does_not_take_are_left_out_of_it() -> None:
    axes = {"debias": ["linear", "matched"], "length_tolerance": [2, 5], "pairing": ["max_min", "all_pairs"]}
    made = make_variants({"pairs_per_prompt": 3}, combinations(axes))
    assert [(variant.name, variant.error is None) for variant in made] == [
        ("debias=linear pairing=max_min", True),
        ("debias=linear pairing=all_pairs", True),
        ("debias=matched length_tolerance=2 pairing=max_min", True),
        ("debias=matched length_tolerance=2 pairing=all_pairs", False),
        ("debias=matched length_tolerance=5 pairing=max_min", True),
        ("debias=matched length_tolerance=5 pairing=all_pairs", False),
    ]
    assert made[1].options == MiningOptions(pairing="all_pairs", pairs_per_prompt=3)
    assert made[2].options == MiningOptions(debias="matched", length_tolerance=2)
    # An object with all options is a base, too.
    base = MiningOptions(debias="matched", length_ratio=0.5)
    made = make_variants(base.model_dump(), [{"debias": "none"}, {"debias": "matched"}])
    assert [variant.options for variant in made] == [MiningOptions(debias="none"), base]


@pytest.mark.parametrize(
    ("texts", "axes"),
    [
        (["debias=none,linear"], {"debias": ["none", "linear"]}),
        (["alpha=auto, 0.5,1e-3"], {"alpha": ["auto", 0.5, 0.001]}),
        (["max-length=null,7", "--bucket-scale=true,false"], {"max_length": [None, 7], "bucket_scale": [True, False]}),
        (["truncated_column=auto,none"], {"truncated_column": ["auto", None]}),
        (["reward_column=01,'a,b',yes,null"], {"reward_column": ["01", "a,b", "yes", None]}),
        (["debias=liner,1"], {"debias": ["liner", 1]}),
    ],
)
def test_values_are_read_as_those_of_set(texts: list[str], axes: dict[str, list[Any]]) -> None:
    assert parse_axes(texts) == axes


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["debias"], "write it as --compare option=value,value"),
        (["debias="], "write it as --compare option=value,value"),
        (["debias=[none]"], "has lists or mappings"),
        (["debias=a: 1"], "has lists or mappings"),
        (["debias=a]"], "is not valid YAML"),
        (["debas=none"], "'debas' is no option of mining; did you mean 'debias'?"),
        (["zzz=none"], "'zzz' is no option of mining; the options are prompt_column, "),
        (["debias=none", "debias=linear"], "has debias twice"),
    ],
)
def test_wrong_texts_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_axes(texts)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("base", "variants", "message"),
    [
        ({}, [], "there is no variant to compare"),
        ({}, [{"seed": seed} for seed in range(101)], "101 variants are more than a table can show"),
        ({"debas": 1}, [{}], "'debas' is no option of mining; did you mean 'debias'"),
        ({}, [{"debias": "none"}, {"debias": "liner"}], "debias is 'liner', but must be one of none, linear"),
        ({}, [{"buckets": True}], "buckets is True, but must be an integer"),
        ({}, [{"debias": "matched"}], "debias 'matched' needs one of length_tolerance"),
        ({"length_ratio": 0.1}, DEBIAS[:3], "length_ratio is for debias 'matched', which no variant has: leave it out"),
        ({"length_ratio": 0.1}, [{"seed": 1}, {"seed": 2}], "length_ratio is for debias 'matched', but debias is 'lin"),
    ],
)
def test_wrong_variants_are_refused(base: dict[str, Any], variants: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        compare_mining(scored(), base, variants)
    assert message in str(caught.value)


# Files


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    frame = scored()
    for number, part in enumerate((frame[:100], frame[100:])):
        part.write_parquet(tmp_path / f"scored-{number}.parquet")
    return [str(tmp_path / f"scored-{number}.parquet") for number in range(2)]


def test_files_are_read_once(files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[list[str]] = []
    batches = ScoredFiles.batches

    def counted(self: ScoredFiles, columns: list[str], *others: Any) -> Any:
        reads.append(columns)
        return batches(self, columns, *others)

    monkeypatch.setattr(ScoredFiles, "batches", counted)
    progress: list[int] = []
    before = sorted(tmp_path.iterdir())
    compared = compare_files(
        files, {"length_tolerance": 3}, DEBIAS, report=lambda event, **fields: progress.append(fields["done"])
    )
    assert reads == [["prompt_id", "reward", "response_tokens"]]
    assert progress == [0, 1, 2, 3, 4]
    assert sorted(tmp_path.iterdir()) == before
    assert compared.summary() == compare_mining(scored(), {"length_tolerance": 3}, DEBIAS).summary()


def test_out_has_the_pairs_of_all_variants(files: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out" / "pairs.parquet"
    variants = [{"debias": "none"}, {"debias": "matched"}, {"win_rates": True}]
    compared = compare_files(files, None, variants, out=out)
    written = read_parquet(out)
    assert written.columns[:2] == ["variant", "prompt_id"]
    assert set(written["variant"]) == {"debias=none", "win_rates=true"}
    for variant, mined in zip(compared.variants, compared.mined, strict=True):
        if mined is not None:
            own = written.filter(pl.col("variant") == variant.name)
            assert own.select(mined.pairs.columns).equals(mined.pairs)
    assert written.filter(pl.col("variant") == "debias=none")["chosen_win_rate"].null_count() == 40
    assert parquet_meta(out) == json.loads(json.dumps({**compared.summary(), "files": files}))


def test_errors_of_files_name_them(files: list[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"320 rows are more than --memory \(memory_gib\) of 1e-06 GiB holds"):
        compare_files(files, None, DEBIAS, memory_gib=1e-6)
    with pytest.raises(DataError, match=r"scored-0\.parquet, …: column 'none' not found"):
        compare_files(files, None, [{"reward_column": "reward"}, {"reward_column": "none"}])
    with pytest.raises(DataError, match=r"…: reward_column=response: reward column 'response' has dtype String"):
        compare_files(files, None, [{"reward_column": "reward"}, {"reward_column": "response"}])
    with pytest.raises(UsageError, match="is one of the files to be mined"):
        compare_files(files, None, DEBIAS, out=Path(files[0]))
