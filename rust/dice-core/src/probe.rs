//! Best and worst of a prompt on a whole bracket of penalties, where float32 can tell.
//!
//! For nearly every prompt the best response is the same on the whole bracket, and so is the worst. That is seen on
//! sixteen lanes of float32: with the middle `a` of the bracket, its half width `d`, scores `s = r − a·l` and the best
//! of them `b`, no other response j is the best anywhere in the bracket if
//!
//! ```text
//! s_j + d · |l_j − l_b|  <  s_b − e
//! ```
//!
//! where `e` is more than all roundings add up to.

use crate::block::Block;
use crate::hull::Bracket;
use crate::lanes::{LANES, Lanes};

/// The test, for one block.
#[derive(Debug, Clone, Copy)]
pub struct Probe<V> {
    alpha: V,
    half: V,
    error: f32,
    /// Whether to count usable rows.
    gaps: bool,
}

/// Best and worst of a prompt on the whole bracket and by reward alone, as places in the block; `None` where that is
/// not certain.
#[derive(Debug, Clone, Copy, Default)]
pub struct Choice {
    /// The best response on the bracket.
    pub chosen: Option<u32>,
    /// The worst response on the bracket.
    pub rejected: Option<u32>,
    /// The best by reward alone.
    pub best: Option<u32>,
    /// The worst by reward alone.
    pub worst: Option<u32>,
    /// Usable rows.
    pub usable: usize,
}

impl<V: Copy> Probe<V> {
    /// `None` if float32 is not enough for this block or bracket.
    #[inline(always)]
    pub fn new<L: Lanes<V = V>>(lanes: L, block: &Block, bracket: Bracket) -> Option<Self> {
        /// Lengths from here on are not read as signed integers.
        const LONGEST: u32 = 1 << 31;
        /// Roundings, in units of 2⁻²⁴ of the scale below. The score of either response takes four (the reward, the
        /// length, the product, the difference), the third term another four, the sums three: fifteen, and some to spare.
        const ROUNDINGS: f32 = 24.0 * (f32::EPSILON / 2.0);
        let alpha = (bracket.low + (bracket.high - bracket.low) / 2.0) as f32;
        let ends = [bracket.low, bracket.high].map(|end| (end - f64::from(alpha)).abs());
        let half = (ends[0].max(ends[1]) as f32).next_up();
        let scale = block.reach + (alpha + half) * block.longest as f32;
        let fits = block.longest < LONGEST && scale < f32::MAX / 64.0;
        // Below the normal range, errors are absolute.
        fits.then(|| Self {
            alpha: lanes.splat(alpha),
            half: lanes.splat(half),
            error: ROUNDINGS * scale + f32::MIN_POSITIVE,
            gaps: block.gaps,
        })
    }

    /// The choice of a prompt of at most [`LANES`] rows.
    #[inline(always)]
    pub fn short<L: Lanes<V = V>>(&self, lanes: L, block: &Block, start: usize, rows: usize) -> Choice {
        let (rewards, lengths) = block.lanes(start);
        // NaN, as of rows that are not usable, neither wins nor is counted.
        let rewards = lanes.head(lanes.load(rewards), rows);
        let sizes = lanes.load_ints(lengths);
        let scores = lanes.sub(rewards, lanes.mul(self.alpha, sizes));
        let (lowest, highest) = (lanes.splat(f32::NEG_INFINITY), lanes.splat(f32::INFINITY));
        let most = lanes.greatest(lanes.max(scores, lowest));
        let least = lanes.least(lanes.min(scores, highest));
        let most_before = lanes.greatest(lanes.max(rewards, lowest));
        let least_before = lanes.least(lanes.min(rewards, highest));
        // Without a usable row there is no lane, and what is read for it does not matter.
        let chosen = lanes.at_least(scores, lanes.splat(most)).trailing_zeros() as usize % LANES;
        let rejected = lanes.at_most(scores, lanes.splat(least)).trailing_zeros() as usize % LANES;
        // Rounding to float32 keeps the order, so a reward that is greatest alone is the greatest.
        let best = lanes.at_least(rewards, lanes.splat(most_before));
        let worst = lanes.at_most(rewards, lanes.splat(least_before));
        let rivals = lanes.at_least(
            lanes.add(scores, self.gain(lanes, sizes, lengths[chosen])),
            lanes.splat(most - self.error),
        );
        let low_rivals = lanes.at_most(
            lanes.sub(scores, self.gain(lanes, sizes, lengths[rejected])),
            lanes.splat(least + self.error),
        );
        let usable = if self.gaps { lanes.at_least(rewards, lowest).count_ones() as usize } else { rows };
        let only = |lanes: u32, lane: usize| (lanes.count_ones() == 1).then_some((start + lane) as u32);
        Choice {
            chosen: only(rivals, chosen),
            rejected: only(low_rivals, rejected),
            best: only(best, best.trailing_zeros() as usize),
            worst: only(worst, worst.trailing_zeros() as usize),
            usable,
        }
    }

    /// Rewards, lengths and scores of the rows from `at` on, up to row `end`.
    // Not a closure: that would not inherit the target's features.
    #[inline(always)]
    fn vectors<L: Lanes<V = V>>(&self, lanes: L, block: &Block, at: usize, end: usize) -> [V; 3] {
        let (rewards, lengths) = block.lanes(at);
        let rewards = lanes.head(lanes.load(rewards), end - at);
        let sizes = lanes.load_ints(lengths);
        [rewards, sizes, lanes.sub(rewards, lanes.mul(self.alpha, sizes))]
    }

    /// What a response can gain on one of another length, on half of the bracket.
    #[inline(always)]
    fn gain<L: Lanes<V = V>>(&self, lanes: L, sizes: V, other: u32) -> V {
        lanes.mul(self.half, lanes.abs(lanes.sub(sizes, lanes.splat(other as i32 as f32))))
    }

    /// The choice of a prompt of any number of rows.
    #[inline(always)]
    pub fn long<L: Lanes<V = V>>(&self, lanes: L, block: &Block, start: usize, end: usize) -> Choice {
        let (lowest, highest) = (lanes.splat(f32::NEG_INFINITY), lanes.splat(f32::INFINITY));
        let (mut most, mut least, mut most_before, mut least_before) = (lowest, highest, lowest, highest);
        let mut at = start;
        while at < end {
            let [rewards, _, scores] = self.vectors(lanes, block, at, end);
            most = lanes.max(scores, most);
            least = lanes.min(scores, least);
            most_before = lanes.max(rewards, most_before);
            least_before = lanes.min(rewards, least_before);
            at += LANES;
        }
        let (most, least) = (lanes.greatest(most), lanes.least(least));
        let (most_before, least_before) = (lanes.greatest(most_before), lanes.least(least_before));
        let mut chosen = Places::default();
        let mut rejected = Places::default();
        let mut best = Places::default();
        let mut worst = Places::default();
        let mut usable = 0;
        let mut at = start;
        while at < end {
            let [rewards, _, scores] = self.vectors(lanes, block, at, end);
            chosen.add(at, lanes.at_least(scores, lanes.splat(most)));
            rejected.add(at, lanes.at_most(scores, lanes.splat(least)));
            best.add(at, lanes.at_least(rewards, lanes.splat(most_before)));
            worst.add(at, lanes.at_most(rewards, lanes.splat(least_before)));
            usable += lanes.at_least(rewards, lowest).count_ones() as usize;
            at += LANES;
        }
        let length = |places: &Places| block.lengths[places.last as usize];
        let (chosen_length, rejected_length) = (length(&chosen), length(&rejected));
        let (mut rivals, mut low_rivals) = (Places::default(), Places::default());
        let mut at = start;
        while at < end {
            let [_, sizes, scores] = self.vectors(lanes, block, at, end);
            let up = lanes.add(scores, self.gain(lanes, sizes, chosen_length));
            let down = lanes.sub(scores, self.gain(lanes, sizes, rejected_length));
            rivals.add(at, lanes.at_least(up, lanes.splat(most - self.error)));
            low_rivals.add(at, lanes.at_most(down, lanes.splat(least + self.error)));
            at += LANES;
        }
        Choice {
            chosen: rivals.only(),
            rejected: low_rivals.only(),
            best: best.only(),
            worst: worst.only(),
            usable,
        }
    }
}

/// Places in the block, of which there should be one.
#[derive(Default)]
struct Places {
    count: u32,
    last: u32,
}

impl Places {
    #[inline(always)]
    fn add(&mut self, at: usize, lanes: u32) {
        self.count += lanes.count_ones();
        self.last = if lanes == 0 { self.last } else { at as u32 + lanes.trailing_zeros() };
    }

    #[inline(always)]
    fn only(&self) -> Option<u32> {
        (self.count == 1).then_some(self.last)
    }
}
