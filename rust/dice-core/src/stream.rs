//! Mining of an input that is larger than memory, in segments.
//!
//! A segment has complete prompts, and no prompt is in two segments. All segments are passed over as long as
//! [`Miner::needs_pass`] is true (usually once for a penalty, two or three times for buckets), and once more for the
//! pairs. The result is the same as that of all segments at once.

use arrow_array::RecordBatch;

use crate::error::Error;
use crate::input::block::{Source, Stop};
use crate::input::columns::Columns;
use crate::input::layout::Layout;
use crate::input::pass::{RowPass, run_pass};
use crate::input::records::Records;
use crate::options::{Debias, Options};
use crate::pairs::bucket::{BucketFit, Buckets};
use crate::pairs::pick::pick;
use crate::pairs::table::{self, Table};
use crate::pairs::totals::Totals;
use crate::penalty::hull::{Bracket, Breakpoint};
use crate::penalty::scan::{ScanRequest, ScanResult, scan};
use crate::penalty::solve::{Answer, Estimate, estimate};
use crate::penalty::steps::{Steps, Target};
use crate::result::Mined;

/// The state between segments.
#[derive(Debug)]
pub struct Miner {
    options: Options,
    estimate: Estimate,
    /// Break points of the pass for the penalty.
    breakpoints: Vec<Breakpoint>,
    /// Sums and counts of the pass for the penalty.
    scanned: ScanResult,
    answer: Option<Answer>,
    bucket_fit: Option<BucketFit>,
    rows: u64,
    totals: Totals,
    gap: i128,
    pairs: u64,
}

impl Miner {
    /// A miner that has seen no segment.
    ///
    /// # Errors
    /// [`Error::Usage`] for an option out of range.
    pub fn new(options: Options) -> Result<Self, Error> {
        options.check(&Columns { batches: Vec::new(), rows: 0 })?;
        let bucket_fit = match options.debias {
            Debias::Bucket { buckets, scale } => Some(BucketFit::new(buckets, scale)),
            _ => None,
        };
        Ok(Self {
            options,
            estimate: Estimate::default(),
            breakpoints: Vec::new(),
            scanned: ScanResult::default(),
            answer: None,
            bucket_fit,
            rows: 0,
            totals: Totals::default(),
            gap: 0,
            pairs: 0,
        })
    }

    /// Estimates the penalty from a sample of the prompts, which should represent all parts of the input. Without an
    /// estimate, all break points are kept in memory.
    ///
    /// # Errors
    /// Those of [`mine`](crate::mine::mine).
    pub fn estimate(&mut self, sample: &Columns) -> Result<(), Error> {
        self.options.check(sample)?;
        if let Some(target) = self.options.target() {
            let pass = EstimatePass { columns: sample, options: &self.options, target };
            self.estimate = run_pass(sample, pass)?;
        }
        Ok(())
    }

    /// Whether another pass over all segments is needed before the pairs.
    pub fn needs_pass(&self) -> bool {
        match &self.bucket_fit {
            Some(fit) => fit.needs_pass(),
            None => self.options.target().is_some() && self.answer.is_none(),
        }
    }

    /// Adds a segment to the current pass.
    ///
    /// # Errors
    /// Those of [`mine`](crate::mine::mine).
    pub fn observe(&mut self, columns: &Columns) -> Result<(), Error> {
        self.options.check(columns)?;
        let options = &self.options;
        if let Some(fit) = &mut self.bucket_fit {
            return run_pass(columns, BucketPass { columns, options, fit });
        }
        let bracket = self.estimate.bracket;
        let results = run_pass(columns, ScanPass { columns, options, bracket })?;
        self.breakpoints.extend(results.iter().flat_map(ScanResult::breakpoints));
        results.iter().for_each(|result| self.scanned.merge(result));
        Ok(())
    }

    /// Ends a pass over all segments.
    pub fn end_pass(&mut self) {
        if let Some(fit) = &mut self.bucket_fit {
            return fit.end_pass();
        }
        let Some(target) = self.options.target() else { return };
        let scanned = std::mem::take(&mut self.scanned);
        let breakpoints = std::mem::take(&mut self.breakpoints);
        let steps = Steps::new(self.estimate.bracket.low, scanned.gap, breakpoints);
        self.answer = self.estimate.answer(target, &steps, &scanned);
    }

    /// The pairs of a segment, with row numbers of the segment.
    ///
    /// # Errors
    /// Those of [`mine`](crate::mine::mine).
    pub fn pairs(&mut self, columns: &Columns) -> Result<Vec<RecordBatch>, Error> {
        self.options.check(columns)?;
        let pass = PairsPass {
            columns,
            options: &self.options,
            alpha: self.answer.as_ref().map(|answer| answer.alpha),
            buckets: self.bucket_fit.as_ref().map(BucketFit::buckets),
        };
        let (tables, totals) = run_pass(columns, pass)?;
        self.rows += columns.rows;
        self.totals.add(&totals);
        self.gap += tables.iter().map(Table::gap).sum::<i128>();
        self.pairs += tables.iter().map(Table::len).sum::<usize>() as u64;
        table::batches(tables, &columns.batches[0].keys)
    }

    /// The result over all segments so far, without the pairs.
    pub fn summary(&self) -> Mined {
        let mut mined = Mined { rows: self.rows, ..Mined::default() };
        if let Some(answer) = &self.answer {
            mined.set_answer(answer.clone());
        }
        mined.set_totals(&self.totals);
        mined.gap_after = self.gap as f64 / self.pairs as f64;
        mined
    }
}

/// Estimates the penalty from the rows.
struct EstimatePass<'a> {
    columns: &'a Columns,
    options: &'a Options,
    target: Target,
}

impl RowPass for EstimatePass<'_> {
    type Output = Estimate;
    fn run<S: Source>(&mut self, source: &S, layout: &Layout) -> Result<Estimate, Stop> {
        estimate(source, layout, &self.options.scan_request(self.columns, false), self.target)
    }
    fn correct(_: &mut Estimate, _: &Records) {}
}

/// Adds the rows to the fit of the buckets.
struct BucketPass<'a> {
    columns: &'a Columns,
    options: &'a Options,
    fit: &'a mut BucketFit,
}

impl RowPass for BucketPass<'_> {
    type Output = ();
    fn run<S: Source>(&mut self, source: &S, layout: &Layout) -> Result<(), Stop> {
        self.fit.observe(&self.options.usable_rows(source, layout, self.columns))
    }
    fn correct((): &mut (), _: &Records) {}
}

/// Scans the rows for break points in a bracket.
struct ScanPass<'a> {
    columns: &'a Columns,
    options: &'a Options,
    bracket: Bracket,
}

impl RowPass for ScanPass<'_> {
    type Output = Vec<ScanResult>;
    fn run<S: Source>(&mut self, source: &S, layout: &Layout) -> Result<Vec<ScanResult>, Stop> {
        let request = self.options.scan_request(self.columns, false);
        scan(source, layout, &ScanRequest { bracket: self.bracket, ..request })
    }
    // The counts of the summary are those of the pass for the pairs.
    fn correct(_: &mut Vec<ScanResult>, _: &Records) {}
}

/// Picks the pairs of the rows.
struct PairsPass<'a> {
    columns: &'a Columns,
    options: &'a Options,
    alpha: Option<f64>,
    buckets: Option<&'a Buckets>,
}

impl RowPass for PairsPass<'_> {
    type Output = (Vec<Table>, Totals);
    fn run<S: Source>(&mut self, source: &S, layout: &Layout) -> Result<Self::Output, Stop> {
        let mut totals = Totals::default();
        let mut tables = Vec::new();
        match self.alpha.filter(|_| self.options.scan_gives_pairs(self.columns)) {
            Some(alpha) => {
                let request = self.options.scan_request(self.columns, true);
                let bracket = Bracket { low: alpha, high: alpha };
                for mut result in scan(source, layout, &ScanRequest { bracket, ..request })? {
                    result.apply_breaks(alpha);
                    totals.add(&result.totals(alpha));
                    tables.push(result.table);
                }
            }
            None => {
                let rules = self.options.pick_rules(self.columns, self.alpha, self.buckets);
                for result in pick(source, layout, &rules)? {
                    totals.add(&result.totals);
                    tables.push(result.table);
                }
            }
        }
        Ok((tables, totals))
    }
    fn correct((_, totals): &mut Self::Output, records: &Records) {
        records.correct(&mut totals.dropped);
    }
}
