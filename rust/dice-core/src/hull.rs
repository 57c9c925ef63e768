//! How one prompt's choice changes as the penalty grows.
//!
//! The chosen response of a prompt maximises `score − α·length`. As α grows from zero it walks down
//! the upper hull of the points (length, score): from the highest score to ever shorter responses.
//! The rejected one minimises the same and walks the lower hull to ever longer ones. Each turn makes
//! `chosen length − rejected length` smaller, at a break point `Δscore / Δlength`.
//!
//! A break point is kept as the least float that reaches it ([`divide_up`]). A tie goes to the
//! shorter response (chosen) or the longer one (rejected), so a turn has been taken at every float
//! `α >= at` and at no other: counting turns and comparing responses at α are the same thing, to the
//! last bit. The hull is built on these floats too: a response that wins at no float α is left out.

use std::cmp::Ordering;

use crate::exact::divide_up;
use crate::filter::Point;

/// The gap of one prompt falls by `drop` from penalty `at` on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Break {
    /// The least penalty, greater than zero and finite, after the step.
    pub at: f64,
    /// Change of length, at least 1.
    pub drop: u32,
}

/// Which response is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The best.
    Chosen,
    /// The worst.
    Rejected,
}

/// Penalties that are looked at, both ends included.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bracket {
    /// Zero or more.
    pub low: f64,
    /// At least `low`; may be infinite.
    pub high: f64,
}

impl Bracket {
    /// All penalties.
    pub const ALL: Self = Self { low: 0.0, high: f64::INFINITY };
}

/// The best response of a prompt from each penalty of `turns` on: first the one at the low end of the bracket,
/// then those that take its place up to the high end.
///
/// Leaves in `points`, of which there must be at least one, only those that matter.
pub fn walk(points: &mut Vec<Point>, side: Side, bracket: Bracket, turns: &mut Vec<(f64, Point)>) {
    prune(points, side, bracket);
    // Each point gains on all those before it as the penalty grows; of equal lengths the best comes first.
    points.sort_unstable_by(|a, b| {
        match side {
            Side::Chosen => b.length.cmp(&a.length).then(order(b.score, a.score)).then(order(b.raw, a.raw)),
            Side::Rejected => a.length.cmp(&b.length).then(order(a.score, b.score)).then(order(a.raw, b.raw)),
        }
        .then(a.row.cmp(&b.row))
    });
    turns.clear();
    for point in points.iter() {
        if turns.last().is_some_and(|(_, last)| last.length == point.length) {
            continue;
        }
        let mut from = bracket.low;
        // The new point beats the chain from some penalty on, since it gains on all of it. If that is not after
        // the penalty at which the chain's last point takes over, that point is the best nowhere, and goes.
        while let Some(&(last_from, last)) = turns.last() {
            let (over, under) = match side {
                Side::Chosen => (last.score, point.score),
                Side::Rejected => (point.score, last.score),
            };
            if under < over {
                let at = divide_up(over, under, f64::from(last.length.abs_diff(point.length)));
                if at > last_from {
                    from = at;
                    break;
                }
            }
            turns.pop();
        }
        // Those after it may still come before the end: a later one may take over from the one before it.
        turns.push((from, *point));
    }
    let end = turns.iter().position(|turn| turn.0 > bracket.high || turn.0 == f64::INFINITY);
    turns.truncate(end.unwrap_or(turns.len()).max(1));
}

/// −0 and +0 are equal here, as they are everywhere else.
fn order(a: f64, b: f64) -> Ordering {
    a.partial_cmp(&b).unwrap_or(Ordering::Equal)
}

/// Removes points that are the best at no penalty of the bracket, as far as rounded arithmetic can tell.
fn prune(points: &mut Vec<Point>, side: Side, bracket: Bracket) {
    if bracket.high == f64::INFINITY || points.len() < 3 {
        return;
    }
    let middle = bracket.low + (bracket.high - bracket.low) / 2.0;
    let sign = if side == Side::Chosen { 1.0 } else { -1.0 };
    let value = |point: &Point| sign * (point.score - middle * f64::from(point.length));
    let mut best = points[0];
    let (mut reach, mut longest) = (0.0f64, 0);
    for point in points.iter() {
        reach = reach.max(point.score.abs());
        longest = longest.max(point.length);
        if value(point) > value(&best) {
            best = *point;
        }
    }
    // Far more than the roundings of both sides, and of the middle, add up to.
    let scale = reach + bracket.high * f64::from(longest);
    let enough = value(&best) - 1e-14 * scale;
    let half = (bracket.high - bracket.low) / 2.0;
    // Written so that a point stays where the arithmetic overflows.
    points.retain(|point| {
        let gain = half * f64::from(point.length.abs_diff(best.length));
        let out = value(point) + gain < enough;
        !out
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn points(of: &[(f64, u32)]) -> Vec<Point> {
        let rows = of.iter().zip(0..);
        rows.map(|(&(score, length), row)| Point { score, raw: score, row, length }).collect()
    }

    /// (penalty, length) of each turn.
    fn turns(of: &[(f64, u32)], side: Side, bracket: Bracket) -> Vec<(f64, u32)> {
        let mut found = Vec::new();
        walk(&mut points(of), side, bracket, &mut found);
        found.iter().map(|(at, point)| (*at, point.length)).collect()
    }

    #[test]
    fn walks_both_hulls() {
        // Chosen: 30 → 20 at 1/10, and 20 → 5 at 3/15, on the line through 10. Rejected: 5 → 30 at 4/25.
        let of = [(4.0, 30), (3.0, 20), (1.0, 10), (0.0, 5)];
        assert_eq!(turns(&of, Side::Chosen, Bracket::ALL), [(0.0, 30), (0.1, 20), (0.2, 5)]);
        assert_eq!(turns(&of, Side::Rejected, Bracket::ALL), [(0.0, 5), (0.16, 30)]);
        let middle = Bracket { low: 0.1, high: 0.15 };
        assert_eq!(turns(&of, Side::Chosen, middle), [(0.1, 20)]);
        assert_eq!(turns(&of, Side::Rejected, middle), [(0.1, 5)]);
    }

    #[test]
    fn points_on_a_line_are_one_turn() {
        let of = [(3.0, 30), (2.0, 20), (1.0, 10)];
        assert_eq!(turns(&of, Side::Chosen, Bracket::ALL), [(0.0, 30), (0.1, 10)]);
        assert_eq!(turns(&of, Side::Rejected, Bracket::ALL), [(0.0, 10), (0.1, 30)]);
    }

    #[test]
    fn equal_responses_never_turn() {
        let of = [(1.0, 7), (1.0, 7), (1.0, 7)];
        assert_eq!(turns(&of, Side::Chosen, Bracket::ALL), [(0.0, 7)]);
    }

    proptest! {
        #[test]
        fn a_bracket_is_a_part_of_the_whole(
            of in prop::collection::vec((-40i32..40, 0u32..30), 1..12),
            low in 0u32..60,
            width in 0u32..30,
            chosen in any::<bool>(),
        ) {
            let side = if chosen { Side::Chosen } else { Side::Rejected };
            let of: Vec<_> = of.into_iter().map(|(score, length)| (f64::from(score) / 8.0, length)).collect();
            let (low, high) = (f64::from(low) / 16.0, f64::from(low + width) / 16.0);
            let whole = turns(&of, side, Bracket::ALL);
            let first = whole.iter().rposition(|turn| turn.0 <= low).unwrap();
            let mut expected = vec![(low, whole[first].1)];
            expected.extend(whole[first + 1..].iter().filter(|turn| turn.0 <= high));
            prop_assert_eq!(turns(&of, side, Bracket { low, high }), expected);
        }
    }
}
