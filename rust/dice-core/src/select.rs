//! The best and the worst of some responses at a given penalty.
//!
//! | | penalised score `score − α·length` | then | then | then |
//! | --- | --- | --- | --- | --- |
//! | best first | highest | shorter | higher raw reward | lower row |
//! | worst first | lowest | longer | lower raw reward | lower row |
//!
//! Penalised scores are compared exactly ([`compare_difference`]). The raw reward only matters where
//! scores were adjusted and rounded: at equal length and equal score it is equal otherwise.

use std::cmp::Ordering;

use crate::exact::compare_difference;
use crate::filter::Point;

/// Compares two responses without regard to their rows: `Greater` if `a` beats `b`.
#[inline]
pub fn compare(a: &Point, b: &Point, alpha: f64) -> Ordering {
    let longer = i64::from(a.length) - i64::from(b.length);
    compare_difference(a.score, b.score, alpha, longer as f64)
        .then_with(|| b.length.cmp(&a.length))
        .then_with(|| a.raw.partial_cmp(&b.raw).unwrap_or(Ordering::Equal))
}

/// Whether `a` beats `b`, so that they can be a pair.
#[inline]
pub fn beats(a: &Point, b: &Point, alpha: f64) -> bool {
    compare(a, b, alpha) == Ordering::Greater
}

/// The order best first.
#[inline]
pub fn best_first(a: &Point, b: &Point, alpha: f64) -> Ordering {
    compare(b, a, alpha).then(a.row.cmp(&b.row))
}

/// The order worst first.
#[inline]
pub fn worst_first(a: &Point, b: &Point, alpha: f64) -> Ordering {
    compare(a, b, alpha).then(a.row.cmp(&b.row))
}

/// The first of the order best first.
#[inline]
pub fn best(points: &[Point], alpha: f64) -> Option<&Point> {
    points.iter().min_by(|a, b| best_first(a, b, alpha))
}

/// The first of the order worst first.
#[inline]
pub fn worst(points: &[Point], alpha: f64) -> Option<&Point> {
    points.iter().min_by(|a, b| worst_first(a, b, alpha))
}

/// The pair's difference of penalised scores.
#[inline]
pub fn margin(chosen: &Point, rejected: &Point, alpha: f64) -> f64 {
    let longer = i64::from(chosen.length) - i64::from(rejected.length);
    difference(chosen.score, rejected.score, longer, alpha)
}

/// `(a − b) − alpha · longer`
#[inline(always)]
pub fn difference(a: f64, b: f64, longer: i64, alpha: f64) -> f64 {
    (a - b) - alpha * longer as f64
}

/// As it is stored: saturating at the range of float32.
#[inline(always)]
pub fn stored(margin: f64) -> f32 {
    margin.clamp(f64::from(f32::MIN), f64::from(f32::MAX)) as f32
}
