//! How a prompt's chosen and rejected responses change as the penalty grows.
//!
//! The chosen response of a prompt maximizes `score − α·length`. As α grows from zero, it moves along the upper hull of
//! the points (length, score): from the highest score to ever shorter responses. The rejected response minimizes the
//! same value and moves along the lower hull to ever longer responses. Each change lowers `chosen length − rejected
//! length`, at a break point `Δscore / Δlength`.
//!
//! A break point is stored as the least float that reaches it ([`divide_up`]). A tie goes to the shorter response
//! (chosen) or the longer one (rejected), so a change is in effect at every float `α >= at` and at no other. Counting
//! changes and comparing responses at α therefore agree to the last bit. The hull is built on these floats too: a
//! response that wins at no float α is left out.

use std::cmp::Ordering;

use crate::input::filter::Response;
use crate::numeric::exact::divide_up;

/// The length gap of one prompt falls by `drop` at penalty `at`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Breakpoint {
    /// The least penalty with the lower gap, greater than zero and finite.
    pub at: f64,
    /// The change of the gap, at least 1.
    pub drop: u32,
}

/// Which response of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The best response.
    Chosen,
    /// The worst response.
    Rejected,
}

/// A range of penalties, both ends included.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bracket {
    /// The least penalty, zero or more.
    pub low: f64,
    /// The greatest penalty, `low` or more; may be infinite.
    pub high: f64,
}

impl Bracket {
    /// All penalties.
    pub const ALL: Self = Self { low: 0.0, high: f64::INFINITY };
}

/// Writes the responses of a prompt that win in the bracket to `winners`, each with the penalty from which it wins:
/// first the winner at the low end, then its successors up to the high end.
///
/// `responses` must not be empty. Those that cannot win are removed from it.
pub(crate) fn walk(
    responses: &mut Vec<Response>,
    side: Side,
    bracket: Bracket,
    winners: &mut Vec<(f64, Response)>,
) {
    prune(responses, side, bracket);
    // Each response gains on all those before it as the penalty grows. Of equal lengths, the best comes first.
    responses.sort_unstable_by(|a, b| {
        match side {
            Side::Chosen => b.length.cmp(&a.length).then(order(b.score, a.score)).then(order(b.raw, a.raw)),
            Side::Rejected => a.length.cmp(&b.length).then(order(a.score, b.score)).then(order(a.raw, b.raw)),
        }
        .then(a.row.cmp(&b.row))
    });
    winners.clear();
    for response in responses.iter() {
        if winners.last().is_some_and(|(_, last)| last.length == response.length) {
            continue;
        }
        let mut from = bracket.low;
        // The new response beats the winners from some penalty on, since it gains on all of them. If that is not
        // above the penalty from which the last winner wins, the last winner wins nowhere and is removed.
        while let Some(&(last_from, last)) = winners.last() {
            let (over, under) = match side {
                Side::Chosen => (last.score, response.score),
                Side::Rejected => (response.score, last.score),
            };
            if under < over {
                let at = divide_up(over, under, f64::from(last.length.abs_diff(response.length)));
                if at > last_from {
                    from = at;
                    break;
                }
            }
            winners.pop();
        }
        // Winners above the high end are kept for now: a later response may replace them below it.
        winners.push((from, *response));
    }
    let end = winners.iter().position(|winner| winner.0 > bracket.high || winner.0 == f64::INFINITY);
    winners.truncate(end.unwrap_or(winners.len()).max(1));
}

/// Compares floats that are not NaN; −0 and +0 are equal.
fn order(a: f64, b: f64) -> Ordering {
    a.partial_cmp(&b).unwrap_or(Ordering::Equal)
}

/// Removes responses that clearly win at no penalty of the bracket, by rounded arithmetic with a margin for its errors.
fn prune(responses: &mut Vec<Response>, side: Side, bracket: Bracket) {
    if bracket.high == f64::INFINITY || responses.len() < 3 {
        return;
    }
    let middle = bracket.low + (bracket.high - bracket.low) / 2.0;
    let sign = if side == Side::Chosen { 1.0 } else { -1.0 };
    let value = |response: &Response| sign * (response.score - middle * f64::from(response.length));
    let mut best = responses[0];
    let (mut max_abs_score, mut max_length) = (0.0f64, 0);
    for response in responses.iter() {
        max_abs_score = max_abs_score.max(response.score.abs());
        max_length = max_length.max(response.length);
        if value(response) > value(&best) {
            best = *response;
        }
    }
    // Far more than the sum of all rounding errors.
    let scale = max_abs_score + bracket.high * f64::from(max_length);
    let threshold = value(&best) - 1e-14 * scale;
    let half_width = (bracket.high - bracket.low) / 2.0;
    // Written so that a response is kept if the arithmetic overflows.
    responses.retain(|response| {
        let gain = half_width * f64::from(response.length.abs_diff(best.length));
        let cannot_win = value(response) + gain < threshold;
        !cannot_win
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn responses(points: &[(f64, u32)]) -> Vec<Response> {
        let rows = points.iter().zip(0..);
        rows.map(|(&(score, length), row)| Response { score, raw: score, row, length }).collect()
    }

    /// (penalty, length) of each winner.
    fn winners(points: &[(f64, u32)], side: Side, bracket: Bracket) -> Vec<(f64, u32)> {
        let mut winners = Vec::new();
        walk(&mut responses(points), side, bracket, &mut winners);
        winners.iter().map(|(at, response)| (*at, response.length)).collect()
    }

    #[test]
    fn walks_both_hulls() {
        // Chosen: 30 → 20 at 1/10, and 20 → 5 at 3/15, on the line through 10. Rejected: 5 → 30 at 4/25.
        let points = [(4.0, 30), (3.0, 20), (1.0, 10), (0.0, 5)];
        assert_eq!(winners(&points, Side::Chosen, Bracket::ALL), [(0.0, 30), (0.1, 20), (0.2, 5)]);
        assert_eq!(winners(&points, Side::Rejected, Bracket::ALL), [(0.0, 5), (0.16, 30)]);
        let middle = Bracket { low: 0.1, high: 0.15 };
        assert_eq!(winners(&points, Side::Chosen, middle), [(0.1, 20)]);
        assert_eq!(winners(&points, Side::Rejected, middle), [(0.1, 5)]);
    }

    #[test]
    fn points_on_a_line_are_one_change() {
        let points = [(3.0, 30), (2.0, 20), (1.0, 10)];
        assert_eq!(winners(&points, Side::Chosen, Bracket::ALL), [(0.0, 30), (0.1, 10)]);
        assert_eq!(winners(&points, Side::Rejected, Bracket::ALL), [(0.0, 10), (0.1, 30)]);
    }

    #[test]
    fn equal_responses_never_change() {
        let points = [(1.0, 7), (1.0, 7), (1.0, 7)];
        assert_eq!(winners(&points, Side::Chosen, Bracket::ALL), [(0.0, 7)]);
    }

    proptest! {
        #[test]
        fn a_bracket_cuts_out_a_part(
            points in prop::collection::vec((-40i32..40, 0u32..30), 1..12),
            low in 0u32..60,
            width in 0u32..30,
            chosen in any::<bool>(),
        ) {
            let side = if chosen { Side::Chosen } else { Side::Rejected };
            let points: Vec<_> = points.into_iter().map(|(score, length)| (f64::from(score) / 8.0, length)).collect();
            let (low, high) = (f64::from(low) / 16.0, f64::from(low + width) / 16.0);
            let all = winners(&points, side, Bracket::ALL);
            let first = all.iter().rposition(|winner| winner.0 <= low).unwrap();
            let mut expected = vec![(low, all[first].1)];
            expected.extend(all[first + 1..].iter().filter(|winner| winner.0 <= high));
            prop_assert_eq!(winners(&points, side, Bracket { low, high }), expected);
        }
    }
}
