//! The input: batches of numeric columns that share the caller's Arrow buffers.
//!
//! Nothing is copied: a buffer is a counted reference into the caller's memory.

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_buffer::{BooleanBuffer, NullBuffer};
use arrow_schema::ArrowError;
use std::mem::discriminant;
use std::ops::Range;

use crate::error::Error;
use crate::input::block::{Block, Source};
use crate::input::filter::{Dropped, InvalidLength};
use crate::input::numbers::{Floats, Int, Ints, key_changes, with_ints};
use crate::numeric::simd::Lanes;

/// One batch of rows.
#[derive(Debug, Clone)]
pub struct Batch {
    /// Number of rows in the batches before this one.
    pub start: u64,
    /// Number of rows in this one.
    pub len: usize,
    /// Prompt keys, without nulls.
    pub keys: Ints,
    /// Rewards.
    pub rewards: Floats,
    /// Lengths of the responses.
    pub lengths: Ints,
    /// Rows in which neither the reward nor the length is null; `None`: all rows.
    pub valid: Option<NullBuffer>,
    /// Rows in which the length is not null; `None`: all rows.
    pub valid_length: Option<NullBuffer>,
    /// Rows cut off by the token limit; `None`: no row.
    pub truncated: Option<BooleanBuffer>,
    /// Values that are equal for duplicate responses of a prompt, and which of them are not null.
    pub duplicate: Option<(Ints, Option<NullBuffer>)>,
    /// Policies that sampled the responses.
    pub policy: Option<Ints>,
    /// Rewards of a second model, and which of them are not null.
    pub second: Option<(Floats, Option<NullBuffer>)>,
}

/// All batches of an input.
#[derive(Debug, Clone)]
pub struct Columns {
    /// In row order, without empty ones.
    pub batches: Vec<Batch>,
    /// Number of rows in all batches.
    pub rows: u64,
}

fn column<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a ArrayRef, Error> {
    batch.column_by_name(name).ok_or_else(|| {
        let names: Vec<_> = batch.schema_ref().fields().iter().map(|f| f.name().clone()).collect();
        Error::MissingColumn(name.into(), names.join(", "))
    })
}

/// Checks that a column has no nulls.
///
/// # Errors
/// [`Error::Null`] with the first row that has one.
pub fn no_nulls(array: &ArrayRef, column: &'static str, start: u64) -> Result<(), Error> {
    if array.null_count() == 0 {
        return Ok(());
    }
    let first = (0..array.len()).position(|i| array.is_null(i)).unwrap_or(0);
    Err(Error::Null { column, row: start + first as u64 })
}

impl Columns {
    /// Reads the columns `prompt`, `reward` and `length`, and the others if present. A null in `truncated` counts as
    /// not truncated.
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
    /// A column is missing or of another type, a prompt or policy is null, there are no rows, or a batch cannot be read.
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
        let parsed = Batch::parse(batch, self.rows)?;
        if let Some(first) = self.batches.first() {
            parsed.check_types(first, batch)?;
        }
        if parsed.len > 0 {
            self.rows += parsed.len as u64;
            self.batches.push(parsed);
        }
        Ok(())
    }

    /// The batch that holds a row, and the row's offset in it.
    #[inline]
    pub(crate) fn locate(&self, row: u64) -> (&Batch, usize) {
        // Most inputs are a single batch.
        let batch = if self.batches.len() == 1 {
            &self.batches[0]
        } else {
            &self.batches[self.batches.partition_point(|batch| batch.start <= row) - 1]
        };
        (batch, (row - batch.start) as usize)
    }

    /// A prompt key as a number of 64 bits (two's complement), from its [`Int::ordinal`].
    pub(crate) fn key_number(&self, ordinal: u64) -> u64 {
        match self.batches.first().map(|batch| &batch.keys) {
            Some(Ints::I8(_) | Ints::I16(_) | Ints::I32(_) | Ints::I64(_)) => ordinal ^ (1 << 63),
            _ => ordinal,
        }
    }

    /// The ranges of batches that a range of rows covers.
    fn ranges(&self, mut rows: Range<u64>) -> impl Iterator<Item = (&Batch, Range<usize>)> {
        std::iter::from_fn(move || {
            (rows.start < rows.end).then(|| {
                let (batch, from) = self.locate(rows.start);
                let to = batch.len.min(from + (rows.end - rows.start) as usize);
                rows.start += (to - from) as u64;
                (batch, from..to)
            })
        })
    }

    /// The error for the first length that does not fit 32 unsigned bits.
    pub(crate) fn invalid_length(&self) -> Error {
        let first = self.batches.iter().find_map(|batch| {
            with_ints!(&batch.lengths, values => values.iter().enumerate().find_map(|(i, &value)| {
                let valid = batch.valid_length.as_ref().is_none_or(|nulls| nulls.is_valid(i));
                (valid && value.length().is_none()).then(|| Error::Length {
                    row: batch.start + i as u64,
                    value: value.to_i128(),
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
        for (batch, range) in self.ranges(rows) {
            with_ints!(&batch.keys, values => keys.extend(values[range].iter().map(|key| key.ordinal())));
        }
    }

    #[inline(always)]
    fn changes<L: Lanes>(&self, lanes: L, rows: Range<u64>, _: &mut Vec<u64>, starts: &mut Vec<u32>) {
        let (mut base, mut last) = (0, None);
        for (batch, range) in self.ranges(rows) {
            with_ints!(&batch.keys, values => {
                let values = &values[range];
                if last.is_some_and(|last| last != values[0].ordinal()) {
                    starts.push(base);
                }
                key_changes(lanes, values, base, starts);
                base += values.len() as u32;
                last = values.last().map(|key| key.ordinal());
            });
        }
    }

    #[inline(always)]
    fn key(&self, row: u64) -> u64 {
        let (batch, index) = self.locate(row);
        batch.keys.ordinal(index)
    }

    fn values(
        &self,
        rows: Range<u64>,
        block: &mut Block,
        dropped: &mut Dropped,
    ) -> Result<(), InvalidLength> {
        for (batch, range) in self.ranges(rows) {
            batch.values(range, block, dropped)?;
        }
        Ok(())
    }
}

/// An optional column, with the rows in which it is not null.
fn optional<T>(
    batch: &RecordBatch,
    name: &'static str,
    parse: impl Fn(&ArrayRef, &'static str) -> Result<T, Error>,
) -> Result<Option<(T, Option<NullBuffer>)>, Error> {
    let parse = |array: &ArrayRef| Ok((parse(array, name)?, array.nulls().cloned()));
    batch.column_by_name(name).map(parse).transpose()
}

fn boolean(array: &ArrayRef, column: &'static str) -> Result<BooleanBuffer, Error> {
    let flags = array.as_boolean_opt().ok_or_else(|| Error::ColumnType {
        column,
        actual: array.data_type().clone(),
        expected: "boolean",
    })?;
    Ok(flags.nulls().map_or_else(|| flags.values().clone(), |nulls| flags.values() & nulls.inner()))
}

impl Batch {
    fn parse(batch: &RecordBatch, start: u64) -> Result<Self, Error> {
        let (keys, rewards, lengths) =
            (column(batch, "prompt")?, column(batch, "reward")?, column(batch, "length")?);
        let has_nulls = |nulls: &NullBuffer| nulls.null_count() > 0;
        let parsed = Self {
            start,
            len: batch.num_rows(),
            keys: Ints::new(keys, "prompt")?,
            rewards: Floats::new(rewards, "reward")?,
            lengths: Ints::new(lengths, "length")?,
            valid: NullBuffer::union(rewards.nulls(), lengths.nulls()).filter(has_nulls),
            valid_length: lengths.nulls().cloned().filter(has_nulls),
            truncated: optional(batch, "truncated", boolean)?.map(|(flags, _)| flags),
            duplicate: optional(batch, "duplicate", Ints::new)?,
            policy: optional(batch, "policy", |array, name| {
                no_nulls(array, name, start)?;
                Ints::new(array, name)
            })?
            .map(|(policies, _)| policies),
            second: optional(batch, "second", Floats::new)?,
        };
        no_nulls(keys, "prompt", start)?;
        Ok(parsed)
    }

    /// Checks that the columns have the types of the first batch: ordinals of two types do not compare.
    fn check_types(&self, first: &Self, batch: &RecordBatch) -> Result<(), Error> {
        for (name, same) in [
            ("prompt", discriminant(&first.keys) == discriminant(&self.keys)),
            ("reward", discriminant(&first.rewards) == discriminant(&self.rewards)),
            ("length", discriminant(&first.lengths) == discriminant(&self.lengths)),
        ] {
            if !same {
                let actual = column(batch, name)?.data_type().clone();
                return Err(Error::ColumnType {
                    column: name,
                    actual,
                    expected: "of one type in all batches",
                });
            }
        }
        Ok(())
    }

    fn values(
        &self,
        range: Range<usize>,
        block: &mut Block,
        dropped: &mut Dropped,
    ) -> Result<(), InvalidLength> {
        let from = block.rewards.len();
        match &self.rewards {
            Floats::F32(values) => block.rewards.extend_from_slice(&values[range.clone()]),
            Floats::F64(values) => {
                block.rewards.extend(values[range.clone()].iter().map(|&value| to_f32(value)));
                block.rewards_f64.extend_from_slice(&values[range.clone()]);
            }
        }
        let mut invalid = false;
        match (&self.lengths, &self.valid_length) {
            (Ints::U32(values), _) => block.lengths.extend_from_slice(&values[range.clone()]),
            (lengths, None) => with_ints!(lengths, values => {
                block.lengths.extend(values[range.clone()].iter().map(|&value| to_length(value, &mut invalid)));
            }),
            // The value of a null is arbitrary.
            (lengths, Some(valid)) => with_ints!(lengths, values => {
                block.lengths.extend(range.clone().map(|i| {
                    if valid.is_valid(i) { to_length(values[i], &mut invalid) } else { 0 }
                }));
            }),
        }
        if invalid {
            return Err(InvalidLength);
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

/// The value as a length; sets `invalid` if it does not fit 32 unsigned bits.
#[inline(always)]
fn to_length<T: Int>(value: T, invalid: &mut bool) -> u32 {
    let length = value.length();
    *invalid |= length.is_none();
    length.unwrap_or(0)
}

/// A reward as float32; infinite if it is out of range.
#[inline(always)]
pub(crate) fn to_f32(reward: f64) -> f32 {
    // Rounding alone would turn a value just out of range into the greatest float32.
    if reward.abs() > f64::from(f32::MAX) { f32::INFINITY } else { reward as f32 }
}
