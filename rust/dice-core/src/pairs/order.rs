//! The best and the worst of some responses at a given penalty.
//!
//! | | penalized score `score − α·length` | then | then | then |
//! | --- | --- | --- | --- | --- |
//! | best first | highest | shorter | higher raw reward | lower row |
//! | worst first | lowest | longer | lower raw reward | lower row |
//!
//! Penalized scores are compared exactly ([`compare_difference`]). The raw reward only matters if
//! scores are adjusted and rounded; otherwise it is equal at equal length and score.

use std::cmp::Ordering;

use crate::input::filter::Response;
use crate::numeric::exact::compare_difference;

/// Compares two responses, ignoring their rows: `Greater` if `a` beats `b`.
#[inline]
pub fn compare(a: &Response, b: &Response, alpha: f64) -> Ordering {
    let length_diff = i64::from(a.length) - i64::from(b.length);
    compare_difference(a.score, b.score, alpha, length_diff as f64)
        .then_with(|| b.length.cmp(&a.length))
        .then_with(|| a.raw.partial_cmp(&b.raw).unwrap_or(Ordering::Equal))
}

/// Whether `a` beats `b`, so that they can be the chosen and the rejected response of a pair.
#[inline]
pub fn beats(a: &Response, b: &Response, alpha: f64) -> bool {
    compare(a, b, alpha) == Ordering::Greater
}

/// The order best first.
#[inline]
pub fn best_first(a: &Response, b: &Response, alpha: f64) -> Ordering {
    compare(b, a, alpha).then(a.row.cmp(&b.row))
}

/// The order worst first.
#[inline]
pub fn worst_first(a: &Response, b: &Response, alpha: f64) -> Ordering {
    compare(a, b, alpha).then(a.row.cmp(&b.row))
}

/// The first of the order best first.
#[inline]
pub fn best(responses: &[Response], alpha: f64) -> Option<&Response> {
    responses.iter().min_by(|a, b| best_first(a, b, alpha))
}

/// The first of the order worst first.
#[inline]
pub fn worst(responses: &[Response], alpha: f64) -> Option<&Response> {
    responses.iter().min_by(|a, b| worst_first(a, b, alpha))
}

/// The pair's difference of penalized scores.
#[inline]
pub fn margin(chosen: &Response, rejected: &Response, alpha: f64) -> f64 {
    let length_diff = i64::from(chosen.length) - i64::from(rejected.length);
    difference(chosen.score, rejected.score, length_diff, alpha)
}

/// `(a − b) − alpha · length_diff`
#[inline(always)]
pub fn difference(a: f64, b: f64, length_diff: i64, alpha: f64) -> f64 {
    (a - b) - alpha * length_diff as f64
}

/// A margin as it is stored: clamped to the range of float32.
#[inline(always)]
pub fn saturate_to_f32(margin: f64) -> f32 {
    margin.clamp(f64::from(f32::MIN), f64::from(f32::MAX)) as f32
}
