//! Best and worst response of a prompt on an entire bracket of penalties, where float32 is precise enough.
//!
//! For nearly every prompt, the best response is the same on the entire bracket, and so is the worst. Sixteen lanes of
//! float32 show that. With the middle `a` of the bracket, half its width `d`, the scores `s = r − a·l` and the best
//! response `b`, no other response j is the best anywhere in the bracket if
//!
//! ```text
//! s_j + d · |l_j − l_b|  <  s_b − e
//! ```
//!
//! where `e` is more than the sum of all rounding errors.

use crate::input::block::Block;
use crate::numeric::simd::{LANES, Lanes};
use crate::penalty::hull::Bracket;

/// The test for the prompts of one block.
#[derive(Debug, Clone, Copy)]
pub struct Probe<V> {
    alpha: V,
    half_width: V,
    error: f32,
    /// Whether the block has rows that are not usable.
    has_unusable: bool,
}

/// Best and worst response of a prompt on the bracket and by reward alone, as offsets in the block; `None` if not
/// certain.
#[derive(Debug, Clone, Copy, Default)]
pub struct Choice {
    /// The best response on the bracket.
    pub chosen: Option<u32>,
    /// The worst response on the bracket.
    pub rejected: Option<u32>,
    /// The best response by reward alone.
    pub best: Option<u32>,
    /// The worst response by reward alone.
    pub worst: Option<u32>,
    /// Number of usable rows.
    pub usable: usize,
}

impl Choice {
    /// Chosen, rejected, best and worst response, if all four are certain.
    #[inline(always)]
    pub fn certain(&self) -> Option<[u32; 4]> {
        Some([self.chosen?, self.rejected?, self.best?, self.worst?])
    }
}

impl<V: Copy> Probe<V> {
    /// `None` if float32 is not precise enough for this block and bracket.
    #[inline(always)]
    pub fn new<L: Lanes<V = V>>(lanes: L, block: &Block, bracket: Bracket) -> Option<Self> {
        /// The lanes read lengths as signed integers.
        const MAX_LENGTH: u32 = 1 << 31;
        /// Rounding errors, in units of 2⁻²⁴ of the scale below. The score of either response has four (reward, length,
        /// product, difference), the third term four more, the sums three: fifteen, and some to spare.
        const ROUNDINGS: f32 = 24.0 * (f32::EPSILON / 2.0);
        let alpha = (bracket.low + (bracket.high - bracket.low) / 2.0) as f32;
        let ends = [bracket.low, bracket.high].map(|end| (end - f64::from(alpha)).abs());
        let half_width = (ends[0].max(ends[1]) as f32).next_up();
        let scale = block.max_abs_reward + (alpha + half_width) * block.max_length as f32;
        let fits = block.max_length < MAX_LENGTH && scale < f32::MAX / 64.0;
        // Errors are absolute below the normal range.
        fits.then(|| Self {
            alpha: lanes.splat(alpha),
            half_width: lanes.splat(half_width),
            error: ROUNDINGS * scale + f32::MIN_POSITIVE,
            has_unusable: block.has_unusable,
        })
    }

    /// The choice of a prompt with at most [`LANES`] rows.
    #[inline(always)]
    pub fn choose_short<L: Lanes<V = V>>(
        &self,
        lanes: L,
        block: &Block,
        start: usize,
        rows: usize,
    ) -> Choice {
        let (rewards, lengths) = block.lanes(start);
        // Rows that are not usable are NaN, which neither wins nor counts.
        let rewards = lanes.head(lanes.load(rewards), rows);
        let sizes = lanes.load_ints(lengths);
        let scores = lanes.sub(rewards, lanes.mul(self.alpha, sizes));
        let (lowest, highest) = (lanes.splat(f32::NEG_INFINITY), lanes.splat(f32::INFINITY));
        let max_score = lanes.greatest(lanes.max(scores, lowest));
        let min_score = lanes.least(lanes.min(scores, highest));
        let max_reward = lanes.greatest(lanes.max(rewards, lowest));
        let min_reward = lanes.least(lanes.min(rewards, highest));
        // Without a usable row no lane is set; then any lane will do.
        let chosen = lanes.at_least(scores, lanes.splat(max_score)).trailing_zeros() as usize % LANES;
        let rejected = lanes.at_most(scores, lanes.splat(min_score)).trailing_zeros() as usize % LANES;
        // Rounding to float32 keeps the order, so a single greatest rounded reward is the greatest reward.
        let best = lanes.at_least(rewards, lanes.splat(max_reward));
        let worst = lanes.at_most(rewards, lanes.splat(min_reward));
        let rivals = lanes.at_least(
            lanes.add(scores, self.gain(lanes, sizes, lengths[chosen])),
            lanes.splat(max_score - self.error),
        );
        let low_rivals = lanes.at_most(
            lanes.sub(scores, self.gain(lanes, sizes, lengths[rejected])),
            lanes.splat(min_score + self.error),
        );
        let usable =
            if self.has_unusable { lanes.at_least(rewards, lowest).count_ones() as usize } else { rows };
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
    // Not a closure, which would be compiled without the vector instructions.
    #[inline(always)]
    fn vectors<L: Lanes<V = V>>(&self, lanes: L, block: &Block, at: usize, end: usize) -> [V; 3] {
        let (rewards, lengths) = block.lanes(at);
        let rewards = lanes.head(lanes.load(rewards), end - at);
        let sizes = lanes.load_ints(lengths);
        [rewards, sizes, lanes.sub(rewards, lanes.mul(self.alpha, sizes))]
    }

    /// How much a response can gain on one of length `other`, from the middle to an end of the bracket.
    #[inline(always)]
    fn gain<L: Lanes<V = V>>(&self, lanes: L, sizes: V, other: u32) -> V {
        lanes.mul(self.half_width, lanes.abs(lanes.sub(sizes, lanes.splat(other as i32 as f32))))
    }

    /// The choice of a prompt with any number of rows.
    #[inline(always)]
    pub fn choose_long<L: Lanes<V = V>>(&self, lanes: L, block: &Block, start: usize, end: usize) -> Choice {
        let (lowest, highest) = (lanes.splat(f32::NEG_INFINITY), lanes.splat(f32::INFINITY));
        let (mut max_score, mut min_score, mut max_reward, mut min_reward) =
            (lowest, highest, lowest, highest);
        let mut at = start;
        while at < end {
            let [rewards, _, scores] = self.vectors(lanes, block, at, end);
            max_score = lanes.max(scores, max_score);
            min_score = lanes.min(scores, min_score);
            max_reward = lanes.max(rewards, max_reward);
            min_reward = lanes.min(rewards, min_reward);
            at += LANES;
        }
        let (max_score, min_score) = (lanes.greatest(max_score), lanes.least(min_score));
        let (max_reward, min_reward) = (lanes.greatest(max_reward), lanes.least(min_reward));
        let mut chosen = LaneHits::default();
        let mut rejected = LaneHits::default();
        let mut best = LaneHits::default();
        let mut worst = LaneHits::default();
        let mut usable = 0;
        let mut at = start;
        while at < end {
            let [rewards, _, scores] = self.vectors(lanes, block, at, end);
            chosen.add(at, lanes.at_least(scores, lanes.splat(max_score)));
            rejected.add(at, lanes.at_most(scores, lanes.splat(min_score)));
            best.add(at, lanes.at_least(rewards, lanes.splat(max_reward)));
            worst.add(at, lanes.at_most(rewards, lanes.splat(min_reward)));
            usable += lanes.at_least(rewards, lowest).count_ones() as usize;
            at += LANES;
        }
        let length = |places: &LaneHits| block.lengths[places.last as usize];
        let (chosen_length, rejected_length) = (length(&chosen), length(&rejected));
        let (mut rivals, mut low_rivals) = (LaneHits::default(), LaneHits::default());
        let mut at = start;
        while at < end {
            let [_, sizes, scores] = self.vectors(lanes, block, at, end);
            let up = lanes.add(scores, self.gain(lanes, sizes, chosen_length));
            let down = lanes.sub(scores, self.gain(lanes, sizes, rejected_length));
            rivals.add(at, lanes.at_least(up, lanes.splat(max_score - self.error)));
            low_rivals.add(at, lanes.at_most(down, lanes.splat(min_score + self.error)));
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

/// The lanes in which a comparison was true, over a prompt: their number and the last one's offset in the block.
#[derive(Default)]
struct LaneHits {
    count: u32,
    last: u32,
}

impl LaneHits {
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
