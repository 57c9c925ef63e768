//! Mining speed, in rows a second: exact penalty, fixed penalty and buckets; grouped and shuffled rows.

#![allow(missing_docs, reason = "criterion_group! makes undocumented functions")]

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dice_benches::{Order, columns};
use dice_core::filter::Filter;
use dice_core::groups::Groups;
use dice_core::{Debias, Options, mine};

const PROMPTS: u32 = 50_000;
const RESPONSES: usize = 16;

fn mining(criterion: &mut Criterion) {
    let ways = [
        ("auto", Debias::LinearAuto),
        ("fixed", Debias::Linear(1e-3)),
        ("bucket", Debias::Bucket { buckets: 10, scale: false }),
    ];
    for order in [Order::Grouped, Order::Shuffled] {
        let input = columns(PROMPTS, RESPONSES, order, 0);
        let mut group = criterion.benchmark_group(format!("mine {order:?} K={RESPONSES}"));
        group.throughput(Throughput::Elements(input.rows)).sample_size(20);
        group.warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(3));
        group.bench_function("groups only", |bencher| bencher.iter(|| Groups::new(black_box(&input))));
        for (name, debias) in ways {
            let options = Options { debias, min_responses: 2, filter: Filter::default() };
            group.bench_function(name, |bencher| bencher.iter(|| mine(black_box(&input), &options)));
        }
        group.finish();
    }
}

criterion_group!(benches, mining);
criterion_main!(benches);
