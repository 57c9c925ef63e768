//! A block of rows, brought to the processor's cache: whole prompts, in types that do not depend on the input.
//!
//! Every pass over the input works on blocks. What the columns are (their types, nulls, batches, the order of
//! rows) is dealt with once, here and in [`Source`].

use std::ops::Range;

use crate::filter::{BadLength, Dropped, Filter, Point};
use crate::lanes::{LANES, Lanes};
use crate::layout::Stop;

/// Rows by number, of which any range can be read.
pub trait Source: Sync {
    /// Number of rows.
    fn rows(&self) -> u64;
    /// Appends [`Int::ordinal`](crate::numbers::Int::ordinal) of the prompt keys of some rows.
    fn keys(&self, rows: Range<u64>, keys: &mut Vec<u64>);
    /// [`Int::ordinal`](crate::numbers::Int::ordinal) of the prompt key of a row.
    fn key(&self, row: u64) -> u64;
    /// Appends the places among some rows (but the first) at which the key is another than before. `keys` is scratch.
    fn changes<L: Lanes>(&self, lanes: L, rows: Range<u64>, keys: &mut Vec<u64>, starts: &mut Vec<u32>);
    /// Appends rewards and lengths of some rows to a block (and their row numbers, if they are not these), and marks
    /// and counts those that are not usable for another reason than these two.
    ///
    /// # Errors
    /// [`BadLength`] if a length is no count of 32 bits, whether the row is usable or not.
    fn values(&self, rows: Range<u64>, block: &mut Block, dropped: &mut Dropped) -> Result<(), BadLength>;
}

/// Rows that a block is meant to hold; more if one prompt has more.
pub const ROWS: usize = 4096;

/// Whole prompts, one after another.
#[derive(Debug, Default)]
pub struct Block {
    /// Rewards rounded to float32; once [screened](Block::screen), NaN marks the rows that are not usable.
    pub rewards: Vec<f32>,
    /// Rewards as they came in; empty where they came as float32.
    pub wide: Vec<f64>,
    /// Lengths.
    pub lengths: Vec<u32>,
    /// Row numbers, where they do not simply count on from [`Block::origins`].
    pub rows: Vec<u32>,
    /// Rows that were marked as not usable, and counted, before the block is screened.
    pub marked: u64,
    /// [`Int::ordinal`](crate::numbers::Int::ordinal) of the key of each prompt.
    pub keys: Vec<u64>,
    /// Where each prompt starts, and the number of rows at the end.
    pub starts: Vec<u32>,
    /// Row number of each prompt's first row; meaningless where there are [`Block::rows`].
    pub origins: Vec<u64>,
    /// Greatest |reward| of a usable row.
    pub reach: f32,
    /// Greatest length of any row.
    pub longest: u32,
    /// Whether a row is not usable.
    pub gaps: bool,
    /// Scratch.
    row_keys: Vec<u64>,
}

impl Block {
    /// Forgets everything.
    pub fn clear(&mut self) {
        self.rewards.clear();
        self.wide.clear();
        self.lengths.clear();
        self.rows.clear();
        self.marked = 0;
        self.keys.clear();
        self.starts.clear();
        self.origins.clear();
    }

    /// Number of prompts.
    pub fn prompts(&self) -> usize {
        self.keys.len()
    }

    /// Row number of the row at place `i`, of prompt `prompt`.
    #[inline(always)]
    pub fn row(&self, prompt: usize, i: usize) -> u64 {
        if self.rows.is_empty() {
            self.origins[prompt] + (i - self.starts[prompt] as usize) as u64
        } else {
            u64::from(self.rows[i])
        }
    }

    /// The reward at place `i`, as it came in.
    #[inline(always)]
    pub fn reward(&self, i: usize) -> f64 {
        if self.wide.is_empty() { f64::from(self.rewards[i]) } else { self.wide[i] }
    }

    /// Finds the prompts of some rows of `source`, from row `from` to at most row `end`, and returns the row after
    /// the last of them. The prompt of the last row is left out unless it ends there (or at `end`).
    ///
    /// Rows of a prompt must lie together.
    ///
    /// # Errors
    /// [`Stop::Huge`] for a prompt of 2³² − 1 rows or more.
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
                return Err(Stop::Huge);
            }
            self.starts.clear();
            self.starts.push(0);
            source.changes(lanes, from..to, &mut self.row_keys, &mut self.starts);
            if to == end {
                self.starts.push((to - from) as u32);
                break;
            }
            // The last start is the end of what is whole.
            if self.starts.len() > 1 {
                break;
            }
            size *= 2;
        }
        let prompts = self.starts.len() - 1;
        let starts = &self.starts[..prompts];
        self.keys.clear();
        self.keys.extend(starts.iter().map(|&start| source.key(from + u64::from(start))));
        self.origins.clear();
        self.origins.extend(starts.iter().map(|&start| from + u64::from(start)));
        Ok(from + u64::from(self.starts[prompts]))
    }

    /// Marks the rows that are not usable for their length or reward, counts them, and adds the others to
    /// `moments`. Pads the columns, so that [`Block::lanes`] can read beyond the last row.
    #[inline(always)]
    pub fn screen(&mut self, filter: &Filter, dropped: &mut Dropped, moments: &mut Moments) {
        let (min, max) = (filter.min_length.unwrap_or(0), filter.max_length.unwrap_or(u32::MAX));
        let shortest = self.lengths.iter().fold(u32::MAX, |a, &b| a.min(b));
        self.longest = self.lengths.iter().fold(0, |a, &b| a.max(b));
        let finite = reach(&self.rewards);
        self.reach = finite.unwrap_or(0.0);
        self.gaps = finite.is_none() || shortest < min || self.longest > max;
        if self.gaps {
            let mut not_finite = 0;
            for (reward, &length) in self.rewards.iter_mut().zip(&self.lengths) {
                if !reward.is_finite() {
                    not_finite += 1;
                } else if length < min {
                    dropped.too_short += 1;
                } else if length > max {
                    dropped.too_long += 1;
                } else {
                    self.reach = self.reach.max(reward.abs());
                    continue;
                }
                *reward = f32::NAN;
            }
            dropped.not_finite += not_finite - self.marked;
        }
        let (marks, lengths) = (&self.rewards, &self.lengths);
        match (self.gaps || self.longest > i32::MAX as u32, self.wide.is_empty()) {
            // The type of each loop is known, so that it is made of vectors.
            (false, true) => moments.add::<false>(marks, lengths, |i| f64::from(marks[i])),
            (false, false) => moments.add::<false>(marks, lengths, |i| self.wide[i]),
            (true, true) => moments.add::<true>(marks, lengths, |i| f64::from(marks[i])),
            (true, false) => moments.add::<true>(marks, lengths, |i| self.wide[i]),
        }
        self.rewards.resize(self.rewards.len() + LANES, f32::NAN);
        self.lengths.resize(self.lengths.len() + LANES, 0);
    }

    /// [`LANES`] rewards and lengths from place `from` on.
    #[inline(always)]
    pub fn lanes(&self, from: usize) -> (&[f32; LANES], &[u32; LANES]) {
        let (rewards, lengths) = (&self.rewards[from..from + LANES], &self.lengths[from..from + LANES]);
        (rewards.try_into().expect("as many"), lengths.try_into().expect("as many"))
    }

    /// Replaces `points` by the usable rows of a prompt. [`Point::row`] is the place in the block, which rises
    /// with the row number.
    #[inline(always)]
    pub fn gather(&self, prompt: usize, points: &mut Vec<Point>) {
        points.clear();
        for i in self.starts[prompt] as usize..self.starts[prompt + 1] as usize {
            if !self.rewards[i].is_nan() {
                points.push(self.point(i));
            }
        }
    }

    /// The row at place `i`. [`Point::row`] is the place.
    #[inline(always)]
    pub fn point(&self, i: usize) -> Point {
        let raw = self.reward(i);
        Point { score: raw, raw, row: i as u64, length: self.lengths[i] }
    }
}

/// Greatest |reward| if all are finite.
#[inline(always)]
fn reach(rewards: &[f32]) -> Option<f32> {
    // Without their signs, floats are in the order of their bits, with infinity and NaN above all others.
    let bits = rewards.iter().fold(0, |most, reward| most.max(reward.to_bits() & 0x7fff_ffff));
    let reach = f32::from_bits(bits);
    reach.is_finite().then_some(reach)
}

/// Sums over usable rows, for the correlation of reward and length. Counted from a pivot (the first row), so that
/// nothing is lost where rewards are far from zero.
#[derive(Debug, Clone, Copy, Default)]
pub struct Moments {
    /// Rows.
    count: f64,
    /// Reward and length that are taken as zero.
    pivot: [f64; 2],
    /// Σ reward, Σ length, Σ reward², Σ length², Σ reward · length
    sums: [f64; 5],
}

impl Moments {
    /// Without `ANY`, all rows are usable and lengths are below 2³¹.
    #[inline(always)]
    fn add<const ANY: bool>(&mut self, marks: &[f32], lengths: &[u32], reward: impl Fn(usize) -> f64) {
        const WIDE: usize = 8;
        if self.count == 0.0 {
            let Some(first) = marks[..lengths.len()].iter().position(|mark| !mark.is_nan()) else { return };
            self.pivot = [reward(first), f64::from(lengths[first])];
        }
        let [zero, zero_length] = self.pivot;
        let mut sums = [[0.0f64; WIDE]; 5];
        let mut count = [0u32; WIDE];
        let mut one = |lane: usize, i: usize| {
            let usable = !ANY || !marks[i].is_nan();
            let length = if ANY { f64::from(lengths[i]) } else { f64::from(lengths[i] as i32) };
            let (x, y) = if usable { (reward(i) - zero, length - zero_length) } else { (0.0, 0.0) };
            count[lane] += u32::from(usable);
            sums[0][lane] += x;
            sums[1][lane] += y;
            sums[2][lane] += x * x;
            sums[3][lane] += y * y;
            sums[4][lane] += x * y;
        };
        let rows = lengths.len();
        let whole = rows - rows % WIDE;
        let mut at = 0;
        while at < whole {
            for lane in 0..WIDE {
                one(lane, at + lane);
            }
            at += WIDE;
        }
        for i in whole..rows {
            one(0, i);
        }
        self.count += f64::from(count.iter().sum::<u32>());
        for (sum, lanes) in self.sums.iter_mut().zip(&sums) {
            *sum += lanes.iter().sum::<f64>();
        }
    }

    /// Adds one row.
    pub fn push(&mut self, reward: f64, length: u32) {
        let length = f64::from(length);
        if self.count == 0.0 {
            self.pivot = [reward, length];
        }
        let (x, y) = (reward - self.pivot[0], length - self.pivot[1]);
        self.count += 1.0;
        self.sums.iter_mut().zip([x, y, x * x, y * y, x * y]).for_each(|(sum, term)| *sum += term);
    }

    /// Adds other rows.
    pub fn merge(&mut self, other: &Self) {
        if self.count == 0.0 {
            *self = *other;
            return;
        }
        // Those of the other, counted from this pivot.
        let (n, [x, y, xx, yy, xy]) = (other.count, other.sums);
        let (u, v) = (other.pivot[0] - self.pivot[0], other.pivot[1] - self.pivot[1]);
        let terms = [
            x + n * u,
            y + n * v,
            xx + 2.0 * u * x + n * u * u,
            yy + 2.0 * v * y + n * v * v,
            xy + u * y + v * x + n * u * v,
        ];
        self.count += n;
        self.sums.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
    }

    /// Pearson's correlation of `reward − alpha · length` with length, to nine decimals (further ones would depend on
    /// the order of rows); NaN where one of them is constant.
    pub fn correlation(&self, alpha: f64) -> f64 {
        let n = self.count;
        let [x, y, xx, yy, xy] = self.sums;
        let (variance_x, variance_y) = (xx / n - (x / n).powi(2), yy / n - (y / n).powi(2));
        let covariance = xy / n - (x / n) * (y / n);
        let penalised = variance_x - 2.0 * alpha * covariance + alpha * alpha * variance_y;
        // What is left of a constant is rounding error.
        let scale = (xx + alpha * alpha * yy) / n;
        if !(penalised > 1e-12 * scale && variance_y > 1e-12 * yy / n) {
            return f64::NAN;
        }
        let correlation = (covariance - alpha * variance_y) / (penalised * variance_y).sqrt();
        // Adding zero turns −0 into 0.
        (correlation.clamp(-1.0, 1.0) * 1e9).round() / 1e9 + 0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn correlation_far_from_zero_and_in_parts() {
        let rows: Vec<(f64, u32)> =
            (0..1000u32).map(|i| (1e4 + f64::from(i * 7919 % 1000) * 5e-6, 500 + i * 31 % 777)).collect();
        let of = |rows: &[(f64, u32)]| {
            let mut moments = Moments::default();
            rows.iter().for_each(|row| moments.push(row.0, row.1));
            moments
        };
        let mean = |value: &dyn Fn(&(f64, u32)) -> f64| rows.iter().map(value).sum::<f64>() / 1000.0;
        let (x, y) = (mean(&|row| row.0 - 1e4), mean(&|row| f64::from(row.1)));
        let spread =
            |a: &dyn Fn(&(f64, u32)) -> f64, b: &dyn Fn(&(f64, u32)) -> f64| mean(&|row| a(row) * b(row));
        let (u, v) = (|row: &(f64, u32)| row.0 - 1e4 - x, |row: &(f64, u32)| f64::from(row.1) - y);
        let truth = spread(&u, &v) / (spread(&u, &u) * spread(&v, &v)).sqrt();
        let whole = of(&rows).correlation(0.0);
        assert!((whole - truth).abs() < 2e-9, "{whole} is not {truth}");
        let mut parts = of(&rows[..1]);
        parts.merge(&of(&rows[1..400]));
        parts.merge(&Moments::default());
        parts.merge(&of(&rows[400..]));
        assert!((parts.correlation(0.0) - whole).abs() < 2e-9);
        assert!(of(&rows[..1]).correlation(0.0).is_nan());
        assert!(Moments::default().correlation(0.0).is_nan());
    }
}
