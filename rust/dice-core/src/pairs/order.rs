//! The best and the worst of some responses at a given penalty, and which two may form a pair.
//!
//! | | penalized score `score − α·length` | then | then | then |
//! | --- | --- | --- | --- | --- |
//! | best first | highest | shorter | higher raw reward | least hash |
//! | worst first | lowest | longer | lower raw reward | least hash |
//!
//! Only a penalty makes the score of different rewards equal; then the length decides. Responses of equal score *and*
//! equal reward are one group, inside which the [hash](crate::pairs::ties) decides and the length does not. A group
//! stands where its shortest response (worst first: its longest) would.
//!
//! Penalized scores are compared exactly ([`compare_difference`]). The raw reward only matters between groups if scores
//! are adjusted and rounded; otherwise it is equal at equal length and score.

use std::cmp::{Ordering, Reverse};

use crate::input::filter::Response;
use crate::numeric::exact::{ExactSum, compare_difference};
use crate::pairs::ties::TieHash;

/// An end of the order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Highest scores first.
    Best,
    /// Lowest scores first.
    Worst,
}

/// Compares penalized scores.
#[inline]
fn compare_scores(a: &Response, b: &Response, alpha: f64) -> Ordering {
    let length_diff = i64::from(a.length) - i64::from(b.length);
    compare_difference(a.score, b.score, alpha, length_diff as f64)
}

/// Compares floats that are not NaN; −0 and +0 are equal.
#[inline]
pub fn order(a: f64, b: f64) -> Ordering {
    a.partial_cmp(&b).unwrap_or(Ordering::Equal)
}

/// Whether `a` beats `b`, so that they can be the chosen and the rejected response of a pair: their rewards differ, and
/// `a` has the higher score, or the same score and is shorter.
#[inline]
pub fn beats(a: &Response, b: &Response, alpha: f64) -> bool {
    let compare = || {
        compare_scores(a, b, alpha).then_with(|| b.length.cmp(&a.length)).then_with(|| order(a.raw, b.raw))
    };
    a.raw != b.raw && compare() == Ordering::Greater
}

impl End {
    /// Which of two responses comes first by score: `Less` if it is `a`.
    #[inline]
    fn by_score(self, a: &Response, b: &Response, alpha: f64) -> Ordering {
        match self {
            Self::Best => compare_scores(b, a, alpha),
            Self::Worst => compare_scores(a, b, alpha),
        }
    }

    /// Which of two responses comes first by reward.
    #[inline]
    pub fn by_reward(self, a: &Response, b: &Response) -> Ordering {
        match self {
            Self::Best => order(b.raw, a.raw),
            Self::Worst => order(a.raw, b.raw),
        }
    }

    /// Sorts responses, those of this end first.
    pub fn sort(self, responses: &mut [Response], alpha: f64, ties: TieHash) {
        // A sort compares all neighbors of its result.
        let mut several_groups = false;
        responses.sort_unstable_by(|a, b| {
            self.by_score(a, b, alpha).then_with(|| {
                several_groups |= a.raw != b.raw;
                self.by_reward(a, b).then_with(|| ties.rank(a).cmp(&ties.rank(b)))
            })
        });
        if !several_groups {
            return;
        }
        for tied in responses.chunk_by_mut(|a, b| self.by_score(a, b, alpha).is_eq()) {
            if tied[0].raw != tied[tied.len() - 1].raw {
                self.sort_groups(tied);
            }
        }
    }

    /// The response at an index of the order, from zero; `None` beyond its end. Changes the order of `responses`.
    pub fn nth(
        self,
        responses: &mut [Response],
        index: usize,
        alpha: f64,
        ties: TieHash,
    ) -> Option<Response> {
        if index >= responses.len() {
            return None;
        }
        let by_rank = |a: &Response, b: &Response| {
            self.by_score(a, b, alpha)
                .then_with(|| self.by_reward(a, b).then_with(|| ties.rank(a).cmp(&ties.rank(b))))
        };
        let nth = *responses.select_nth_unstable_by(index, by_rank).1;
        // Among equal scores, groups of other rewards are ordered by their lengths.
        let of_other_group =
            |other: &Response| other.raw != nth.raw && self.by_score(other, &nth, alpha).is_eq();
        if responses.iter().any(of_other_group) {
            self.sort(responses, alpha, ties);
            return Some(responses[index]);
        }
        Some(nth)
    }

    /// Sorts the groups of equal reward among responses of equal score by their lengths.
    fn sort_groups(self, tied: &mut [Response]) {
        let mut sorted: Vec<(u32, Response)> = Vec::with_capacity(tied.len());
        for group in tied.chunk_by(|a, b| a.raw == b.raw) {
            let lengths = group.iter().map(|response| response.length);
            let length = if self == Self::Best { lengths.min() } else { lengths.max() };
            sorted.extend(group.iter().map(|response| (length.unwrap_or(0), *response)));
        }
        // Stable: groups of equal length stay in the order of their rewards.
        match self {
            Self::Best => sorted.sort_by_key(|entry| entry.0),
            Self::Worst => sorted.sort_by_key(|entry| Reverse(entry.0)),
        }
        tied.iter_mut().zip(sorted).for_each(|(place, entry)| *place = entry.1);
    }

    /// The first of the order; `None` of no responses.
    #[inline]
    pub fn first(self, responses: &[Response], alpha: f64, ties: TieHash) -> Option<Response> {
        let (mut first, rest) = responses.split_first()?;
        let mut tied = false;
        for response in rest {
            match self.by_score(response, first, alpha) {
                Ordering::Less => (first, tied) = (response, false),
                Ordering::Equal => tied = true,
                Ordering::Greater => {}
            }
        }
        Some(if tied { self.first_of_tied(responses, first, alpha, ties) } else { *first })
    }

    /// The first by reward, then the shortest (worst first: the longest).
    #[inline]
    pub fn first_by_reward(self, responses: &[Response]) -> Option<Response> {
        let by_length = |a: &Response, b: &Response| match self {
            Self::Best => a.length.cmp(&b.length),
            Self::Worst => b.length.cmp(&a.length),
        };
        responses.iter().min_by(|a, b| self.by_reward(a, b).then_with(|| by_length(a, b))).copied()
    }

    /// The first of the order, whose score is that of `like`.
    #[cold]
    fn first_of_tied(self, responses: &[Response], like: &Response, alpha: f64, ties: TieHash) -> Response {
        let tied = || responses.iter().filter(|other| self.by_score(other, like, alpha).is_eq());
        if tied().all(|response| response.raw == like.raw) {
            return *tied().min_by_key(|response| ties.rank(response)).unwrap_or(like);
        }
        let mut tied: Vec<Response> = tied().copied().collect();
        self.sort(&mut tied, alpha, ties);
        tied[0]
    }
}

/// The best and the worst response, if the one beats the other. Where a penalty makes two responses of equal reward
/// the best and the worst, the pair of the greatest margin among those of different reward: the best with the worst of
/// another reward, or the best of another reward with the worst (see [`wider`]).
pub fn best_and_worst(
    chosen: &[Response],
    rejected: &[Response],
    alpha: f64,
    ties: TieHash,
) -> Option<(Response, Response)> {
    let best = End::Best.first(chosen, alpha, ties)?;
    let worst = End::Worst.first(rejected, alpha, ties)?;
    if best.raw != worst.raw {
        return beats(&best, &worst, alpha).then_some((best, worst));
    }
    let with_best = End::Worst.first(&others(rejected, best.raw), alpha, ties).map(|other| (best, other));
    let with_worst = End::Best.first(&others(chosen, best.raw), alpha, ties).map(|other| (other, worst));
    let pairs = [with_best, with_worst].into_iter().flatten();
    pairs.filter(|(a, b)| beats(a, b, alpha)).reduce(|first, second| wider(first, second, alpha))
}

/// The responses of another reward.
pub fn others(responses: &[Response], raw: f64) -> Vec<Response> {
    responses.iter().filter(|response| response.raw != raw).copied().collect()
}

/// The pair with the greater margin; of equal margins, the one whose chosen response is shorter by more; else `first`.
pub fn wider(first: (Response, Response), second: (Response, Response), alpha: f64) -> (Response, Response) {
    let gap = |pair: &(Response, Response)| i64::from(pair.0.length) - i64::from(pair.1.length);
    match compare_margins(&second, &first, alpha).then_with(|| gap(&first).cmp(&gap(&second))) {
        Ordering::Greater => second,
        _ => first,
    }
}

/// Compares the margins of two pairs, exactly.
pub fn compare_margins(a: &(Response, Response), b: &(Response, Response), alpha: f64) -> Ordering {
    let gap = |pair: &(Response, Response)| i64::from(pair.0.length) - i64::from(pair.1.length);
    let difference = (gap(a) - gap(b)) as f64;
    let product = alpha * difference;
    if !product.is_finite() {
        return order(0.0, difference);
    }
    let mut sum = ExactSum::default();
    let error = alpha.mul_add(difference, -product);
    for term in [a.0.score, -a.1.score, -b.0.score, b.1.score, -product, -error] {
        sum.add(term);
    }
    order(sum.value(), 0.0)
}

/// The pair's difference of penalized scores.
#[inline]
pub fn margin(chosen: &Response, rejected: &Response, alpha: f64) -> f64 {
    let length_diff = i64::from(chosen.length) - i64::from(rejected.length);
    difference(chosen.score, rejected.score, length_diff, alpha)
}

/// `(a − b) − alpha · length_diff`
#[inline(always)]
pub fn difference(a: f64, b: f64, length_diff: i64, alpha: f64) -> f64 {
    (a - b) - alpha * length_diff as f64
}

/// A margin as it is stored: clamped to the range of float32.
#[inline(always)]
pub fn saturate_to_f32(margin: f64) -> f32 {
    margin.clamp(f64::from(f32::MIN), f64::from(f32::MAX)) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Half of the scores are adjusted, so that equal scores have other rewards at the same length too.
        #[test]
        fn nth_is_that_of_the_sorted(
            values in prop::collection::vec((-3i32..3, 1u32..5, any::<bool>()), 1..40), alpha in 0i32..3, seed: u64
        ) {
            let response = |(row, &(reward, length, adjusted)): (usize, &(i32, u32, bool))| {
                let raw = f64::from(reward);
                Response { score: if adjusted { 0.0 } else { raw }, raw, row: row as u64, length }
            };
            let responses: Vec<Response> = values.iter().enumerate().map(response).collect();
            let (alpha, ties) = (f64::from(alpha) / 2.0, TieHash::new(seed, 7, 0));
            for end in [End::Best, End::Worst] {
                let mut sorted = responses.clone();
                end.sort(&mut sorted, alpha, ties);
                for (index, expected) in sorted.iter().enumerate() {
                    let found = end.nth(&mut responses.clone(), index, alpha, ties);
                    prop_assert_eq!(found.map(|response| response.row), Some(expected.row));
                }
                prop_assert!(end.nth(&mut sorted, responses.len(), alpha, ties).is_none());
                let first = end.first(&responses, alpha, ties);
                prop_assert_eq!(first.map(|response| response.row), Some(sorted[0].row));
            }
        }
    }
}
