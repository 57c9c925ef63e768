//! How a prompt's chosen and rejected responses change as the penalty grows.
//!
//! The chosen response of a prompt maximizes `score − α·length`. As α grows from zero, it moves along the upper hull of
//! the points (length, score): from the highest score to ever shorter responses. The rejected response minimizes the
//! same value and moves along the lower hull to ever longer responses. Each change lowers `chosen length − rejected
//! length`, at a break point `Δscore / Δlength`.
//!
//! Without a penalty a hash decides among responses of equal score ([`ties`](crate::pairs::ties)); with the least
//! penalty above zero, the shortest of them is chosen and the longest is rejected. So the least float above zero is a
//! break point where these differ.
//!
//! A break point is stored as the least float that reaches it ([`divide_up`]). A tie goes to the shorter response
//! (chosen) or the longer one (rejected), so a change is in effect at every float `α >= at` and at no other. Counting
//! changes and comparing responses at α therefore agree to the last bit. The hull is built on these floats too: a
//! response that wins at no float α is left out.

use crate::input::filter::Response;
use crate::numeric::exact::divide_up;
use crate::pairs::order::End;
use crate::pairs::ties::TieHash;

/// The least float above zero.
pub(crate) const LEAST: f64 = f64::from_bits(1);

/// The length gap of one prompt falls by `drop` at penalty `at`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Breakpoint {
    /// The least penalty with the lower gap, greater than zero and finite.
    pub at: f64,
    /// The change of the gap. Zero if only the responses change, which takes responses of equal reward.
    pub drop: u32,
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
/// `responses` must not be empty, and their scores must be their rewards. Those that cannot win are removed from it.
pub(crate) fn walk(
    responses: &mut Vec<Response>,
    side: End,
    bracket: Bracket,
    ties: TieHash,
    winners: &mut Vec<(f64, Response)>,
) {
    prune(responses, side, bracket);
    // Each response gains on all those before it as the penalty grows. Of equal lengths, the best comes first.
    responses.sort_unstable_by(|a, b| {
        let by_length = if side == End::Best { b.length.cmp(&a.length) } else { a.length.cmp(&b.length) };
        by_length.then_with(|| side.by_reward(a, b)).then_with(|| ties.rank(a).cmp(&ties.rank(b)))
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
                End::Best => (last.score, response.score),
                End::Worst => (response.score, last.score),
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
    if bracket.low == 0.0
        && let Some(first) = side.first(responses, 0.0, ties)
        && first.row != winners[0].1.row
    {
        let replaced = winners.get(1).is_some_and(|next| next.0 <= LEAST);
        winners[0].0 = LEAST;
        winners.splice(..usize::from(replaced), [(0.0, first)]);
    }
    let end = winners.iter().position(|winner| winner.0 > bracket.high || winner.0 == f64::INFINITY);
    winners.truncate(end.unwrap_or(winners.len()).max(1));
}

/// Removes responses that clearly win at no penalty of the bracket, by rounded arithmetic with a margin for its errors.
fn prune(responses: &mut Vec<Response>, side: End, bracket: Bracket) {
    if bracket.high == f64::INFINITY || responses.len() < 3 {
        return;
    }
    let middle = bracket.low + (bracket.high - bracket.low) / 2.0;
    let sign = if side == End::Best { 1.0 } else { -1.0 };
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
    fn winners(points: &[(f64, u32)], side: End, bracket: Bracket) -> Vec<(f64, u32)> {
        let mut winners = Vec::new();
        walk(&mut responses(points), side, bracket, TieHash::default(), &mut winners);
        winners.iter().map(|(at, response)| (*at, response.length)).collect()
    }

    #[test]
    fn walks_both_hulls() {
        // Chosen: 30 → 20 at 1/10, and 20 → 5 at 3/15, on the line through 10. Rejected: 5 → 30 at 4/25.
        let points = [(4.0, 30), (3.0, 20), (1.0, 10), (0.0, 5)];
        assert_eq!(winners(&points, End::Best, Bracket::ALL), [(0.0, 30), (0.1, 20), (0.2, 5)]);
        assert_eq!(winners(&points, End::Worst, Bracket::ALL), [(0.0, 5), (0.16, 30)]);
        let middle = Bracket { low: 0.1, high: 0.15 };
        assert_eq!(winners(&points, End::Best, middle), [(0.1, 20)]);
        assert_eq!(winners(&points, End::Worst, middle), [(0.1, 5)]);
    }

    #[test]
    fn points_on_a_line_are_one_change() {
        let points = [(3.0, 30), (2.0, 20), (1.0, 10)];
        assert_eq!(winners(&points, End::Best, Bracket::ALL), [(0.0, 30), (0.1, 10)]);
        assert_eq!(winners(&points, End::Worst, Bracket::ALL), [(0.0, 10), (0.1, 30)]);
    }

    #[test]
    fn equal_responses_never_change() {
        let points = [(1.0, 7), (1.0, 7), (1.0, 7)];
        assert_eq!(winners(&points, End::Best, Bracket::ALL), [(0.0, 7)]);
    }

    #[test]
    fn equal_rewards_are_apart_from_the_least_penalty_on() {
        // The hash decides without a penalty, and the length with any.
        let points: Vec<_> = (0..9).map(|length| (1.0, length)).collect();
        let [(0.0, first), (LEAST, 0)] = winners(&points, End::Best, Bracket::ALL)[..] else { panic!() };
        let [(0.0, last), (LEAST, 8)] = winners(&points, End::Worst, Bracket::ALL)[..] else { panic!() };
        assert_eq!((first, last), (last, first));
        assert!(first != 0 && first != 8, "{first}: another hash, choose other points");
        let none = Bracket { low: 0.0, high: 0.0 };
        assert_eq!(winners(&points, End::Best, none), [(0.0, first)]);
        let some = Bracket { low: 0.5, high: 1.0 };
        assert_eq!(winners(&points, End::Best, some), [(0.5, 0)]);
        // A response that takes over at the least penalty itself.
        let steep = [(LEAST * 3.0, 9), (LEAST * 3.0, 7), (0.0, 0)];
        let walked = winners(&steep, End::Best, Bracket::ALL);
        assert_eq!(walked.last(), Some(&(LEAST, 0)));
        assert!(walked.len() == 2 && walked[0].0 == 0.0, "{walked:?}");
    }

    proptest! {
        #[test]
        fn a_bracket_cuts_out_a_part(
            points in prop::collection::vec((-40i32..40, 0u32..30), 1..12),
            low in 0u32..60,
            width in 0u32..30,
            chosen in any::<bool>(),
        ) {
            let side = if chosen { End::Best } else { End::Worst };
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
