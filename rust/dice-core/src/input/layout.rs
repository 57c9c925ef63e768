//! Where the rows of each prompt are, by ascending key. So the result does not depend on the order of rows.
//!
//! | input | layout |
//! | --- | --- |
//! | rows sorted by key | [`Layout::InOrder`]: prompts are found during the pass, nothing is stored |
//! | rows of each prompt contiguous | [`Layout::Runs`]: 12 bytes per prompt |
//! | any other | sorted into [`Records`](crate::input::records::Records), which are in order: 12 to 24 bytes per row |

use std::ops::Range;

use rayon::prelude::*;

use crate::input::block::{Block, ROWS, Source, Stop};
use crate::input::chunks::chunks;
use crate::input::columns::Columns;
use crate::input::filter::Dropped;
use crate::numeric::simd::{Job, Lanes, dispatch};

/// Where the rows of each prompt are.
#[derive(Debug)]
pub enum Layout {
    /// The rows are sorted by key.
    InOrder,
    /// The rows of each prompt are contiguous: a run.
    Runs {
        /// First row of each run; the last entry is the number of rows.
        starts: Vec<u64>,
        /// Numbers of the runs, by ascending key.
        order: Vec<u32>,
    },
    /// A sample of the prompts, as ranges of rows.
    Sample(Vec<Range<u64>>),
}

/// Checks during a pass that the keys of prompts are ascending.
#[derive(Debug)]
pub(crate) struct KeyOrderCheck(Option<u64>);

impl KeyOrderCheck {
    /// For a chunk of a layout that starts at `from`.
    pub(crate) fn new(layout: &Layout, source: &impl Source, from: u64) -> Self {
        let mut key = Vec::new();
        if layout.by_rows() && from > 0 && from < source.rows() {
            source.keys(from - 1..from, &mut key);
        }
        Self(key.pop())
    }

    /// Checks the next block. The prompts of [`Layout::Sample`] may be in any order.
    ///
    /// # Errors
    /// [`Stop::KeyOrder`] if a key is not above the one before.
    #[inline(always)]
    pub(crate) fn check(&mut self, layout: &Layout, block: &Block) -> Result<(), Stop> {
        let ascending = block.keys.windows(2).all(|pair| pair[0] < pair[1]);
        let first = self.0.is_none_or(|last| block.keys.first().is_none_or(|first| last < *first));
        self.0 = block.keys.last().copied();
        if (ascending && first) || matches!(layout, Layout::Sample(_)) { Ok(()) } else { Err(Stop::KeyOrder) }
    }
}

impl Layout {
    /// Whether the rows seem to be sorted by key, judged by a few thousand of them.
    pub(crate) fn seems_in_order(source: &impl Source) -> bool {
        const WINDOWS: u64 = 64;
        const WINDOW: u64 = 64;
        let last = u128::from(source.rows().saturating_sub(WINDOW));
        let mut keys = Vec::new();
        for window in 0..WINDOWS {
            let from = (last * u128::from(window) / u128::from(WINDOWS - 1)) as u64;
            source.keys(from..source.rows().min(from + WINDOW), &mut keys);
        }
        keys.is_sorted() || source.rows() < WINDOWS * WINDOW
    }

    /// The runs of the input, if each prompt has one run. `None` also if the runs are so short that sorting the rows is
    /// as quick.
    pub(crate) fn runs(columns: &Columns) -> Option<Self> {
        let chunks = chunks(columns.rows, columns.rows);
        let starts_of_chunks: Vec<Vec<u64>> = chunks
            .into_par_iter()
            .map(|chunk| dispatch(RunStarts { columns, chunk }))
            .collect::<Option<_>>()?;
        let mut starts: Vec<u64> = starts_of_chunks.into_iter().flatten().collect();
        let runs = u32::try_from(starts.len()).ok()?;
        let keys: Vec<u64> = starts.par_iter().map(|&start| Source::key(columns, start)).collect();
        let mut order: Vec<u32> = (0..runs).collect();
        order.par_sort_unstable_by_key(|&run| keys[run as usize]);
        // A prompt with two runs would be mined as two prompts.
        let repeated = order.par_windows(2).any(|pair| keys[pair[0] as usize] == keys[pair[1] as usize]);
        starts.push(columns.rows);
        (!repeated).then_some(Self::Runs { starts, order })
    }

    /// Chunks for threads to work on, as ranges of the positions that [`Layout::fill`] takes. They do not depend on the
    /// number of threads.
    pub(crate) fn chunks(&self, source: &impl Source) -> Vec<Range<u64>> {
        match self {
            Self::InOrder => chunks(source.rows(), source.rows()),
            Self::Runs { order, .. } => chunks(order.len() as u64, source.rows()),
            Self::Sample(ranges) => chunks(ranges.len() as u64, ranges.len() as u64 * 16),
        }
    }

    /// Whether chunks are cut between rows, so that a cut may be inside a prompt.
    fn by_rows(&self) -> bool {
        matches!(self, Self::InOrder)
    }

    /// Moves both ends of a chunk to the start of the next prompt.
    pub(crate) fn align(&self, source: &impl Source, chunk: Range<u64>) -> Range<u64> {
        if self.by_rows() { next_start(source, chunk.start)..next_start(source, chunk.end) } else { chunk }
    }

    /// Fills a block with complete prompts of an [aligned](Layout::align) chunk, from position `from` on, and returns
    /// the next position.
    #[inline(always)]
    pub(crate) fn fill<L: Lanes, S: Source>(
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
            Self::Sample(ranges) => ranges[i as usize].clone(),
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
            block.first_rows.push(rows.start);
            block.keys.push(source.key(rows.start));
            source.values(rows, block, dropped)?;
            block.starts.push(block.rewards.len() as u32);
            at += 1;
        }
        Ok(at)
    }

    /// About `count` prompts: evenly spread groups of neighbors, since a new place costs more than another prompt.
    pub(crate) fn sample(&self, source: &impl Source, count: u64) -> Self {
        const NEIGHBORS: u64 = 4;
        let count = count / NEIGHBORS;
        let spread = |size: u64| {
            (0..count).map(move |i| (u128::from(size) * u128::from(i) / u128::from(count)) as u64)
        };
        let mut ranges: Vec<Range<u64>> = match self {
            Self::InOrder => {
                let rows: Vec<u64> = spread(source.rows()).collect();
                rows.into_par_iter().flat_map_iter(|row| prompts_from(source, row, NEIGHBORS)).collect()
            }
            Self::Runs { starts, order } => spread(order.len() as u64)
                .flat_map(|i| i..(i + NEIGHBORS).min(order.len() as u64))
                .map(|i| order[i as usize] as usize)
                .map(|run| starts[run]..starts[run + 1])
                .collect(),
            Self::Sample(ranges) => spread(ranges.len() as u64).map(|i| ranges[i as usize].clone()).collect(),
        };
        // Two places may be in the same prompt if prompts are long.
        ranges.sort_unstable_by_key(|range| range.start);
        ranges.dedup();
        Self::Sample(ranges)
    }
}

/// The first row at or after `row` at which a prompt starts.
fn next_start(source: &impl Source, row: u64) -> u64 {
    if row == 0 || row >= source.rows() {
        return row.min(source.rows());
    }
    next_key_change(source, row - 1)
}

/// The first prompts that start at or after a row, at most `count`.
fn prompts_from(source: &impl Source, row: u64, count: u64) -> impl Iterator<Item = Range<u64>> {
    let mut next = next_start(source, row);
    std::iter::from_fn(move || {
        let start = next;
        (start < source.rows()).then(|| {
            next = next_key_change(source, start);
            start..next
        })
    })
    .take(count as usize)
}

/// The first row after `row` with another key, or the number of rows.
fn next_key_change(source: &impl Source, row: u64) -> u64 {
    let mut keys = Vec::new();
    let mut at = row;
    let mut step = 32;
    let mut key = None;
    while at < source.rows() {
        let end = source.rows().min(at + step);
        keys.clear();
        source.keys(at..end, &mut keys);
        let key = *key.get_or_insert(keys[0]);
        if let Some(offset) = keys.iter().position(|&other| other != key) {
            return at + offset as u64;
        }
        at = end;
        step = (2 * step).min(1 << 16);
    }
    source.rows()
}

/// Finds the rows of a chunk at which runs start. `None` if there are so few rows per run that sorting the rows is
/// quicker.
struct RunStarts<'a> {
    columns: &'a Columns,
    chunk: Range<u64>,
}

impl Job for RunStarts<'_> {
    type Output = Option<Vec<u64>>;
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> Self::Output {
        let Self { columns, chunk } = self;
        let chunk = Layout::InOrder.align(columns, chunk);
        let mut block = Block::default();
        let mut starts = Vec::new();
        let mut at = chunk.start;
        while at < chunk.end {
            at = block.split(lanes, columns, at, chunk.end).ok()?;
            starts.extend_from_slice(&block.first_rows);
            if starts.len() > 1000 && starts.len() as u64 * 3 / 2 > at - chunk.start {
                return None;
            }
        }
        Some(starts)
    }
}
