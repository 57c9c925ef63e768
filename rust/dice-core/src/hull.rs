//! Break points of one prompt's choice as the penalty grows.
//!
//! The chosen response of a prompt maximises `score − α·length`. As α grows from zero it walks down
//! the upper hull of the points (length, score): from the highest score to ever shorter responses.
//! The rejected one minimises the same and walks the lower hull to ever longer ones. Each step makes
//! `chosen length − rejected length` smaller, at a break point `Δscore / Δlength`.
//!
//! A break point is kept as the least float that reaches it ([`divide_up`]). A tie goes to the
//! shorter response (chosen) or the longer one (rejected), so a step has been taken at every float
//! `α >= at` and at no other: counting steps and comparing responses at α are the same thing, to the
//! last bit. The hull is built on these floats too: a response that wins at no float α is left out.

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

/// Memory that is used for one prompt after another.
#[derive(Debug, Default)]
pub struct Scratch {
    /// The hull so far: score, length, and the least penalty at which it is the best.
    chain: Vec<(f64, u32, f64)>,
}

/// Adds the break points of one prompt for α > 0 to `breaks`, and returns its gap at α = 0 (length of
/// the chosen response less that of the rejected one).
///
/// Sorts `points`, of which there must be at least one.
pub fn walk(points: &mut [Point], scratch: &mut Scratch, breaks: &mut Vec<Break>) -> i64 {
    points.sort_unstable_by(|a, b| a.length.cmp(&b.length).then_with(|| a.score.total_cmp(&b.score)));
    let chain = &mut scratch.chain;
    // From long to short, at each length the best score first.
    best_chain(chain, points.iter().rev().map(|p| (p.score, p.length)));
    let chosen = chain.first().map_or(0, |best| i64::from(best.1));
    emit(chain, breaks);
    // From short to long, at each length the worst score first; turned over, the worst is the best.
    best_chain(chain, points.iter().map(|p| (-p.score, p.length)));
    let rejected = chain.first().map_or(0, |best| i64::from(best.1));
    emit(chain, breaks);
    chosen - rejected
}

fn emit(chain: &[(f64, u32, f64)], breaks: &mut Vec<Break>) {
    breaks.extend(
        chain
            .windows(2)
            .filter(|step| step[1].2.is_finite())
            .map(|step| Break { at: step[1].2, drop: step[0].1.abs_diff(step[1].1) }),
    );
}

/// The best points for growing α >= 0, where each point gains on all those before it.
///
/// Each new point beats the chain from some α on, since it gains on all of it. If that α is not above
/// where the chain's last point starts to be the best, that point is the best nowhere, and goes.
fn best_chain(chain: &mut Vec<(f64, u32, f64)>, points: impl Iterator<Item = (f64, u32)>) {
    chain.clear();
    let mut previous = None;
    for (score, length) in points {
        // Of equal lengths the first is the best at every α.
        if previous.replace(length) == Some(length) {
            continue;
        }
        let mut from = 0.0;
        while let Some(&(top_score, top_length, top_from)) = chain.last() {
            if score < top_score {
                let at = divide_up(top_score, score, f64::from(top_length.abs_diff(length)));
                if at > top_from {
                    from = at;
                    break;
                }
            }
            chain.pop();
        }
        chain.push((score, length, from));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(of: &[(f64, u32)]) -> Vec<Point> {
        let rows = of.iter().zip(0..);
        rows.map(|(&(score, length), row)| Point { score, raw: score, row, length }).collect()
    }

    #[test]
    fn walks_both_hulls() {
        // Chosen: 30 → 20 at 1/10, and 20 → 5 at 3/15, on the line through 10. Rejected: 5 → 30 at 4/25.
        let mut points = points(&[(4.0, 30), (3.0, 20), (1.0, 10), (0.0, 5)]);
        let mut breaks = Vec::new();
        assert_eq!(walk(&mut points, &mut Scratch::default(), &mut breaks), 25);
        breaks.sort_by(|a, b| a.at.total_cmp(&b.at));
        let steps: Vec<_> = breaks.iter().map(|step| (step.at, step.drop)).collect();
        assert_eq!(steps, [(0.1, 10), (0.16, 25), (0.2, 15)]);
    }

    #[test]
    fn points_on_a_line_are_one_step() {
        let mut points = points(&[(3.0, 30), (2.0, 20), (1.0, 10)]);
        let mut breaks = Vec::new();
        assert_eq!(walk(&mut points, &mut Scratch::default(), &mut breaks), 20);
        assert!(breaks.iter().all(|step| step.at == 0.1f64 && step.drop == 20));
        assert_eq!(breaks.len(), 2);
    }

    #[test]
    fn equal_responses_never_step() {
        let mut points = points(&[(1.0, 7), (1.0, 7), (1.0, 7)]);
        let mut breaks = Vec::new();
        assert_eq!(walk(&mut points, &mut Scratch::default(), &mut breaks), 0);
        assert!(breaks.is_empty());
    }
}
