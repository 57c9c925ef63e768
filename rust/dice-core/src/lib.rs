//! Mining of preference pairs with an exact length penalty, and replay sampling.
//!
//! Pure Rust on Arrow columns: no Python, no text, no files. The miner sees a prompt key, a reward
//! and a length per response, and answers with row numbers.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`columns`] | the input: batches of numeric columns, borrowed from their Arrow buffers |
//! | [`filter`] | which rows are usable, and a count of the others by reason |
//! | [`groups`] | the rows of each prompt, for grouped and for ungrouped input |
//! | [`exact`] | comparisons and sums of floats without rounding error |
//! | [`hull`] | break points of one prompt's choice as the penalty grows |
//! | [`penalty`] | the penalty that brings the mean length gap nearest zero |
//! | [`bucket`] | rewards centred inside length quantiles |
//! | [`select`] | the best and worst response of one prompt at a given penalty |
//! | [`mod@mine`] | the whole: columns in, pairs out |
//! | [`replay`] | seeded sampling of offline rows |
//!
//! Results do not depend on the number of threads, on how the input is cut into batches, or on the
//! order of rows (but for exact ties, which go to the lower row number).

pub mod block;
pub mod bucket;
pub mod columns;
pub mod error;
pub mod exact;
pub mod filter;
pub mod hull;
pub mod labels;
pub mod lanes;
pub mod layout;
pub mod mine;
pub mod pairing;
pub mod penalty;
pub mod pick;
pub mod pool;
pub mod records;
pub mod replay;
pub mod scan;
pub mod select;
pub mod solve;
pub mod stream;
pub mod table;

pub use columns::Columns;
pub use error::Error;
pub use mine::{Debias, Mined, Options, mine};
