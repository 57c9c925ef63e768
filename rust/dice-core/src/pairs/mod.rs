//! Which responses of a prompt become pairs, and the columns of the pairs.

pub(crate) mod bucket;
pub(crate) mod labels;
pub(crate) mod order;
pub mod pairing;
pub(crate) mod pick;
pub mod pool;
pub mod table;
pub mod ties;
pub mod totals;
