//! The passes one by one: brackets, segments, samples and sorted copies do not change the result.

use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float32Type, UInt64Type};
use arrow_array::{
    ArrayRef, Float32Array, Float64Array, Int64Array, RecordBatch, UInt8Array, UInt32Array, UInt64Array,
};
use arrow_select::concat::concat_batches;
use dice_core::input::block::Source;
use dice_core::input::layout::Layout;
use dice_core::input::records::Records;
use dice_core::pairs::pairing::Pairing;
use dice_core::pairs::pool::{PickFrom, Pool};
use dice_core::pairs::table::batches;
use dice_core::penalty::hull::Bracket;
use dice_core::penalty::scan::{ScanRequest, scan};
use dice_core::stream::Miner;
use dice_core::{Columns, Debias, Options, mine};
use proptest::prelude::*;

#[derive(Debug, Clone, Copy)]
struct Row {
    prompt: u32,
    reward: f64,
    length: u32,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Keys {
    U8,
    U32,
    I64,
    /// Far from each other.
    U64,
}

fn columns(rows: &[Row], keys: Keys, wide: bool, size: usize) -> Columns {
    let number = |row: &Row| u64::from(row.prompt);
    let prompt: ArrayRef = match keys {
        Keys::U8 => Arc::new(UInt8Array::from_iter_values(rows.iter().map(|row| row.prompt as u8))),
        Keys::U32 => Arc::new(UInt32Array::from_iter_values(rows.iter().map(|row| row.prompt))),
        Keys::I64 => Arc::new(Int64Array::from_iter_values(rows.iter().map(|row| i64::from(row.prompt) - 3))),
        Keys::U64 => Arc::new(UInt64Array::from_iter_values(rows.iter().map(|row| number(row) << 56))),
    };
    let reward: ArrayRef = if wide {
        Arc::new(Float64Array::from_iter_values(rows.iter().map(|row| row.reward)))
    } else {
        Arc::new(Float32Array::from_iter_values(rows.iter().map(|row| row.reward as f32)))
    };
    let length: ArrayRef = Arc::new(UInt32Array::from_iter_values(rows.iter().map(|row| row.length)));
    let all =
        RecordBatch::try_from_iter([("prompt", prompt), ("reward", reward), ("length", length)]).unwrap();
    let starts = (0..rows.len()).step_by(size);
    Columns::new(starts.map(|from| Ok(all.slice(from, size.min(rows.len() - from))))).unwrap()
}

/// Rewards and lengths with many ties, with nearly none, or with differences below the precision of float32.
fn rows() -> impl Strategy<Value = Vec<Row>> {
    let values = prop_oneof![
        (-6i32..6, 0u32..8).prop_map(|(reward, length)| (f64::from(reward) / 4.0, length)),
        (-1e3f64..1e3, 0u32..3000),
        (-3i32..3, 0u32..4)
            .prop_map(|(reward, length)| (7.0 + f64::from(reward) * 1e-9, 16_777_214 + length)),
        (-3i32..3, 0u32..200).prop_map(|(reward, length)| (f64::from(reward) * 1e-42, length)),
        // Scores that are equal at a penalty of 0.3, except for differences that float32 rounds away.
        (-3i32..3, 0u32..3000)
            .prop_map(|(noise, length)| (0.3 * f64::from(length) + f64::from(noise) * 1e-5, length)),
        (0u32..3000).prop_map(|length| (0.3 * f64::from(length + 16_777_216), length + 16_777_216)),
        (prop_oneof![Just(f64::NAN), Just(f64::INFINITY), Just(3e38), Just(1e39)], 0u32..9),
    ];
    // Prompts with one row, with some, and with more rows than a vector has lanes.
    let prompt = prop_oneof![3 => 0u32..12, 2 => Just(3u32)];
    prop::collection::vec((prompt, values), 1..160).prop_map(|rows| {
        let mut rows: Vec<Row> =
            rows.into_iter().map(|(prompt, (reward, length))| Row { prompt, reward, length }).collect();
        rows.sort_by_key(|row| row.prompt);
        rows
    })
}

fn concat(batches: &[RecordBatch]) -> RecordBatch {
    concat_batches(&batches[0].schema(), batches).unwrap()
}

/// The pairs at a given penalty.
fn pairs_at(columns: &Columns, alpha: f64) -> RecordBatch {
    let options = Options { debias: Debias::Linear(alpha), ..Options::default() };
    concat(&mine(columns, &options).unwrap().pairs)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn a_bracket_changes_nothing(
        rows in rows(),
        wide in any::<bool>(),
        size in 1usize..200,
        low in prop_oneof![Just(0.0), Just(0.3), 0.0f64..1e-2, 0.0f64..2.0],
        width in prop_oneof![Just(0.0), 0.0f64..1e-6, 0.0f64..1.0],
        place in 0.0f64..=1.0,
    ) {
        let columns = columns(&rows, Keys::U32, wide, size);
        let bracket = Bracket { low, high: low + width };
        let pool = Pool { columns: &columns, chosen: PickFrom::Any, rejected: PickFrom::Any };
        let request = ScanRequest { filter: Default::default(), min_responses: 2, bracket, pool, seed: 0, pairs: true };
        let run = |bracket: Bracket| scan(&columns, &Layout::InOrder, &ScanRequest { bracket, ..request }).unwrap();
        let mut results = run(bracket);
        let exact = run(Bracket::ALL);
        prop_assert_eq!(results[0].gap_before, exact[0].gap_before);
        prop_assert_eq!(results[0].contrast, exact[0].contrast);
        prop_assert_eq!(results[0].dropped, exact[0].dropped);
        prop_assert_eq!(results[0].dropped_prompts, exact[0].dropped_prompts);
        // The break points of the bracket are those of all penalties inside it.
        let sorted = |breakpoints: Vec<(f64, u32)>| {
            let mut drops = std::collections::BTreeMap::<u64, u64>::new();
            breakpoints.iter().for_each(|&(at, drop)| *drops.entry(at.to_bits()).or_default() += u64::from(drop));
            drops
        };
        let inside = |at: f64| low < at && at <= low + width;
        let expected = exact[0].breakpoints().filter(|b| inside(b.at)).map(|b| (b.at, b.drop)).collect();
        prop_assert_eq!(sorted(results[0].breakpoints().map(|b| (b.at, b.drop)).collect()), sorted(expected));
        let alpha = (low + width * place).min(low + width);
        results.iter_mut().for_each(|result| result.apply_breaks(alpha));
        let tables = results.into_iter().map(|result| result.table).collect();
        let pairs = concat(&batches(tables, &columns.batches[0].keys).unwrap());
        prop_assert_eq!(pairs, pairs_at(&columns, alpha));
    }

    #[test]
    fn segments_change_nothing(
        rows in rows(),
        cuts in prop::collection::vec(0u32..12, 0..5),
        sampled in any::<bool>(),
        shuffled in any::<bool>(),
        debias in prop_oneof![
            Just(Debias::LinearAuto),
            Just(Debias::None),
            Just(Debias::Linear(0.01)),
            Just(Debias::PerToken),
            Just(Debias::Bucket { buckets: 3, scale: true }),
        ],
        pairing in prop_oneof![Just(Pairing::MaxMin), Just(Pairing::All { max_pairs: 3 })],
    ) {
        let options = Options { debias, pairing, ..Options::default() };
        let input = columns(&rows, Keys::I64, true, rows.len());
        let expected = mine(&input, &options).unwrap();
        let mut cuts = cuts;
        cuts.sort_unstable();
        let segments: Vec<(usize, Columns)> = {
            let mut edges = vec![0];
            edges.extend(cuts.iter().map(|cut| rows.partition_point(|row| row.prompt < *cut)));
            edges.push(rows.len());
            edges.windows(2).filter(|edge| edge[0] < edge[1]).map(|edge| {
                let mut part = rows[edge[0]..edge[1]].to_vec();
                if shuffled {
                    // The rows of a prompt stay in order: of equal rewards it decides which is taken.
                    part.sort_by_key(|row| std::cmp::Reverse(row.prompt));
                }
                (edge[0], columns(&part, Keys::I64, true, part.len()))
            }).collect()
        };
        let mut miner = Miner::new(options).unwrap();
        if sampled {
            miner.estimate(&segments[0].1).unwrap();
        }
        let mut passes = 0;
        while miner.needs_pass() {
            segments.iter().for_each(|(_, segment)| miner.observe(segment).unwrap());
            miner.end_pass();
            passes += 1;
            prop_assert!(passes <= 3);
        }
        let pairs: Vec<RecordBatch> =
            segments.iter().flat_map(|(_, segment)| miner.pairs(segment).unwrap()).collect();
        let (pairs, other) = (concat(&pairs), concat(&expected.pairs));
        // Row numbers are those of the segments, so rewards and lengths are compared instead.
        for column in [0, 3, 4, 5, 6, 7] {
            prop_assert_eq!(pairs.column(column), other.column(column));
        }
        let summary = miner.summary();
        prop_assert_eq!(summary.alpha, expected.alpha);
        prop_assert_eq!(summary.alpha_interval, expected.alpha_interval);
        prop_assert_eq!(summary.dropped, expected.dropped);
        prop_assert_eq!(summary.dropped_prompts, expected.dropped_prompts);
        prop_assert_eq!(summary.prompts, expected.prompts);
        let same = |a: f64, b: f64| a == b || (a.is_nan() && b.is_nan());
        prop_assert!(same(summary.gap_before, expected.gap_before));
        prop_assert!(same(summary.gap_after, expected.gap_after));
    }

    #[test]
    fn records_are_the_rows_in_order(
        rows in rows(),
        keys in prop_oneof![Just(Keys::U8), Just(Keys::U32), Just(Keys::I64), Just(Keys::U64)],
        wide in any::<bool>(),
        size in 1usize..200,
        seed in any::<u64>(),
    ) {
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.sort_by_key(|&i| (i as u64 ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let shuffled: Vec<Row> = order.iter().map(|&i| rows[i]).collect();
        let columns = columns(&shuffled, keys, wide, size);
        let records = Records::new(&columns).unwrap();
        let mut sorted_keys = Vec::new();
        records.keys(0..records.rows(), &mut sorted_keys);
        let mut expected: Vec<(u64, usize)> =
            (0..rows.len()).map(|i| (Source::key(&columns, i as u64), i)).collect();
        expected.sort_unstable();
        prop_assert_eq!(&sorted_keys, &expected.iter().map(|row| row.0).collect::<Vec<_>>());
        let mut block = dice_core::input::block::Block::default();
        let from = rows.len() as u64 / 3;
        records.values(from..records.rows(), &mut block, &mut Default::default()).unwrap();
        for (i, &(_, row)) in expected[from as usize..].iter().enumerate() {
            prop_assert_eq!(block.rows[i] as usize, row);
            prop_assert_eq!(block.lengths[i], shuffled[row].length);
            let reward = if wide { shuffled[row].reward } else { f64::from(shuffled[row].reward as f32) };
            prop_assert!(block.reward(i) == reward || !reward.is_finite());
        }
    }
}

/// On inputs large enough for a sample, the answer is that of all break points, in any order of rows.
#[test]
fn a_sample_changes_nothing() {
    let mut state = 1u64;
    let mut random = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32
    };
    for (ties, step) in [(false, 1e-4), (true, 0.25)] {
        let mut rows = Vec::new();
        for prompt in 0..40_000 {
            for _ in 0..1 + random() % 8 {
                let length = random() % 900;
                let noise = f64::from(random() % 4000) / 1000.0;
                let reward = ((noise + f64::from(length) * 2e-3) / step).round() * step;
                rows.push(Row { prompt, reward, length: if ties { length / 100 * 100 } else { length } });
            }
        }
        let grouped = columns(&rows, Keys::U32, false, 50_000);
        let mined = mine(&grouped, &Options::default()).unwrap();
        assert!(grouped.rows > 1 << 17 && mined.curve.iter().any(|point| !point.exact));
        let (alpha, (low, high)) = (mined.alpha.unwrap(), mined.alpha_interval.unwrap());
        // Without an estimate, all break points are computed.
        let mut miner = Miner::new(Options::default()).unwrap();
        miner.observe(&grouped).unwrap();
        miner.end_pass();
        assert!(!miner.needs_pass());
        let complete = miner.summary();
        assert_eq!((complete.alpha, complete.alpha_interval), (Some(alpha), Some((low, high))));
        let pairs = concat(&mined.pairs);
        assert_eq!(pairs, concat(&miner.pairs(&grouped).unwrap()));
        // The pairs change at both ends of the interval.
        assert_eq!(pairs.column(1), pairs_at(&grouped, low).column(1));
        let at = |alpha: f64| {
            let pairs = pairs_at(&grouped, alpha);
            (pairs.column(1).clone(), pairs.column(2).clone())
        };
        let here = at(alpha);
        assert_eq!(at(high.next_down()), here);
        assert_ne!(at(high), here);
        assert_ne!(at(low.next_down()), here);
        // Another order of rows gives the same responses, if the rows of a prompt stay in order: of equal rewards it
        // decides which is taken.
        let mut moved: Vec<(u32, usize)> = (0..rows.len()).map(|i| (random(), i)).collect();
        for prompt in moved.chunk_by_mut(|a, b| rows[a.1].prompt == rows[b.1].prompt) {
            let mut places: Vec<u32> = prompt.iter().map(|row| row.0).collect();
            places.sort_unstable();
            prompt.iter_mut().zip(places).for_each(|(row, place)| row.0 = place);
        }
        moved.sort_unstable();
        let shuffled =
            columns(&moved.iter().map(|&(_, i)| rows[i]).collect::<Vec<_>>(), Keys::U32, false, 70_001);
        let other = mine(&shuffled, &Options::default()).unwrap();
        assert_eq!(other.alpha, Some(alpha));
        let other = concat(&other.pairs);
        for column in [0, 3, 4, 5, 6, 7] {
            assert_eq!(pairs.column(column), other.column(column));
        }
        let chosen = other.column(1).as_primitive::<UInt64Type>();
        let rewards = other.column(3).as_primitive::<Float32Type>();
        for i in (0..other.num_rows()).step_by(997) {
            assert_eq!(rows[moved[chosen.value(i) as usize].1].reward as f32, rewards.value(i));
        }
    }
}
