//! Where the rows of each prompt are, by ascending key, so that the order of rows never shows in the result.
//!
//! | input | layout |
//! | --- | --- |
//! | keys never fall | [`Layout::InOrder`]: prompts are found on the way, nothing is stored |
//! | each prompt's rows lie together | [`Layout::Runs`]: 12 bytes a prompt |
//! | any other | sorted into [`Records`](crate::records::Records), which are in order: 12 to 24 bytes a row |

use std::ops::Range;

use rayon::prelude::*;

use crate::block::{Block, ROWS, Source};
use crate::filter::{BadLength, Dropped};
use crate::lanes::{Job, Lanes, dispatch};
use crate::records::Records;
use crate::{Columns, Error};

/// Rows in the order of prompts.
#[derive(Debug)]
pub enum Layout {
    /// Rows as they are: their keys never fall.
    InOrder,
    /// Each prompt's rows lie together.
    Runs {
        /// First row of each run, and the number of rows at the end.
        starts: Vec<u64>,
        /// Runs by ascending key.
        order: Vec<u32>,
    },
    /// Some prompts, as ranges of rows.
    Some(Vec<Range<u64>>),
}

/// Why a pass over the rows ended early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// A length is no count.
    Length,
    /// The key of a row is below that of the row before.
    Order,
    /// A prompt has more rows than a block can count.
    Huge,
}

impl From<BadLength> for Stop {
    fn from(_: BadLength) -> Self {
        Self::Length
    }
}

/// Work over all rows of an input, whatever their order.
pub trait Over {
    /// What comes out.
    type Output;
    /// Does it. May be called again with another layout.
    ///
    /// # Errors
    /// [`Stop`].
    fn run<S: Source>(&mut self, source: &S, layout: &Layout) -> Result<Self::Output, Stop>;
    /// Corrects counts of what was dropped before the records were made.
    fn correct(output: &mut Self::Output, records: &Records);
}

/// Does work over an input, in the layout that it has.
///
/// # Errors
/// The first bad length; too many rows to be sorted.
pub fn over<W: Over>(columns: &Columns, mut work: W) -> Result<W::Output, Error> {
    let explain = |stop| match stop {
        Stop::Length => columns.bad_length(),
        Stop::Order => Error::Read("the prompts changed while they were read".into()),
        Stop::Huge => {
            Error::Usage("a prompt has 4294967295 rows or more, which cannot be mined: drop some".into())
        }
    };
    if Layout::seems_in_order(columns) {
        match work.run(columns, &Layout::InOrder) {
            Err(Stop::Order) => {}
            other => return other.map_err(explain),
        }
    }
    if let Some(layout) = Layout::runs(columns) {
        return work.run(columns, &layout).map_err(explain);
    }
    let records = Records::new(columns)?;
    let mut output = work.run(&records, &Layout::InOrder).map_err(explain)?;
    W::correct(&mut output, &records);
    Ok(output)
}

/// Checks on the way that the keys of prompts rise.
#[derive(Debug)]
pub struct Rising(Option<u64>);

impl Rising {
    /// Before the prompts of a layout from `from` on.
    pub fn before(layout: &Layout, source: &impl Source, from: u64) -> Self {
        let mut key = Vec::new();
        if layout.by_rows() && from > 0 && from < source.rows() {
            source.keys(from - 1..from, &mut key);
        }
        Self(key.pop())
    }

    /// After the prompts of a block. Those of [`Layout::Some`] may be in any order.
    ///
    /// # Errors
    /// [`Stop::Order`]
    #[inline(always)]
    pub fn check(&mut self, layout: &Layout, block: &Block) -> Result<(), Stop> {
        let rising = block.keys.windows(2).all(|pair| pair[0] < pair[1]);
        let first = self.0.is_none_or(|last| block.keys.first().is_none_or(|first| last < *first));
        self.0 = block.keys.last().copied();
        if (rising && first) || matches!(layout, Layout::Some(_)) { Ok(()) } else { Err(Stop::Order) }
    }
}

impl Layout {
    /// Whether keys seem to rise, by a look at some thousand rows.
    pub fn seems_in_order(source: &impl Source) -> bool {
        const LOOKS: u64 = 64;
        const EACH: u64 = 64;
        let mut keys = Vec::new();
        for look in 0..LOOKS {
            let from = (source.rows().saturating_sub(EACH) as u128 * u128::from(look) / u128::from(LOOKS - 1))
                as u64;
            source.keys(from..source.rows().min(from + EACH), &mut keys);
        }
        keys.is_sorted() || source.rows() < LOOKS * EACH
    }

    /// The runs of the input, if each prompt has one (and runs are not so short that sorting the rows is as quick).
    pub fn runs(columns: &Columns) -> Option<Self> {
        let pieces = pieces(columns.rows, columns.rows);
        let parts: Vec<Vec<u64>> =
            pieces.into_par_iter().map(|piece| dispatch(Starts(columns, piece))).collect::<Option<_>>()?;
        let mut starts: Vec<u64> = parts.into_iter().flatten().collect();
        let runs = u32::try_from(starts.len()).ok()?;
        let keys: Vec<u64> = starts.par_iter().map(|&start| Source::key(columns, start)).collect();
        let mut order: Vec<u32> = (0..runs).collect();
        order.par_sort_unstable_by_key(|&run| keys[run as usize]);
        // A prompt of two runs would be two prompts.
        let twice = order.par_windows(2).any(|pair| keys[pair[0] as usize] == keys[pair[1] as usize]);
        starts.push(columns.rows);
        (!twice).then_some(Self::Runs { starts, order })
    }

    /// Pieces for threads to work on, as ranges of what [`Layout::fill`] counts in. They do not depend on the
    /// number of threads.
    pub fn pieces(&self, source: &impl Source) -> Vec<Range<u64>> {
        match self {
            Self::InOrder => pieces(source.rows(), source.rows()),
            Self::Runs { order, .. } => pieces(order.len() as u64, source.rows()),
            Self::Some(ranges) => pieces(ranges.len() as u64, ranges.len() as u64 * 16),
        }
    }

    /// Whether pieces are cut between rows, so that prompts may straddle them.
    fn by_rows(&self) -> bool {
        matches!(self, Self::InOrder)
    }

    /// Where a piece starts in truth: at its first prompt.
    pub fn aligned(&self, source: &impl Source, piece: Range<u64>) -> Range<u64> {
        if self.by_rows() { aligned(source, piece.start)..aligned(source, piece.end) } else { piece }
    }

    /// Replaces the contents of a block by whole prompts from `from` on, and returns where to go on. Of a piece that
    /// is [aligned](Layout::aligned).
    #[inline(always)]
    pub fn fill<L: Lanes, S: Source>(
        &self,
        lanes: L,
        source: &S,
        from: u64,
        end: u64,
        block: &mut Block,
        dropped: &mut Dropped,
    ) -> Result<u64, Stop> {
        block.clear();
        let range = |i: u64| match self {
            Self::Runs { starts, order } => {
                let run = order[i as usize] as usize;
                starts[run]..starts[run + 1]
            }
            Self::Some(ranges) => ranges[i as usize].clone(),
            Self::InOrder => 0..0,
        };
        if self.by_rows() {
            let next = block.split(lanes, source, from, end)?;
            source.values(from..next, block, dropped)?;
            return Ok(next);
        }
        let mut at = from;
        block.starts.push(0);
        while at < end && block.rewards.len() < ROWS {
            let rows = range(at);
            block.origins.push(rows.start);
            block.keys.push(source.key(rows.start));
            source.values(rows, block, dropped)?;
            block.starts.push(block.rewards.len() as u32);
            at += 1;
        }
        Ok(at)
    }

    /// About `count` prompts in places spread evenly, some neighbours in each: a place costs more than a prompt.
    pub fn sample(&self, source: &impl Source, count: u64) -> Self {
        const NEIGHBOURS: u64 = 4;
        let count = count / NEIGHBOURS;
        let spread =
            |of: u64| (0..count).map(move |i| (u128::from(of) * u128::from(i) / u128::from(count)) as u64);
        let mut ranges: Vec<Range<u64>> = match self {
            Self::InOrder => {
                let rows: Vec<u64> = spread(source.rows()).collect();
                rows.into_par_iter().flat_map_iter(|row| prompts_from(source, row, NEIGHBOURS)).collect()
            }
            Self::Runs { starts, order } => spread(order.len() as u64)
                .flat_map(|i| i..(i + NEIGHBOURS).min(order.len() as u64))
                .map(|i| order[i as usize] as usize)
                .map(|run| starts[run]..starts[run + 1])
                .collect(),
            Self::Some(ranges) => spread(ranges.len() as u64).map(|i| ranges[i as usize].clone()).collect(),
        };
        // Places may lie within the same prompts, where those are long.
        ranges.sort_unstable_by_key(|range| range.start);
        ranges.dedup();
        Self::Some(ranges)
    }
}

/// Even pieces of `items`, which are made of `rows`.
pub fn pieces(items: u64, rows: u64) -> Vec<Range<u64>> {
    /// Rows that are worth a piece of their own.
    const WORTH: u64 = 1 << 17;
    const MOST: u64 = 64;
    let count = rows.div_ceil(WORTH).clamp(1, MOST);
    let cut = |i: u64| (u128::from(items) * u128::from(i) / u128::from(count)) as u64;
    (0..count).map(|i| cut(i)..cut(i + 1)).filter(|piece| !piece.is_empty()).collect()
}

/// The first row from `row` on at which a prompt starts.
fn aligned(source: &impl Source, row: u64) -> u64 {
    if row == 0 || row >= source.rows() {
        return row.min(source.rows());
    }
    change_from(source, row - 1)
}

/// The first prompts that start at or after a row, at most `count`.
fn prompts_from(source: &impl Source, row: u64, count: u64) -> impl Iterator<Item = Range<u64>> {
    let mut next = aligned(source, row);
    std::iter::from_fn(move || {
        let start = next;
        (start < source.rows()).then(|| {
            next = change_from(source, start);
            start..next
        })
    })
    .take(count as usize)
}

/// The first row after `row` with another key than it has, or the number of rows.
fn change_from(source: &impl Source, row: u64) -> u64 {
    let mut keys = Vec::new();
    let mut at = row;
    let mut step = 32;
    let mut key = None;
    while at < source.rows() {
        let end = source.rows().min(at + step);
        keys.clear();
        source.keys(at..end, &mut keys);
        let key = *key.get_or_insert(keys[0]);
        if let Some(place) = keys.iter().position(|&other| other != key) {
            return at + place as u64;
        }
        at = end;
        step = (2 * step).min(1 << 16);
    }
    source.rows()
}

/// The rows of a piece at which runs start; `None` if hardly two rows of a prompt lie together, since sorting the rows
/// is the shorter way then.
struct Starts<'a>(&'a Columns, Range<u64>);

impl Job for Starts<'_> {
    type Output = Option<Vec<u64>>;
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> Self::Output {
        let Self(columns, piece) = self;
        let piece = Layout::InOrder.aligned(columns, piece);
        let mut block = Block::default();
        let mut starts = Vec::new();
        let mut at = piece.start;
        while at < piece.end {
            at = block.split(lanes, columns, at, piece.end).ok()?;
            starts.extend_from_slice(&block.origins);
            if starts.len() > 1000 && starts.len() as u64 * 3 / 2 > at - piece.start {
                return None;
            }
        }
        Some(starts)
    }
}
