//! Ranges of keys with about equal numbers of rows, the first step of sorting rows by prompt.

use std::ops::Range;

use rayon::prelude::*;

use crate::input::block::Source;
use crate::input::columns::Columns;

/// Maximum number of bins in the histogram of keys.
const MAX_BINS: u64 = 1 << 16;
/// Target number of rows in a partition.
const PARTITION_ROWS: u64 = 1 << 15;
/// Maximum number of partitions: a thread writes to all of them in turn.
const MAX_PARTITIONS: u64 = 1 << 11;
/// Rows that are read at a time.
pub(crate) const READ_ROWS: u64 = 1 << 10;

/// Ranges of keys.
#[derive(Debug)]
pub(crate) struct Partitions {
    /// First record of each partition; the last entry is the number of rows.
    pub(crate) starts: Vec<u64>,
    /// Least key of each partition.
    pub(crate) keys: Vec<u64>,
    /// Greatest key of all.
    max_key: u64,
    /// Partition of each bin. The bin of a key is `(key − keys[0]) >> shift`.
    of_bin: Vec<u16>,
    shift: u32,
}

/// Calls `each` with the keys of a chunk of rows, some at a time.
fn for_keys(columns: &Columns, chunk: &Range<u64>, mut each: impl FnMut(&[u64])) {
    let mut keys = Vec::new();
    let mut at = chunk.start;
    while at < chunk.end {
        let to = chunk.end.min(at + READ_ROWS);
        keys.clear();
        columns.keys(at..to, &mut keys);
        each(&keys);
        at = to;
    }
}

impl Partitions {
    /// Cuts the keys `low..=high` so that partitions have about equal numbers of rows.
    pub(crate) fn new(columns: &Columns, chunks: &[Range<u64>], low: u64, high: u64) -> Self {
        let spread = high - low;
        let shift = (64 - spread.leading_zeros()).saturating_sub(MAX_BINS.trailing_zeros());
        let bins = (spread >> shift) as usize + 1;
        let empty = || vec![0u32; bins];
        let histogram = chunks
            .par_iter()
            .fold(empty, |mut counts, chunk| {
                for_keys(columns, chunk, |keys| {
                    keys.iter().for_each(|key| counts[((key - low) >> shift) as usize] += 1);
                });
                counts
            })
            .reduce(empty, |mut a, b| {
                a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
                a
            });
        let target = PARTITION_ROWS.max(columns.rows / MAX_PARTITIONS);
        let mut of_bin = vec![0u16; bins];
        let (mut keys, mut starts) = (vec![low], vec![0u64]);
        let (mut total, mut filled) = (0u64, 0u64);
        for (bin, &count) in histogram.iter().enumerate() {
            if filled > 0 && filled + u64::from(count) > target && count > 0 {
                starts.push(total);
                keys.push(low + ((bin as u64) << shift));
                filled = 0;
            }
            of_bin[bin] = (keys.len() - 1) as u16;
            filled += u64::from(count);
            total += u64::from(count);
        }
        starts.push(total);
        Self { starts, keys, max_key: high, of_bin, shift }
    }

    pub(crate) fn len(&self) -> usize {
        self.keys.len()
    }

    /// The partition of a key.
    #[inline(always)]
    pub(crate) fn of_key(&self, key: u64) -> usize {
        self.of_bin[((key - self.keys[0]) >> self.shift) as usize] as usize
    }

    /// The partition of a record.
    #[inline(always)]
    pub(crate) fn of_record(&self, record: u64) -> usize {
        self.starts.partition_point(|&start| start <= record).saturating_sub(1)
    }

    /// Greatest key of a partition, relative to its least.
    pub(crate) fn max_relative_key(&self, partition: usize) -> u64 {
        let last = self.keys.get(partition + 1).map_or(self.max_key, |next| next - 1);
        last - self.keys[partition]
    }

    /// For each chunk and partition, the record where the chunk's rows start: after those of the chunks before it.
    pub(crate) fn first_slots(&self, columns: &Columns, chunks: &[Range<u64>]) -> Vec<Vec<u32>> {
        let mut slots: Vec<Vec<u32>> = chunks
            .par_iter()
            .map(|chunk| {
                let mut counts = vec![0u32; self.len()];
                for_keys(columns, chunk, |keys| keys.iter().for_each(|&key| counts[self.of_key(key)] += 1));
                counts
            })
            .collect();
        let mut next: Vec<u32> = self.starts[..self.len()].iter().map(|&start| start as u32).collect();
        for counts in &mut slots {
            for (slot, next) in counts.iter_mut().zip(&mut next) {
                (*slot, *next) = (*next, next.wrapping_add(*slot));
            }
        }
        slots
    }
}
