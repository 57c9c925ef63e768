//! Mining of preference pairs with an exact length penalty, and replay sampling.
//!
//! Pure Rust on Arrow columns: no Python, no text, no files. The miner reads a prompt key, a reward and a length per
//! response, and returns row numbers.
//!
//! Each of these modules imports only those below it; `tests/module_graph.rs` checks that.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`stream`] | mining of an input larger than memory, in segments |
//! | [`mod@mine`] | mining of an input in memory: columns in, pairs out |
//! | `options`, `result` | the options and the result of mining |
//! | [`penalty`] | the penalty that brings the mean length gap nearest zero |
//! | [`pairs`] | which responses of a prompt become pairs, and the columns of the pairs |
//! | [`sampling`] | seeded sampling of offline rows |
//! | [`input`] | the columns, where the rows of each prompt are, and blocks of rows |
//! | `numeric` | exact comparisons and sums, vectors of float32, correlation |
//!
//! Pairs, penalty and counts do not depend on the number of threads, on how the input is cut into batches, or on the
//! order of rows (except that the order of a prompt's own rows decides which of several responses of equal reward is
//! taken: [`pairs::ties`]).

mod error;
pub mod input;
pub mod mine;
mod numeric;
mod options;
pub mod pairs;
pub mod penalty;
mod result;
pub mod sampling;
pub mod stream;

pub use error::Error;
pub use input::columns::Columns;
pub use mine::mine;
pub use options::{Debias, Options};
pub use result::Mined;
