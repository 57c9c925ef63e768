//! Mining of an input in memory: columns in, pairs out.

use crate::error::Error;
use crate::input::block::{Source, Stop};
use crate::input::columns::Columns;
use crate::input::layout::Layout;
use crate::input::pass::{RowPass, run_pass};
use crate::input::records::Records;
use crate::options::{Debias, Options};
use crate::pairs::bucket::Buckets;
use crate::pairs::pick::pick;
use crate::pairs::table::{self, Table};
use crate::pairs::totals::Totals;
use crate::penalty::solve::solve;
use crate::result::Mined;

/// Picks pairs from the usable responses of every prompt, by reward minus the length penalty.
///
/// The pairs have the columns
///
/// | column | type | |
/// | --- | --- | --- |
/// | `prompt` | the input's | the key |
/// | `chosen_row`, `rejected_row` | uint64 | row numbers over all batches |
/// | `chosen_reward`, `rejected_reward` | float32 | rewards of the input |
/// | `margin` | float32 | difference of the scores |
/// | `chosen_length`, `rejected_length` | uint32 | |
/// | `chosen_win_rate`, `rejected_win_rate` | float32 | if requested |
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
/// [`Error::Usage`] for an option out of range; [`Error::Length`] for a length that does not fit 32 unsigned bits.
pub fn mine(columns: &Columns, options: &Options) -> Result<Mined, Error> {
    options.check(columns)?;
    let (tables, mut mined) = run_pass(columns, MineAll { columns, options })?;
    mined.pairs = table::batches(tables, &columns.batches[0].keys)?;
    Ok(mined)
}

/// Computes everything but the batches of pairs.
struct MineAll<'a> {
    columns: &'a Columns,
    options: &'a Options,
}

impl RowPass for MineAll<'_> {
    type Output = (Vec<Table>, Mined);

    fn run<S: Source>(&mut self, source: &S, layout: &Layout) -> Result<Self::Output, Stop> {
        let Self { columns, options } = *self;
        let mut mined = Mined { rows: columns.rows, ..Mined::default() };
        let mut scanned = None;
        if let Some(target) = options.target() {
            let pairs = options.scan_gives_pairs(columns);
            let solution = solve(source, layout, &options.scan_request(columns, pairs), target)?;
            if pairs {
                scanned = Some((solution.tables, solution.total.totals(solution.answer.alpha)));
            }
            mined.set_answer(solution.answer);
        }
        let (tables, totals) = match scanned {
            Some(scanned) => scanned,
            None => self.pick(source, layout, mined.alpha)?,
        };
        mined.set_totals(&totals);
        let pairs: usize = tables.iter().map(Table::len).sum();
        mined.gap_after = tables.iter().map(Table::gap).sum::<i128>() as f64 / pairs as f64;
        Ok((tables, mined))
    }

    fn correct((_, mined): &mut Self::Output, records: &Records) {
        records.correct(&mut mined.dropped);
    }
}

impl MineAll<'_> {
    /// The pairs of a penalty, or of the options without one.
    fn pick<S: Source>(
        &self,
        source: &S,
        layout: &Layout,
        alpha: Option<f64>,
    ) -> Result<(Vec<Table>, Totals), Stop> {
        let Self { columns, options } = *self;
        let buckets = match options.debias {
            Debias::Bucket { buckets, scale } => {
                Some(Buckets::fit(&options.usable_rows(source, layout, columns), buckets, scale)?)
            }
            _ => None,
        };
        let mut totals = Totals::default();
        let mut tables = Vec::new();
        for result in pick(source, layout, &options.pick_rules(columns, alpha, buckets.as_ref()))? {
            totals.add(&result.totals);
            tables.push(result.table);
        }
        Ok((tables, totals))
    }
}
