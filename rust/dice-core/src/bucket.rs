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
use crate::filter::{BadLength, Dropped, Filter, Point};
use crate::lanes::Portable;
use crate::layout::Layout;
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

impl Buckets {
    /// Measures the buckets over all usable rows.
    ///
    /// # Errors
    /// [`BadLength`] if a length is no count of 32 bits.
    pub fn measure<S: Source>(rows: &Usable<S>, buckets: usize, scaled: bool) -> Result<Self, BadLength> {
        let counts = rows.fold(BTreeMap::<u32, u64>::new, |counts, point| {
            *counts.entry(point.length).or_default() += 1;
        })?;
        let counts = counts.into_iter().reduce(|mut all, part| {
            part.into_iter().for_each(|(length, count)| *all.entry(length).or_default() += count);
            all
        });
        let mut found =
            Self { cuts: cuts(&counts.unwrap_or_default(), buckets), mean: vec![], scale: vec![] };
        let size = found.cuts.len() + 1;
        found.mean = vec![0.0; size];
        found.scale = vec![1.0; size];
        found.mean = found.means(rows, |_, point| point.raw)?;
        if scaled {
            let square = |bucket: usize, point: &Point| {
                let deviation = point.raw - found.mean[bucket];
                deviation * deviation
            };
            let variance = found.means(rows, square)?;
            found.scale = variance.iter().map(|v| if *v > 0.0 { v.sqrt() } else { 1.0 }).collect();
        }
        Ok(found)
    }

    /// Mean of a value in each bucket, exact up to its last rounding, so that neither the order of rows
    /// nor the number of threads shows in it.
    fn means<S: Source>(
        &self,
        rows: &Usable<S>,
        value: impl Fn(usize, &Point) -> f64 + Sync,
    ) -> Result<Vec<f64>, BadLength> {
        let empty = || vec![(ExactSum::default(), 0u64); self.cuts.len() + 1];
        let parts = rows.fold(empty, |sums, point| {
            let bucket = self.bucket(point.length);
            sums[bucket].0.add(value(bucket, point));
            sums[bucket].1 += 1;
        })?;
        let sums = parts.into_iter().fold(empty(), |mut all, part| {
            for (all, part) in all.iter_mut().zip(part) {
                all.0.merge(&part.0);
                all.1 += part.1;
            }
            all
        });
        Ok(sums.iter().map(|(sum, count)| sum.value() / (*count).max(1) as f64).collect())
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
    ) -> Result<Vec<T>, BadLength> {
        let pieces = self.layout.pieces(self.source).into_par_iter();
        let piece = |piece| {
            let piece = self.layout.aligned(self.source, piece);
            let mut state = empty();
            let (mut block, mut group, mut ignored) =
                (Block::default(), Group::default(), Dropped::default());
            let mut at = piece.start;
            while at < piece.end {
                at = self.layout.fill(Portable, self.source, at, piece.end, &mut block, &mut ignored)?;
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
