//! The input: numeric columns in batches, each sharing the Arrow buffers that it came in.
//!
//! Nothing is copied: a [`ScalarBuffer`] is a counted reference into the caller's memory. Types are
//! looked at once a batch (an enum per column), never once a value.

use arrow_array::cast::AsArray;
use arrow_array::types::{
    Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type, UInt32Type,
    UInt64Type,
};
use arrow_array::{Array, ArrayRef, PrimitiveArray, RecordBatch};
use arrow_buffer::{BooleanBuffer, NullBuffer, ScalarBuffer};
use arrow_schema::{ArrowError, DataType};
use std::sync::Arc;

use crate::Error;

/// An integer column of any width.
#[derive(Debug, Clone)]
pub enum Ints {
    /// 8 bits, signed.
    I8(ScalarBuffer<i8>),
    /// 16 bits, signed.
    I16(ScalarBuffer<i16>),
    /// 32 bits, signed.
    I32(ScalarBuffer<i32>),
    /// 64 bits, signed.
    I64(ScalarBuffer<i64>),
    /// 8 bits, unsigned.
    U8(ScalarBuffer<u8>),
    /// 16 bits, unsigned.
    U16(ScalarBuffer<u16>),
    /// 32 bits, unsigned.
    U32(ScalarBuffer<u32>),
    /// 64 bits, unsigned.
    U64(ScalarBuffer<u64>),
}

/// Runs `$body` with `$values` bound to the slice of the column, once per integer type.
macro_rules! with_ints {
    ($column:expr, $values:ident => $body:expr) => {
        match $column {
            $crate::columns::Ints::I8($values) => $body,
            $crate::columns::Ints::I16($values) => $body,
            $crate::columns::Ints::I32($values) => $body,
            $crate::columns::Ints::I64($values) => $body,
            $crate::columns::Ints::U8($values) => $body,
            $crate::columns::Ints::U16($values) => $body,
            $crate::columns::Ints::U32($values) => $body,
            $crate::columns::Ints::U64($values) => $body,
        }
    };
}
pub(crate) use with_ints;

/// An integer that can be a prompt key or a length.
pub trait Int: Copy + Ord + Send + Sync {
    /// The value's place in the order of its type, as an unsigned number.
    fn ordinal(self) -> u64;
    /// The inverse of [`Int::ordinal`].
    fn from_ordinal(ordinal: u64) -> Self;
    /// The value.
    fn wide(self) -> i128;
    /// The value as a length, if it is a count of 32 bits.
    #[inline]
    fn length(self) -> Option<u32> {
        u32::try_from(self.wide()).ok()
    }
}

macro_rules! int {
    ($($signed:ty)+; $($unsigned:ty)+) => {
        $(impl Int for $signed {
            // Flipping the sign bit maps the signed order onto the unsigned one.
            fn ordinal(self) -> u64 { (i64::from(self) as u64) ^ (1 << 63) }
            fn from_ordinal(ordinal: u64) -> Self { (ordinal ^ (1 << 63)) as $signed }
            fn wide(self) -> i128 { i128::from(self) }
        })+
        $(impl Int for $unsigned {
            fn ordinal(self) -> u64 { u64::from(self) }
            fn from_ordinal(ordinal: u64) -> Self { ordinal as $unsigned }
            fn wide(self) -> i128 { i128::from(self) }
        })+
    };
}
int!(i8 i16 i32 i64; u8 u16 u32 u64);

impl Ints {
    /// The column's buffer, without its nulls.
    ///
    /// # Errors
    /// [`Error::ColumnType`] if it is not an integer column.
    pub fn new(array: &ArrayRef, column: &'static str) -> Result<Self, Error> {
        Ok(match array.data_type() {
            DataType::Int8 => Self::I8(array.as_primitive::<Int8Type>().values().clone()),
            DataType::Int16 => Self::I16(array.as_primitive::<Int16Type>().values().clone()),
            DataType::Int32 => Self::I32(array.as_primitive::<Int32Type>().values().clone()),
            DataType::Int64 => Self::I64(array.as_primitive::<Int64Type>().values().clone()),
            DataType::UInt8 => Self::U8(array.as_primitive::<UInt8Type>().values().clone()),
            DataType::UInt16 => Self::U16(array.as_primitive::<UInt16Type>().values().clone()),
            DataType::UInt32 => Self::U32(array.as_primitive::<UInt32Type>().values().clone()),
            DataType::UInt64 => Self::U64(array.as_primitive::<UInt64Type>().values().clone()),
            other => {
                return Err(Error::ColumnType { column, found: other.clone(), wanted: "an integer type" });
            }
        })
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        with_ints!(self, values => values.len())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// [`Int::ordinal`] of the value at `index`.
    #[inline]
    pub fn ordinal(&self, index: usize) -> u64 {
        with_ints!(self, values => values[index].ordinal())
    }

    /// Where the values lie in memory.
    pub fn address(&self) -> usize {
        with_ints!(self, values => values.as_ptr() as usize)
    }

    /// A new column of this one's type, of the values with the given ordinals.
    pub fn from_ordinals(&self, ordinals: &[u64]) -> ArrayRef {
        macro_rules! array {
            ($type:ty) => {
                Arc::new(PrimitiveArray::<$type>::from_iter_values(
                    ordinals.iter().map(|&ordinal| Int::from_ordinal(ordinal)),
                ))
            };
        }
        match self {
            Self::I8(_) => array!(Int8Type),
            Self::I16(_) => array!(Int16Type),
            Self::I32(_) => array!(Int32Type),
            Self::I64(_) => array!(Int64Type),
            Self::U8(_) => array!(UInt8Type),
            Self::U16(_) => array!(UInt16Type),
            Self::U32(_) => array!(UInt32Type),
            Self::U64(_) => array!(UInt64Type),
        }
    }
}

/// A floating-point column. Everything is compared in 64 bits, to which 32 convert exactly.
#[derive(Debug, Clone)]
pub enum Floats {
    /// 32 bits.
    F32(ScalarBuffer<f32>),
    /// 64 bits.
    F64(ScalarBuffer<f64>),
}

impl Floats {
    /// The column's buffer, without its nulls.
    ///
    /// # Errors
    /// [`Error::ColumnType`] if it is neither float32 nor float64.
    pub fn new(array: &ArrayRef, column: &'static str) -> Result<Self, Error> {
        Ok(match array.data_type() {
            DataType::Float32 => Self::F32(array.as_primitive::<Float32Type>().values().clone()),
            DataType::Float64 => Self::F64(array.as_primitive::<Float64Type>().values().clone()),
            other => {
                return Err(Error::ColumnType { column, found: other.clone(), wanted: "float32 or float64" });
            }
        })
    }

    /// The value at `index`.
    #[inline]
    pub fn get(&self, index: usize) -> f64 {
        match self {
            Self::F32(values) => f64::from(values[index]),
            Self::F64(values) => values[index],
        }
    }

    /// Where the values lie in memory.
    pub fn address(&self) -> usize {
        match self {
            Self::F32(values) => values.as_ptr() as usize,
            Self::F64(values) => values.as_ptr() as usize,
        }
    }
}

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

impl Columns {
    /// Takes the columns `prompt`, `reward`, `length` and, where it is there, `truncated` (a null in
    /// it counts as not truncated).
    ///
    /// | column | types |
    /// | --- | --- |
    /// | `prompt` | any integer, no nulls |
    /// | `reward` | float32 or float64 |
    /// | `length` | any integer, in tokens or characters |
    /// | `truncated` | boolean |
    ///
    /// # Errors
    /// A missing column, one of another type, a null prompt, no rows, or a batch that cannot be read.
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
        };
        if let Some(nulls) = keys.nulls().filter(|nulls| nulls.null_count() > 0) {
            let first = (0..nulls.len()).find(|&i| nulls.is_null(i)).unwrap_or(0);
            return Err(Error::Null { column: "prompt", row: start + first as u64 });
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

    /// [`Int::ordinal`] of the prompt key of a row.
    #[inline]
    pub fn key(&self, row: u64) -> u64 {
        let (batch, index) = self.locate(row);
        batch.keys.ordinal(index)
    }

    /// The error for the first length that is no count of 32 bits, if there is one.
    pub fn first_bad_length(&self) -> Option<Error> {
        self.batches.iter().find_map(|batch| {
            with_ints!(&batch.lengths, values => values.iter().enumerate().find_map(|(i, &value)| {
                let there = batch.valid_length.as_ref().is_none_or(|nulls| nulls.is_valid(i));
                let bad = value.length().is_none();
                (there && bad).then(|| Error::Length {
                    row: batch.start + i as u64,
                    value: value.wide(),
                })
            }))
        })
    }
}
