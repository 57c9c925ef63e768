//! A block of rows that fits the processor's cache: complete prompts, in types that do not depend on the input.
//!
//! Every pass over the input works on blocks. The types, nulls and batches of the columns and the order of rows are
//! handled once, here and in [`Source`].

use std::ops::Range;

use crate::input::filter::{Dropped, Filter, InvalidLength, Response};
use crate::numeric::moments::Moments;
use crate::numeric::simd::{LANES, Lanes};

/// Why a pass over the rows ended early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// A length is negative or needs more than 32 bits.
    InvalidLength,
    /// The key of a row is below that of the row before.
    KeyOrder,
    /// A prompt has more rows than a block can count.
    PromptTooLarge,
}

impl From<InvalidLength> for Stop {
    fn from(_: InvalidLength) -> Self {
        Self::InvalidLength
    }
}

/// Rows that can be read by row number, in any range.
pub trait Source: Sync {
    /// Number of rows.
    fn rows(&self) -> u64;
    /// Appends [`Int::ordinal`](crate::input::numbers::Int::ordinal) of the prompt keys of some rows.
    fn keys(&self, rows: Range<u64>, keys: &mut Vec<u64>);
    /// [`Int::ordinal`](crate::input::numbers::Int::ordinal) of the prompt key of a row.
    fn key(&self, row: u64) -> u64;
    /// Appends the offsets into `rows` at which the key differs from the row before. `keys` is a scratch buffer.
    fn changes<L: Lanes>(&self, lanes: L, rows: Range<u64>, keys: &mut Vec<u64>, starts: &mut Vec<u32>);
    /// Appends the rewards and lengths of some rows to a block (and their row numbers, if they are not consecutive).
    /// Marks and counts null and truncated rows; [`Block::screen`] does so for values that are out of range.
    ///
    /// # Errors
    /// [`InvalidLength`] if a length does not fit 32 unsigned bits, even on a row that is not usable.
    fn values(&self, rows: Range<u64>, block: &mut Block, dropped: &mut Dropped)
    -> Result<(), InvalidLength>;
}

/// Number of rows that a block holds, unless one prompt alone has more.
pub const ROWS: usize = 4096;

/// Complete prompts, one after another.
#[derive(Debug, Default)]
pub struct Block {
    /// Rewards rounded to float32; once [screened](Block::screen), NaN marks the rows that are not usable.
    pub rewards: Vec<f32>,
    /// Rewards of a float64 input, unrounded; empty if the input is float32.
    pub rewards_f64: Vec<f64>,
    /// Lengths.
    pub lengths: Vec<u32>,
    /// Row numbers, if they are not consecutive from [`Block::first_rows`] on; otherwise empty.
    pub rows: Vec<u32>,
    /// Number of rows that were marked as not usable, and counted, before the block is screened.
    pub marked: u64,
    /// [`Int::ordinal`](crate::input::numbers::Int::ordinal) of the key of each prompt.
    pub keys: Vec<u64>,
    /// Offset of each prompt's first row; the last entry is the number of rows.
    pub starts: Vec<u32>,
    /// Row number of each prompt's first row; not used if [`Block::rows`] is filled.
    pub first_rows: Vec<u64>,
    /// Greatest |reward| of the usable rows.
    pub max_abs_reward: f32,
    /// Greatest length of all rows.
    pub max_length: u32,
    /// Whether any row is not usable.
    pub has_unusable: bool,
    /// Scratch buffer of [`Block::split`].
    row_keys: Vec<u64>,
}

impl Block {
    /// Removes all rows.
    pub fn clear(&mut self) {
        self.rewards.clear();
        self.rewards_f64.clear();
        self.lengths.clear();
        self.rows.clear();
        self.marked = 0;
        self.keys.clear();
        self.starts.clear();
        self.first_rows.clear();
    }

    /// Number of prompts.
    pub fn prompts(&self) -> usize {
        self.keys.len()
    }

    /// Row number of the row at offset `i`, which belongs to prompt number `prompt` of the block.
    #[inline(always)]
    pub fn row(&self, prompt: usize, i: usize) -> u64 {
        if self.rows.is_empty() {
            self.first_rows[prompt] + (i - self.starts[prompt] as usize) as u64
        } else {
            u64::from(self.rows[i])
        }
    }

    /// The reward at offset `i`, in the precision of the input.
    #[inline(always)]
    pub fn reward(&self, i: usize) -> f64 {
        if self.rewards_f64.is_empty() { f64::from(self.rewards[i]) } else { self.rewards_f64[i] }
    }

    /// Finds the complete prompts in rows `from..end` of `source`, about [`ROWS`] rows of them, and returns the row
    /// after the last one.
    ///
    /// The rows of a prompt must be contiguous, and a prompt must start at `from` and end at `end`.
    ///
    /// # Errors
    /// [`Stop::PromptTooLarge`] for a prompt of 2³² − 1 rows or more.
    #[inline(always)]
    pub fn split<L: Lanes, S: Source>(
        &mut self,
        lanes: L,
        source: &S,
        from: u64,
        end: u64,
    ) -> Result<u64, Stop> {
        let mut size = ROWS as u64;
        loop {
            let to = end.min(from.saturating_add(size));
            if to - from >= u64::from(u32::MAX) {
                return Err(Stop::PromptTooLarge);
            }
            self.starts.clear();
            self.starts.push(0);
            source.changes(lanes, from..to, &mut self.row_keys, &mut self.starts);
            if to == end {
                self.starts.push((to - from) as u32);
                break;
            }
            // The last start ends the last complete prompt.
            if self.starts.len() > 1 {
                break;
            }
            size *= 2;
        }
        let prompts = self.starts.len() - 1;
        let starts = &self.starts[..prompts];
        self.keys.clear();
        self.keys.extend(starts.iter().map(|&start| source.key(from + u64::from(start))));
        self.first_rows.clear();
        self.first_rows.extend(starts.iter().map(|&start| from + u64::from(start)));
        Ok(from + u64::from(self.starts[prompts]))
    }

    /// Marks and counts the rows whose length or reward is out of range, and adds the usable rows to `moments`.
    /// Pads the columns, so that [`Block::lanes`] can read past the last row.
    #[inline(always)]
    pub fn screen(&mut self, filter: &Filter, dropped: &mut Dropped, moments: &mut Moments) {
        let (min, max) = (filter.min_length.unwrap_or(0), filter.max_length.unwrap_or(u32::MAX));
        let shortest = self.lengths.iter().fold(u32::MAX, |a, &b| a.min(b));
        self.max_length = self.lengths.iter().fold(0, |a, &b| a.max(b));
        let max_if_finite = max_abs_reward(&self.rewards);
        self.max_abs_reward = max_if_finite.unwrap_or(0.0);
        self.has_unusable = max_if_finite.is_none() || shortest < min || self.max_length > max;
        if self.has_unusable {
            let mut not_finite = 0;
            for (reward, &length) in self.rewards.iter_mut().zip(&self.lengths) {
                if !reward.is_finite() {
                    not_finite += 1;
                } else if length < min {
                    dropped.too_short += 1;
                } else if length > max {
                    dropped.too_long += 1;
                } else {
                    self.max_abs_reward = self.max_abs_reward.max(reward.abs());
                    continue;
                }
                *reward = f32::NAN;
            }
            dropped.not_finite += not_finite - self.marked;
        }
        let (marks, lengths) = (&self.rewards, &self.lengths);
        match (self.has_unusable || self.max_length > i32::MAX as u32, self.rewards_f64.is_empty()) {
            // One loop per type, so that the compiler can vectorize each.
            (false, true) => moments.add_rows::<false>(marks, lengths, |i| f64::from(marks[i])),
            (false, false) => moments.add_rows::<false>(marks, lengths, |i| self.rewards_f64[i]),
            (true, true) => moments.add_rows::<true>(marks, lengths, |i| f64::from(marks[i])),
            (true, false) => moments.add_rows::<true>(marks, lengths, |i| self.rewards_f64[i]),
        }
        self.rewards.resize(self.rewards.len() + LANES, f32::NAN);
        self.lengths.resize(self.lengths.len() + LANES, 0);
    }

    /// [`LANES`] rewards and lengths from offset `from` on.
    #[inline(always)]
    pub fn lanes(&self, from: usize) -> (&[f32; LANES], &[u32; LANES]) {
        let (rewards, lengths) = (&self.rewards[from..from + LANES], &self.lengths[from..from + LANES]);
        (rewards.try_into().expect("LANES values"), lengths.try_into().expect("LANES values"))
    }

    /// Replaces `responses` by the usable rows of a prompt. [`Response::row`] is the offset in the block, which grows
    /// with the row number.
    #[inline(always)]
    pub fn gather(&self, prompt: usize, responses: &mut Vec<Response>) {
        responses.clear();
        for i in self.starts[prompt] as usize..self.starts[prompt + 1] as usize {
            if !self.rewards[i].is_nan() {
                responses.push(self.response(i));
            }
        }
    }

    /// The row at offset `i`. [`Response::row`] is the offset.
    #[inline(always)]
    pub fn response(&self, i: usize) -> Response {
        let raw = self.reward(i);
        Response { score: raw, raw, row: i as u64, length: self.lengths[i] }
    }
}

/// The greatest |reward|, if all are finite.
#[inline(always)]
fn max_abs_reward(rewards: &[f32]) -> Option<f32> {
    // Without the sign, floats are in the order of their bits, with infinity and NaN above all others.
    let bits = rewards.iter().fold(0, |greatest, reward| greatest.max(reward.to_bits() & 0x7fff_ffff));
    let greatest = f32::from_bits(bits);
    greatest.is_finite().then_some(greatest)
}
