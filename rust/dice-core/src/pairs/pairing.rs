//! Which responses of a prompt make pairs.
//!
//! The orders best first and worst first are those of `order`, by penalized score. In every pair, the chosen response
//! beats the rejected one.
//!
//! | [`Pairing`] | pairs of a prompt |
//! | --- | --- |
//! | `MaxMin` | the best with the worst (Chen et al., arXiv 2406.09760) |
//! | `MaxRandom` | the best with a random one that it beats |
//! | `TopBottom` | each of the k best with each of the l worst, greatest margins first |
//! | `SweetSpot` | the best with the one nearest to `mean − d·std` of the scores (Xiao et al., arXiv 2502.16825) |
//! | `All` | all with all, greatest margins first |
//! | `Matched` | of all pairs whose lengths differ by at most a tolerance, the one with the greatest margin |

use std::cmp::Ordering;

use crate::input::filter::Response;
use crate::pairs::order::{beats, best, best_first, margin, worst, worst_first};
use crate::pairs::pool::Group;

/// By how much the lengths of a matched pair may differ.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Tolerance {
    /// A number of tokens or characters.
    Absolute(u32),
    /// A fraction of the longer length.
    Relative(f64),
}

impl Tolerance {
    fn allows(self, a: &Response, b: &Response) -> bool {
        match self {
            Self::Absolute(max) => abs_diff(a, b) <= max,
            Self::Relative(max) => f64::from(abs_diff(a, b)) <= max * f64::from(a.length.max(b.length)),
        }
    }
}

/// Which responses make pairs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pairing {
    /// The best with the worst.
    MaxMin,
    /// The best with a random one.
    MaxRandom {
        /// Seed of the draw.
        seed: u64,
    },
    /// The best ones with the worst ones.
    TopBottom {
        /// Number of best responses.
        top: usize,
        /// Number of worst responses.
        bottom: usize,
        /// Maximum number of pairs per prompt.
        max_pairs: usize,
    },
    /// The best with one that is some standard deviations below the mean.
    SweetSpot {
        /// Number of standard deviations.
        deviations: f64,
    },
    /// All with all.
    All {
        /// Maximum number of pairs per prompt.
        max_pairs: usize,
    },
    /// Two of nearly equal length.
    Matched(Tolerance),
}

/// A chosen and a rejected response, and their difference of penalized scores.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pair {
    pub(crate) chosen: Response,
    pub(crate) rejected: Response,
    pub(crate) margin: f64,
}

impl Pair {
    fn new(chosen: &Response, rejected: &Response, alpha: f64) -> Self {
        Self { chosen: *chosen, rejected: *rejected, margin: margin(chosen, rejected, alpha) }
    }
}

impl Pairing {
    /// Appends the pairs of a prompt. `key` is its key as a 64-bit number.
    pub(crate) fn pairs(&self, group: &mut Group, alpha: f64, key: u64, pairs: &mut Vec<Pair>) {
        let Some(best) = best(&group.chosen, alpha).copied() else { return };
        let with_best = |rejected: Response| Pair::new(&best, &rejected, alpha);
        match *self {
            Self::MaxMin => {
                let worst = worst(&group.rejected, alpha).copied();
                pairs.extend(worst.filter(|worst| beats(&best, worst, alpha)).map(with_best));
            }
            Self::MaxRandom { seed } => pairs.extend(random(group, &best, alpha, seed, key).map(with_best)),
            Self::SweetSpot { deviations } => {
                pairs.extend(sweet_spot(group, &best, alpha, deviations).map(with_best));
            }
            Self::TopBottom { top, bottom, max_pairs } => {
                top_bottom(group, alpha, (top, bottom), max_pairs, pairs);
            }
            Self::All { max_pairs } => top_bottom(group, alpha, (usize::MAX, usize::MAX), max_pairs, pairs),
            Self::Matched(tolerance) => pairs.extend(matched(group, alpha, tolerance)),
        }
    }
}

/// A random response that `best` beats.
fn random(group: &mut Group, best: &Response, alpha: f64, seed: u64, key: u64) -> Option<Response> {
    let worse = &mut group.rejected;
    worse.retain(|response| beats(best, response, alpha));
    worse.sort_unstable_by(|a, b| worst_first(a, b, alpha));
    let random = splitmix64(splitmix64(seed) ^ key);
    let index = (u128::from(random) * worse.len() as u128) >> 64;
    worse.get(index as usize).copied()
}

/// The response nearest to `mean − deviations · std` of the scores, of those that `best` beats.
fn sweet_spot(group: &mut Group, best: &Response, alpha: f64, deviations: f64) -> Option<Response> {
    let score = |response: &Response| response.score - alpha * f64::from(response.length);
    // In a fixed order, so that the sums do not depend on the order of rows.
    group.all.sort_unstable_by(|a, b| best_first(a, b, alpha));
    let count = group.all.len() as f64;
    let mean = group.all.iter().map(score).sum::<f64>() / count;
    let variance = group.all.iter().map(|response| (score(response) - mean).powi(2)).sum::<f64>() / count;
    let spot = mean - deviations * variance.sqrt();
    let distance = |response: &Response| (score(response) - spot).abs();
    let worse = group.rejected.iter().filter(|response| beats(best, response, alpha));
    worse.min_by(|a, b| distance(a).total_cmp(&distance(b)).then_with(|| worst_first(a, b, alpha))).copied()
}

/// Appends the pairs of the `top` best with the `bottom` worst responses that have the greatest margins.
fn top_bottom(
    group: &mut Group,
    alpha: f64,
    (top, bottom): (usize, usize),
    max_pairs: usize,
    pairs: &mut Vec<Pair>,
) {
    group.chosen.sort_unstable_by(|a, b| best_first(a, b, alpha));
    group.rejected.sort_unstable_by(|a, b| worst_first(a, b, alpha));
    let from = pairs.len();
    for chosen in group.chosen.iter().take(top) {
        let worse = group.rejected.iter().take(bottom).filter(|other| beats(chosen, other, alpha));
        pairs.extend(worse.map(|rejected| Pair::new(chosen, rejected, alpha)));
        // Bounds the memory for prompts with many responses.
        if pairs.len() - from > max_pairs.saturating_mul(2).max(1 << 12) {
            keep_greatest_margins(pairs, from, max_pairs);
        }
    }
    keep_greatest_margins(pairs, from, max_pairs);
}

/// Sorts the pairs from `from` on, greatest margins first, and keeps the first `max_pairs`.
fn keep_greatest_margins(pairs: &mut Vec<Pair>, from: usize, max_pairs: usize) {
    // Stable: equal margins stay in the order of ranks.
    pairs[from..].sort_by(|a, b| b.margin.total_cmp(&a.margin));
    pairs.truncate(from.saturating_add(max_pairs));
}

/// The pair of nearly equal lengths with the greatest margin.
fn matched(group: &mut Group, alpha: f64, tolerance: Tolerance) -> Option<Pair> {
    // By length: after the first rejected response that is too long, all others are too long.
    group.rejected.sort_unstable_by_key(|response| (response.length, response.row));
    let mut best: Option<Pair> = None;
    for chosen in &group.chosen {
        let too_short = |other: &Response| other.length < chosen.length && !tolerance.allows(chosen, other);
        let first = group.rejected.partition_point(too_short);
        let near = group.rejected[first..].iter().take_while(|other| tolerance.allows(chosen, other));
        for rejected in near.filter(|other| beats(chosen, other, 0.0)) {
            let pair = Pair::new(chosen, rejected, alpha);
            if best.as_ref().is_none_or(|best| compare_matches(&pair, best).is_lt()) {
                best = Some(pair);
            }
        }
    }
    best
}

/// Greatest margin first, then least difference of length, then lower rows.
fn compare_matches(a: &Pair, b: &Pair) -> Ordering {
    b.margin
        .total_cmp(&a.margin)
        .then_with(|| abs_diff(&a.chosen, &a.rejected).cmp(&abs_diff(&b.chosen, &b.rejected)))
        .then_with(|| a.chosen.row.cmp(&b.chosen.row))
        .then_with(|| a.rejected.row.cmp(&b.rejected.row))
}

fn abs_diff(a: &Response, b: &Response) -> u32 {
    a.length.abs_diff(b.length)
}

/// The generator of Steele, Lea and Flood (2014, doi 10.1145/2660193.2660195), as a hash of one number.
fn splitmix64(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splitmix64_is_the_published_one() {
        // The first output from state 0.
        assert_eq!(splitmix64(0), 0xe220_a839_7b1d_cdaf);
    }
}
