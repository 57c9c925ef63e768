//! Which responses of a prompt make pairs.
//!
//! Best first and worst first are the orders of [`select`](crate::select), on scores less the penalty; a pair is always of
//! a response and one that it beats.
//!
//! | [`Pairing`] | pairs of a prompt |
//! | --- | --- |
//! | `MaxMin` | the best with the worst (Chen et al., arXiv 2406.09760) |
//! | `MaxRandom` | the best with a random one that it beats |
//! | `TopBottom` | each of the k best with each of the l worst, those of the greatest margins first |
//! | `SweetSpot` | the best with the one nearest `mean − d·std` of the scores (Xiao et al., arXiv 2502.16825) |
//! | `All` | all, those of the greatest margins first |
//! | `Matched` | of all whose lengths differ by at most a tolerance, the one of the greatest margin |

use crate::filter::Point;
use crate::pool::Group;
use crate::select::{beats, best, best_first, margin, worst, worst_first};

/// How far the lengths of a matched pair may be apart.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Tolerance {
    /// This far.
    Absolute(u32),
    /// This share of the longer one.
    Relative(f64),
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
    /// The best with the worst ones.
    TopBottom {
        /// How many of the best.
        top: usize,
        /// How many of the worst.
        bottom: usize,
        /// Pairs of a prompt at most.
        most: usize,
    },
    /// The best with one some standard deviations below the mean.
    SweetSpot {
        /// How many.
        deviations: f64,
    },
    /// All with all.
    All {
        /// Pairs of a prompt at most.
        most: usize,
    },
    /// Nearly equal lengths.
    Matched(Tolerance),
}

/// A chosen and a rejected response, and their difference of penalised scores.
#[derive(Debug, Clone, Copy)]
pub struct Pair {
    /// The better one.
    pub chosen: Point,
    /// The worse one.
    pub rejected: Point,
    /// By how much.
    pub margin: f64,
}

impl Pairing {
    /// Appends the pairs of a prompt. `key` is its key as a number of 64 bits.
    pub fn pairs(&self, group: &mut Group, alpha: f64, key: u64, pairs: &mut Vec<Pair>) {
        let pair = |chosen: &Point, rejected: &Point| Pair {
            chosen: *chosen,
            rejected: *rejected,
            margin: margin(chosen, rejected, alpha),
        };
        let Some(best) = best(&group.chosen, alpha).copied() else { return };
        match *self {
            Self::MaxMin => {
                let worst = worst(&group.rejected, alpha).filter(|worst| beats(&best, worst, alpha));
                pairs.extend(worst.map(|worst| pair(&best, worst)));
            }
            Self::MaxRandom { seed } => {
                let worse = &mut group.rejected;
                worse.retain(|point| beats(&best, point, alpha));
                worse.sort_unstable_by(|a, b| worst_first(a, b, alpha));
                let random = splitmix64(splitmix64(seed) ^ key);
                let place = (u128::from(random) * worse.len() as u128) >> 64;
                pairs.extend(worse.get(place as usize).map(|rejected| pair(&best, rejected)));
            }
            Self::SweetSpot { deviations } => {
                let score = |point: &Point| point.score - alpha * f64::from(point.length);
                // In one order, so that the sums do not depend on that of the rows.
                group.all.sort_unstable_by(|a, b| best_first(a, b, alpha));
                let count = group.all.len() as f64;
                let mean = group.all.iter().map(score).sum::<f64>() / count;
                let variance =
                    group.all.iter().map(|point| (score(point) - mean).powi(2)).sum::<f64>() / count;
                let spot = mean - deviations * variance.sqrt();
                let distance = |point: &Point| (score(point) - spot).abs();
                let nearest =
                    group.rejected.iter().filter(|point| beats(&best, point, alpha)).min_by(|a, b| {
                        distance(a).total_cmp(&distance(b)).then_with(|| worst_first(a, b, alpha))
                    });
                pairs.extend(nearest.map(|rejected| pair(&best, rejected)));
            }
            Self::TopBottom { .. } | Self::All { .. } => {
                let (top, bottom, most) = match *self {
                    Self::TopBottom { top, bottom, most } => (top, bottom, most),
                    Self::All { most } => (usize::MAX, usize::MAX, most),
                    _ => return,
                };
                group.chosen.sort_unstable_by(|a, b| best_first(a, b, alpha));
                group.rejected.sort_unstable_by(|a, b| worst_first(a, b, alpha));
                let from = pairs.len();
                for chosen in group.chosen.iter().take(top) {
                    let worse =
                        group.rejected.iter().take(bottom).filter(|other| beats(chosen, other, alpha));
                    pairs.extend(worse.map(|rejected| pair(chosen, rejected)));
                    // What cannot be among the first is not held.
                    if pairs.len() - from > most.saturating_mul(2).max(1 << 12) {
                        first(pairs, from, most);
                    }
                }
                first(pairs, from, most);
            }
            Self::Matched(tolerance) => {
                let apart = |a: &Point, b: &Point| a.length.abs_diff(b.length);
                let near = |a: &Point, b: &Point| match tolerance {
                    Tolerance::Absolute(most) => apart(a, b) <= most,
                    Tolerance::Relative(most) => {
                        f64::from(apart(a, b)) <= most * f64::from(a.length.max(b.length))
                    }
                };
                // Among the shorter ones first: once a rejected response is too long, so are all after it.
                group.rejected.sort_unstable_by_key(|point| (point.length, point.row));
                let mut found: Option<Pair> = None;
                for chosen in &group.chosen {
                    let first = group
                        .rejected
                        .partition_point(|other| other.length < chosen.length && !near(chosen, other));
                    let window = group.rejected[first..].iter().take_while(|other| near(chosen, other));
                    for rejected in window.filter(|other| beats(chosen, other, 0.0)) {
                        let this = pair(chosen, rejected);
                        let better = found.is_none_or(|best| {
                            this.margin
                                .total_cmp(&best.margin)
                                .reverse()
                                .then_with(|| {
                                    apart(chosen, rejected).cmp(&apart(&best.chosen, &best.rejected))
                                })
                                .then_with(|| chosen.row.cmp(&best.chosen.row))
                                .then_with(|| rejected.row.cmp(&best.rejected.row))
                                .is_lt()
                        });
                        if better {
                            found = Some(this);
                        }
                    }
                }
                pairs.extend(found);
            }
        }
    }
}

/// Sorts the pairs from `from` on, greatest margins first, and keeps the first `most`.
fn first(pairs: &mut Vec<Pair>, from: usize, most: usize) {
    // Stable: equal margins stay in the order of ranks.
    pairs[from..].sort_by(|a, b| b.margin.total_cmp(&a.margin));
    pairs.truncate(from.saturating_add(most));
}

/// Steele, Lea and Flood's generator (2014, doi 10.1145/2660193.2660195), as a mixing of one number.
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
