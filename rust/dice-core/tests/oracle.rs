//! The miner against a naive oracle, which shares no code with it: rewards are multiples of a small unit, penalties are
//! fractions, all comparisons are in 128-bit integers, and the oracle computes the gap at the break point of every two
//! responses of every prompt.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float32Type, Int64Type, UInt32Type, UInt64Type};
use arrow_array::{ArrayRef, BooleanArray, Float32Array, Float64Array, Int64Array, RecordBatch, UInt32Array};
use dice_core::input::filter::Filter;
use dice_core::penalty::steps::CurvePoint;
use dice_core::{Columns, Debias, Mined, Options, mine};
use proptest::prelude::*;

/// One unit of reward.
const UNIT: f64 = 1.0 / (1 << 20) as f64;

const SEED: u64 = 0x5eed;

#[derive(Debug, Clone, PartialEq)]
struct Row {
    prompt: i64,
    /// In units; `None` is null, and `i64::MAX` means NaN.
    reward: Option<i64>,
    length: Option<u32>,
    truncated: bool,
}

#[derive(Debug, Clone, Copy)]
struct Limits {
    min_responses: usize,
    min_length: Option<u32>,
    max_length: Option<u32>,
}

fn reward(units: i64) -> f64 {
    if units == i64::MAX { f64::NAN } else { units as f64 * UNIT }
}

fn batch(rows: &[Row]) -> RecordBatch {
    let columns: [(&str, ArrayRef); 4] = [
        ("prompt", Arc::new(Int64Array::from_iter_values(rows.iter().map(|row| row.prompt)))),
        ("reward", Arc::new(rows.iter().map(|row| row.reward.map(reward)).collect::<Float64Array>())),
        ("length", Arc::new(rows.iter().map(|row| row.length).collect::<UInt32Array>())),
        ("truncated", Arc::new(rows.iter().map(|row| Some(row.truncated)).collect::<BooleanArray>())),
    ];
    RecordBatch::try_from_iter_with_nullable(columns.map(|(name, array)| (name, array, true))).unwrap()
}

fn run(rows: &[Row], size: usize, debias: Debias, limits: Limits) -> Mined {
    // Slices of one batch, so that buffers start at an offset.
    let all = batch(rows);
    let starts = (0..rows.len()).step_by(size);
    let batches = starts.map(|from| Ok(all.slice(from, size.min(rows.len() - from))));
    let filter = Filter { min_length: limits.min_length, max_length: limits.max_length };
    let options =
        Options { debias, min_responses: limits.min_responses, filter, seed: SEED, ..Options::default() };
    mine(&Columns::new(batches).unwrap(), &options).unwrap()
}

/// Prompt, chosen row, rejected row.
fn pairs(mined: &Mined) -> Vec<(i64, u64, u64)> {
    let prompts = mined.pairs[0].column(0).as_primitive::<Int64Type>();
    let chosen = mined.pairs[0].column(1).as_primitive::<UInt64Type>();
    let rejected = mined.pairs[0].column(2).as_primitive::<UInt64Type>();
    (0..mined.pairs[0].num_rows()).map(|i| (prompts.value(i), chosen.value(i), rejected.value(i))).collect()
}

// ---- the oracle

/// Reward in units, length, row, hash.
type Response = (i128, i128, u64, u64);

fn splitmix64(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The usable responses of the prompts that have enough of them.
fn usable(rows: &[Row], limits: Limits) -> BTreeMap<i64, Vec<Response>> {
    let mut prompts = BTreeMap::<i64, Vec<Response>>::new();
    let mut seen = BTreeMap::<i64, u64>::new();
    for (row, number) in rows.iter().zip(0..) {
        let place = seen.entry(row.prompt).or_default();
        let hash = splitmix64(splitmix64(splitmix64(SEED) ^ row.prompt as u64) ^ *place);
        *place += 1;
        let (Some(units), Some(length)) = (row.reward, row.length) else { continue };
        let fits = limits.min_length.is_none_or(|min| length >= min)
            && limits.max_length.is_none_or(|max| length <= max);
        if units != i64::MAX && !row.truncated && fits {
            prompts.entry(row.prompt).or_default().push((units.into(), length.into(), number, hash));
        }
    }
    prompts.retain(|_, responses| responses.len() >= limits.min_responses);
    prompts
}

/// Chosen and rejected at the penalty `over / under` (in units): of all pairs of different reward the one with the
/// greatest margin; then the least gap of lengths; then the best one chosen; then the worst one rejected.
fn naive_pair(responses: &[Response], over: i128, under: i128) -> Option<(Response, Response)> {
    let penalized = |r: &Response| r.0 * under - over * r.1;
    // Without a penalty the length does not count.
    let length = |r: &Response| if over == 0 { 0 } else { r.1 };
    let pairs = responses.iter().flat_map(|a| responses.iter().map(move |b| (*a, *b)));
    pairs.filter(|(a, b)| a.0 != b.0).min_by_key(|(a, b)| {
        let (best, worst) = (penalized(a), penalized(b));
        (worst - best, length(a) - length(b), (-best, length(a), a.3), (worst, -length(b), b.3))
    })
}

fn naive_gap(prompts: &BTreeMap<i64, Vec<Response>>, over: i128, under: i128) -> i128 {
    let pairs = prompts.values().filter_map(|responses| naive_pair(responses, over, under));
    pairs.map(|(chosen, rejected)| chosen.1 - rejected.1).sum()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Fraction(i128, i128);

impl Ord for Fraction {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0 * other.1).cmp(&(other.0 * self.1))
    }
}

impl PartialOrd for Fraction {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// A penalty above zero and below all at which anything else could change.
const LEAST: Fraction = Fraction(1, 1_000_000);

/// Every penalty at which anything could change, and zero.
fn candidates(prompts: &BTreeMap<i64, Vec<Response>>) -> Vec<Fraction> {
    let mut fractions = BTreeSet::from([Fraction(0, 1), LEAST]);
    let mut insert = |reward: i128, length: i128| {
        if reward.signum() * length.signum() > 0 {
            fractions.insert(Fraction(reward.abs(), length.abs()));
        }
    };
    for responses in prompts.values() {
        for a in responses {
            for b in responses {
                insert(a.0 - b.0, a.1 - b.1);
                if a.0 == b.0 && a.2 != b.2 {
                    // Best and worst of equal reward: one of them makes way for another response.
                    for c in responses {
                        for d in responses {
                            insert(c.0 + d.0 - a.0 - b.0, c.1 + d.1 - a.1 - b.1);
                        }
                    }
                }
            }
        }
    }
    fractions.into_iter().collect()
}

// ---- inputs

fn rows(dense: bool) -> impl Strategy<Value = Vec<Row>> {
    // Few values with many ties, or many values with few ties.
    let (rewards, lengths) = if dense { (-3i64..4, 0u32..6) } else { (-8i64 << 20..8 << 20, 0u32..2000) };
    let reward = prop_oneof![30 => rewards.prop_map(Some), 1 => Just(None), 1 => Just(Some(i64::MAX))];
    let length = prop_oneof![30 => lengths.prop_map(Some), 1 => Just(None)];
    let row = (-4i64..12, reward, length, prop::bool::weighted(0.05)).prop_map(
        |(prompt, reward, length, truncated)| Row {
            prompt: prompt * 1_000_000_007,
            reward,
            length,
            truncated,
        },
    );
    (prop::collection::vec(row, 1..90), any::<bool>()).prop_map(|(mut rows, grouped)| {
        if grouped {
            rows.sort_by_key(|row| row.prompt);
        }
        rows
    })
}

fn limits() -> impl Strategy<Value = Limits> {
    (2usize..5, prop::option::of(0u32..3), prop::option::of(3u32..1500))
        .prop_map(|(min_responses, min_length, max_length)| Limits { min_responses, min_length, max_length })
}

fn near(float: f64, fraction: Fraction) -> bool {
    if fraction == LEAST {
        return float == f64::from_bits(1);
    }
    let value = fraction.0 as f64 * UNIT / fraction.1 as f64;
    (float - value).abs() <= value * 1e-15
}

fn check_auto(rows: &[Row], size: usize, limits: Limits) -> Result<(), TestCaseError> {
    let mined = run(rows, size, Debias::LinearAuto, limits);
    let prompts = usable(rows, limits);
    let candidates = candidates(&prompts);
    let gaps: Vec<_> = candidates.iter().map(|f| naive_gap(&prompts, f.0, f.1)).collect();
    // Of equal gaps, the lowest penalty.
    let best = (0..gaps.len()).min_by_key(|&i| (gaps[i].abs(), i)).unwrap();
    let (low, high) = mined.alpha_interval.unwrap();
    prop_assert!(near(low, candidates[best]), "{low} is not {:?}", candidates[best]);
    let pairs_at = |fraction: Fraction| -> Vec<_> {
        let picked = prompts.iter().map(|(prompt, all)| (*prompt, naive_pair(all, fraction.0, fraction.1)));
        picked.filter_map(|(prompt, pair)| pair.map(|(c, r)| (prompt, c.2, r.2))).collect()
    };
    let expected = pairs_at(candidates[best]);
    match (best..gaps.len()).find(|&i| pairs_at(candidates[i]) != expected) {
        Some(next) => prop_assert!(near(high, candidates[next]), "{high} is not {:?}", candidates[next]),
        None => prop_assert_eq!(high, f64::INFINITY),
    }
    let alpha = mined.alpha.unwrap();
    prop_assert!(alpha == 0.0 && low == 0.0 || low < alpha && alpha < high);
    let count = expected.len() as f64;
    prop_assert_eq!(pairs(&mined), expected);
    if count > 0.0 {
        prop_assert_eq!(mined.gap_after, gaps[best] as f64 / count);
        // That of the least penalty: of equal rewards the shortest best and the longest worst.
        prop_assert_eq!(mined.gap_before, gaps[1] as f64 / count);
        for CurvePoint { alpha, gap, exact } in &mined.curve {
            prop_assert!(*exact);
            let value =
                |f: &Fraction| if *f == LEAST { f64::from_bits(1) } else { f.0 as f64 * UNIT / f.1 as f64 };
            let at = candidates.iter().rposition(|f| value(f) <= *alpha * (1.0 + 1e-15));
            prop_assert_eq!(*gap, gaps[at.unwrap()] as f64 / count);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn best_penalty_with_many_ties(rows in rows(true), size in 1usize..40, limits in limits()) {
        check_auto(&rows, size, limits)?;
    }

    #[test]
    fn best_penalty_with_few_ties(rows in rows(false), size in 1usize..40, limits in limits()) {
        check_auto(&rows, size, limits)?;
    }

    #[test]
    fn fixed_penalty(rows in rows(true), size in 1usize..40, limits in limits(), over in 0i128..12, power in 0u32..4) {
        // A penalty of `over / 2^power` units is a float, and lies on break points often.
        let alpha = over as f64 * UNIT / f64::from(1u32 << power);
        let mined = run(&rows, size, Debias::Linear(alpha), limits);
        let prompts = usable(&rows, limits);
        let expected: Vec<_> = prompts
            .iter()
            .filter_map(|(prompt, responses)| {
                naive_pair(responses, over, 1 << power).map(|(c, r)| (*prompt, c.2, r.2))
            })
            .collect();
        prop_assert_eq!(pairs(&mined), expected);
        let (low, high) = mined.alpha_interval.unwrap();
        prop_assert!(low <= alpha && alpha < high);
        // The pairs are the same at the low end, and differ at the high end and below the low end.
        let at = |alpha: f64| {
            let mined = run(&rows, size, Debias::Linear(alpha), limits);
            (mined.gap_after * mined.pairs[0].num_rows() as f64).round() as i64
        };
        prop_assert_eq!(pairs(&run(&rows, size, Debias::Linear(low), limits)), pairs(&mined));
        let pairs_of = |alpha: f64| pairs(&run(&rows, size, Debias::Linear(alpha), limits));
        if high.is_finite() {
            prop_assert!(at(high) <= at(alpha));
            prop_assert_ne!(pairs_of(high), pairs(&mined));
            prop_assert_eq!(pairs_of(high.next_down()), pairs(&mined));
        }
        if low > 0.0 {
            prop_assert!(at(low.next_down()) >= at(alpha));
            prop_assert_ne!(pairs_of(low.next_down()), pairs(&mined));
        }
    }

    #[test]
    fn every_row_is_counted_once(rows in rows(true), size in 1usize..40, limits in limits()) {
        let mined = run(&rows, size, Debias::None, limits);
        let prompts = usable(&rows, limits);
        let kept: usize = prompts.values().map(Vec::len).sum();
        let d = mined.dropped;
        let sum = d.null + d.not_finite + d.truncated + d.too_short + d.too_long + d.too_few_responses;
        prop_assert_eq!(sum, (rows.len() - kept) as u64);
        let null = rows.iter().filter(|row| row.reward.is_none() || row.length.is_none());
        prop_assert_eq!(d.null, null.count() as u64);
        let all: BTreeSet<_> = rows.iter().map(|row| row.prompt).collect();
        prop_assert_eq!(mined.prompts, all.len() as u64);
        prop_assert_eq!(mined.dropped_prompts.too_few_responses, (all.len() - prompts.len()) as u64);
        prop_assert_eq!(mined.dropped_prompts.tied, (prompts.len() - mined.pairs[0].num_rows()) as u64);
        prop_assert_eq!(mined.dropped_prompts.no_contrast, 0);
    }

    #[test]
    fn order_of_rows_does_not_matter(
        rows in rows(false),
        size in 1usize..40,
        limits in limits(),
        debias in prop_oneof![
            Just(Debias::LinearAuto),
            Just(Debias::Bucket { buckets: 3, scale: false }),
            Just(Debias::Bucket { buckets: 4, scale: true }),
        ],
        seed in any::<u64>(),
    ) {
        let mut shuffled: Vec<(u64, usize)> =
            (0..rows.len()).map(|i| (seed.wrapping_add(i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15), i)).collect();
        shuffled.sort_unstable();
        let moved: Vec<Row> = shuffled.iter().map(|&(_, i)| rows[i].clone()).collect();
        let (before, after) = (run(&rows, size, debias, limits), run(&moved, rows.len(), debias, limits));
        prop_assert_eq!(before.alpha, after.alpha);
        // Duplicates may be swapped, so pairs are compared by the contents of their rows.
        let content = |mined: &Mined, rows: &[Row]| -> Vec<_> {
            pairs(mined).iter().map(|pair| (rows[pair.1 as usize].clone(), rows[pair.2 as usize].clone())).collect()
        };
        prop_assert_eq!(content(&before, &rows), content(&after, &moved));
        for column in 3..8 {
            prop_assert_eq!(before.pairs[0].column(column), after.pairs[0].column(column));
        }
    }

    #[test]
    fn buckets_are_centered(rows in rows(false), size in 1usize..40, limits in limits(), buckets in 1usize..12) {
        let mined = run(&rows, size, Debias::Bucket { buckets, scale: false }, limits);
        let one = Limits { min_responses: 1, ..limits };
        let mut all: Vec<Response> = usable(&rows, one).into_values().flatten().collect();
        all.sort_by_key(|r| r.1);
        let cuts: Vec<i128> =
            (1..buckets).filter_map(|j| all.get((j * all.len()).div_ceil(buckets).saturating_sub(1)).map(|r| r.1)).collect();
        let bucket = |length: i128| cuts.iter().filter(|&&cut| cut < length).count();
        let score = |r: &Response| {
            let same: Vec<i128> = all.iter().filter(|o| bucket(o.1) == bucket(r.1)).map(|o| o.0).collect();
            r.0 as f64 * UNIT - same.iter().sum::<i128>() as f64 * UNIT / same.len() as f64
        };
        let expected: Vec<_> = usable(&rows, limits)
            .iter()
            .filter_map(|(prompt, responses)| {
                let chosen = responses.iter().min_by(|a, b| {
                    score(b).total_cmp(&score(a)).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2))
                })?;
                let rejected = responses.iter().min_by(|a, b| {
                    score(a).total_cmp(&score(b)).then(b.1.cmp(&a.1)).then(a.2.cmp(&b.2))
                })?;
                (chosen.0 != rejected.0).then_some((*prompt, chosen.2, rejected.2))
            })
            .collect();
        prop_assert_eq!(pairs(&mined), expected);
    }

    /// For arbitrary bits: no panic, no pair of a row with itself, no NaN margin, and the lengths of the rows.
    #[test]
    fn any_floats(
        rows in prop::collection::vec((0u32..6, any::<f32>(), any::<u32>()), 1..60),
        doubles in prop::option::of(any::<f64>()),
        alpha in prop::option::of(0.0..f64::MAX),
        bucket in any::<bool>(),
    ) {
        let rewards: ArrayRef = match doubles {
            None => Arc::new(Float32Array::from_iter_values(rows.iter().map(|row| row.1))),
            Some(factor) => Arc::new(Float64Array::from_iter_values(rows.iter().map(|row| f64::from(row.1) * factor))),
        };
        let batch = RecordBatch::try_from_iter([
            ("prompt", Arc::new(UInt32Array::from_iter_values(rows.iter().map(|row| row.0))) as ArrayRef),
            ("reward", rewards),
            ("length", Arc::new(UInt32Array::from_iter_values(rows.iter().map(|row| row.2)))),
        ]).unwrap();
        let debias = match alpha {
            _ if bucket => Debias::Bucket { buckets: 4, scale: true },
            None => Debias::LinearAuto,
            Some(alpha) => Debias::Linear(alpha),
        };
        let options = Options { debias, ..Options::default() };
        let mined = mine(&Columns::new([Ok(batch)]).unwrap(), &options).unwrap();
        let chosen = mined.pairs[0].column(1).as_primitive::<UInt64Type>();
        let rejected = mined.pairs[0].column(2).as_primitive::<UInt64Type>();
        for i in 0..mined.pairs[0].num_rows() {
            prop_assert_ne!(chosen.value(i), rejected.value(i));
            prop_assert!(!mined.pairs[0].column(5).as_primitive::<Float32Type>().value(i).is_nan());
            prop_assert_eq!(
                mined.pairs[0].column(6).as_primitive::<UInt32Type>().value(i),
                rows[chosen.value(i) as usize].2
            );
        }
    }
}
