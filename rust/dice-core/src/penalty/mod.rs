//! The penalty that brings the mean length gap nearest zero, exactly.

pub mod hull;
pub(crate) mod probe;
pub mod scan;
pub(crate) mod solve;
pub(crate) mod states;
pub mod steps;
