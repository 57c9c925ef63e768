//! Rows in any order, sorted by prompt: a compact copy of the values that the miner needs of each row.
//!
//! | 32-bit words | |
//! | --- | --- |
//! | row number | 1 |
//! | reward | 1, or 2 for float64 |
//! | key and length | 1 where both are below 2¹⁶, 2 where both are below 2³², else 3 |
//!
//! The key is stored relative to the least key of its partition. The sort is stable and has two steps:
//!
//! 1. Rows are written to partitions: ranges of keys with some ten thousand rows each, so that the next step works in
//!    the processor's cache. A histogram of the keys' leading bits gives the cuts.
//! 2. Each partition is sorted by key, in radix passes.
//!
//! No two threads write to the same slot. The words are atomic with relaxed order, so this is safe Rust; on common
//! processors such a store costs no more than a plain one.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use rayon::prelude::*;

use crate::error::Error;
use crate::input::block::{Block, Source};
use crate::input::chunks::chunks;
use crate::input::columns::{Columns, to_f32};
use crate::input::filter::{Dropped, InvalidLength};
use crate::input::numbers::{Floats, Int, key_changes, with_ints};
use crate::input::partitions::{Partitions, READ_ROWS};
use crate::numeric::simd::Lanes;

/// Maximum number of key bits that one radix pass sorts by.
const MAX_DIGIT_BITS: u32 = 12;

/// Rows by prompt.
#[derive(Debug)]
pub struct Records {
    words: Vec<AtomicU32>,
    format: Format,
    rows: u64,
    partitions: Partitions,
    /// Counts of the rows that were dropped while the records were written. Their reward is NaN.
    dropped: Dropped,
}

/// The layout of a record.
#[derive(Debug, Clone, Copy)]
struct Format {
    /// Whether rewards are float64.
    f64_rewards: bool,
    /// Number of words for key and length.
    tail: usize,
}

/// One row.
#[derive(Debug, Clone, Copy)]
struct Record {
    row: u32,
    reward: f64,
    key: u64,
    length: u32,
}

impl Format {
    fn words(self) -> usize {
        2 + usize::from(self.f64_rewards) + self.tail
    }

    #[inline(always)]
    fn write(self, words: &[AtomicU32], record: &Record) {
        words[0].store(record.row, Relaxed);
        let tail = if self.f64_rewards {
            let bits = record.reward.to_bits();
            words[1].store(bits as u32, Relaxed);
            words[2].store((bits >> 32) as u32, Relaxed);
            &words[3..]
        } else {
            words[1].store((record.reward as f32).to_bits(), Relaxed);
            &words[2..]
        };
        match self.tail {
            1 => tail[0].store(record.length << 16 | record.key as u32, Relaxed),
            _ => {
                tail[0].store(record.length, Relaxed);
                tail[1].store(record.key as u32, Relaxed);
                if let Some(high) = tail.get(2) {
                    high.store((record.key >> 32) as u32, Relaxed);
                }
            }
        }
    }

    #[inline(always)]
    fn key(self, word: impl Fn(usize) -> u32) -> u64 {
        let tail = 2 + usize::from(self.f64_rewards);
        match self.tail {
            1 => u64::from(word(tail) & 0xffff),
            2 => u64::from(word(tail + 1)),
            _ => u64::from(word(tail + 1)) | u64::from(word(tail + 2)) << 32,
        }
    }

    #[inline(always)]
    fn length(self, word: impl Fn(usize) -> u32) -> u32 {
        let first = word(2 + usize::from(self.f64_rewards));
        if self.tail == 1 { first >> 16 } else { first }
    }
}

/// Least key, greatest key, and greatest length (`u32::MAX` if it is invalid).
fn bounds(columns: &Columns) -> (u64, u64, u32) {
    let bounds_of_chunks = columns.batches.par_iter().flat_map(|batch| {
        chunks(batch.len as u64, batch.len as u64).into_par_iter().map(move |chunk| {
            let range = chunk.start as usize..chunk.end as usize;
            let keys = with_ints!(&batch.keys, keys => {
                let keys = &keys[range.clone()];
                let low = keys.iter().min().map_or(u64::MAX, |key| key.ordinal());
                (low, keys.iter().max().map_or(0, |key| key.ordinal()))
            });
            let longest = with_ints!(&batch.lengths, lengths => {
                lengths[range].iter().max().and_then(|length| length.length()).unwrap_or(u32::MAX)
            });
            (keys.0, keys.1, longest)
        })
    });
    bounds_of_chunks.reduce(|| (u64::MAX, 0, 0), |a, b| (a.0.min(b.0), a.1.max(b.1), a.2.max(b.2)))
}

/// Writes the rows of chunks to their partitions.
struct Writer<'a> {
    columns: &'a Columns,
    partitions: &'a Partitions,
    format: Format,
    words: &'a [AtomicU32],
}

impl Writer<'_> {
    /// Writes a chunk, whose rows of each partition start at `slots`. Returns the counts of dropped rows.
    fn write(&self, chunk: &Range<u64>, mut slots: Vec<u32>) -> Result<Dropped, InvalidLength> {
        let size = self.format.words();
        let mut dropped = Dropped::default();
        let (mut block, mut keys) = (Block::default(), Vec::new());
        let mut at = chunk.start;
        while at < chunk.end {
            let to = chunk.end.min(at + READ_ROWS);
            keys.clear();
            self.columns.keys(at..to, &mut keys);
            block.clear();
            self.columns.values(at..to, &mut block, &mut dropped)?;
            for (i, &key) in keys.iter().enumerate() {
                let partition = self.partitions.of_key(key);
                let slot = slots[partition] as usize * size;
                slots[partition] = slots[partition].wrapping_add(1);
                let marked = block.marked > 0 && block.rewards[i].is_nan();
                let record = Record {
                    row: (at + i as u64) as u32,
                    reward: if marked { f64::from(block.rewards[i]) } else { block.reward(i) },
                    key: key - self.partitions.keys[partition],
                    length: block.lengths[i],
                };
                self.format.write(&self.words[slot..slot + size], &record);
            }
            at = to;
        }
        Ok(dropped)
    }
}

impl Records {
    /// Sorts the rows of the input by prompt.
    ///
    /// # Errors
    /// [`Error::Usage`] for 2³² rows or more; the first invalid length.
    pub fn new(columns: &Columns) -> Result<Self, Error> {
        if columns.rows >= 1 << 32 {
            return Err(Error::Usage(format!(
                "there are {} rows that are not grouped by prompt, but fewer than 4294967296 can be sorted at a time: \
                 sort them by prompt, or mine them from Parquet files",
                columns.rows
            )));
        }
        let (low, high, max_length) = bounds(columns);
        let chunks = chunks(columns.rows, columns.rows);
        let partitions = Partitions::new(columns, &chunks, low, high);
        let max_relative = (0..partitions.len()).map(|p| partitions.max_relative_key(p)).max().unwrap_or(0);
        let format = Format {
            f64_rewards: columns.batches.iter().any(|batch| matches!(batch.rewards, Floats::F64(_))),
            tail: match (max_relative.max(u64::from(max_length)), max_relative) {
                (..0x1_0000, _) => 1,
                (_, ..0x1_0000_0000) => 2,
                _ => 3,
            },
        };
        let slots = partitions.first_slots(columns, &chunks);
        // The pages are not touched here, so that each thread gets its own.
        let words: Vec<AtomicU32> =
            vec![0u32; columns.rows as usize * format.words()].into_iter().map(AtomicU32::new).collect();
        let writer = Writer { columns, partitions: &partitions, format, words: &words };
        let dropped = chunks
            .par_iter()
            .zip(slots)
            .map(|(chunk, slots)| writer.write(chunk, slots))
            .try_reduce(Dropped::default, |mut a, b| {
                a.add(&b);
                Ok(a)
            })
            .map_err(|InvalidLength| columns.invalid_length())?;
        let records = Self { words, format, rows: columns.rows, partitions, dropped };
        (0..records.partitions.len())
            .into_par_iter()
            .for_each_init(Scratch::default, |scratch, partition| records.sort(partition, scratch));
        Ok(records)
    }

    /// Corrects the counts of a pass over these records, which sees rows dropped at writing as rows with a NaN reward.
    pub(crate) fn correct(&self, dropped: &mut Dropped) {
        dropped.not_finite -= self.dropped.null + self.dropped.truncated;
        dropped.add(&self.dropped);
    }

    /// Sorts a partition by key, in radix passes from the lowest digit up.
    fn sort(&self, partition: usize, scratch: &mut Scratch) {
        let size = self.format.words();
        let starts = &self.partitions.starts;
        let words = &self.words[starts[partition] as usize * size..starts[partition + 1] as usize * size];
        let bits = 64 - self.partitions.max_relative_key(partition).leading_zeros();
        let passes = bits.div_ceil(MAX_DIGIT_BITS);
        let digit = bits.div_ceil(passes.max(1));
        for pass in 0..passes {
            scratch.from.clear();
            scratch.from.extend(words.iter().map(|word| word.load(Relaxed)));
            let shift = pass * digit;
            let mask = (1u64 << digit) - 1;
            let digit_of = |record: &[u32]| ((self.format.key(|i| record[i]) >> shift) & mask) as usize;
            scratch.counts.clear();
            scratch.counts.resize(mask as usize + 1, 0);
            for record in scratch.from.chunks_exact(size) {
                scratch.counts[digit_of(record)] += 1;
            }
            let mut next = 0;
            for count in &mut scratch.counts {
                (*count, next) = (next, next + *count);
            }
            for record in scratch.from.chunks_exact(size) {
                let slot = &mut scratch.counts[digit_of(record)];
                let to = &words[*slot as usize * size..][..size];
                *slot += 1;
                for (word, value) in to.iter().zip(record) {
                    word.store(*value, Relaxed);
                }
            }
        }
    }

    /// The parts of partitions that a range of records covers: (partition, words).
    fn parts(&self, rows: Range<u64>) -> impl Iterator<Item = (usize, &[AtomicU32])> {
        let size = self.format.words();
        let mut partition = self.partitions.of_record(rows.start);
        let mut at = rows.start;
        std::iter::from_fn(move || {
            if at >= rows.end {
                return None;
            }
            while self.partitions.starts[partition + 1] <= at {
                partition += 1;
            }
            let to = self.partitions.starts[partition + 1].min(rows.end);
            let words = &self.words[at as usize * size..to as usize * size];
            at = to;
            Some((partition, words))
        })
    }
}

impl Source for Records {
    fn rows(&self) -> u64 {
        self.rows
    }

    fn keys(&self, rows: Range<u64>, keys: &mut Vec<u64>) {
        for (partition, words) in self.parts(rows) {
            let records = words.chunks_exact(self.format.words());
            let least = self.partitions.keys[partition];
            keys.extend(records.map(|record| least + self.format.key(|i| record[i].load(Relaxed))));
        }
    }

    #[inline(always)]
    fn changes<L: Lanes>(&self, lanes: L, rows: Range<u64>, keys: &mut Vec<u64>, starts: &mut Vec<u32>) {
        keys.clear();
        self.keys(rows, keys);
        key_changes(lanes, keys, 0, starts);
    }

    #[inline(always)]
    fn key(&self, row: u64) -> u64 {
        let partition = self.partitions.of_record(row);
        let size = self.format.words();
        let record = &self.words[row as usize * size..][..size];
        self.partitions.keys[partition] + self.format.key(|i| record[i].load(Relaxed))
    }

    fn values(&self, rows: Range<u64>, block: &mut Block, _: &mut Dropped) -> Result<(), InvalidLength> {
        let format = self.format;
        for (_, words) in self.parts(rows) {
            let records = words.chunks_exact(format.words());
            block.rows.extend(records.clone().map(|record| record[0].load(Relaxed)));
            block.lengths.extend(records.clone().map(|record| format.length(|i| record[i].load(Relaxed))));
            if format.f64_rewards {
                let reward = |record: &[AtomicU32]| {
                    f64::from_bits(
                        u64::from(record[1].load(Relaxed)) | u64::from(record[2].load(Relaxed)) << 32,
                    )
                };
                block.rewards_f64.extend(records.clone().map(reward));
                block.rewards.extend(records.map(|record| to_f32(reward(record))));
            } else {
                block.rewards.extend(records.map(|record| f32::from_bits(record[1].load(Relaxed))));
            }
        }
        Ok(())
    }
}

/// Buffers of [`Records::sort`].
#[derive(Default)]
struct Scratch {
    from: Vec<u32>,
    counts: Vec<u32>,
}
