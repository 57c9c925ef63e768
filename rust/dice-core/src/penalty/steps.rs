//! The total length gap as a step function of the penalty.
//!
//! The total gap of all prompts, `G(α) = Σ (|chosen| − |rejected|)`, falls in steps at the break points of
//! [`hull`](crate::penalty::hull). Adding the steps in order gives the best α: the interval `[low, high)` on which |G|
//! is least; if G has the same value on two of them (only the responses change), the lower one. (Chen et al., arXiv
//! 2406.09760, eq. 6, search for the same α on a grid.)
//!
//! Every float of the interval gives the same pairs, so the reported one is a choice: zero if it is inside, else the
//! middle. The interval then has an upper end: beyond the last break point, every prompt has its shortest response
//! chosen and its longest rejected, so |G| is as great as it can be, and an earlier step is at least as good.

use rayon::prelude::*;

use crate::penalty::hull::{Bracket, Breakpoint};

/// Approximate maximum number of points of [`Steps::curve`].
const CURVE_POINTS: usize = 200;

/// A point of the curve of mean length gap against penalty.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CurvePoint {
    /// The penalty.
    pub alpha: f64,
    /// The mean length gap from this penalty to that of the next step.
    pub gap: f64,
    /// Whether the gap is that of all prompts, rather than of a sample.
    pub exact: bool,
}

/// Which penalty is requested.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    /// The penalty that brings the gap nearest zero.
    LeastGap,
    /// A given penalty.
    At(f64),
}

/// The total length gap as a function of the penalty.
#[derive(Debug, Clone)]
pub struct Steps {
    /// Least penalty of each step, ascending. The first is the low end of the bracket.
    at: Vec<f64>,
    /// Total gap of each step, never rising: at most 2³² for each of at most 2⁶³ prompts.
    gap: Vec<i128>,
}

impl Steps {
    /// From the gap at α = `low` and the break points of all prompts above it, in any order.
    pub fn new(low: f64, gap_at_low: i128, mut breakpoints: Vec<Breakpoint>) -> Self {
        // Equal break points become one step, so their order does not matter.
        breakpoints.par_sort_unstable_by(|a, b| a.at.total_cmp(&b.at));
        let mut steps = Self { at: vec![low], gap: vec![gap_at_low] };
        let mut gap = gap_at_low;
        for same in breakpoints.chunk_by(|a, b| a.at == b.at) {
            gap -= same.iter().map(|step| i128::from(step.drop)).sum::<i128>();
            steps.at.push(same[0].at);
            steps.gap.push(gap);
        }
        steps
    }

    /// The step on which |G| is least; of two, the one with the lower penalty.
    pub fn least(&self) -> usize {
        let after = self.gap.partition_point(|&gap| gap > 0);
        if after == 0 {
            return 0;
        }
        // The last step above zero, or the first at or below zero. If there is no such step, the answer is not known
        // yet, or all steps are known and the last one is the best.
        match self.gap.get(after) {
            Some(gap) if gap.abs() < self.gap[after - 1].abs() => after,
            // Steps of equal gap differ only in their responses.
            _ => self.gap.partition_point(|&gap| gap > self.gap[after - 1]),
        }
    }

    /// The step of a penalty; the first step for a penalty below the bracket.
    pub fn step_at(&self, alpha: f64) -> usize {
        self.at.partition_point(|&at| at <= alpha).saturating_sub(1)
    }

    /// The requested step, if both its ends are known: these may be only the steps of a bracket.
    pub fn find(&self, target: Target, bracket: Bracket) -> Option<usize> {
        let step = match target {
            Target::LeastGap => self.least(),
            Target::At(alpha) => self.step_at(alpha),
        };
        let low_known = step > 0 || bracket.low == 0.0;
        let high_known = step + 1 < self.at.len() || bracket.high == f64::INFINITY;
        (low_known && high_known).then_some(step)
    }

    /// A bracket that is likely to contain the requested step of all prompts, if these are the steps of a random sample
    /// of `prompts` prompts, whose gaps have the given standard deviation. The sample's steps are known in `known`.
    pub fn bracket(&self, target: Target, known: Bracket, prompts: u64, deviation: f64) -> Bracket {
        /// Width to both sides, in standard errors of the sample's mean gap.
        const STANDARD_ERRORS: f64 = 3.0;
        /// Width to both sides of a given penalty, in steps of the sample.
        const MARGIN_STEPS: usize = 16;
        let (first, last) = match target {
            Target::LeastGap => {
                // In units of the sample's total gap.
                let slack = STANDARD_ERRORS * deviation * (prompts as f64).sqrt();
                let above = self.gap.partition_point(|&gap| gap as f64 >= slack);
                (above.checked_sub(1), self.gap.partition_point(|&gap| gap as f64 > -slack) + 1)
            }
            Target::At(alpha) => {
                let step = self.step_at(alpha);
                (step.checked_sub(MARGIN_STEPS), step + MARGIN_STEPS)
            }
        };
        Bracket {
            low: first.map_or(known.low, |step| self.at[step]),
            high: self.at.get(last).copied().unwrap_or(known.high),
        }
    }

    /// The penalties `[low, high)` of a step; `high` may be infinite.
    pub fn interval(&self, step: usize) -> (f64, f64) {
        (self.at[step], self.at.get(step + 1).copied().unwrap_or(f64::INFINITY))
    }

    /// The total gap on a step.
    pub fn gap(&self, step: usize) -> i128 {
        self.gap[step]
    }

    /// The penalty that is reported for a step.
    pub fn representative(&self, step: usize) -> f64 {
        let (low, high) = self.interval(step);
        if low == 0.0 {
            return 0.0;
        }
        let alpha = low + (high - low) / 2.0;
        // There is no middle between adjacent floats (nor below infinity, but `least` never returns that step). The
        // lower end is part of the interval, since ties go to the shorter chosen and the longer rejected response.
        if low < alpha && alpha < high { alpha } else { low }
    }

    /// Some hundred points (α, total gap from α on) of the function around a step.
    ///
    /// All steps if they are few. Otherwise the steps at even distances up to four times the penalty at the step's
    /// end, others at even ranks over all steps, the step itself and its neighbors.
    pub fn curve(&self, step: usize) -> Vec<(f64, i128)> {
        let last = self.at.len() - 1;
        let mut chosen: Vec<usize> = if last < CURVE_POINTS {
            (0..=last).collect()
        } else {
            let (low, high) = self.interval(step);
            let max_penalty = 4.0 * if high.is_finite() { high } else { low };
            let half = CURVE_POINTS / 2;
            let by_penalty = (0..half).map(|i| self.step_at(max_penalty * (i as f64 / half as f64)));
            let by_rank = (0..=half).map(|i| last * i / half);
            let near = step.saturating_sub(1)..=(step + 1).min(last);
            by_penalty.chain(by_rank).chain(near).collect()
        };
        chosen.sort_unstable();
        chosen.dedup();
        chosen.into_iter().map(|step| (self.at[step], self.gap[step])).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(gap: i128, breakpoints: &[(f64, u32)]) -> Steps {
        Steps::new(0.0, gap, breakpoints.iter().map(|&(at, drop)| Breakpoint { at, drop }).collect())
    }

    #[test]
    fn the_least_gap_is_chosen() {
        let steps = steps(10, &[(0.3, 4), (0.1, 4), (0.2, 3), (0.2, 1)]);
        assert_eq!((steps.least(), steps.gap(2), steps.interval(2)), (2, 2, (0.2, 0.3)));
        assert_eq!(steps.representative(2), 0.25);
    }

    #[test]
    fn of_two_equal_gaps_the_lower_penalty_is_chosen() {
        let steps = steps(2, &[(0.5, 4)]);
        assert_eq!((steps.least(), steps.representative(0)), (0, 0.0));
    }

    #[test]
    fn of_steps_of_equal_gap_the_lowest_is_chosen() {
        assert_eq!(steps(9, &[(0.1, 6), (0.2, 0), (0.3, 0), (0.4, 9)]).least(), 1);
        assert_eq!(steps(9, &[(0.1, 10), (0.2, 0), (0.3, 0), (0.4, 9)]).least(), 1);
        assert_eq!(steps(0, &[(0.1, 0), (0.2, 3)]).least(), 0);
    }

    #[test]
    fn no_penalty_where_none_is_needed() {
        assert_eq!(steps(-3, &[(0.5, 4)]).least(), 0);
        assert_eq!(steps(0, &[]).interval(0), (0.0, f64::INFINITY));
    }

    #[test]
    fn adjacent_floats_have_no_middle() {
        let low = 0.1f64;
        let steps = steps(10, &[(low, 10), (low.next_up(), 5)]);
        assert_eq!(steps.representative(steps.least()), low);
    }

    #[test]
    fn long_curves_are_thinned_around_the_answer() {
        let breakpoints: Vec<_> = (1..10_000).map(|i| (f64::from(i) * 1e-5, 1)).collect();
        let steps = steps(50, &breakpoints);
        let curve = steps.curve(steps.least());
        assert!(curve.len() <= CURVE_POINTS + 4);
        assert!(curve.contains(&(0.0, 50)) && curve.iter().any(|point| point.1 == 0));
    }
}
