//! Sums and counts over all rows, added up over chunks of them.

use crate::input::filter::Dropped;
use crate::numeric::moments::Moments;
use crate::pairs::pairing::Pairing;

/// Numbers of prompts without a pair, by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DroppedPrompts {
    /// The prompt has too few usable responses.
    pub too_few_responses: u64,
    /// The responses that could make a pair have equal rewards, which is no preference.
    pub tied: u64,
    /// No response that may be chosen beats one that may be rejected.
    pub no_contrast: u64,
    /// No response beats another one of nearly equal length.
    pub no_match: u64,
}

impl DroppedPrompts {
    /// Adds the counts of other prompts.
    pub(crate) fn add(&mut self, other: &Self) {
        self.too_few_responses += other.too_few_responses;
        self.tied += other.tied;
        self.no_contrast += other.no_contrast;
        self.no_match += other.no_match;
    }

    /// Counts a prompt in which a pairing has no pair; `tied`: since two responses have equal rewards.
    pub(crate) fn count_pairless(&mut self, pairing: Pairing, tied: bool) {
        match pairing {
            _ if tied => self.tied += 1,
            Pairing::Matched(_) => self.no_match += 1,
            _ => self.no_contrast += 1,
        }
    }
}

/// Sums and counts over some rows.
#[derive(Debug, Clone, Default)]
pub(crate) struct Totals {
    /// Σ (|best| − |worst|) by reward alone, over the prompts with contrast; of equal rewards, the shortest best and the
    /// longest worst.
    pub(crate) gap_before: i128,
    /// Prompts whose best response beats the worst by reward alone.
    pub(crate) contrast: u64,
    /// Number of prompts.
    pub(crate) prompts: u64,
    /// Rows that are not usable.
    pub(crate) dropped: Dropped,
    /// Prompts without a pair.
    pub(crate) dropped_prompts: DroppedPrompts,
    /// Pairs of equal rewards that were left out, where a prompt has several pairs.
    pub(crate) tied_pairs: u64,
    /// Sums of reward and length over the usable rows.
    pub(crate) rewards: Moments,
    /// Sums of score (before a linear penalty) and length over the usable rows.
    pub(crate) scores: Moments,
    /// The linear penalty that `scores` do not include.
    pub(crate) alpha: f64,
}

impl Totals {
    /// Adds the totals of other rows at the same penalty.
    pub(crate) fn add(&mut self, other: &Self) {
        self.gap_before += other.gap_before;
        self.contrast += other.contrast;
        self.prompts += other.prompts;
        self.dropped.add(&other.dropped);
        self.dropped_prompts.add(&other.dropped_prompts);
        self.tied_pairs += other.tied_pairs;
        self.rewards.merge(&other.rewards);
        self.scores.merge(&other.scores);
        self.alpha = other.alpha;
    }
}
