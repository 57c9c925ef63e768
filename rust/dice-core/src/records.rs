//! Rows in any order, sorted by prompt: a copy of what the miner needs of each row, in as few bytes as will hold it.
//!
//! | 32-bit words | |
//! | --- | --- |
//! | row number | 1 |
//! | reward | 1, or 2 for float64 |
//! | key and length | 1 where both are below 2¹⁶, 2 where both are below 2³², else 3 |
//!
//! The key is counted from the least key of its partition. The sort is stable, and in two steps:
//!
//! 1. rows are dealt to partitions, which are ranges of keys with some ten thousand rows each, so that what follows
//!    works in the processor's cache. A histogram of the keys' leading bits says where to cut;
//! 2. each partition is sorted by key, in radix passes.
//!
//! Threads deal rows to places that no two of them share. The words are atomic, with relaxed order, so that this is
//! plain safe Rust; on common processors such a store costs what any store costs.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use rayon::prelude::*;

use crate::block::{Block, Source};
use crate::filter::{BadLength, Dropped};
use crate::lanes::Lanes;
use crate::layout::pieces;
use crate::numbers::{Floats, Int, places, with_ints};
use crate::{Columns, Error};

/// Most bins of the histogram of keys.
const BINS: u64 = 1 << 16;
/// Rows that a partition is meant to have.
const PARTITION: u64 = 1 << 15;
/// Most partitions: each is a place of memory that a thread writes to in turn.
const PARTITIONS: u64 = 1 << 11;
/// Bits of the key that one pass sorts by, at most.
const DIGIT: u32 = 12;
/// Rows that are dealt at a time.
const DEAL: u64 = 1 << 10;

/// Rows by prompt.
#[derive(Debug)]
pub struct Records {
    words: Vec<AtomicU32>,
    format: Format,
    rows: u64,
    /// First record of each partition, and the number of rows at the end.
    starts: Vec<u64>,
    /// Least key of each partition.
    keys: Vec<u64>,
    /// Rows that are not usable, found when they were copied. Their reward is NaN.
    dropped: Dropped,
}

/// What a record is made of.
#[derive(Debug, Clone, Copy)]
struct Format {
    /// Whether rewards are float64.
    wide: bool,
    /// Words of key and length.
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
        2 + usize::from(self.wide) + self.tail
    }

    #[inline(always)]
    fn write(self, words: &[AtomicU32], record: &Record) {
        words[0].store(record.row, Relaxed);
        let tail = if self.wide {
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
        let tail = 2 + usize::from(self.wide);
        match self.tail {
            1 => u64::from(word(tail) & 0xffff),
            2 => u64::from(word(tail + 1)),
            _ => u64::from(word(tail + 1)) | u64::from(word(tail + 2)) << 32,
        }
    }

    #[inline(always)]
    fn length(self, word: impl Fn(usize) -> u32) -> u32 {
        let first = word(2 + usize::from(self.wide));
        if self.tail == 1 { first >> 16 } else { first }
    }
}

/// Least and greatest key, and the greatest length that is one.
fn bounds(columns: &Columns) -> (u64, u64, u32) {
    let parts = columns.batches.par_iter().flat_map(|batch| {
        pieces(batch.len as u64, batch.len as u64).into_par_iter().map(move |piece| {
            let range = piece.start as usize..piece.end as usize;
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
    parts.reduce(|| (u64::MAX, 0, 0), |a, b| (a.0.min(b.0), a.1.max(b.1), a.2.max(b.2)))
}

impl Records {
    /// Sorts the rows of the input by prompt.
    ///
    /// # Errors
    /// [`Error::Usage`] for 2³² rows or more; the first bad length.
    pub fn new(columns: &Columns) -> Result<Self, Error> {
        if columns.rows >= 1 << 32 {
            return Err(Error::Usage(format!(
                "there are {} rows that are not grouped by prompt, but fewer than 4294967296 can be sorted at a time: \
                 sort them by prompt, or mine them from Parquet files",
                columns.rows
            )));
        }
        let (low, high, longest) = bounds(columns);
        let spread = high - low;
        // (key − low) >> shift is a bin.
        let shift = (64 - spread.leading_zeros()).saturating_sub(BINS.trailing_zeros());
        let bins = (spread >> shift) as usize + 1;
        let chunks = pieces(columns.rows, columns.rows);
        let key_chunks = |chunk: &Range<u64>, each: &mut dyn FnMut(&[u64])| {
            let mut keys = Vec::new();
            let mut at = chunk.start;
            while at < chunk.end {
                let to = chunk.end.min(at + DEAL);
                keys.clear();
                columns.keys(at..to, &mut keys);
                each(&keys);
                at = to;
            }
        };
        let empty = || vec![0u32; bins];
        let histogram = chunks
            .par_iter()
            .fold(empty, |mut counts, chunk| {
                key_chunks(chunk, &mut |keys| {
                    keys.iter().for_each(|key| counts[((key - low) >> shift) as usize] += 1);
                });
                counts
            })
            .reduce(empty, |mut a, b| {
                a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
                a
            });
        // The partition of each bin.
        let aim = PARTITION.max(columns.rows / PARTITIONS);
        let mut partition_of = vec![0u16; bins];
        let (mut keys, mut starts) = (vec![low], vec![0u64]);
        let (mut total, mut filled) = (0u64, 0u64);
        for (bin, &count) in histogram.iter().enumerate() {
            if filled > 0 && filled + u64::from(count) > aim && count > 0 {
                starts.push(total);
                keys.push(low + ((bin as u64) << shift));
                filled = 0;
            }
            partition_of[bin] = (keys.len() - 1) as u16;
            filled += u64::from(count);
            total += u64::from(count);
        }
        starts.push(total);
        // Keys of a partition, counted from its least.
        let width = |p: usize| keys.get(p + 1).map_or(high - keys[p], |next| next - 1 - keys[p]);
        let widest = (0..keys.len()).map(width).max().unwrap_or(0);
        let format = Format {
            wide: columns.batches.iter().any(|batch| matches!(batch.rewards, Floats::F64(_))),
            tail: match (widest.max(u64::from(longest)), widest) {
                (..0x1_0000, _) => 1,
                (_, ..0x1_0000_0000) => 2,
                _ => 3,
            },
        };
        // Where each chunk's rows go: after those of the chunks before it.
        let partitions = keys.len();
        let partition = |key: u64| partition_of[((key - low) >> shift) as usize] as usize;
        let mut places: Vec<Vec<u32>> = chunks
            .par_iter()
            .map(|chunk| {
                let mut counts = vec![0u32; partitions];
                key_chunks(chunk, &mut |keys| keys.iter().for_each(|&key| counts[partition(key)] += 1));
                counts
            })
            .collect();
        let mut next: Vec<u32> = starts[..partitions].iter().map(|&start| start as u32).collect();
        for counts in &mut places {
            for (place, next) in counts.iter_mut().zip(&mut next) {
                (*place, *next) = (*next, next.wrapping_add(*place));
            }
        }
        let size = format.words();
        // Not touched here, so that each thread gets its own pages.
        let words =
            vec![0u32; columns.rows as usize * size].into_iter().map(AtomicU32::new).collect::<Vec<_>>();
        let dropped = chunks
            .into_par_iter()
            .zip(places)
            .map(|(chunk, mut places)| {
                let mut dropped = Dropped::default();
                let (mut block, mut row_keys) = (Block::default(), Vec::new());
                let mut at = chunk.start;
                while at < chunk.end {
                    let to = chunk.end.min(at + DEAL);
                    row_keys.clear();
                    columns.keys(at..to, &mut row_keys);
                    block.clear();
                    columns.values(at..to, &mut block, &mut dropped)?;
                    for (i, &key) in row_keys.iter().enumerate() {
                        let p = partition(key);
                        let place = places[p] as usize * size;
                        places[p] = places[p].wrapping_add(1);
                        let marked = block.marked > 0 && block.rewards[i].is_nan();
                        let record = Record {
                            row: (at + i as u64) as u32,
                            reward: if marked { f64::from(block.rewards[i]) } else { block.reward(i) },
                            key: key - keys[p],
                            length: block.lengths[i],
                        };
                        format.write(&words[place..place + size], &record);
                    }
                    at = to;
                }
                Ok(dropped)
            })
            .try_reduce(Dropped::default, |mut a, b| {
                a.add(&b);
                Ok(a)
            })
            .map_err(|BadLength| columns.bad_length())?;
        let widths: Vec<u64> = (0..partitions).map(width).collect();
        let records = Self { words, format, rows: columns.rows, starts, keys, dropped };
        widths.into_par_iter().enumerate().for_each_init(Scratch::default, |scratch, (partition, width)| {
            records.sort(partition, width, scratch);
        });
        Ok(records)
    }

    /// Corrects the counts of a pass over these records: what was dropped when they were copied has a NaN for a reward.
    pub fn correct(&self, dropped: &mut Dropped) {
        dropped.not_finite -= self.dropped.null + self.dropped.truncated;
        dropped.add(&self.dropped);
    }

    /// Sorts a partition whose keys go up to `widest`, by radix passes from the lowest digit up.
    fn sort(&self, partition: usize, widest: u64, scratch: &mut Scratch) {
        let size = self.format.words();
        let range = self.starts[partition] as usize * size..self.starts[partition + 1] as usize * size;
        let place = &self.words[range];
        let bits = 64 - widest.leading_zeros();
        let passes = bits.div_ceil(DIGIT);
        let digit = bits.div_ceil(passes.max(1));
        for pass in 0..passes {
            scratch.from.clear();
            scratch.from.extend(place.iter().map(|word| word.load(Relaxed)));
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
                let at = &mut scratch.counts[digit_of(record)];
                let to = &place[*at as usize * size..][..size];
                *at += 1;
                for (word, value) in to.iter().zip(record) {
                    word.store(*value, Relaxed);
                }
            }
        }
    }

    /// The parts of partitions that make up some rows: partition, words.
    fn parts(&self, rows: Range<u64>) -> impl Iterator<Item = (usize, &[AtomicU32])> {
        let size = self.format.words();
        let mut partition = self.starts.partition_point(|&start| start <= rows.start).saturating_sub(1);
        let mut at = rows.start;
        std::iter::from_fn(move || {
            if at >= rows.end {
                return None;
            }
            while self.starts[partition + 1] <= at {
                partition += 1;
            }
            let to = self.starts[partition + 1].min(rows.end);
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
            let least = self.keys[partition];
            keys.extend(records.map(|record| least + self.format.key(|i| record[i].load(Relaxed))));
        }
    }

    #[inline(always)]
    fn changes<L: Lanes>(&self, lanes: L, rows: Range<u64>, keys: &mut Vec<u64>, starts: &mut Vec<u32>) {
        keys.clear();
        self.keys(rows, keys);
        places(lanes, keys, 0, starts);
    }

    #[inline(always)]
    fn key(&self, row: u64) -> u64 {
        let partition = self.starts.partition_point(|&start| start <= row) - 1;
        let size = self.format.words();
        let record = &self.words[row as usize * size..][..size];
        self.keys[partition] + self.format.key(|i| record[i].load(Relaxed))
    }

    fn values(&self, rows: Range<u64>, block: &mut Block, _: &mut Dropped) -> Result<(), BadLength> {
        let format = self.format;
        for (_, words) in self.parts(rows) {
            let records = words.chunks_exact(format.words());
            block.rows.extend(records.clone().map(|record| record[0].load(Relaxed)));
            block.lengths.extend(records.clone().map(|record| format.length(|i| record[i].load(Relaxed))));
            if format.wide {
                let wide = |record: &[AtomicU32]| {
                    f64::from_bits(
                        u64::from(record[1].load(Relaxed)) | u64::from(record[2].load(Relaxed)) << 32,
                    )
                };
                block.wide.extend(records.clone().map(wide));
                block.rewards.extend(records.map(|record| crate::columns::narrow(wide(record))));
            } else {
                block.rewards.extend(records.map(|record| f32::from_bits(record[1].load(Relaxed))));
            }
        }
        Ok(())
    }
}

#[derive(Default)]
struct Scratch {
    from: Vec<u32>,
    counts: Vec<u32>,
}
