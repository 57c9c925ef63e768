//! The requested penalty, exactly, without the break points of every prompt.
//!
//! The total gap falls in [`steps`](crate::penalty::steps) as the penalty grows; only the few steps next to the answer
//! matter. A sample of the prompts gives a bracket of penalties that should contain them. One
//! [`scan`](mod@crate::penalty::scan) of all prompts then gives the total gap at the low end of the bracket and all break
//! points inside. If the answer is not inside after all, the bracket is widened and the scan repeated. So the answer
//! never depends on the sample.

use rayon::prelude::*;

use crate::input::block::{Source, Stop};
use crate::input::layout::Layout;
use crate::pairs::table::Table;
use crate::penalty::hull::Bracket;
use crate::penalty::scan::{ScanRequest, ScanResult, scan};
use crate::penalty::steps::{CurvePoint, Steps, Target};

/// Rows from which on a sample saves time.
const MIN_ROWS_TO_SAMPLE: u64 = 1 << 14;
/// Prompts of the first sample, whose break points are all computed.
const FIRST_SAMPLE: u64 = 1 << 8;
/// How many times larger the next sample is; it is scanned with the bracket of the one before.
const SAMPLE_GROWTH: u64 = 1 << 4;
/// Maximum number of prompts in the last sample.
const MAX_SAMPLE: u64 = 1 << 15;
/// Minimum number of rows per prompt of a sample.
const ROWS_PER_SAMPLED_PROMPT: u64 = 1 << 8;
/// Prompts that a sample needs to be representative.
const MIN_SAMPLED_PROMPTS: u64 = 32;
/// Number of misses after which the bracket covers all penalties.
const MAX_MISSES: u32 = 3;

/// The penalty, and the gap around it.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    /// The penalty.
    pub(crate) alpha: f64,
    /// The penalties `[low, high)` with the same best and worst responses.
    pub(crate) interval: (f64, f64),
    /// The curve of the mean gap.
    pub(crate) curve: Vec<CurvePoint>,
}

/// The answer, and the pairs at the penalty.
#[derive(Debug)]
pub(crate) struct Solution {
    pub(crate) answer: Answer,
    /// Sums and counts over all prompts.
    pub(crate) total: ScanResult,
    /// The pairs at the penalty, if they are requested.
    pub(crate) tables: Vec<Table>,
}

/// Computes the penalty. `request.bracket` is ignored.
///
/// # Errors
/// [`Stop`] of the scan.
pub(crate) fn solve<S: Source>(
    source: &S,
    layout: &Layout,
    request: &ScanRequest,
    target: Target,
) -> Result<Solution, Stop> {
    let mut estimate = if source.rows() < MIN_ROWS_TO_SAMPLE {
        Estimate::default()
    } else {
        estimate(source, layout, request, target)?
    };
    loop {
        let bracket = estimate.bracket;
        let mut results = scan(source, layout, &ScanRequest { bracket, ..*request })?;
        let (steps, total) = combine(bracket, &results);
        let Some(answer) = estimate.answer(target, &steps, &total) else { continue };
        if request.pairs {
            results.par_iter_mut().for_each(|result| result.apply_breaks(answer.alpha));
        }
        let tables = results.into_iter().map(|result| result.table).collect();
        return Ok(Solution { answer, total, tables });
    }
}

/// An estimate of the penalty from a sample.
#[derive(Debug)]
pub(crate) struct Estimate {
    /// Where the answer should be.
    pub(crate) bracket: Bracket,
    /// The steps of the first sample, and its number of prompts.
    sample: Option<(Steps, u64)>,
    /// How often the answer was not inside the bracket.
    misses: u32,
}

impl Estimate {
    /// The answer, if it is among the steps of the bracket; otherwise widens the bracket.
    pub(crate) fn answer(&mut self, target: Target, steps: &Steps, total: &ScanResult) -> Option<Answer> {
        let Some(step) = steps.find(target, self.bracket) else {
            self.misses += 1;
            self.bracket = if self.misses < MAX_MISSES { widen(self.bracket) } else { Bracket::ALL };
            return None;
        };
        let alpha = match target {
            Target::LeastGap => steps.representative(step),
            Target::At(alpha) => alpha,
        };
        Some(Answer { alpha, interval: steps.interval(step), curve: curve(steps, step, total, self) })
    }
}

impl Default for Estimate {
    fn default() -> Self {
        Self { bracket: Bracket::ALL, sample: None, misses: 0 }
    }
}

/// Estimates the penalty from samples of the prompts, each larger than the one before.
///
/// # Errors
/// [`Stop`] of the scan.
pub(crate) fn estimate<S: Source>(
    source: &S,
    layout: &Layout,
    request: &ScanRequest,
    target: Target,
) -> Result<Estimate, Stop> {
    let scan_sample = |sample: &Layout, bracket: Bracket| {
        let results = scan(source, sample, &ScanRequest { bracket, pairs: false, ..*request })?;
        Ok::<_, Stop>(combine(bracket, &results))
    };
    let first = layout.sample(source, FIRST_SAMPLE);
    let (steps, total) = scan_sample(&first, Bracket::ALL)?;
    let prompts = total.counted;
    if prompts < MIN_SAMPLED_PROMPTS {
        return Ok(Estimate::default());
    }
    // The deviation of the gaps is larger at the answer than without a penalty.
    let near = steps.representative(steps.least());
    let (_, total) = scan_sample(&first, Bracket { low: near, high: near })?;
    let mut bracket = steps.bracket(target, Bracket::ALL, prompts, total.deviation());
    let max_count = MAX_SAMPLE.min(source.rows() / ROWS_PER_SAMPLED_PROMPT);
    let mut count = FIRST_SAMPLE;
    while count < max_count {
        count = max_count.min(count * SAMPLE_GROWTH);
        let (steps, total) = scan_sample(&layout.sample(source, count), bracket)?;
        bracket = steps.bracket(target, bracket, total.counted, total.deviation());
    }
    Ok(Estimate { bracket, sample: Some((steps, prompts)), misses: 0 })
}

/// The steps of a scan, and the sums and counts of its chunks.
fn combine(bracket: Bracket, results: &[ScanResult]) -> (Steps, ScanResult) {
    let mut total = ScanResult::default();
    results.iter().for_each(|result| total.merge(result));
    let breakpoints = results.iter().flat_map(ScanResult::breakpoints).collect();
    (Steps::new(bracket.low, total.gap, breakpoints), total)
}

/// A wider bracket around one that did not contain the answer.
fn widen(Bracket { low, high }: Bracket) -> Bracket {
    let more = 8.0 * (high - low);
    if more.is_finite() { Bracket { low: (low - more).max(0.0), high: high + more } } else { Bracket::ALL }
}

/// The curve of the mean gap: exact inside the bracket, and that of the sample outside.
fn curve(steps: &Steps, step: usize, total: &ScanResult, estimate: &Estimate) -> Vec<CurvePoint> {
    if total.counted == 0 {
        return Vec::new();
    }
    let point = |(alpha, gap): (f64, i128), prompts: u64, exact| CurvePoint {
        alpha,
        gap: gap as f64 / prompts as f64,
        exact,
    };
    let mut curve: Vec<CurvePoint> =
        steps.curve(step).into_iter().map(|step| point(step, total.counted, true)).collect();
    if let Some((sample, prompts)) = &estimate.sample
        && estimate.bracket != Bracket::ALL
        && *prompts > 0
    {
        let Bracket { low, high } = estimate.bracket;
        let near = sample.step_at(steps.interval(step).0);
        let outside = sample.curve(near).into_iter().filter(|(alpha, _)| *alpha < low || *alpha > high);
        curve.extend(outside.map(|step| point(step, *prompts, false)));
        curve.sort_by(|a, b| a.alpha.total_cmp(&b.alpha));
    }
    curve
}
