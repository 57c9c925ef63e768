//! Which rows are usable, and a count of the others by the first reason that applies.
//!
//! | order | reason | a row is dropped when |
//! | --- | --- | --- |
//! | 1 | `null` | its reward or its length is null |
//! | 2 | `not_finite` | its reward is NaN, infinite, or beyond float32, in which pairs are stored |
//! | 3 | `truncated` | it was cut off by the token limit |
//! | 4 | `too_short` | its length is under `min_length` |
//! | 5 | `too_long` | its length is over `max_length` |
//! | 6 | `too_few_responses` | its prompt has fewer than `min_responses` rows that none of these dropped |

use std::ops::Range;

use crate::columns::{Batch, Floats, Int, with_ints};

/// One usable response.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// What is compared: the reward, or the reward adjusted by its length bucket. Finite.
    pub score: f64,
    /// The reward as it came in.
    pub raw: f64,
    /// Row number over all batches.
    pub row: u64,
    /// Length in the unit of the input.
    pub length: u32,
}

/// Bounds on the length; both ends are kept.
#[derive(Debug, Clone, Copy, Default)]
pub struct Filter {
    /// The shortest response that is kept.
    pub min_length: Option<u32>,
    /// The longest response that is kept.
    pub max_length: Option<u32>,
}

/// Rows dropped, by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Reward or length null.
    pub null: u64,
    /// Reward NaN, infinite or beyond float32.
    pub not_finite: u64,
    /// Cut off by the token limit.
    pub truncated: u64,
    /// Under `min_length`.
    pub too_short: u64,
    /// Over `max_length`.
    pub too_long: u64,
    /// Usable, but on a prompt with too few usable responses.
    pub too_few_responses: u64,
}

impl Dropped {
    /// Adds another count.
    pub fn add(&mut self, other: &Self) {
        self.null += other.null;
        self.not_finite += other.not_finite;
        self.truncated += other.truncated;
        self.too_short += other.too_short;
        self.too_long += other.too_long;
        self.too_few_responses += other.too_few_responses;
    }
}

/// A length that is negative or needs more than 32 bits was met; see
/// [`Columns::first_bad_length`](crate::Columns::first_bad_length).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadLength;

impl Filter {
    /// Calls `keep` on the usable rows of `range` (places in the batch), in order, and counts the others.
    ///
    /// # Errors
    /// [`BadLength`], whether the row would have been dropped or not.
    #[inline]
    pub fn apply(
        &self,
        batch: &Batch,
        range: Range<usize>,
        dropped: &mut Dropped,
        mut keep: impl FnMut(Point),
    ) -> Result<(), BadLength> {
        // The types are matched here, outside the loop over rows.
        with_ints!(&batch.lengths, lengths => match &batch.rewards {
            Floats::F32(rewards) => self.scan(
                batch, range, dropped, &mut keep,
                |i| f64::from(rewards[i]), |i| lengths[i].length(),
            ),
            Floats::F64(rewards) => self.scan(
                batch, range, dropped, &mut keep,
                |i| rewards[i], |i| lengths[i].length(),
            ),
        })
    }

    #[inline]
    fn scan(
        &self,
        batch: &Batch,
        range: Range<usize>,
        dropped: &mut Dropped,
        keep: &mut impl FnMut(Point),
        reward: impl Fn(usize) -> f64,
        length: impl Fn(usize) -> Option<u32>,
    ) -> Result<(), BadLength> {
        let (min, max) = (self.min_length.unwrap_or(0), self.max_length.unwrap_or(u32::MAX));
        for i in range {
            if batch.valid.as_ref().is_some_and(|nulls| nulls.is_null(i)) {
                let there = batch.valid_length.as_ref().is_none_or(|nulls| nulls.is_valid(i));
                if there && length(i).is_none() {
                    return Err(BadLength);
                }
                dropped.null += 1;
                continue;
            }
            let (raw, length) = (reward(i), length(i).ok_or(BadLength)?);
            // False for NaN too.
            let finite = raw.abs() <= f64::from(f32::MAX);
            if !finite {
                dropped.not_finite += 1;
            } else if batch.truncated.as_ref().is_some_and(|flags| flags.value(i)) {
                dropped.truncated += 1;
            } else if length < min {
                dropped.too_short += 1;
            } else if length > max {
                dropped.too_long += 1;
            } else {
                keep(Point { score: raw, raw, row: batch.start + i as u64, length });
            }
        }
        Ok(())
    }
}
