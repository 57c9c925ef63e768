//! The penalty that is looked for, exactly, without looking at the break points of every prompt.
//!
//! The total gap falls in steps as the penalty grows ([`penalty`](crate::penalty)); only the few next to the answer
//! matter. A sample of the prompts says between which penalties they must lie; one [`scan`](mod@crate::scan) then gives
//! the total gap at the low end of that bracket and all break points inside, for all prompts. If the answer is not
//! inside after all, the bracket is widened and the scan done again: the answer is that of all break points, whatever
//! the sample was.

use rayon::prelude::*;

use crate::block::Source;
use crate::hull::Bracket;
use crate::layout::{Layout, Stop};
use crate::mine::CurvePoint;
use crate::penalty::{Steps, Target};
use crate::scan::{Found, Wanted, scan};
use crate::table::Table;

/// Rows from which on a sample is worth it.
const MANY: u64 = 1 << 14;
/// Prompts of the first sample, all of whose break points are found.
const FIRST: u64 = 1 << 8;
/// How many times more prompts the next sample has; it is scanned with the bracket of the one before.
const MORE: u64 = 1 << 4;
/// Prompts from which on a sample says something.
const FEW: u64 = 32;
/// Times that a bracket is widened before all penalties are looked at.
const TRIES: u32 = 3;
/// Prompts of the last sample, at most.
const LAST: u64 = 1 << 15;
/// Rows for each prompt of a sample, at least.
const SPARSE: u64 = 1 << 8;

/// The answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The penalty.
    pub alpha: f64,
    /// The penalties `[low, high)` with the same best and worst responses.
    pub interval: (f64, f64),
    /// The curve around it.
    pub curve: Vec<CurvePoint>,
}

/// The answer, and what was found on the way.
#[derive(Debug)]
pub struct Solved {
    /// The answer.
    pub answer: Answer,
    /// What was found in all prompts.
    pub total: Found,
    /// The pairs at the penalty, if they were wanted.
    pub tables: Vec<Table>,
}

/// Finds the penalty; `wanted.bracket` is not looked at.
///
/// # Errors
/// [`Stop`], of the scan.
pub fn solve<S: Source>(
    source: &S,
    layout: &Layout,
    wanted: &Wanted,
    target: Target,
) -> Result<Solved, Stop> {
    let mut guess =
        if source.rows() < MANY { Guess::default() } else { guess(source, layout, wanted, target)? };
    loop {
        let bracket = guess.bracket;
        let mut parts = scan(source, layout, &Wanted { bracket, ..*wanted })?;
        let (steps, total) = assemble(bracket, &parts);
        let Some(answer) = guess.answer(target, &steps, &total) else { continue };
        if wanted.pairs {
            parts.par_iter_mut().for_each(|part| part.settle(answer.alpha));
        }
        return Ok(Solved { answer, tables: parts.into_iter().map(|part| part.table).collect(), total });
    }
}

/// What a sample says.
#[derive(Debug)]
pub struct Guess {
    /// Where the answer must lie.
    pub bracket: Bracket,
    /// The sample's steps and its prompts.
    sample: Option<(Steps, u64)>,
    /// Times that the answer was not inside.
    misses: u32,
}

impl Guess {
    /// The answer, if it is among the steps of the bracket; otherwise widens the bracket.
    pub fn answer(&mut self, target: Target, steps: &Steps, total: &Found) -> Option<Answer> {
        let Some(step) = steps.find(target, self.bracket) else {
            self.misses += 1;
            self.bracket = if self.misses < TRIES { wider(self.bracket) } else { Bracket::ALL };
            return None;
        };
        let alpha = match target {
            Target::LeastGap => steps.representative(step),
            Target::At(alpha) => alpha,
        };
        Some(Answer { alpha, interval: steps.interval(step), curve: curve(steps, step, total, self) })
    }
}

impl Default for Guess {
    fn default() -> Self {
        Self { bracket: Bracket::ALL, sample: None, misses: 0 }
    }
}

/// Looks at samples of the prompts, each larger than the one before.
///
/// # Errors
/// [`Stop`], of the scan.
pub fn guess<S: Source>(source: &S, layout: &Layout, wanted: &Wanted, target: Target) -> Result<Guess, Stop> {
    let look = |sample: &Layout, bracket: Bracket| {
        let parts = scan(source, sample, &Wanted { bracket, pairs: false, ..*wanted })?;
        Ok::<_, Stop>(assemble(bracket, &parts))
    };
    let first = layout.sample(source, FIRST);
    let (steps, total) = look(&first, Bracket::ALL)?;
    let prompts = total.entered;
    if prompts < FEW {
        return Ok(Guess::default());
    }
    // The gaps spread more at the answer than without a penalty.
    let near = steps.representative(steps.least());
    let (_, total) = look(&first, Bracket { low: near, high: near })?;
    let mut bracket = steps.bracket(target, Bracket::ALL, prompts, total.deviation());
    let most = LAST.min(source.rows() / SPARSE);
    let mut count = FIRST;
    while count < most {
        count = most.min(count * MORE);
        let (steps, total) = look(&layout.sample(source, count), bracket)?;
        bracket = steps.bracket(target, bracket, total.entered, total.deviation());
    }
    Ok(Guess { bracket, sample: Some((steps, prompts)), misses: 0 })
}

/// The steps of a scan, and its parts added up.
pub fn assemble(bracket: Bracket, parts: &[Found]) -> (Steps, Found) {
    let mut total = Found::default();
    parts.iter().for_each(|part| total.merge(part));
    let breaks = parts.iter().flat_map(Found::breaks).collect();
    (Steps::new(bracket.low, total.gap, breaks), total)
}

/// A bracket around one that did not hold the answer.
fn wider(Bracket { low, high }: Bracket) -> Bracket {
    let more = 8.0 * (high - low);
    if more.is_finite() { Bracket { low: (low - more).max(0.0), high: high + more } } else { Bracket::ALL }
}

/// Exact inside the bracket, and from the sample outside.
fn curve(steps: &Steps, step: usize, total: &Found, guess: &Guess) -> Vec<CurvePoint> {
    if total.entered == 0 {
        return Vec::new();
    }
    let point = |(alpha, gap): (f64, i128), prompts: u64, exact| CurvePoint {
        alpha,
        gap: gap as f64 / prompts as f64,
        exact,
    };
    let mut curve: Vec<CurvePoint> =
        steps.curve(step).into_iter().map(|step| point(step, total.entered, true)).collect();
    if let Some((sample, prompts)) = &guess.sample
        && guess.bracket != Bracket::ALL
        && *prompts > 0
    {
        let Bracket { low, high } = guess.bracket;
        let near = sample.step_at(steps.interval(step).0);
        let outside = sample.curve(near).into_iter().filter(|(alpha, _)| *alpha < low || *alpha > high);
        curve.extend(outside.map(|step| point(step, *prompts, false)));
        curve.sort_by(|a, b| a.alpha.total_cmp(&b.alpha));
    }
    curve
}
