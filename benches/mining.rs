//! Mining speed in rows per second: grouped and shuffled rows; 2, 16, 64 and 1 to 40 responses per prompt; all ways of
//! debiasing and pairing.

#![allow(missing_docs, reason = "criterion_group! generates undocumented functions")]

use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use dice_benches::{Order, Responses, columns};
use dice_core::input::records::Records;
use dice_core::pairs::pairing::{Pairing, Tolerance};
use dice_core::{Columns, Debias, Options, mine};

const ROWS: usize = 1 << 20;

fn group<'a>(criterion: &'a mut Criterion, name: &str, input: &Columns) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Elements(input.rows)).sample_size(20);
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    group
}

fn exact_penalty(criterion: &mut Criterion) {
    let sizes = [Responses::Each(2), Responses::Each(16), Responses::Each(64), Responses::Ragged];
    for order in [Order::Grouped, Order::Shuffled] {
        for responses in sizes {
            let input = columns(ROWS, responses, order, 0);
            let mut group = group(criterion, &format!("exact penalty, {order:?}"), &input);
            let options = Options::default();
            let name = format!("{responses:?}");
            group.bench_function(name, |bencher| bencher.iter(|| mine(black_box(&input), &options)));
            group.finish();
        }
    }
}

fn debiasing_and_pairing(criterion: &mut Criterion) {
    let options = |debias, pairing| Options { debias, pairing, ..Options::default() };
    let linear = Debias::LinearAuto;
    let variants = [
        ("none", options(Debias::None, Pairing::MaxMin)),
        ("fixed penalty", options(Debias::Linear(1e-3), Pairing::MaxMin)),
        ("per token", options(Debias::PerToken, Pairing::MaxMin)),
        ("bucket", options(Debias::Bucket { buckets: 10, scale: false }, Pairing::MaxMin)),
        ("matched", options(Debias::None, Pairing::Matched(Tolerance::Absolute(100)))),
        ("max_random", options(linear, Pairing::MaxRandom { seed: 0 })),
        ("top_bottom", options(linear, Pairing::TopBottom { top: 2, bottom: 2, max_pairs: 4 })),
        ("max_sweet_spot", options(linear, Pairing::SweetSpot { deviations: 2.0 })),
        ("all_pairs", options(linear, Pairing::All { max_pairs: 8 })),
        ("win rates", Options { win_rates: Some(1.0), ..Options::default() }),
    ];
    let input = columns(ROWS, Responses::Each(16), Order::Grouped, 0);
    let mut group = group(criterion, "options, Grouped, Each(16)", &input);
    for (name, options) in variants {
        group.bench_function(name, |bencher| bencher.iter(|| mine(black_box(&input), &options)));
    }
    group.finish();
}

fn sorting(criterion: &mut Criterion) {
    let input = columns(ROWS, Responses::Each(16), Order::Shuffled, 0);
    let mut group = group(criterion, "parts", &input);
    group.bench_function("sorting shuffled rows", |bencher| bencher.iter(|| Records::new(black_box(&input))));
    group.finish();
}

criterion_group!(benches, exact_penalty, debiasing_and_pairing, sorting);
criterion_main!(benches);
