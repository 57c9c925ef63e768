//! Even chunks of the input for threads to work on.

use std::ops::Range;

/// Rows that are worth a chunk of their own.
const ROWS_PER_CHUNK: u64 = 1 << 17;
const MAX_CHUNKS: u64 = 64;

/// Cuts `items`, which consist of `rows` rows, into even chunks. They do not depend on the number of threads.
pub(crate) fn chunks(items: u64, rows: u64) -> Vec<Range<u64>> {
    let count = rows.div_ceil(ROWS_PER_CHUNK).clamp(1, MAX_CHUNKS);
    let cut = |i: u64| (u128::from(items) * u128::from(i) / u128::from(count)) as u64;
    (0..count).map(|i| cut(i)..cut(i + 1)).filter(|chunk| !chunk.is_empty()).collect()
}
