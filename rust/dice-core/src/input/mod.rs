//! The input: columns, where the rows of each prompt are, and blocks of rows for the passes.

pub mod block;
pub(crate) mod chunks;
pub mod columns;
pub mod filter;
pub mod layout;
pub mod numbers;
pub(crate) mod partitions;
pub(crate) mod pass;
pub mod records;
