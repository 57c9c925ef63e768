//! The whole: columns in, pairs out.

use arrow_array::RecordBatch;

use crate::block::{Moments, Source};
use crate::bucket::{Buckets, Usable};
use crate::filter::{Dropped, Filter};
use crate::hull::Bracket;
use crate::layout::{Layout, Over, Stop, over};
use crate::pairing::Pairing;
use crate::penalty::Target;
use crate::pick::{Rules, Scoring, pick};
use crate::pool::{PickFrom, Pool};
use crate::records::Records;
use crate::scan::{Found, Wanted};
use crate::solve::solve;
use crate::table::{self, Table};
use crate::{Columns, Error};

/// What is done about length.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Debias {
    /// Nothing.
    None,
    /// `reward − α·length`, with the α that brings the mean length gap nearest zero.
    LinearAuto,
    /// `reward − α·length`, with this α: finite and not negative.
    Linear(f64),
    /// `reward / length`; responses of length 0 are too short.
    PerToken,
    /// The reward centred inside length quantiles: see [`bucket`](crate::bucket).
    Bucket {
        /// Number of quantiles, at least 1.
        buckets: usize,
        /// Whether to divide by the standard deviation too.
        scale: bool,
    },
}

/// Options of [`mine`].
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// What is done about length.
    pub debias: Debias,
    /// Usable responses that a prompt needs, at least 2.
    pub min_responses: usize,
    /// Bounds on the length of a usable response.
    pub filter: Filter,
    /// Which responses make pairs.
    pub pairing: Pairing,
    /// Which policies the chosen response may come from.
    pub chosen_from: PickFrom,
    /// Which policies the rejected response may come from.
    pub rejected_from: PickFrom,
    /// Whether to add [win rates](crate::labels::win_rate), at this scale.
    pub win_rates: Option<f64>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            debias: Debias::LinearAuto,
            min_responses: 2,
            filter: Filter::default(),
            pairing: Pairing::MaxMin,
            chosen_from: PickFrom::Any,
            rejected_from: PickFrom::Any,
            win_rates: None,
        }
    }
}

/// Prompts that gave no pair, by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DroppedPrompts {
    /// Fewer usable responses than asked for.
    pub too_few_responses: u64,
    /// No response that may be chosen beats one that may be rejected.
    pub no_contrast: u64,
    /// No two responses of nearly equal length, one of which beats the other.
    pub no_match: u64,
}

impl DroppedPrompts {
    /// Adds another count.
    pub fn add(&mut self, other: &Self) {
        self.too_few_responses += other.too_few_responses;
        self.no_contrast += other.no_contrast;
        self.no_match += other.no_match;
    }

    /// Counts a prompt for which a pairing found nothing.
    pub fn count_pairless(&mut self, pairing: Pairing) {
        match pairing {
            Pairing::Matched(_) => self.no_match += 1,
            _ => self.no_contrast += 1,
        }
    }
}

/// A point of the curve of mean length gap against penalty.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CurvePoint {
    /// The penalty.
    pub alpha: f64,
    /// The mean gap from there on.
    pub gap: f64,
    /// Whether it is that of all prompts, rather than of a sample.
    pub exact: bool,
}

/// What [`mine`] gives.
#[derive(Debug, Clone, Default)]
pub struct Mined {
    /// The pairs, by ascending prompt key, in one batch or several: see [`mine`].
    pub pairs: Vec<RecordBatch>,
    /// The penalty; `None` without a linear one.
    pub alpha: Option<f64>,
    /// The penalties `[low, high)` that give the same best and worst responses; `high` may be infinite.
    pub alpha_interval: Option<(f64, f64)>,
    /// Mean of |best| − |worst| by reward alone, over prompts where one beats the other; NaN without such.
    pub gap_before: f64,
    /// Mean of |chosen| − |rejected| of the pairs; NaN without pairs.
    pub gap_after: f64,
    /// The gap around the answer; none without a linear penalty or without pairs.
    pub curve: Vec<CurvePoint>,
    /// Pearson's correlation of reward and length over the usable rows; NaN if one is constant.
    pub correlation_before: f64,
    /// The same of score and length.
    pub correlation_after: f64,
    /// Rows dropped.
    pub dropped: Dropped,
    /// Prompts that gave no pair.
    pub dropped_prompts: DroppedPrompts,
    /// Prompts in the input.
    pub prompts: u64,
    /// Rows in the input.
    pub rows: u64,
}

/// Picks pairs of every prompt's usable responses, by reward less the length penalty.
///
/// Pairs come with the columns
///
/// | column | type | |
/// | --- | --- | --- |
/// | `prompt` | the input's | the key |
/// | `chosen_row`, `rejected_row` | uint64 | row numbers over all batches |
/// | `chosen_reward`, `rejected_reward` | float32 | as they came in |
/// | `margin` | float32 | difference of the scores |
/// | `chosen_length`, `rejected_length` | uint32 | |
/// | `chosen_win_rate`, `rejected_win_rate` | float32 | if asked for |
/// | `consistency` | float32 | if the input has a column `second` |
///
/// ```
/// use arrow_array::{ArrayRef, Float32Array, RecordBatch, UInt32Array};
/// use dice_core::{Columns, Options, mine};
/// use std::sync::Arc;
///
/// let batch = RecordBatch::try_from_iter([
///     ("prompt", Arc::new(UInt32Array::from(vec![7, 7, 7])) as ArrayRef),
///     ("reward", Arc::new(Float32Array::from(vec![0.5, 0.4, 0.0]))),
///     ("length", Arc::new(UInt32Array::from(vec![90, 20, 20]))),
/// ])?;
/// let mined = mine(&Columns::new([Ok(batch)])?, &Options::default())?;
/// assert_eq!(mined.gap_before, 70.0);
/// assert_eq!(mined.gap_after, 0.0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`Error::Usage`] for an option out of range; [`Error::Length`] for a length that is no count.
pub fn mine(columns: &Columns, options: &Options) -> Result<Mined, Error> {
    check(columns, options)?;
    let (tables, mut mined) = over(columns, Whole { columns, options })?;
    mined.pairs = table::batches(tables, &columns.batches[0].keys)?;
    Ok(mined)
}

/// Checks that the options fit each other and the columns.
///
/// # Errors
/// [`Error::Usage`].
pub fn check(columns: &Columns, options: &Options) -> Result<(), Error> {
    let refuse = |message: String| Err(Error::Usage(message));
    if options.min_responses < 2 {
        return refuse(format!(
            "min_responses is {}, but a pair takes two responses: give 2 or more",
            options.min_responses
        ));
    }
    if let Filter { min_length: Some(min), max_length: Some(max) } = options.filter
        && min > max
    {
        return refuse(format!("min_length is {min} and max_length {max}: no response can be both"));
    }
    let pooled = options.chosen_from != PickFrom::Any || options.rejected_from != PickFrom::Any;
    if pooled && columns.batches.iter().any(|batch| batch.policy.is_none()) {
        return refuse("chosen_from and rejected_from need a column of policies: name it".into());
    }
    match options.debias {
        Debias::Linear(alpha) if !(alpha.is_finite() && alpha >= 0.0) => {
            refuse(format!("alpha is {alpha}, but must be 'auto' or a finite number of zero or more"))
        }
        Debias::Bucket { buckets: 0, .. } => refuse("buckets is 0: give 1 or more".into()),
        Debias::LinearAuto | Debias::Linear(_) | Debias::PerToken | Debias::Bucket { .. }
            if matches!(options.pairing, Pairing::Matched(_)) =>
        {
            refuse("matched pairs are picked by reward alone: leave other debiasing out".into())
        }
        _ => Ok(()),
    }
}

/// The filter, with what the debiasing asks of lengths.
pub fn filter(options: &Options) -> Filter {
    let Filter { min_length, max_length } = options.filter;
    match options.debias {
        Debias::PerToken => Filter { min_length: Some(min_length.unwrap_or(0).max(1)), max_length },
        _ => options.filter,
    }
}

/// The penalty that is looked for, if there is one.
pub fn target(options: &Options) -> Option<Target> {
    match options.debias {
        _ if matches!(options.pairing, Pairing::Matched(_)) => None,
        Debias::LinearAuto => Some(Target::LeastGap),
        Debias::Linear(alpha) => Some(Target::At(alpha)),
        Debias::None => Some(Target::At(0.0)),
        Debias::PerToken | Debias::Bucket { .. } => None,
    }
}

/// Whether the pairs are just the best and worst of all of a prompt's usable rows, without labels.
pub(crate) fn plain(options: &Options, columns: &Columns) -> bool {
    options.pairing == Pairing::MaxMin
        && options.win_rates.is_none()
        && pool(options, columns).everything()
        && columns.batches.iter().all(|batch| batch.second.is_none())
}

/// All of the mining; the pairs are apart.
struct Whole<'a> {
    columns: &'a Columns,
    options: &'a Options,
}

impl Over for Whole<'_> {
    type Output = (Vec<Table>, Mined);

    fn correct((_, mined): &mut Self::Output, records: &Records) {
        records.correct(&mut mined.dropped);
    }

    fn run<S: Source>(&mut self, source: &S, layout: &Layout) -> Result<Self::Output, Stop> {
        let Self { columns, options } = *self;
        let mut tables = Vec::new();
        let mut mined = Mined { rows: columns.rows, ..Mined::default() };
        let plain = plain(options, columns);
        let mut totals = Totals::default();
        if let Some(target) = target(options) {
            let solved = solve(source, layout, &wanted(options, columns, plain), target)?;
            let alpha = solved.answer.alpha;
            mined.alpha = Some(alpha);
            mined.alpha_interval = Some(solved.answer.interval);
            mined.curve = solved.answer.curve;
            if plain {
                tables = solved.tables;
                totals = Totals::of(&solved.total, alpha);
            }
        }
        if !(plain && mined.alpha.is_some()) {
            let buckets = match options.debias {
                Debias::Bucket { buckets, scale } => {
                    Some(Buckets::measure(&usable(source, layout, options, columns), buckets, scale)?)
                }
                _ => None,
            };
            let rules = rules(options, columns, mined.alpha, buckets.as_ref());
            for part in pick(source, layout, &rules)? {
                totals.add(&part.totals);
                tables.push(part.table);
            }
        }
        totals.tell(&mut mined);
        let pairs: usize = tables.iter().map(Table::len).sum();
        mined.gap_after = tables.iter().map(Table::gap).sum::<i128>() as f64 / pairs as f64;
        Ok((tables, mined))
    }
}

/// The rows that count.
pub(crate) fn usable<'a, S>(
    source: &'a S,
    layout: &'a Layout,
    options: &Options,
    columns: &'a Columns,
) -> Usable<'a, S> {
    Usable { source, layout, filter: filter(options), pool: pool(options, columns) }
}

fn pool<'a>(options: &Options, columns: &'a Columns) -> Pool<'a> {
    Pool { columns, chosen: options.chosen_from, rejected: options.rejected_from }
}

/// What a scan looks for; on all penalties.
pub(crate) fn wanted<'a>(options: &Options, columns: &'a Columns, pairs: bool) -> Wanted<'a> {
    Wanted {
        filter: filter(options),
        min_responses: options.min_responses,
        bracket: Bracket::ALL,
        pool: pool(options, columns),
        pairs,
    }
}

/// What the pass that picks pairs does.
pub(crate) fn rules<'a>(
    options: &Options,
    columns: &'a Columns,
    alpha: Option<f64>,
    buckets: Option<&'a Buckets>,
) -> Rules<'a> {
    let scoring = match (buckets, options.debias) {
        (Some(buckets), _) => Scoring::Bucket(buckets),
        (None, Debias::PerToken) => Scoring::PerToken,
        _ => Scoring::Linear(alpha.unwrap_or(0.0)),
    };
    Rules {
        filter: filter(options),
        min_responses: options.min_responses,
        pool: pool(options, columns),
        scoring,
        pairing: options.pairing,
        win_rates: options.win_rates,
    }
}

/// What is told of all rows, added up over parts of them.
#[derive(Debug, Clone, Default)]
pub struct Totals {
    /// Σ (|best| − |worst|) by reward alone, of the prompts with contrast.
    pub gap_before: i128,
    /// Prompts whose best response beats the worst by reward alone.
    pub contrast: u64,
    /// Prompts.
    pub prompts: u64,
    /// Rows that are not usable.
    pub dropped: Dropped,
    /// Prompts without a pair.
    pub dropped_prompts: DroppedPrompts,
    /// Sums of reward and length over the usable rows.
    pub moments: Moments,
    /// Sums of score (before a linear penalty) and length over the usable rows.
    pub scores: Moments,
    /// The penalty that the scores still lack.
    pub alpha: f64,
}

impl Totals {
    /// Of a scan.
    pub(crate) fn of(found: &Found, alpha: f64) -> Self {
        Self {
            gap_before: found.gap_before,
            contrast: found.contrast,
            prompts: found.prompts,
            dropped: found.dropped,
            dropped_prompts: found.dropped_prompts,
            moments: found.moments,
            scores: found.moments,
            alpha,
        }
    }

    /// Adds those of other rows, of the same penalty.
    pub fn add(&mut self, other: &Self) {
        self.gap_before += other.gap_before;
        self.contrast += other.contrast;
        self.prompts += other.prompts;
        self.dropped.add(&other.dropped);
        self.dropped_prompts.add(&other.dropped_prompts);
        self.moments.merge(&other.moments);
        self.scores.merge(&other.scores);
        self.alpha = other.alpha;
    }

    /// Writes them down.
    pub(crate) fn tell(&self, mined: &mut Mined) {
        mined.gap_before = self.gap_before as f64 / self.contrast as f64;
        mined.correlation_before = self.moments.correlation(0.0);
        mined.correlation_after = self.scores.correlation(self.alpha);
        mined.dropped = self.dropped;
        mined.dropped_prompts = self.dropped_prompts;
        mined.prompts = self.prompts;
    }
}
