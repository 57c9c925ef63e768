//! What can go wrong, each with the row and the remedy.

use arrow_schema::DataType;

/// An error that the caller's user can act on.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// An option out of range.
    #[error("{0}")]
    Usage(String),
    /// A column that the input lacks.
    #[error("column '{0}' is missing from the input; columns are {1}")]
    MissingColumn(String, String),
    /// A column of a type that the miner cannot read.
    #[error("column '{column}' has type {found}, but must be {wanted}; cast it first")]
    ColumnType {
        /// The column's role: `prompt`, `reward`, `length`, `truncated`, `key`, `weight`.
        column: &'static str,
        /// The type that was found.
        found: DataType,
        /// The types that are read.
        wanted: &'static str,
    },
    /// A null where every row needs a value.
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
    /// No rows at all.
    #[error("the input has no rows; give a table with at least one response")]
    Empty,
    /// Batches that could not be read.
    #[error("the input could not be read: {0}")]
    Read(String),
}
