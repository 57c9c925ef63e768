//! The input: numeric columns in batches, each sharing the Arrow buffers that it came in.
//!
//! Nothing is copied: a buffer is a counted reference into the caller's memory.

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_buffer::{BooleanBuffer, NullBuffer};
use arrow_schema::ArrowError;
use std::mem::discriminant;
use std::ops::Range;

use crate::Error;
use crate::block::{Block, Source};
use crate::filter::{BadLength, Dropped};
use crate::lanes::Lanes;
use crate::numbers::{Floats, Int, Ints, places, with_ints};

/// One batch of rows.
#[derive(Debug, Clone)]
pub struct Batch {
    /// Rows in the batches before this one.
    pub start: u64,
    /// Rows in this one.
    pub len: usize,
    /// Prompt keys, none of them null.
    pub keys: Ints,
    /// Rewards.
    pub rewards: Floats,
    /// Lengths of the responses.
    pub lengths: Ints,
    /// Rows in which both the reward and the length are there; `None`: all of them.
    pub valid: Option<NullBuffer>,
    /// Rows in which the length is there; `None`: all of them.
    pub valid_length: Option<NullBuffer>,
    /// Rows cut off by the token limit; `None`: no row is.
    pub truncated: Option<BooleanBuffer>,
    /// Values by which responses of a prompt are equal, and which of them are there.
    pub duplicate: Option<(Ints, Option<NullBuffer>)>,
    /// Policies that sampled the responses.
    pub policy: Option<Ints>,
    /// Rewards of a second model, and which of them are there.
    pub second: Option<(Floats, Option<NullBuffer>)>,
}

/// All the batches of an input.
#[derive(Debug, Clone)]
pub struct Columns {
    /// In row order, none of them empty.
    pub batches: Vec<Batch>,
    /// Rows in all of them.
    pub rows: u64,
}

fn column<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a ArrayRef, Error> {
    batch.column_by_name(name).ok_or_else(|| {
        let names: Vec<_> = batch.schema_ref().fields().iter().map(|f| f.name().clone()).collect();
        Error::MissingColumn(name.into(), names.join(", "))
    })
}

/// Refuses nulls, naming the first row that has one.
///
/// # Errors
/// [`Error::Null`].
pub fn no_nulls(array: &ArrayRef, column: &'static str, start: u64) -> Result<(), Error> {
    if array.null_count() == 0 {
        return Ok(());
    }
    let first = (0..array.len()).position(|i| array.is_null(i)).unwrap_or(0);
    Err(Error::Null { column, row: start + first as u64 })
}

impl Columns {
    /// Takes the columns `prompt`, `reward`, `length` and, where they are there, the others (a null in `truncated`
    /// counts as not truncated).
    ///
    /// | column | types |
    /// | --- | --- |
    /// | `prompt` | any integer, no nulls |
    /// | `reward` | float32 or float64 |
    /// | `length` | any integer, in tokens or characters |
    /// | `truncated` | boolean |
    /// | `duplicate` | any integer |
    /// | `policy` | any integer, no nulls |
    /// | `second` | float32 or float64 |
    ///
    /// # Errors
    /// A missing column, one of another type, a null prompt or policy, no rows, or a batch that cannot be read.
    pub fn new(batches: impl IntoIterator<Item = Result<RecordBatch, ArrowError>>) -> Result<Self, Error> {
        let mut columns = Self { batches: Vec::new(), rows: 0 };
        for batch in batches {
            columns.push(&batch.map_err(|error| Error::Read(error.to_string()))?)?;
        }
        if columns.rows == 0 {
            return Err(Error::Empty);
        }
        Ok(columns)
    }

    fn push(&mut self, batch: &RecordBatch) -> Result<(), Error> {
        let start = self.rows;
        let (keys, rewards, lengths) =
            (column(batch, "prompt")?, column(batch, "reward")?, column(batch, "length")?);
        let parsed = Batch {
            start,
            len: batch.num_rows(),
            keys: Ints::new(keys, "prompt")?,
            rewards: Floats::new(rewards, "reward")?,
            lengths: Ints::new(lengths, "length")?,
            valid: NullBuffer::union(rewards.nulls(), lengths.nulls()).filter(|nulls| nulls.null_count() > 0),
            valid_length: lengths.nulls().filter(|nulls| nulls.null_count() > 0).cloned(),
            truncated: match batch.column_by_name("truncated") {
                None => None,
                Some(array) => {
                    let flags = array.as_boolean_opt().ok_or_else(|| Error::ColumnType {
                        column: "truncated",
                        found: array.data_type().clone(),
                        wanted: "boolean",
                    })?;
                    Some(match flags.nulls() {
                        None => flags.values().clone(),
                        Some(nulls) => flags.values() & nulls.inner(),
                    })
                }
            },
            duplicate: match batch.column_by_name("duplicate") {
                None => None,
                Some(array) => Some((Ints::new(array, "duplicate")?, array.nulls().cloned())),
            },
            policy: match batch.column_by_name("policy") {
                None => None,
                Some(array) => {
                    no_nulls(array, "policy", start)?;
                    Some(Ints::new(array, "policy")?)
                }
            },
            second: match batch.column_by_name("second") {
                None => None,
                Some(array) => Some((Floats::new(array, "second")?, array.nulls().cloned())),
            },
        };
        no_nulls(keys, "prompt", start)?;
        if let Some(first) = self.batches.first() {
            // Ordinals of two types do not compare.
            for (column, array, same) in [
                ("prompt", keys, discriminant(&first.keys) == discriminant(&parsed.keys)),
                ("reward", rewards, discriminant(&first.rewards) == discriminant(&parsed.rewards)),
                ("length", lengths, discriminant(&first.lengths) == discriminant(&parsed.lengths)),
            ] {
                if !same {
                    let wanted = "of one type in all batches";
                    return Err(Error::ColumnType { column, found: array.data_type().clone(), wanted });
                }
            }
        }
        if parsed.len > 0 {
            self.rows += parsed.len as u64;
            self.batches.push(parsed);
        }
        Ok(())
    }

    /// The batch that holds a row, and the row's place in it.
    #[inline]
    pub fn locate(&self, row: u64) -> (&Batch, usize) {
        // Input is one batch more often than not.
        let batch = if self.batches.len() == 1 {
            &self.batches[0]
        } else {
            &self.batches[self.batches.partition_point(|batch| batch.start <= row) - 1]
        };
        (batch, (row - batch.start) as usize)
    }

    /// A prompt key as a number of 64 bits (two's complement), from its [`Int::ordinal`].
    pub fn key_number(&self, ordinal: u64) -> u64 {
        match self.batches.first().map(|batch| &batch.keys) {
            Some(Ints::I8(_) | Ints::I16(_) | Ints::I32(_) | Ints::I64(_)) => ordinal ^ (1 << 63),
            _ => ordinal,
        }
    }

    /// The parts of batches that make up some rows.
    fn parts(&self, mut rows: Range<u64>) -> impl Iterator<Item = (&Batch, Range<usize>)> {
        std::iter::from_fn(move || {
            (rows.start < rows.end).then(|| {
                let (batch, from) = self.locate(rows.start);
                let to = batch.len.min(from + (rows.end - rows.start) as usize);
                rows.start += (to - from) as u64;
                (batch, from..to)
            })
        })
    }

    /// The error for the first length that is no count of 32 bits.
    pub fn bad_length(&self) -> Error {
        let first = self.batches.iter().find_map(|batch| {
            with_ints!(&batch.lengths, values => values.iter().enumerate().find_map(|(i, &value)| {
                let there = batch.valid_length.as_ref().is_none_or(|nulls| nulls.is_valid(i));
                let bad = value.length().is_none();
                (there && bad).then(|| Error::Length {
                    row: batch.start + i as u64,
                    value: value.wide(),
                })
            }))
        });
        first.unwrap_or_else(|| Error::Read("a length changed while it was read".into()))
    }
}

impl Source for Columns {
    fn rows(&self) -> u64 {
        self.rows
    }

    fn keys(&self, rows: Range<u64>, keys: &mut Vec<u64>) {
        for (batch, range) in self.parts(rows) {
            with_ints!(&batch.keys, values => keys.extend(values[range].iter().map(|key| key.ordinal())));
        }
    }

    #[inline(always)]
    fn changes<L: Lanes>(&self, lanes: L, rows: Range<u64>, _: &mut Vec<u64>, starts: &mut Vec<u32>) {
        let (mut before, mut last) = (0, None);
        for (batch, range) in self.parts(rows) {
            with_ints!(&batch.keys, values => {
                let values = &values[range];
                if last.is_some_and(|last| last != values[0].ordinal()) {
                    starts.push(before);
                }
                places(lanes, values, before, starts);
                before += values.len() as u32;
                last = values.last().map(|key| key.ordinal());
            });
        }
    }

    #[inline(always)]
    fn key(&self, row: u64) -> u64 {
        let (batch, index) = self.locate(row);
        batch.keys.ordinal(index)
    }

    fn values(&self, rows: Range<u64>, block: &mut Block, dropped: &mut Dropped) -> Result<(), BadLength> {
        for (batch, range) in self.parts(rows) {
            batch.values(range, block, dropped)?;
        }
        Ok(())
    }
}

impl Batch {
    fn values(&self, range: Range<usize>, block: &mut Block, dropped: &mut Dropped) -> Result<(), BadLength> {
        let from = block.rewards.len();
        match &self.rewards {
            Floats::F32(values) => block.rewards.extend_from_slice(&values[range.clone()]),
            Floats::F64(values) => {
                block.rewards.extend(values[range.clone()].iter().map(|&value| narrow(value)));
                block.wide.extend_from_slice(&values[range.clone()]);
            }
        }
        let mut bad = false;
        match (&self.lengths, &self.valid_length) {
            (Ints::U32(values), _) => block.lengths.extend_from_slice(&values[range.clone()]),
            (lengths, None) => with_ints!(lengths, values => {
                block.lengths.extend(values[range.clone()].iter().map(|&value| count(value, &mut bad)));
            }),
            // What lies under a null may be anything.
            (lengths, Some(valid)) => with_ints!(lengths, values => {
                block.lengths.extend(range.clone().map(|i| {
                    if valid.is_valid(i) { count(values[i], &mut bad) } else { 0 }
                }));
            }),
        }
        if bad {
            return Err(BadLength);
        }
        let rewards = &mut block.rewards[from..];
        if let Some(valid) = &self.valid {
            for (reward, i) in rewards.iter_mut().zip(range.clone()) {
                if valid.is_null(i) {
                    *reward = f32::NAN;
                    dropped.null += 1;
                    block.marked += 1;
                }
            }
        }
        if let Some(truncated) = &self.truncated {
            for (reward, i) in rewards.iter_mut().zip(range) {
                if truncated.value(i) && reward.is_finite() {
                    *reward = f32::NAN;
                    dropped.truncated += 1;
                    block.marked += 1;
                }
            }
        }
        Ok(())
    }
}

/// The value as a length; sets `bad` if it is no count of 32 bits.
#[inline(always)]
fn count<T: Int>(value: T, bad: &mut bool) -> u32 {
    let length = value.length();
    *bad |= length.is_none();
    length.unwrap_or(0)
}

/// A reward as float32; infinite where it is beyond it.
#[inline(always)]
pub(crate) fn narrow(reward: f64) -> f32 {
    // Rounding alone would bring what is barely beyond back to the greatest float32.
    if reward.abs() > f64::from(f32::MAX) { f32::INFINITY } else { reward as f32 }
}
