//! Mining of an input that comes in segments, of which one at a time is in memory.
//!
//! Each segment has whole prompts, and no prompt is in two of them. All segments are passed over until
//! [`Miner::needs_pass`] says no more (once for the penalty, as a rule: [`solve`](mod@crate::solve) says why; twice
//! or three times for buckets), and once more for the pairs. The result is that of all segments at once.

use arrow_array::RecordBatch;

use crate::block::Source;
use crate::bucket::{Buckets, Measure};
use crate::hull::{Bracket, Break};
use crate::layout::{Layout, Over, Stop, over};
use crate::mine::{Debias, Mined, Options, Totals, check, plain, rules, target, usable, wanted};
use crate::penalty::{Steps, Target};
use crate::pick::pick;
use crate::records::Records;
use crate::scan::{Found, Wanted, scan};
use crate::solve::{Answer, Guess, guess};
use crate::table::{self, Table};
use crate::{Columns, Error};

/// The state between segments.
#[derive(Debug)]
pub struct Miner {
    options: Options,
    guess: Guess,
    /// Of the pass for the penalty.
    breaks: Vec<Break>,
    found: Found,
    answer: Option<Answer>,
    measure: Option<Measure>,
    rows: u64,
    totals: Totals,
    gap: i128,
    pairs: u64,
}

impl Miner {
    /// Nothing seen yet.
    ///
    /// # Errors
    /// [`Error::Usage`] for an option out of range.
    pub fn new(options: Options) -> Result<Self, Error> {
        check(&Columns { batches: Vec::new(), rows: 0 }, &options)?;
        let measure = match options.debias {
            Debias::Bucket { buckets, scale } => Some(Measure::new(buckets, scale)),
            _ => None,
        };
        Ok(Self {
            options,
            guess: Guess::default(),
            breaks: Vec::new(),
            found: Found::default(),
            answer: None,
            measure,
            rows: 0,
            totals: Totals::default(),
            gap: 0,
            pairs: 0,
        })
    }

    /// Takes a first guess from some of the prompts, of all parts of the input. Without, all break points are held.
    ///
    /// # Errors
    /// Those of [`mine`](crate::mine::mine).
    pub fn look(&mut self, sample: &Columns) -> Result<(), Error> {
        check(sample, &self.options)?;
        if let Some(target) = target(&self.options) {
            self.guess = over(sample, Look { columns: sample, options: &self.options, target })?;
        }
        Ok(())
    }

    /// Whether another pass over all segments is needed before the pairs.
    pub fn needs_pass(&self) -> bool {
        match &self.measure {
            Some(measure) => measure.needs_pass(),
            None => target(&self.options).is_some() && self.answer.is_none(),
        }
    }

    /// Adds a segment to the pass.
    ///
    /// # Errors
    /// Those of [`mine`](crate::mine::mine).
    pub fn observe(&mut self, columns: &Columns) -> Result<(), Error> {
        check(columns, &self.options)?;
        let options = &self.options;
        if let Some(measure) = &mut self.measure {
            return over(columns, Observe { columns, options, measure });
        }
        let bracket = self.guess.bracket;
        let found = over(columns, Survey { columns, options, bracket })?;
        self.breaks.extend(found.iter().flat_map(Found::breaks));
        found.iter().for_each(|part| self.found.merge(part));
        Ok(())
    }

    /// Ends a pass over all segments.
    pub fn end_pass(&mut self) {
        if let Some(measure) = &mut self.measure {
            return measure.end_pass();
        }
        let Some(target) = target(&self.options) else { return };
        let bracket = self.guess.bracket;
        let found = std::mem::take(&mut self.found);
        let steps = Steps::new(bracket.low, found.gap, std::mem::take(&mut self.breaks));
        self.answer = self.guess.answer(target, &steps, &found);
    }

    /// The pairs of a segment, with row numbers of the segment.
    ///
    /// # Errors
    /// Those of [`mine`](crate::mine::mine).
    pub fn pairs(&mut self, columns: &Columns) -> Result<Vec<RecordBatch>, Error> {
        check(columns, &self.options)?;
        let work = Pairs {
            columns,
            options: &self.options,
            alpha: self.answer.as_ref().map(|answer| answer.alpha),
            buckets: self.measure.as_ref().map(Measure::buckets),
        };
        let (tables, totals) = over(columns, work)?;
        self.rows += columns.rows;
        self.totals.add(&totals);
        self.gap += tables.iter().map(Table::gap).sum::<i128>();
        self.pairs += tables.iter().map(Table::len).sum::<usize>() as u64;
        table::batches(tables, &columns.batches[0].keys)
    }

    /// What was found, without the pairs.
    pub fn summary(&self) -> Mined {
        let mut mined = Mined { rows: self.rows, ..Mined::default() };
        if let Some(answer) = &self.answer {
            mined.alpha = Some(answer.alpha);
            mined.alpha_interval = Some(answer.interval);
            mined.curve.clone_from(&answer.curve);
        }
        self.totals.tell(&mut mined);
        mined.gap_after = self.gap as f64 / self.pairs as f64;
        mined
    }
}

struct Look<'a> {
    columns: &'a Columns,
    options: &'a Options,
    target: Target,
}

impl Over for Look<'_> {
    type Output = Guess;
    fn run<S: Source>(&mut self, source: &S, layout: &Layout) -> Result<Guess, Stop> {
        guess(source, layout, &wanted(self.options, self.columns, false), self.target)
    }
    fn correct(_: &mut Guess, _: &Records) {}
}

struct Observe<'a> {
    columns: &'a Columns,
    options: &'a Options,
    measure: &'a mut Measure,
}

impl Over for Observe<'_> {
    type Output = ();
    fn run<S: Source>(&mut self, source: &S, layout: &Layout) -> Result<(), Stop> {
        self.measure.observe(&usable(source, layout, self.options, self.columns))
    }
    fn correct((): &mut (), _: &Records) {}
}

struct Survey<'a> {
    columns: &'a Columns,
    options: &'a Options,
    bracket: Bracket,
}

impl Over for Survey<'_> {
    type Output = Vec<Found>;
    fn run<S: Source>(&mut self, source: &S, layout: &Layout) -> Result<Vec<Found>, Stop> {
        let wanted = wanted(self.options, self.columns, false);
        scan(source, layout, &Wanted { bracket: self.bracket, ..wanted })
    }
    // Counts are those of the pass for the pairs.
    fn correct(_: &mut Vec<Found>, _: &Records) {}
}

struct Pairs<'a> {
    columns: &'a Columns,
    options: &'a Options,
    alpha: Option<f64>,
    buckets: Option<&'a Buckets>,
}

impl Over for Pairs<'_> {
    type Output = (Vec<Table>, Totals);
    fn run<S: Source>(&mut self, source: &S, layout: &Layout) -> Result<Self::Output, Stop> {
        let mut totals = Totals::default();
        let mut tables = Vec::new();
        match self.alpha.filter(|_| plain(self.options, self.columns)) {
            Some(alpha) => {
                let wanted = wanted(self.options, self.columns, true);
                let bracket = Bracket { low: alpha, high: alpha };
                for mut part in scan(source, layout, &Wanted { bracket, ..wanted })? {
                    part.settle(alpha);
                    totals.add(&Totals::of(&part, alpha));
                    tables.push(part.table);
                }
            }
            None => {
                let rules = rules(self.options, self.columns, self.alpha, self.buckets);
                for part in pick(source, layout, &rules)? {
                    totals.add(&part.totals);
                    tables.push(part.table);
                }
            }
        }
        Ok((tables, totals))
    }
    fn correct((_, totals): &mut Self::Output, records: &Records) {
        records.correct(&mut totals.dropped);
    }
}
