//! The best and worst response of one prompt at a given penalty.
//!
//! | | penalised score `score − α·length` | then | then | then |
//! | --- | --- | --- | --- | --- |
//! | chosen | highest | shorter | higher raw reward | lower row |
//! | rejected | lowest | longer | lower raw reward | lower row |
//!
//! Penalised scores are compared exactly ([`compare_difference`]). The raw reward only matters where
//! scores were adjusted and rounded: at equal length and equal score it is equal otherwise.

use std::cmp::Ordering;

use crate::exact::compare_difference;
use crate::filter::Point;

/// Compares the penalised scores of two responses.
#[inline]
pub fn compare(a: &Point, b: &Point, alpha: f64) -> Ordering {
    let longer = i64::from(a.length) - i64::from(b.length);
    compare_difference(a.score, b.score, alpha, longer as f64)
}

/// Chosen and rejected of at least one response; `None` if there is no contrast.
///
/// Chosen and rejected are the same row if and only if all responses agree in length, score and raw
/// reward: if the best is the worst, all penalised scores are equal, so that the chosen is the shortest
/// and the rejected the longest of all, hence all lengths are equal; then all scores are, and by the
/// next rule all raw rewards. The other way round, both fall to the lowest row.
#[inline]
pub fn select(points: &[Point], alpha: f64) -> Option<(Point, Point)> {
    let (mut best, mut worst) = (points.first()?, points.first()?);
    for point in &points[1..] {
        let against_best = compare(point, best, alpha)
            .then_with(|| best.length.cmp(&point.length))
            .then_with(|| tie(point.raw, best.raw))
            .then_with(|| best.row.cmp(&point.row));
        if against_best == Ordering::Greater {
            best = point;
        }
        let against_worst = compare(worst, point, alpha)
            .then_with(|| point.length.cmp(&worst.length))
            .then_with(|| tie(worst.raw, point.raw))
            .then_with(|| worst.row.cmp(&point.row));
        if against_worst == Ordering::Greater {
            worst = point;
        }
    }
    (best.row != worst.row).then_some((*best, *worst))
}

/// −0 and +0 are equal here, as they are everywhere else.
fn tie(a: f64, b: f64) -> Ordering {
    a.partial_cmp(&b).unwrap_or(Ordering::Equal)
}

/// The pair's difference of penalised scores, as it is stored: saturating at the range of float32.
#[inline]
pub fn margin(chosen: &Point, rejected: &Point, alpha: f64) -> f32 {
    let longer = i64::from(chosen.length) - i64::from(rejected.length);
    let margin = (chosen.score - rejected.score) - alpha * longer as f64;
    margin.clamp(f64::from(f32::MIN), f64::from(f32::MAX)) as f32
}
