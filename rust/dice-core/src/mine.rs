//! The whole: columns in, pairs out.

use std::sync::Arc;

use arrow_array::{ArrayRef, Float32Array, RecordBatch, UInt32Array, UInt64Array};
use arrow_schema::{DataType, Field, Schema};
use rayon::prelude::*;

use crate::bucket::Buckets;
use crate::filter::{BadLength, Dropped, Filter, Point};
use crate::groups::Groups;
use crate::hull::{self, Break};
use crate::penalty::Steps;
use crate::select::{margin, select};
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
}

/// Prompts that gave no pair, by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DroppedPrompts {
    /// Fewer usable responses than asked for.
    pub too_few_responses: u64,
    /// All usable responses agree in reward and length.
    pub no_contrast: u64,
}

/// What [`mine`] gives.
#[derive(Debug, Clone)]
pub struct Mined {
    /// The pairs, by ascending prompt key: see [`mine`].
    pub pairs: RecordBatch,
    /// The penalty; `None` for [`Debias::Bucket`].
    pub alpha: Option<f64>,
    /// The penalties `[low, high)` that give the same pairs; `high` may be infinite.
    pub alpha_interval: Option<(f64, f64)>,
    /// Mean of chosen length − rejected length without any debiasing; NaN without pairs.
    pub gap_before: f64,
    /// The same, of the pairs; NaN without pairs.
    pub gap_after: f64,
    /// (α, mean gap from α on) around the answer; none for [`Debias::Bucket`] or without pairs.
    pub curve: Vec<(f64, f64)>,
    /// Rows dropped.
    pub dropped: Dropped,
    /// Prompts that gave no pair.
    pub dropped_prompts: DroppedPrompts,
    /// Prompts in the input.
    pub prompts: u64,
    /// Rows in the input.
    pub rows: u64,
}

/// Groups worked on at a time by one thread.
const BLOCK: usize = 1024;

/// One pair, before it becomes a row.
struct Pair {
    key: u64,
    chosen: Point,
    rejected: Point,
}

/// Takes the best and the worst usable response of every prompt, less the length penalty.
///
/// Pairs come with the columns
///
/// | column | type | |
/// | --- | --- | --- |
/// | `prompt` | the input's | the key |
/// | `chosen_row`, `rejected_row` | uint64 | row numbers over all batches |
/// | `chosen_reward`, `rejected_reward` | float32 | as they came in |
/// | `margin` | float32 | difference of the rewards after the penalty |
/// | `chosen_length`, `rejected_length` | uint32 | |
///
/// ```
/// use arrow_array::{ArrayRef, Float32Array, RecordBatch, UInt32Array};
/// use dice_core::{Columns, Debias, Options, mine};
/// use std::sync::Arc;
///
/// let batch = RecordBatch::try_from_iter([
///     ("prompt", Arc::new(UInt32Array::from(vec![7, 7, 7])) as ArrayRef),
///     ("reward", Arc::new(Float32Array::from(vec![0.5, 0.4, 0.0]))),
///     ("length", Arc::new(UInt32Array::from(vec![90, 20, 20]))),
/// ])?;
/// let options =
///     Options { debias: Debias::LinearAuto, min_responses: 2, filter: Default::default() };
/// let mined = mine(&Columns::new([Ok(batch)])?, &options)?;
/// assert_eq!(mined.gap_before, 70.0);
/// assert_eq!(mined.gap_after, 0.0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`Error::Usage`] for an option out of range; [`Error::Length`] for a length that is no count.
pub fn mine(columns: &Columns, options: &Options) -> Result<Mined, Error> {
    check(options)?;
    let bad =
        |BadLength| columns.first_bad_length().unwrap_or_else(|| Error::Read("a length changed".into()));
    let groups = Groups::new(columns);
    let buckets = match options.debias {
        Debias::Bucket { buckets, scale } => {
            Some(Buckets::measure(columns, &options.filter, buckets, scale).map_err(bad)?)
        }
        _ => None,
    };
    let mut survey = survey(columns, &groups, options, buckets.is_none()).map_err(bad)?;
    let steps = Steps::new(survey.gap, std::mem::take(&mut survey.breaks));
    let step = match options.debias {
        Debias::LinearAuto => steps.least(),
        Debias::Linear(alpha) => steps.step_at(alpha),
        Debias::None | Debias::Bucket { .. } => 0,
    };
    let alpha = match options.debias {
        Debias::Linear(alpha) => alpha,
        _ => steps.representative(step),
    };
    let pairs = pick(columns, &groups, options, buckets.as_ref(), alpha).map_err(bad)?;
    let count = pairs.len();
    let gap: i128 =
        pairs.iter().map(|pair| i128::from(pair.chosen.length) - i128::from(pair.rejected.length)).sum();
    debug_assert!(buckets.is_some() || gap == steps.gap(step));
    let mean = |gap: i128| gap as f64 / count as f64;
    let linear = buckets.is_none();
    Ok(Mined {
        alpha: linear.then_some(alpha),
        alpha_interval: linear.then(|| steps.interval(step)),
        gap_before: mean(survey.gap),
        gap_after: mean(gap),
        curve: if linear && count > 0 {
            steps.curve(step).into_iter().map(|(alpha, gap)| (alpha, mean(gap))).collect()
        } else {
            Vec::new()
        },
        dropped: survey.dropped,
        dropped_prompts: survey.dropped_prompts,
        prompts: groups.len() as u64,
        rows: columns.rows,
        pairs: assemble(columns, &pairs, alpha)?,
    })
}

fn check(options: &Options) -> Result<(), Error> {
    if options.min_responses < 2 {
        return Err(Error::Usage(format!(
            "min_responses is {}, but a pair takes two responses: give 2 or more",
            options.min_responses
        )));
    }
    if let Filter { min_length: Some(min), max_length: Some(max) } = options.filter
        && min > max
    {
        return Err(Error::Usage(format!(
            "min_length is {min} and max_length {max}: no response can be both"
        )));
    }
    match options.debias {
        Debias::Linear(alpha) if !(alpha.is_finite() && alpha >= 0.0) => Err(Error::Usage(format!(
            "alpha is {alpha}, but must be 'auto' or a finite number of zero or more"
        ))),
        Debias::Bucket { buckets: 0, .. } => Err(Error::Usage("buckets is 0: give 1 or more".into())),
        _ => Ok(()),
    }
}

/// What one pass over all prompts finds.
#[derive(Default)]
struct Survey {
    /// Total gap at α = 0 of the prompts that give a pair.
    gap: i128,
    breaks: Vec<Break>,
    dropped: Dropped,
    dropped_prompts: DroppedPrompts,
}

/// Counts what is dropped, and collects the gap at α = 0 and (if asked) the break points.
fn survey(columns: &Columns, groups: &Groups, options: &Options, breaks: bool) -> Result<Survey, BadLength> {
    let parts: Vec<Survey> = (0..groups.len().div_ceil(BLOCK))
        .into_par_iter()
        .map_init(
            || (Vec::new(), hull::Scratch::default()),
            |(points, scratch), block| {
                let mut part = Survey::default();
                for group in block * BLOCK..groups.len().min((block + 1) * BLOCK) {
                    groups.gather(group, columns, &options.filter, &mut part.dropped, points)?;
                    if points.len() < options.min_responses {
                        part.dropped.too_few_responses += points.len() as u64;
                        part.dropped_prompts.too_few_responses += 1;
                    } else if let Some((chosen, rejected)) = select(points, 0.0) {
                        part.gap += i128::from(chosen.length) - i128::from(rejected.length);
                        if breaks {
                            hull::walk(points, scratch, &mut part.breaks);
                        }
                    } else {
                        part.dropped_prompts.no_contrast += 1;
                    }
                }
                Ok(part)
            },
        )
        .collect::<Result<_, _>>()?;
    let mut all = Survey::default();
    all.breaks.reserve_exact(parts.iter().map(|part| part.breaks.len()).sum());
    for part in parts {
        all.gap += part.gap;
        all.breaks.extend(part.breaks);
        all.dropped.add(&part.dropped);
        all.dropped_prompts.too_few_responses += part.dropped_prompts.too_few_responses;
        all.dropped_prompts.no_contrast += part.dropped_prompts.no_contrast;
    }
    Ok(all)
}

/// The pairs at a penalty, in the order of the groups.
fn pick(
    columns: &Columns,
    groups: &Groups,
    options: &Options,
    buckets: Option<&Buckets>,
    alpha: f64,
) -> Result<Vec<Pair>, BadLength> {
    let parts: Vec<Vec<Pair>> = (0..groups.len().div_ceil(BLOCK))
        .into_par_iter()
        .map_init(Vec::new, |points, block| {
            let mut pairs = Vec::new();
            let mut ignored = Dropped::default();
            for group in block * BLOCK..groups.len().min((block + 1) * BLOCK) {
                groups.gather(group, columns, &options.filter, &mut ignored, points)?;
                if points.len() < options.min_responses {
                    continue;
                }
                if let Some(buckets) = buckets {
                    points.iter_mut().for_each(|point| buckets.adjust(point));
                }
                if let Some((chosen, rejected)) = select(points, alpha) {
                    pairs.push(Pair { key: columns.key(chosen.row), chosen, rejected });
                }
            }
            Ok(pairs)
        })
        .collect::<Result<_, _>>()?;
    let mut pairs = Vec::with_capacity(parts.iter().map(Vec::len).sum());
    parts.into_iter().for_each(|part| pairs.extend(part));
    Ok(pairs)
}

fn assemble(columns: &Columns, pairs: &[Pair], alpha: f64) -> Result<RecordBatch, Error> {
    let keys: Vec<u64> = pairs.iter().map(|pair| pair.key).collect();
    let key = columns.batches.first().ok_or(Error::Empty)?.keys.from_ordinals(&keys);
    let schema = Schema::new(vec![
        Field::new("prompt", key.data_type().clone(), false),
        Field::new("chosen_row", DataType::UInt64, false),
        Field::new("rejected_row", DataType::UInt64, false),
        Field::new("chosen_reward", DataType::Float32, false),
        Field::new("rejected_reward", DataType::Float32, false),
        Field::new("margin", DataType::Float32, false),
        Field::new("chosen_length", DataType::UInt32, false),
        Field::new("rejected_length", DataType::UInt32, false),
    ]);
    let rows = |row: fn(&Pair) -> u64| -> ArrayRef {
        Arc::new(UInt64Array::from_iter_values(pairs.iter().map(row)))
    };
    let rewards = |reward: &dyn Fn(&Pair) -> f32| -> ArrayRef {
        Arc::new(Float32Array::from_iter_values(pairs.iter().map(reward)))
    };
    let lengths = |length: fn(&Pair) -> u32| -> ArrayRef {
        Arc::new(UInt32Array::from_iter_values(pairs.iter().map(length)))
    };
    let columns = vec![
        key,
        rows(|pair| pair.chosen.row),
        rows(|pair| pair.rejected.row),
        rewards(&|pair| pair.chosen.raw as f32),
        rewards(&|pair| pair.rejected.raw as f32),
        rewards(&|pair| margin(&pair.chosen, &pair.rejected, alpha)),
        lengths(|pair| pair.chosen.length),
        lengths(|pair| pair.rejected.length),
    ];
    RecordBatch::try_new(Arc::new(schema), columns).map_err(|error| Error::Read(error.to_string()))
}
