//! Mining of preference pairs with an exact length penalty, and replay sampling.
//!
//! Pure Rust on Arrow columns: no Python, no text, no files. The miner sees a prompt key, a reward
//! and a length per response, and answers with row numbers.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`mod@mine`] | the whole: columns in, pairs out |
//! | [`stream`] | the same of an input that comes in segments |
//! | [`columns`] | the input: batches of numeric columns, borrowed from their Arrow buffers |
//! | [`numbers`] | columns of numbers of any type |
//! | [`layout`] | where the rows of each prompt are, in whatever order they came |
//! | [`records`] | rows in any order, sorted by prompt |
//! | [`block`] | some whole prompts at a time, in types that do not depend on the input |
//! | [`filter`] | which rows are usable, and a count of the others by reason |
//! | [`pool`] | duplicates, and which policies' responses may be chosen or rejected |
//! | [`mod@solve`] | the penalty that brings the mean length gap nearest zero |
//! | [`mod@scan`] | the pass over all prompts: best and worst, and break points inside a bracket |
//! | [`probe`] | the same in float32, where that can tell |
//! | [`lanes`] | sixteen float32 at a time |
//! | [`hull`] | how one prompt's choice turns as the penalty grows |
//! | [`penalty`] | the gap as a step function of the penalty |
//! | [`exact`] | comparisons and sums of floats without rounding error |
//! | [`bucket`] | rewards centred inside length quantiles |
//! | [`select`] | the orders best first and worst first |
//! | [`pairing`] | which responses of a prompt make pairs |
//! | [`labels`] | labels that come from all of a prompt's responses |
//! | [`mod@pick`] | the pass that writes pairs other than the best with the worst |
//! | [`table`] | the pairs, as columns |
//! | [`replay`] | seeded sampling of offline rows |
//!
//! Pairs, penalty and counts do not depend on the number of threads, on how the input is cut into batches, or on the
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
pub mod numbers;
pub mod pairing;
pub mod penalty;
pub mod pick;
pub mod pool;
pub mod probe;
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
