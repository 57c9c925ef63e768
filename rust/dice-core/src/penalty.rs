//! The penalty that brings the mean length gap nearest zero.
//!
//! The total gap of all prompts, `G(α) = Σ (|chosen| − |rejected|)`, falls in steps at the break points
//! of [`hull`](crate::hull), so the best α is found by adding the steps up in order: the interval
//! `[low, high)` on which |G| is least. It is one interval, since G never takes a value twice.
//! (Chen et al., arXiv 2406.09760, eq. 6, look for the same α on a grid.)
//!
//! Every float of the interval gives the same pairs, so the one that is reported is a choice: zero if
//! it is in, else the middle. There is an upper end then: beyond the last break point every prompt has
//! its shortest response chosen and its longest rejected, so |G| is as great there as it can be, and no
//! step is taken that far while another is as good.

use rayon::prelude::*;

use crate::hull::{Bracket, Break};

/// Points of [`Steps::curve`], at most about this many.
const CURVE: usize = 200;

/// The penalty that is looked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    /// The one that brings the gap nearest zero.
    LeastGap,
    /// This one.
    At(f64),
}

/// The total length gap as a function of the penalty.
#[derive(Debug, Clone)]
pub struct Steps {
    /// Least penalty of each step: the low end of what is known first, then rising.
    at: Vec<f64>,
    /// The total gap from there on, falling. At most 2³² for each of at most 2⁶³ prompts.
    gap: Vec<i128>,
}

impl Steps {
    /// From the gap at α = `low` and the break points of all prompts beyond it, in any order.
    pub fn new(low: f64, gap_at_low: i128, mut breaks: Vec<Break>) -> Self {
        // Equal break points are added up, so their order does not matter.
        breaks.par_sort_unstable_by(|a, b| a.at.total_cmp(&b.at));
        let mut steps = Self { at: vec![low], gap: vec![gap_at_low] };
        let mut gap = gap_at_low;
        for same in breaks.chunk_by(|a, b| a.at == b.at) {
            gap -= same.iter().map(|step| i128::from(step.drop)).sum::<i128>();
            steps.at.push(same[0].at);
            steps.gap.push(gap);
        }
        steps
    }

    /// The step on which |G| is least; of two, the one at the lower penalty.
    pub fn least(&self) -> usize {
        let after = self.gap.partition_point(|&gap| gap > 0);
        if after == 0 {
            return 0;
        }
        // The last step above zero, or the first at or below it (unless there is none, in which case no answer
        // is known yet, or all steps are known and the last is the best).
        match self.gap.get(after) {
            Some(gap) if gap.abs() < self.gap[after - 1].abs() => after,
            _ => after - 1,
        }
    }

    /// The step that a penalty lies on; the first for one below what is known.
    pub fn step_at(&self, alpha: f64) -> usize {
        self.at.partition_point(|&at| at <= alpha).saturating_sub(1)
    }

    /// The step that is looked for, if both its ends are known: the steps may be those of a bracket alone.
    pub fn find(&self, target: Target, bracket: Bracket) -> Option<usize> {
        let step = match target {
            Target::LeastGap => self.least(),
            Target::At(alpha) => self.step_at(alpha),
        };
        let low_known = step > 0 || bracket.low == 0.0;
        let high_known = step + 1 < self.at.len() || bracket.high == f64::INFINITY;
        (low_known && high_known).then_some(step)
    }

    /// Where the steps of all prompts are likely to have what is looked for, if these are the steps of a random
    /// sample of them: `prompts` of them, whose gaps have the given standard deviation.
    /// Nothing is known of the sample outside `known`.
    pub fn bracket(&self, target: Target, known: Bracket, prompts: u64, deviation: f64) -> Bracket {
        /// Standard errors of the sample's mean gap to both sides.
        const ERRORS: f64 = 3.0;
        /// Steps of the sample to both sides of a given penalty.
        const NEAR: usize = 16;
        let (first, last) = match target {
            Target::LeastGap => {
                // In total gaps of the sample.
                let slack = ERRORS * deviation * (prompts as f64).sqrt();
                let above = self.gap.partition_point(|&gap| gap as f64 >= slack);
                (above.checked_sub(1), self.gap.partition_point(|&gap| gap as f64 > -slack) + 1)
            }
            Target::At(alpha) => {
                let step = self.step_at(alpha);
                (step.checked_sub(NEAR), step + NEAR)
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

    /// The penalty that stands for a step.
    pub fn representative(&self, step: usize) -> f64 {
        let (low, high) = self.interval(step);
        if low == 0.0 {
            return 0.0;
        }
        let alpha = low + (high - low) / 2.0;
        // Between neighbouring floats there is no middle (nor below infinity, for a step that
        // `least` never gives). The lower end itself is in the interval: the step has been taken at the
        // break point, since ties go to the shorter chosen and the longer rejected response.
        if low < alpha && alpha < high { alpha } else { low }
    }

    /// Some hundred points (α, total gap from α on) of the function around a step.
    ///
    /// All of them if they are few. Otherwise the steps that are met at even distances up to four times
    /// the penalty at the step's end, and others at even ranks over all; the step and its neighbours always.
    pub fn curve(&self, step: usize) -> Vec<(f64, i128)> {
        let last = self.at.len() - 1;
        let mut chosen: Vec<usize> = if last < CURVE {
            (0..=last).collect()
        } else {
            let (low, high) = self.interval(step);
            let reach = 4.0 * if high.is_finite() { high } else { low };
            let half = CURVE / 2;
            let by_penalty = (0..half).map(|i| self.step_at(reach * (i as f64 / half as f64)));
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

    fn steps(gap: i128, of: &[(f64, u32)]) -> Steps {
        Steps::new(0.0, gap, of.iter().map(|&(at, drop)| Break { at, drop }).collect())
    }

    #[test]
    fn finds_the_least_gap() {
        let found = steps(10, &[(0.3, 4), (0.1, 4), (0.2, 3), (0.2, 1)]);
        assert_eq!((found.least(), found.gap(2), found.interval(2)), (2, 2, (0.2, 0.3)));
        assert_eq!(found.representative(2), 0.25);
    }

    #[test]
    fn of_two_equals_the_lower_penalty() {
        let found = steps(2, &[(0.5, 4)]);
        assert_eq!((found.least(), found.representative(0)), (0, 0.0));
    }

    #[test]
    fn no_penalty_where_none_is_needed() {
        assert_eq!(steps(-3, &[(0.5, 4)]).least(), 0);
        assert_eq!(steps(0, &[]).interval(0), (0.0, f64::INFINITY));
    }

    #[test]
    fn neighbouring_floats_have_no_middle() {
        let low = 0.1f64;
        let found = steps(10, &[(low, 10), (low.next_up(), 5)]);
        assert_eq!(found.representative(found.least()), low);
    }

    #[test]
    fn long_curves_are_thinned_around_the_answer() {
        let of: Vec<_> = (1..10_000).map(|i| (f64::from(i) * 1e-5, 1)).collect();
        let found = steps(50, &of);
        let curve = found.curve(found.least());
        assert!(curve.len() <= CURVE + 4);
        assert!(curve.contains(&(0.0, 50)) && curve.iter().any(|point| point.1 == 0));
    }
}
