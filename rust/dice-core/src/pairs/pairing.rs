//! Which responses of a prompt make pairs.
//!
//! The orders best first and worst first are those of `order`, by penalized score. In every pair, the chosen response
//! beats the rejected one, and their rewards differ.
//!
//! | [`Pairing`] | pairs of a prompt |
//! | --- | --- |
//! | `MaxMin` | the best with the worst (Chen et al., arXiv 2406.09760); see `best_and_worst` if they have equal rewards |
//! | `MaxRandom` | the best with a random one that it beats |
//! | `TopBottom` | each of the k best with each of the l worst, greatest margins first |
//! | `SweetSpot` | the best with the one nearest to `mean − d·std` of the scores (Xiao et al., arXiv 2502.16825) |
//! | `All` | all with all, greatest margins first |
//! | `Matched` | of all pairs whose lengths differ by at most a tolerance, the one with the greatest margin |

use std::cmp::Ordering;

use crate::input::filter::Response;
use crate::pairs::order::{End, beats, best_and_worst, margin};
use crate::pairs::pool::Group;
use crate::pairs::ties::{TieHash, any_tied, count_tied, splitmix64};

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

/// What was left out since two responses have equal rewards.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct LeftOut {
    /// Pairs that `TopBottom` and `All` would have made.
    pub(crate) pairs: u64,
    /// Whether the prompt has no pair, and would have one without this rule.
    pub(crate) prompt: bool,
}

impl Pairing {
    /// Appends the pairs of a prompt. `key` is its key as a 64-bit number.
    pub(crate) fn pairs(
        &self,
        group: &mut Group,
        alpha: f64,
        key: u64,
        ties: TieHash,
        pairs: &mut Vec<Pair>,
    ) -> LeftOut {
        let before = pairs.len();
        let mut left_out = LeftOut::default();
        match *self {
            Self::MaxMin => {
                let ends = best_and_worst(&group.chosen, &group.rejected, alpha, ties);
                pairs.extend(ends.map(|(best, worst)| Pair::new(&best, &worst, alpha)));
            }
            Self::MaxRandom { seed } => pairs.extend(random(group, alpha, ties, splitmix64(seed) ^ key)),
            Self::SweetSpot { deviations } => pairs.extend(sweet_spot(group, alpha, ties, deviations)),
            Self::TopBottom { top, bottom, max_pairs } => {
                left_out.pairs = top_bottom(group, alpha, ties, (top, bottom), max_pairs, pairs);
            }
            Self::All { max_pairs } => {
                left_out.pairs = top_bottom(group, alpha, ties, (usize::MAX, usize::MAX), max_pairs, pairs);
            }
            Self::Matched(tolerance) => {
                let (pair, tied) = matched(group, alpha, ties, tolerance);
                pairs.extend(pair);
                left_out.prompt = pair.is_none() && tied;
                return left_out;
            }
        }
        left_out.prompt = pairs.len() == before && any_tied(&group.chosen, &group.rejected);
        left_out
    }
}

/// The best with a random response that it beats.
fn random(group: &mut Group, alpha: f64, ties: TieHash, salt: u64) -> Option<Pair> {
    let best = End::Best.first(&group.chosen, alpha, ties)?;
    // Those that it beats come first; the others stay in the list.
    let mut count = 0;
    for i in 0..group.rejected.len() {
        if beats(&best, &group.rejected[i], alpha) {
            group.rejected.swap(i, count);
            count += 1;
        }
    }
    let worse = &mut group.rejected[..count];
    let index = (u128::from(splitmix64(salt)) * count as u128) >> 64;
    End::Worst.nth(worse, index as usize, alpha, ties).map(|rejected| Pair::new(&best, &rejected, alpha))
}

/// The best with the response nearest to `mean − deviations · std` of the scores, of those that it beats.
fn sweet_spot(group: &mut Group, alpha: f64, ties: TieHash, deviations: f64) -> Option<Pair> {
    let score = |response: &Response| response.score - alpha * f64::from(response.length);
    // In a fixed order, so that the sums do not depend on the order of rows.
    End::Best.sort(&mut group.all, alpha, ties);
    let count = group.all.len() as f64;
    let mean = group.all.iter().map(score).sum::<f64>() / count;
    let variance = group.all.iter().map(|response| (score(response) - mean).powi(2)).sum::<f64>() / count;
    let spot = mean - deviations * variance.sqrt();
    let distance = |response: &Response| (score(response) - spot).abs();
    let best = End::Best.first(&group.chosen, alpha, ties)?;
    let mut nearest: Option<(f64, &Response)> = None;
    let mut several = false;
    for response in group.rejected.iter().filter(|response| beats(&best, response, alpha)) {
        let distance = distance(response);
        if nearest.is_none_or(|(least, _)| distance < least) {
            (nearest, several) = (Some((distance, response)), false);
        } else {
            several |= nearest.is_some_and(|(least, _)| distance == least);
        }
    }
    let (least, nearest) = nearest?;
    let nearest = if several {
        let as_near = |response: &&Response| beats(&best, response, alpha) && distance(response) == least;
        let equal: Vec<Response> = group.rejected.iter().filter(as_near).copied().collect();
        End::Worst.first(&equal, alpha, ties)?
    } else {
        *nearest
    };
    Some(Pair::new(&best, &nearest, alpha))
}

/// Appends the pairs of the `top` best with the `bottom` worst responses that have the greatest margins. Returns the
/// number of pairs that are left out since their rewards are equal.
fn top_bottom(
    group: &mut Group,
    alpha: f64,
    ties: TieHash,
    (top, bottom): (usize, usize),
    max_pairs: usize,
    pairs: &mut Vec<Pair>,
) -> u64 {
    End::Best.sort(&mut group.chosen, alpha, ties);
    End::Worst.sort(&mut group.rejected, alpha, ties);
    let best = &group.chosen[..top.min(group.chosen.len())];
    let worst = &group.rejected[..bottom.min(group.rejected.len())];
    let from = pairs.len();
    let mut tied = false;
    for chosen in best {
        let worse = worst.iter().filter(|other| {
            tied |= chosen.raw == other.raw && chosen.row != other.row;
            beats(chosen, other, alpha)
        });
        pairs.extend(worse.map(|rejected| Pair::new(chosen, rejected, alpha)));
        // Bounds the memory for prompts with many responses.
        if pairs.len() - from > max_pairs.saturating_mul(2).max(1 << 12) {
            keep_greatest_margins(pairs, from, max_pairs);
        }
    }
    keep_greatest_margins(pairs, from, max_pairs);
    if tied { count_tied(best, worst) } else { 0 }
}

/// Sorts the pairs from `from` on, greatest margins first, and keeps the first `max_pairs`.
fn keep_greatest_margins(pairs: &mut Vec<Pair>, from: usize, max_pairs: usize) {
    // Stable: equal margins stay in the order of ranks.
    pairs[from..].sort_by(|a, b| b.margin.total_cmp(&a.margin));
    pairs.truncate(from.saturating_add(max_pairs));
}

/// The pair of nearly equal lengths with the greatest margin, and whether any two of nearly equal lengths are left out
/// since their rewards are equal.
fn matched(group: &mut Group, alpha: f64, ties: TieHash, tolerance: Tolerance) -> (Option<Pair>, bool) {
    // By length: after the first rejected response that is too long, all others are too long.
    group.rejected.sort_unstable_by_key(|response| (response.length, response.row));
    let mut best: Option<Pair> = None;
    let mut tied = false;
    for chosen in &group.chosen {
        let too_short = |other: &Response| other.length < chosen.length && !tolerance.allows(chosen, other);
        let first = group.rejected.partition_point(too_short);
        let near = group.rejected[first..].iter().take_while(|other| tolerance.allows(chosen, other));
        for rejected in near {
            if beats(chosen, rejected, 0.0) {
                let pair = Pair::new(chosen, rejected, alpha);
                if best.as_ref().is_none_or(|best| compare_matches(&pair, best, ties).is_lt()) {
                    best = Some(pair);
                }
            } else {
                tied |= chosen.raw == rejected.raw && chosen.row != rejected.row;
            }
        }
    }
    (best, tied)
}

/// Greatest margin first, then least difference of length, then least hashes.
fn compare_matches(a: &Pair, b: &Pair, ties: TieHash) -> Ordering {
    b.margin
        .total_cmp(&a.margin)
        .then_with(|| abs_diff(&a.chosen, &a.rejected).cmp(&abs_diff(&b.chosen, &b.rejected)))
        .then_with(|| ties.rank(&a.chosen).cmp(&ties.rank(&b.chosen)))
        .then_with(|| ties.rank(&a.rejected).cmp(&ties.rank(&b.rejected)))
}

fn abs_diff(a: &Response, b: &Response) -> u32 {
    a.length.abs_diff(b.length)
}
