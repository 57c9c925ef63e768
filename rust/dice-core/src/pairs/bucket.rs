//! Rewards centered inside exact length quantiles.
//!
//! Of the `n` usable lengths in ascending order, the cut `c_j` (j = 1 … B − 1) is the one at rank
//! ⌈j·n/B⌉, and a response of length l lies in bucket `#{j : c_j < l}`: quantiles of the inverse
//! distribution function, closed on the right. Equal lengths share a bucket, so there may be fewer than B.
//! With `m_b` the mean and `s_b` the population standard deviation of the rewards in bucket b,
//!
//! ```text
//! reward' = reward − m_b                 (centered)
//! reward' = (reward − m_b) / s_b         (scaled; s_b = 0 leaves it at reward − m_b)
//! ```
//!
//! Usable rows of prompts with too few of them count here too.

use std::collections::BTreeMap;

use rayon::prelude::*;

use crate::input::block::{Block, Source, Stop};
use crate::input::filter::{Dropped, Filter, Response};
use crate::input::layout::{KeyOrderCheck, Layout};
use crate::numeric::exact::ExactSum;
use crate::numeric::moments::Moments;
use crate::numeric::simd::Portable;
use crate::pairs::pool::{Group, Pool};

/// The adjustment of each bucket.
#[derive(Debug, Clone)]
pub struct Buckets {
    /// Greatest length of each bucket but the last, ascending.
    cuts: Vec<u32>,
    mean: Vec<f64>,
    /// Divisor of each bucket.
    scale: Vec<f64>,
}

/// Fits the buckets in passes over all usable rows: lengths first, then means, then deviations.
#[derive(Debug)]
pub struct BucketFit {
    buckets: usize,
    scaled: bool,
    counts: BTreeMap<u32, u64>,
    /// Sum of the current pass and number of rows, for each bucket.
    sums: Vec<(ExactSum, u64)>,
    fitted: Buckets,
    stage: Stage,
}

/// What the current pass measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Lengths,
    Means,
    Deviations,
    Done,
}

impl BucketFit {
    /// A fit without any rows yet.
    pub fn new(buckets: usize, scaled: bool) -> Self {
        let fitted = Buckets { cuts: vec![], mean: vec![], scale: vec![] };
        Self { buckets, scaled, counts: BTreeMap::new(), sums: vec![], fitted, stage: Stage::Lengths }
    }

    /// Whether another pass is needed.
    pub fn needs_pass(&self) -> bool {
        self.stage != Stage::Done
    }

    /// Adds some of the rows to the current pass.
    ///
    /// # Errors
    /// [`Stop`] if a length is invalid or rows are not in the order of the layout.
    pub fn observe<S: Source>(&mut self, rows: &UsableRows<S>) -> Result<(), Stop> {
        let fitted = &self.fitted;
        match self.stage {
            Stage::Lengths => {
                let counts_of_chunks = rows.fold(BTreeMap::<u32, u64>::new, |counts, response| {
                    *counts.entry(response.length).or_default() += 1;
                })?;
                for (length, count) in counts_of_chunks.into_iter().flatten() {
                    *self.counts.entry(length).or_default() += count;
                }
            }
            Stage::Means => {
                add(&mut self.sums, rows, |response| (fitted.bucket(response.length), response.raw))?
            }
            Stage::Deviations => add(&mut self.sums, rows, |response| {
                let bucket = fitted.bucket(response.length);
                let deviation = response.raw - fitted.mean[bucket];
                (bucket, deviation * deviation)
            })?,
            Stage::Done => {}
        }
        Ok(())
    }

    /// Ends a pass over all rows.
    pub fn end_pass(&mut self) {
        // The sums are exact, so the means depend neither on the order of rows nor on the number of threads.
        let means = self.sums.iter().map(|(sum, count)| sum.value() / (*count).max(1) as f64);
        match self.stage {
            Stage::Lengths => {
                self.fitted.cuts = cuts(&self.counts, self.buckets);
                self.fitted.scale = vec![1.0; self.fitted.cuts.len() + 1];
            }
            Stage::Means => self.fitted.mean = means.collect(),
            Stage::Deviations => {
                self.fitted.scale = means.map(|v| if v > 0.0 { v.sqrt() } else { 1.0 }).collect();
            }
            Stage::Done => {}
        }
        self.sums = vec![(ExactSum::default(), 0); self.fitted.cuts.len() + 1];
        self.stage = match self.stage {
            Stage::Lengths => Stage::Means,
            Stage::Means if self.scaled => Stage::Deviations,
            _ => Stage::Done,
        };
    }

    /// The buckets, complete after the last pass.
    pub fn buckets(&self) -> &Buckets {
        &self.fitted
    }
}

/// Adds `value`, which returns (bucket, value), of each row to the sums of the buckets.
fn add<S: Source>(
    sums: &mut [(ExactSum, u64)],
    rows: &UsableRows<S>,
    value: impl Fn(&Response) -> (usize, f64) + Sync,
) -> Result<(), Stop> {
    let size = sums.len();
    let sums_of_chunks = rows.fold(
        || vec![(ExactSum::default(), 0u64); size],
        |sums, response| {
            let (bucket, value) = value(response);
            sums[bucket].0.add(value);
            sums[bucket].1 += 1;
        },
    )?;
    for other in sums_of_chunks {
        for (sum, other) in sums.iter_mut().zip(other) {
            sum.0.merge(&other.0);
            sum.1 += other.1;
        }
    }
    Ok(())
}

impl Buckets {
    /// Fits the buckets to all usable rows.
    ///
    /// # Errors
    /// [`Stop`] if a length is invalid or rows are not in the order of the layout.
    pub fn fit<S: Source>(rows: &UsableRows<S>, buckets: usize, scaled: bool) -> Result<Self, Stop> {
        let mut fit = BucketFit::new(buckets, scaled);
        while fit.needs_pass() {
            fit.observe(rows)?;
            fit.end_pass();
        }
        Ok(fit.fitted)
    }

    fn bucket(&self, length: u32) -> usize {
        self.cuts.partition_point(|&cut| cut < length)
    }

    /// Sets the score of a response to its reward adjusted by its bucket.
    #[inline]
    pub fn adjust(&self, response: &mut Response) {
        let bucket = self.bucket(response.length);
        response.score = (response.raw - self.mean[bucket]) / self.scale[bucket];
    }
}

/// The cuts without repeats, and without the greatest length, since its last bucket would be empty.
fn cuts(counts: &BTreeMap<u32, u64>, buckets: usize) -> Vec<u32> {
    let total: u64 = counts.values().sum();
    let mut cuts = Vec::new();
    let mut below = 0;
    let mut next = 1u128;
    for (&length, &count) in counts {
        below += count;
        // The cut at rank ⌈j·n/B⌉ is this length if the rank is among those counted so far.
        let mut is_cut = false;
        while next < buckets as u128
            && (next * u128::from(total)).div_ceil(buckets as u128) <= u128::from(below)
        {
            is_cut = true;
            next += 1;
        }
        if is_cut && below < total {
            cuts.push(length);
        }
    }
    cuts
}

/// The usable rows of an input.
#[derive(Debug, Clone, Copy)]
pub struct UsableRows<'a, S> {
    /// The rows.
    pub source: &'a S,
    /// Where the rows of each prompt are.
    pub layout: &'a Layout,
    /// Bounds on lengths.
    pub filter: Filter,
    /// Which responses count.
    pub pool: Pool<'a>,
}

impl<S: Source> UsableRows<'_, S> {
    /// Folds the usable rows of each chunk, in parallel.
    fn fold<T: Send>(
        &self,
        empty: impl Fn() -> T + Sync,
        add: impl Fn(&mut T, &Response) + Sync,
    ) -> Result<Vec<T>, Stop> {
        let fold_chunk = |chunk| {
            let chunk = self.layout.align(self.source, chunk);
            let mut state = empty();
            let (mut block, mut group, mut ignored) =
                (Block::default(), Group::default(), Dropped::default());
            let mut order = KeyOrderCheck::new(self.layout, self.source, chunk.start);
            let mut at = chunk.start;
            while at < chunk.end {
                at = self.layout.fill(Portable, self.source, at, chunk.end, &mut block, &mut ignored)?;
                order.check(self.layout, &block)?;
                block.screen(&self.filter, &mut ignored, &mut Moments::default());
                for prompt in 0..block.prompts() {
                    self.pool.fill(&block, prompt, &mut group, &mut ignored);
                    group.all.iter().for_each(|response| add(&mut state, response));
                }
            }
            Ok(state)
        };
        self.layout.chunks(self.source).into_par_iter().map(fold_chunk).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_are_quantiles_of_the_inverse_distribution_function() {
        let counts = |pairs: &[(u32, u64)]| pairs.iter().copied().collect();
        assert_eq!(cuts(&counts(&[(1, 1), (2, 1), (3, 1), (4, 1)]), 2), [2]);
        assert_eq!(cuts(&counts(&[(1, 1), (2, 1), (3, 1)]), 2), [2]);
        // Equal lengths share a bucket.
        assert_eq!(cuts(&counts(&[(5, 90), (9, 10)]), 10), [5]);
        assert!(cuts(&counts(&[(5, 90)]), 10).is_empty());
    }
}
