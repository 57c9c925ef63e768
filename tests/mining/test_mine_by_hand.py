"""Small examples of each of the miner's options, worked out by hand: the oracle and the miner must both agree."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from mine_oracle import expected, splitmix64
from mine_penalty_oracle import Choices

from dice_py import mine_pairs

# Best first by reward: rows 0, 1, 2, 4, 3; worst first: 3, 4, 1, 2, 0. Of 1 and 2, which have equal rewards, 1 has the
# lesser hash: of six rows of prompt 1 and seed 0, the hashes are in the order 3, 0, 1, 5, 2, 4.
FIVE = pl.DataFrame(
    {"prompt_id": [1] * 5, "reward": [4.0, 2.0, 2.0, -1.0, 0.0], "response_tokens": [40, 10, 20, 30, 20]}
)


@pytest.fixture(params=["oracle", "miner"])
def who(request: pytest.FixtureRequest) -> Any:
    def ask(frame: pl.DataFrame, **options: Any) -> Any:
        options = {"debias": "none"} | options
        return (
            mine_pairs(frame, **options) if request.param == "miner" else SimpleNamespace(**expected(frame, **options))
        )

    return ask


def rows(mined: Any) -> list[tuple[int, int]]:
    pairs: list[tuple[int, int]] = mined.pairs.select("chosen_row", "rejected_row").rows()
    return pairs


def frame(reward: list[Any], length: list[Any], **columns: Any) -> pl.DataFrame:
    """One prompt, unless there is a `prompt_id`."""
    return pl.DataFrame({"prompt_id": [1] * len(reward), "reward": reward, "response_tokens": length} | columns)


def test_max_min(who: Any) -> None:
    mined = who(FIVE)
    assert rows(mined) == [(0, 3)]
    assert mined.pairs.row(0) == (1, 0, 3, 4.0, -1.0, 5.0, 40, 30)
    # Less 0.125 a token: -1, 0.75, -0.5, -4.75, -2.5.
    assert rows(who(FIVE, debias="linear", alpha=0.125)) == [(1, 3)]
    assert who(FIVE, debias="linear", alpha=0.125).pairs["margin"].to_list() == [5.5]


def test_per_token(who: Any) -> None:
    # 0.1, 0.2, 0.1, -1/30, 0 for each token.
    mined = who(FIVE, debias="per_token")
    assert rows(mined) == [(1, 3)]
    assert mined.pairs["margin"].to_list() == [pytest.approx(0.2 + 1 / 30)]
    # No length to divide by: too short, whatever min_length says.
    empty = frame([9.0, 1.0, 2.0], [0, 1, 4])
    assert rows(who(empty, debias="per_token", min_length=0)) == [(1, 2)]
    assert who(empty, debias="per_token").dropped["too_short"] == 1
    # An empty response is chosen only if that is asked for.
    assert who(empty).dropped["too_short"] == 1
    assert rows(who(empty)) == [(2, 1)]
    assert who(empty, min_length=0).dropped["too_short"] == 0
    assert rows(who(empty, min_length=0)) == [(0, 1)]


def test_per_token_ties_go_to_the_shorter(who: Any) -> None:
    # 1, 1, 0.5, 0.5 for each token. Best first: 1, 0, 2, 3. Worst first: 3, 2, 0, 1.
    mined = who(frame([4.0, 2.0, 1.0, 2.0], [4, 2, 2, 4]), debias="per_token", pairing="all_pairs")
    assert rows(mined) == [(1, 2), (0, 3), (0, 2), (1, 0), (2, 3)]
    # Rows 1 and 3 have equal rewards, if not for each token.
    assert mined.dropped_pairs["tied"] == 1


def test_a_tie_of_rounded_scores_goes_by_the_reward(who: Any) -> None:
    low, high = math.nextafter(2, 0), 2.0
    assert low / 3 == high / 3
    mined = who(frame([low, high, low], [3, 3, 3]), debias="per_token", pairing="all_pairs")
    assert rows(mined) == [(1, 0), (1, 2)]
    assert mined.pairs["margin"].to_list() == [0.0, 0.0]


def test_top_bottom(who: Any) -> None:
    mined = who(FIVE, pairing="top_bottom")
    assert rows(mined) == [(0, 3), (0, 4), (1, 3), (1, 4)]
    assert mined.pairs["margin"].to_list() == [5, 4, 3, 2]
    assert rows(who(FIVE, pairing="top_bottom", pairs_per_prompt=3)) == [(0, 3), (0, 4), (1, 3)]
    assert rows(who(FIVE, pairing="top_bottom", top_k=1, bottom_k=3)) == [(0, 3), (0, 4), (0, 1)]
    # Where both reach into the middle, no response meets itself, nor one that it does not beat.
    assert rows(who(FIVE[:2], pairing="top_bottom", top_k=9, bottom_k=9)) == [(0, 1)]


ALL = [(0, 3), (0, 4), (1, 3), (2, 3), (0, 1), (0, 2), (1, 4), (2, 4), (4, 3)]


def test_all_pairs(who: Any) -> None:
    mined = who(FIVE, pairing="all_pairs")
    assert rows(mined) == ALL
    assert mined.pairs["margin"].to_list() == [5, 4, 3, 3, 2, 2, 2, 2, 1]
    assert mined.dropped_pairs["tied"] == 1
    assert mined.chosen_longer_share == 4 / 9
    assert mined.mean_length_gap_after == (10 + 20 - 20 - 10 + 20 + 30 - 10 + 0 - 10) / 9
    assert mined.mean_length_gap_before == 10
    assert rows(who(FIVE, pairing="all_pairs", pairs_per_prompt=4)) == ALL[:4]
    assert rows(who(FIVE, pairing="top_bottom", top_k=5, bottom_k=5)) == ALL


def test_max_sweet_spot(who: Any) -> None:
    # Mean 1.4, population deviation 1.744: the targets are -2.09, -0.34 and 1.4.
    assert rows(who(FIVE, pairing="max_sweet_spot")) == [(0, 3)]
    assert rows(who(FIVE, pairing="max_sweet_spot", sweet_spot_deviations=1.0)) == [(0, 4)]
    # Rows 1 and 2 are as near; worst first, 1 comes before 2.
    assert rows(who(FIVE, pairing="max_sweet_spot", sweet_spot_deviations=0.0)) == [(0, 1)]
    # 0 and 2 lie as near to the mean of 1: the worse is taken.
    near = frame([0.0, 2.0, 3.0, -1.0], [1, 1, 1, 1])
    assert rows(who(near, pairing="max_sweet_spot", sweet_spot_deviations=0.0)) == [(2, 0)]


def test_splitmix64_is_the_published_one() -> None:
    # Vigna's splitmix64.c from states 0 and 1234567.
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(1234567) == 6457827717110365317


def test_max_random(who: Any) -> None:
    # By prompt and seed, the upper two bits of splitmix64(splitmix64(seed) ^ prompt) name one of four.
    for prompt in (0, 1, 2, 3, -1, 10**18):
        data = FIVE.with_columns(prompt_id=pl.lit(prompt, dtype=pl.Int64))
        for seed in (0, 1, 2**64 - 1):
            index = splitmix64(splitmix64(seed) ^ (prompt % 2**64)) >> 62
            ties = [splitmix64(splitmix64(splitmix64(seed) ^ (prompt % 2**64)) ^ row) for row in (1, 2)]
            middle = [1, 2] if ties[0] < ties[1] else [2, 1]
            assert rows(who(data, pairing="max_random", seed=seed)) == [(0, [3, 4, *middle][index])]
    drawn = [rows(who(FIVE, pairing="max_random", seed=seed))[0][1] for seed in range(40)]
    assert set(drawn) == {1, 2, 3, 4}


def test_max_random_of_text_prompts_goes_by_their_rank(who: Any) -> None:
    named = pl.concat([FIVE.with_columns(prompt_id=pl.lit(name)) for name in ("b", "a", "c")])
    numbered = pl.concat([FIVE.with_columns(prompt_id=pl.lit(number)) for number in (2, 1, 3)])
    for seed in range(5):
        drawn = rows(who(named, pairing="max_random", seed=seed))
        assert drawn == rows(who(numbered, pairing="max_random", seed=seed))
        assert [chosen for chosen, _ in drawn] == [5, 0, 10]


def test_matched(who: Any) -> None:
    for bound in ({"length_tolerance": 10}, {"length_ratio": 0.25}, {"length_ratio": 1.0}, {"length_tolerance": 30}):
        assert rows(who(FIVE, debias="matched", **bound)) == [(0, 3)]
    for bound in ({"length_tolerance": 9}, {"length_tolerance": 0}, {"length_ratio": 0.2}, {"length_ratio": 0.0}):
        mined = who(FIVE, debias="matched", **bound)
        assert rows(mined) == [(2, 4)]
        assert mined.pairs["margin"].to_list() == [2.0]
    two = frame([1.0, 0.0, 5.0, 5.0], [1, 9, 3, 3], prompt_id=[1, 1, 2, 2])
    dropped = who(two, debias="matched", length_tolerance=7).dropped_prompts
    assert (dropped["no_match"], dropped["tied"]) == (1, 1)
    assert rows(who(two, debias="matched", length_tolerance=8)) == [(0, 1)]


def test_matched_ties(who: Any) -> None:
    # Of pairs with the same margin: the least difference in length, then the lesser hash.
    assert rows(who(frame([1.0, 1.0, 0.0], [7, 5, 4]), debias="matched", length_tolerance=9)) == [(1, 2)]
    assert rows(who(frame([0.0, 1.0, 1.0], [4, 5, 3]), debias="matched", length_tolerance=9)) == [(1, 0)]
    assert rows(who(frame([1.0, 0.0, 0.0], [4, 3, 5]), debias="matched", length_tolerance=9)) == [(0, 1)]
    assert rows(who(frame([0.0, 0.0], [4, 3]), debias="matched", length_tolerance=9)) == []


def test_duplicates_count_once(who: Any) -> None:
    values = {
        "text": ["a", "b", "a", None, None],
        "number": [7, -7, 7, None, None],
        "tokens": [[1, 2], [2, 1], [1, 2], None, None],
    }
    data = FIVE.with_columns(pl.Series(name, value) for name, value in values.items())
    for name in values:
        # Row 2 repeats row 0. Rows 3 and 4 hold nulls, which are equal to nothing.
        mined = who(data, duplicate_column=name, pairing="all_pairs")
        assert mined.dropped["duplicate"] == 1
        assert rows(mined) == [pair for pair in ALL if 2 not in pair]
    # A row that is dropped for another reason makes no other row a duplicate.
    first_is_cut = data.with_columns(finish_reason=pl.Series(["length", "stop", "stop", "stop", "stop"]))
    mined = who(first_is_cut, duplicate_column="text", pairing="all_pairs")
    assert (mined.dropped["truncated"], mined.dropped["duplicate"]) == (1, 0)
    # The same text under two prompts is no duplicate; and what is left must be enough.
    two = frame([1.0, 2.0, 3.0, 4.0], [1, 2, 3, 4], prompt_id=[1, 1, 2, 2], text=["a", "a", "a", "b"])
    mined = who(two, duplicate_column="text")
    assert rows(mined) == [(3, 2)]
    assert (mined.dropped["duplicate"], mined.dropped["too_few_responses"]) == (1, 1)
    assert mined.dropped_prompts["too_few_responses"] == 1


def test_policies(who: Any) -> None:
    data = FIVE.with_columns(policy=pl.Series([9, 10, 10, 9, 9], dtype=pl.Int16))
    mined = who(data, policy_column="policy")
    assert rows(mined) == [(0, 3)]
    assert mined.pairs.select("chosen_policy", "rejected_policy").row(0) == (9, 9)
    assert mined.pairs.schema["chosen_policy"] == pl.Int16
    assert rows(who(data, policy_column="policy", chosen_from="newest")) == [(1, 3)]
    of_equal_reward = who(data, policy_column="policy", chosen_from="newest", rejected_from="newest")
    assert rows(of_equal_reward) == []
    assert of_equal_reward.dropped_prompts["tied"] == 1
    assert rows(who(data, policy_column="policy", rejected_from="newest")) == [(0, 1)]
    policies: dict[str, Any] = {"policy_column": "policy", "chosen_from": "newest", "rejected_from": "oldest"}
    assert rows(who(data, pairing="all_pairs", **policies)) == [(1, 3), (2, 3), (1, 4), (2, 4)]
    # As text "10" is less than "9".
    text = data.with_columns(pl.col("policy").cast(pl.String))
    assert rows(who(text, policy_column="policy", chosen_from="oldest")) == [(1, 3)]
    assert who(text, policy_column="policy").pairs.schema["rejected_policy"] == pl.String
    # The newest is the newest of each prompt's usable responses.
    cut = data.with_columns(cut=pl.Series([False, True, True, False, False]))
    assert rows(who(cut, policy_column="policy", chosen_from="newest", truncated_column="cut")) == [(0, 3)]


def test_the_best_of_the_newest_may_beat_nothing(who: Any) -> None:
    data = frame([1.0, 5.0], [3, 3], policy=[2, 1])
    mined = who(data, policy_column="policy", chosen_from="newest", rejected_from="oldest")
    assert rows(mined) == []
    assert mined.dropped_prompts["no_contrast"] == 1
    assert math.isnan(mined.mean_length_gap_before)


def test_the_penalty_follows_the_policies() -> None:
    # Below 0.1 the best of the newest is 30 long, from there on 10, as long as the oldest.
    data = frame([3.0, 1.0, 0.0], [30, 10, 10], policy=[2, 2, 1])
    options: dict[str, Any] = {"policy_column": "policy", "chosen_from": "newest", "rejected_from": "oldest"}
    assert Choices(data, **options).least_gap() == 0
    mined = mine_pairs(data, **options)
    assert (mined.alpha_low, mined.alpha_high) == (0.1, math.inf)
    assert mined.alpha is not None
    assert 0.1 <= mined.alpha < math.inf
    assert rows(mined) == [(1, 2)]


def test_min_margin(who: Any) -> None:
    mined = who(FIVE, pairing="all_pairs", min_margin=2.0)
    assert rows(mined) == ALL[:8]
    assert mined.dropped_pairs["below_min_margin"] == 1
    # After the cap.
    mined = who(FIVE, pairing="all_pairs", min_margin=4.5, pairs_per_prompt=2)
    assert rows(mined) == ALL[:1]
    assert mined.dropped_pairs["below_min_margin"] == 1
    # Of 5, 4, 3, 3, 2, 2, 2, 2, 1 the median is 2, and the upper quarter begins at 3.
    mined = who(FIVE, pairing="all_pairs", min_margin_quantile=0.75)
    assert rows(mined) == ALL[:4]
    assert mined.dropped_pairs["below_quantile"] == 5
    # Of what is left: of 5, 4, 3, 3 the upper half begins at 3.5.
    mined = who(FIVE, pairing="all_pairs", min_margin=2.5, min_margin_quantile=0.5)
    assert rows(mined) == ALL[:2]
    assert (mined.dropped_pairs["below_min_margin"], mined.dropped_pairs["below_quantile"]) == (5, 2)
    assert rows(who(FIVE, min_margin=6.0)) == []
    # It is the stored margin that counts: in float32, 0.7 is a little less and 0.1 a little more.
    assert rows(who(frame([0.7, 0.0], [3, 3]), min_margin=0.7)) == []
    assert rows(who(frame([0.1, 0.0], [3, 3]), min_margin=0.1)) == [(0, 1)]


def test_win_rates(who: Any) -> None:
    mined = who(frame([1.0, 0.0], [5, 5]), win_rates=True)
    assert mined.pairs["chosen_win_rate"].to_list() == [pytest.approx((0.5 + 0.7310586) / 2)]
    assert mined.pairs["rejected_win_rate"].to_list() == [pytest.approx((0.5 + 0.2689414) / 2)]
    # The score is what is compared, and responses in neither place count.
    mined = who(frame([1.0, 0.0, -1.0], [2, 1, 4]), debias="linear", alpha=1.0, win_rates=True, label_scale=2.0)
    # Scores -1, -1, -5.
    assert rows(mined) == [(1, 2)]
    assert mined.pairs["chosen_win_rate"].to_list() == [pytest.approx((0.5 + 0.5 + 0.8807971) / 3)]
    assert mined.pairs["rejected_win_rate"].to_list() == [pytest.approx((0.5 + 2 * 0.1192029) / 3)]


def test_soft_labels(who: Any) -> None:
    data = frame([1.0, 0.0], [5, 5])
    assert who(data, soft_labels=True).pairs["soft_label"].to_list() == [pytest.approx(0.7310586)]
    assert who(data, soft_labels=True, label_scale=0.5).pairs["soft_label"].to_list() == [pytest.approx(0.8807971)]


def test_difficulty(who: Any) -> None:
    data = frame([0.0, 1.0, 0.0, 2.0, 0.0, 3.0, 0.0, 4.0], [5] * 8, prompt_id=[1, 1, 2, 2, 3, 3, 4, 4])
    labels = {0.0: "easy " * 4, 0.5: "hard hard easy easy", 0.99: "hard hard hard easy", 1.0: "hard " * 4}
    for quantile, words in labels.items():
        mined = who(data, difficulty_quantile=quantile)
        assert mined.pairs["difficulty"].to_list() == words.split()
        assert mined.pairs.schema["difficulty"] == pl.Enum(["easy", "hard"])
    # Of the final pairs: 3 and 4.
    assert who(data, difficulty_quantile=0.5, min_margin=2.5).pairs["difficulty"].to_list() == ["hard", "easy"]


def test_consistency(who: Any) -> None:
    nan = math.nan
    cases = [
        ([3.0, 2.0, 1.0, 0.0], [10.0, 30.0, 20.0, nan], 1 / 3),  # one pair of three agrees
        ([3.0, 2.0, 1.0, 0.0], [4.0, 3.0, 2.0, 1.0], 1.0),
        ([3.0, 2.0, 1.0, 0.0], [1.0, 2.0, 3.0, 4.0], 0.0),
        ([3.0, 2.0, 2.0, 0.0], [3.0, 2.0, 1.0, 1.0], (4 / 6 + 1) / 2),  # two ties
        ([3.0, 2.0, 1.0, 0.0], [1.0, None, math.inf, nan], None),
    ]
    for reward, second, value in cases:
        data = frame(reward, [1, 2, 3, 4], second=pl.Series(second, strict=False))
        mined = who(data, second_reward_column="second")
        assert mined.pairs["consistency"].to_list() == [None if value is None else pytest.approx(value)]
        assert mined.mean_consistency == pytest.approx(nan if value is None else value, nan_ok=True)
    # Each prompt once, however many pairs it gives.
    two = frame([3.0, 2.0, 1.0, 0.0, 1.0], [1] * 5, prompt_id=[1, 1, 1, 2, 2], second=[3.0, 2.0, 1.0, 1.0, 0.0])
    mined = who(two, second_reward_column="second", pairing="all_pairs")
    assert mined.pairs["consistency"].to_list() == [1.0, 1.0, 1.0, 0.0]
    assert mined.mean_consistency == 0.5
    assert who(two).mean_consistency is None


def test_statistics(who: Any) -> None:
    data = frame([1.0, 2.0, 3.0, 9.0], [10, 20, 30, 40], prompt_id=[1, 1, 1, 2])
    mined = who(data, debias="linear", alpha=0.5)
    # Scores -4, -8, -12, -11 at lengths 10, 20, 30, 40; the single response of prompt 2 counts too.
    assert mined.reward_length_correlation_before == pytest.approx(12.5 / math.sqrt(5 * 38.75))
    assert mined.reward_length_correlation_after == pytest.approx(-12.5 / math.sqrt(5 * 38.75))
    assert mined.margin_quantiles["max"] == mined.margin_quantiles["0.5"] == 8.0
    assert (mined.chosen_longer_share, mined.mean_length_gap_before, mined.mean_length_gap_after) == (0.0, 20.0, -20.0)
    spread = frame([0.0, 1.0, 0.0, 2.0, 0.0, 3.0, 0.0, 4.0], [5] * 8, prompt_id=[1, 1, 2, 2, 3, 3, 4, 4])
    wanted = {"min": 1.0, "0.05": 1.15, "0.25": 1.75, "0.5": 2.5, "0.75": 3.25, "0.95": 3.85, "max": 4.0}
    assert who(spread).margin_quantiles == pytest.approx(wanted)
