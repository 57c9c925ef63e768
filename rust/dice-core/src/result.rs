//! The result of mining.

use arrow_array::RecordBatch;

use crate::input::filter::Dropped;
use crate::pairs::totals::{DroppedPrompts, Totals};
use crate::penalty::solve::Answer;
use crate::penalty::steps::CurvePoint;

/// The result of [`mine`](crate::mine::mine).
#[derive(Debug, Clone, Default)]
pub struct Mined {
    /// The pairs, by ascending prompt key, in one batch or several: see [`mine`](crate::mine::mine).
    pub pairs: Vec<RecordBatch>,
    /// The penalty; `None` without a linear one.
    pub alpha: Option<f64>,
    /// The penalties `[low, high)` with the same best and worst responses; `high` may be infinite.
    pub alpha_interval: Option<(f64, f64)>,
    /// Mean of |best| − |worst| by reward alone, over prompts where one beats the other (of equal rewards, the shortest
    /// best and the longest worst, as the least penalty has them); NaN without such prompts.
    pub gap_before: f64,
    /// Mean of |chosen| − |rejected| of the pairs; NaN without pairs.
    pub gap_after: f64,
    /// The gap around the answer; empty without a linear penalty or without pairs.
    pub curve: Vec<CurvePoint>,
    /// Pearson's correlation of reward and length over the usable rows; NaN if one is constant.
    pub correlation_before: f64,
    /// Pearson's correlation of score and length over the usable rows; NaN if one is constant.
    pub correlation_after: f64,
    /// Numbers of dropped rows.
    pub dropped: Dropped,
    /// Numbers of prompts without a pair.
    pub dropped_prompts: DroppedPrompts,
    /// Number of pairs of equal rewards that were left out, where a prompt can have several pairs.
    pub tied_pairs: u64,
    /// Number of prompts in the input.
    pub prompts: u64,
    /// Number of rows in the input.
    pub rows: u64,
}

impl Mined {
    pub(crate) fn set_answer(&mut self, answer: Answer) {
        self.alpha = Some(answer.alpha);
        self.alpha_interval = Some(answer.interval);
        self.curve = answer.curve;
    }

    pub(crate) fn set_totals(&mut self, totals: &Totals) {
        self.gap_before = totals.gap_before as f64 / totals.contrast as f64;
        self.correlation_before = totals.rewards.correlation(0.0);
        self.correlation_after = totals.scores.correlation(totals.alpha);
        self.dropped = totals.dropped;
        self.dropped_prompts = totals.dropped_prompts;
        self.tied_pairs = totals.tied_pairs;
        self.prompts = totals.prompts;
    }
}
