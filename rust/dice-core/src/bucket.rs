//! Rewards centred inside exact length quantiles.
//!
//! Of the `n` usable lengths in rising order, the cut `c_j` (j = 1 … B − 1) is the one at rank
//! ⌈j·n/B⌉, and a response of length l lies in bucket `#{j : c_j < l}`: quantiles of the inverse
//! distribution function, closed on the right. Equal lengths share a bucket, so there may be fewer.
//! With `m_b` the mean and `s_b` the population standard deviation of the rewards in bucket b,
//!
//! ```text
//! reward' = reward − m_b                 (centred)
//! reward' = (reward − m_b) / s_b         (scaled; s_b = 0 leaves it at reward − m_b)
//! ```
//!
//! Usable here are rows of prompts with too few of them too.

use std::collections::BTreeMap;

use rayon::prelude::*;

use crate::block::{Block, Moments, Source};
use crate::exact::ExactSum;
use crate::filter::{Dropped, Filter, Point};
use crate::lanes::Portable;
use crate::layout::{Layout, Rising, Stop};
use crate::pool::{Group, Pool};

/// The adjustment of each bucket.
#[derive(Debug, Clone)]
pub struct Buckets {
    /// Longest length of each bucket but the last, rising.
    cuts: Vec<u32>,
    mean: Vec<f64>,
    /// What to divide by.
    scale: Vec<f64>,
}

/// Buckets being measured, in passes over all usable rows: lengths first, then means, then deviations.
#[derive(Debug)]
pub struct Measure {
    buckets: usize,
    scaled: bool,
    counts: BTreeMap<u32, u64>,
    /// Of what the pass sums up, and rows, for each bucket.
    sums: Vec<(ExactSum, u64)>,
    found: Buckets,
    pass: Pass,
}

/// What a pass measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pass {
    Lengths,
    Means,
    Deviations,
    Done,
}

impl Measure {
    /// Nothing measured yet.
    pub fn new(buckets: usize, scaled: bool) -> Self {
        let found = Buckets { cuts: vec![], mean: vec![], scale: vec![] };
        Self { buckets, scaled, counts: BTreeMap::new(), sums: vec![], found, pass: Pass::Lengths }
    }

    /// Whether another pass is needed.
    pub fn needs_pass(&self) -> bool {
        self.pass != Pass::Done
    }

    /// Looks at some of the rows, for this pass.
    ///
    /// # Errors
    /// [`Stop`] if a length is no count or rows are not in the order of the layout.
    pub fn observe<S: Source>(&mut self, rows: &Usable<S>) -> Result<(), Stop> {
        let found = &self.found;
        match self.pass {
            Pass::Lengths => {
                let parts = rows.fold(BTreeMap::<u32, u64>::new, |counts, point| {
                    *counts.entry(point.length).or_default() += 1;
                })?;
                for (length, count) in parts.into_iter().flatten() {
                    *self.counts.entry(length).or_default() += count;
                }
            }
            Pass::Means => add(&mut self.sums, rows, |point| (found.bucket(point.length), point.raw))?,
            Pass::Deviations => add(&mut self.sums, rows, |point| {
                let bucket = found.bucket(point.length);
                let deviation = point.raw - found.mean[bucket];
                (bucket, deviation * deviation)
            })?,
            Pass::Done => {}
        }
        Ok(())
    }

    /// Ends a pass over all rows.
    pub fn end_pass(&mut self) {
        // Exact up to their last rounding, so that neither the order of rows nor the number of threads shows.
        let means = self.sums.iter().map(|(sum, count)| sum.value() / (*count).max(1) as f64);
        match self.pass {
            Pass::Lengths => {
                self.found.cuts = cuts(&self.counts, self.buckets);
                self.found.scale = vec![1.0; self.found.cuts.len() + 1];
            }
            Pass::Means => self.found.mean = means.collect(),
            Pass::Deviations => {
                self.found.scale = means.map(|v| if v > 0.0 { v.sqrt() } else { 1.0 }).collect();
            }
            Pass::Done => {}
        }
        self.sums = vec![(ExactSum::default(), 0); self.found.cuts.len() + 1];
        self.pass = match self.pass {
            Pass::Lengths => Pass::Means,
            Pass::Means if self.scaled => Pass::Deviations,
            _ => Pass::Done,
        };
    }

    /// What was measured.
    pub fn buckets(&self) -> &Buckets {
        &self.found
    }
}

/// Adds a value of each row to the sum of a bucket.
fn add<S: Source>(
    sums: &mut [(ExactSum, u64)],
    rows: &Usable<S>,
    value: impl Fn(&Point) -> (usize, f64) + Sync,
) -> Result<(), Stop> {
    let size = sums.len();
    let parts = rows.fold(
        || vec![(ExactSum::default(), 0u64); size],
        |sums, point| {
            let (bucket, value) = value(point);
            sums[bucket].0.add(value);
            sums[bucket].1 += 1;
        },
    )?;
    for part in parts {
        for (sum, part) in sums.iter_mut().zip(part) {
            sum.0.merge(&part.0);
            sum.1 += part.1;
        }
    }
    Ok(())
}

impl Buckets {
    /// Measures the buckets over all usable rows.
    ///
    /// # Errors
    /// [`Stop`] if a length is no count or rows are not in the order of the layout.
    pub fn measure<S: Source>(rows: &Usable<S>, buckets: usize, scaled: bool) -> Result<Self, Stop> {
        let mut measure = Measure::new(buckets, scaled);
        while measure.needs_pass() {
            measure.observe(rows)?;
            measure.end_pass();
        }
        Ok(measure.found)
    }

    fn bucket(&self, length: u32) -> usize {
        self.cuts.partition_point(|&cut| cut < length)
    }

    /// Sets the score of a response to its reward adjusted by its bucket.
    #[inline]
    pub fn adjust(&self, point: &mut Point) {
        let bucket = self.bucket(point.length);
        point.score = (point.raw - self.mean[bucket]) / self.scale[bucket];
    }
}

/// The cuts, each once. A cut at the greatest length would have nothing above it.
fn cuts(counts: &BTreeMap<u32, u64>, buckets: usize) -> Vec<u32> {
    let total: u64 = counts.values().sum();
    let mut cuts = Vec::new();
    let mut below = 0;
    let mut next = 1u128;
    for (&length, &count) in counts {
        below += count;
        // The cut at rank ⌈j·n/B⌉ is this length if the rank is within those counted by now.
        let mut here = false;
        while next < buckets as u128
            && (next * u128::from(total)).div_ceil(buckets as u128) <= u128::from(below)
        {
            here = true;
            next += 1;
        }
        if here && below < total {
            cuts.push(length);
        }
    }
    cuts
}

/// The usable rows of an input.
#[derive(Debug, Clone, Copy)]
pub struct Usable<'a, S> {
    /// The rows.
    pub source: &'a S,
    /// Where the prompts are.
    pub layout: &'a Layout,
    /// Bounds on lengths.
    pub filter: Filter,
    /// Which responses count.
    pub pool: Pool<'a>,
}

impl<S: Source> Usable<'_, S> {
    /// Folds the rows, in parallel over pieces of the input.
    fn fold<T: Send>(
        &self,
        empty: impl Fn() -> T + Sync,
        add: impl Fn(&mut T, &Point) + Sync,
    ) -> Result<Vec<T>, Stop> {
        let pieces = self.layout.pieces(self.source).into_par_iter();
        let piece = |piece| {
            let piece = self.layout.aligned(self.source, piece);
            let mut state = empty();
            let (mut block, mut group, mut ignored) =
                (Block::default(), Group::default(), Dropped::default());
            let mut rising = Rising::before(self.layout, self.source, piece.start);
            let mut at = piece.start;
            while at < piece.end {
                at = self.layout.fill(Portable, self.source, at, piece.end, &mut block, &mut ignored)?;
                rising.check(self.layout, &block)?;
                block.screen(&self.filter, &mut ignored, &mut Moments::default());
                for prompt in 0..block.prompts() {
                    self.pool.fill(&block, prompt, &mut group, &mut ignored);
                    group.all.iter().for_each(|point| add(&mut state, point));
                }
            }
            Ok(state)
        };
        pieces.map(piece).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_are_quantiles_of_the_inverse_distribution_function() {
        let counts = |of: &[(u32, u64)]| of.iter().copied().collect();
        assert_eq!(cuts(&counts(&[(1, 1), (2, 1), (3, 1), (4, 1)]), 2), [2]);
        assert_eq!(cuts(&counts(&[(1, 1), (2, 1), (3, 1)]), 2), [2]);
        // Equal lengths share a bucket.
        assert_eq!(cuts(&counts(&[(5, 90), (9, 10)]), 10), [5]);
        assert!(cuts(&counts(&[(5, 90)]), 10).is_empty());
    }
}
