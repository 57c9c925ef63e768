//! Arithmetic: exact comparisons and sums, vectors of float32, correlation.

pub(crate) mod exact;
pub(crate) mod moments;
pub(crate) mod simd;
