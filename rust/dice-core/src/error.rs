//! Errors, each with the row and the remedy.

use arrow_schema::DataType;

/// An error that the user of the caller can correct.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// An option is out of range.
    #[error("{0}")]
    Usage(String),
    /// The input lacks a column: the column, and the columns that it has.
    #[error("column '{0}' is missing from the input; columns are {1}")]
    MissingColumn(String, String),
    /// A column has a type that the miner cannot read.
    #[error("column '{column}' has type {actual}, but must be {expected}; cast it first")]
    ColumnType {
        /// The column's role: `prompt`, `reward`, `length`, `truncated`, `key`, `weight`.
        column: &'static str,
        /// The type of the column.
        actual: DataType,
        /// The types that can be read.
        expected: &'static str,
    },
    /// A null in a column that needs a value in every row.
    #[error("row {row}: the {column} is null; fill or drop such rows first")]
    Null {
        /// The column's role.
        column: &'static str,
        /// The first such row, counted from zero over all batches.
        row: u64,
    },
    /// A length that is negative or above 2³² − 1.
    #[error(
        "row {row}: the length is {value}; lengths are counts between 0 and 4294967295: correct or drop such rows"
    )]
    Length {
        /// The first such row.
        row: u64,
        /// Its value.
        value: i128,
    },
    /// A weight that is negative, NaN or infinite.
    #[error(
        "row {row}: the weight is {value}; weights are finite numbers of zero or more: correct or drop such rows"
    )]
    Weight {
        /// The first such row.
        row: u64,
        /// Its value.
        value: f64,
    },
    /// The input has no rows.
    #[error("the input has no rows; pass a table with at least one response")]
    Empty,
    /// A batch could not be read.
    #[error("the input could not be read: {0}")]
    Read(String),
}
