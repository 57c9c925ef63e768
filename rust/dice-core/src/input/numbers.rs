//! Columns of numbers, each sharing its Arrow buffer.
//!
//! The type is checked once per batch (an enum per column), never once per value.

use arrow_array::cast::AsArray;
use arrow_array::types::{
    Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type, UInt32Type,
    UInt64Type,
};
use arrow_array::{Array, ArrayRef, PrimitiveArray};
use arrow_buffer::ScalarBuffer;
use arrow_schema::DataType;
use std::sync::Arc;

use crate::error::Error;
use crate::numeric::simd::{Lanes, changes};

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

/// Runs `$body` with `$values` bound to the column's slice; `$body` is compiled once per integer type.
macro_rules! with_ints {
    ($column:expr, $values:ident => $body:expr) => {
        match $column {
            $crate::input::numbers::Ints::I8($values) => $body,
            $crate::input::numbers::Ints::I16($values) => $body,
            $crate::input::numbers::Ints::I32($values) => $body,
            $crate::input::numbers::Ints::I64($values) => $body,
            $crate::input::numbers::Ints::U8($values) => $body,
            $crate::input::numbers::Ints::U16($values) => $body,
            $crate::input::numbers::Ints::U32($values) => $body,
            $crate::input::numbers::Ints::U64($values) => $body,
        }
    };
}
pub(crate) use with_ints;

/// An integer that can be a prompt key or a length.
pub trait Int: Copy + Ord + Send + Sync {
    /// The value as an unsigned number, in the same order as the values of the type.
    fn ordinal(self) -> u64;
    /// The inverse of [`Int::ordinal`].
    fn from_ordinal(ordinal: u64) -> Self;
    /// The value in 128 bits.
    fn to_i128(self) -> i128;
    /// A mask with bit `i` set if `keys[i] != keys[i + 1]`.
    #[inline(always)]
    fn changes<L: Lanes>(_: L, keys: &[Self; 65]) -> u64 {
        changes(keys)
    }
    /// The value as a length, if it fits 32 unsigned bits.
    #[inline]
    fn length(self) -> Option<u32> {
        u32::try_from(self.to_i128()).ok()
    }
}

macro_rules! int {
    ($($signed:ty $({ $($signed_more:item)* })?)+; $($unsigned:ty $({ $($unsigned_more:item)* })?)+) => {
        $(impl Int for $signed {
            // Flipping the sign bit maps the signed order onto the unsigned one.
            fn ordinal(self) -> u64 { (i64::from(self) as u64) ^ (1 << 63) }
            fn from_ordinal(ordinal: u64) -> Self { (ordinal ^ (1 << 63)) as $signed }
            fn to_i128(self) -> i128 { i128::from(self) }
            $($($signed_more)*)?
        })+
        $(impl Int for $unsigned {
            fn ordinal(self) -> u64 { u64::from(self) }
            fn from_ordinal(ordinal: u64) -> Self { ordinal as $unsigned }
            fn to_i128(self) -> i128 { i128::from(self) }
            $($($unsigned_more)*)?
        })+
    };
}
/// The comparison with vector instructions.
macro_rules! changes {
    ($lanes:ident) => {
        #[inline(always)]
        fn changes<L: Lanes>(lanes: L, keys: &[Self; 65]) -> u64 {
            lanes.$lanes(pulp::bytemuck::cast_slice(keys).try_into().expect("65 keys"))
        }
    };
}
int!(
    i8 i16 i32 { changes!(changes_32); } i64 { changes!(changes_64); };
    u8 u16 u32 { changes!(changes_32); } u64 { changes!(changes_64); }
);

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
                return Err(Error::ColumnType { column, actual: other.clone(), expected: "an integer type" });
            }
        })
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        with_ints!(self, values => values.len())
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// [`Int::ordinal`] of the value at `index`.
    #[inline]
    pub fn ordinal(&self, index: usize) -> u64 {
        with_ints!(self, values => values[index].ordinal())
    }

    /// The memory address of the values.
    pub fn address(&self) -> usize {
        with_ints!(self, values => values.as_ptr() as usize)
    }

    /// A new column of this one's type, from ordinals.
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

/// A floating-point column. All values are compared as float64, to which float32 converts exactly.
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
                return Err(Error::ColumnType {
                    column,
                    actual: other.clone(),
                    expected: "float32 or float64",
                });
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

    /// The memory address of the values.
    pub fn address(&self) -> usize {
        match self {
            Self::F32(values) => values.as_ptr() as usize,
            Self::F64(values) => values.as_ptr() as usize,
        }
    }
}

/// Appends the offsets at which the key differs from the one before, counted from `base`.
#[inline(always)]
pub(crate) fn key_changes<L: Lanes, T: Int>(lanes: L, keys: &[T], base: u32, starts: &mut Vec<u32>) {
    let mut at = 0;
    while let Some(window) = keys.get(at..at + 65) {
        let mut changes = T::changes(lanes, window.try_into().expect("65 keys"));
        while changes != 0 {
            starts.push(base + at as u32 + 1 + changes.trailing_zeros());
            changes &= changes - 1;
        }
        at += 64;
    }
    starts.extend((at + 1..keys.len()).filter(|&i| keys[i - 1] != keys[i]).map(|i| base + i as u32));
}
