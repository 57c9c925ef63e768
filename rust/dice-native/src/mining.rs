//! `mine` and what it returns.

use arrow_array::RecordBatch;
use arrow_array::ffi_stream::RecordBatchStreamReader;
use arrow_pyarrow::PyArrowType;
use dice_core::filter::Filter;
use dice_core::{Columns, Debias, Error, Options, mine as core_mine};
use pyo3::prelude::*;

use crate::to_python;

/// What was mined and what was dropped.
#[pyclass(frozen, get_all, module = "dice_py._native")]
pub struct MineSummary {
    /// The penalty; None for buckets.
    alpha: Option<f64>,
    /// Least penalty with the same pairs; None for buckets.
    alpha_low: Option<f64>,
    /// Penalty from which on the pairs differ; infinity if there is none, None for buckets.
    alpha_high: Option<f64>,
    /// Mean of chosen length − rejected length without debiasing; NaN without pairs.
    mean_length_gap_before: f64,
    /// The same, of the pairs.
    mean_length_gap_after: f64,
    /// Penalties of the curve.
    curve_alpha: Vec<f64>,
    /// Mean length gap from each on.
    curve_gap: Vec<f64>,
    /// (reason, rows), in the order in which reasons are looked at.
    dropped: Vec<(&'static str, u64)>,
    /// (reason, prompts).
    dropped_prompts: Vec<(&'static str, u64)>,
    /// Prompts in the input.
    prompts: u64,
    /// Rows in the input.
    rows: u64,
}

/// Mine pairs from a stream of the columns prompt, reward, length and (optionally) truncated.
#[pyfunction]
#[pyo3(signature = (stream, *, debias, alpha, min_responses, min_length, max_length, buckets, bucket_scale))]
#[expect(clippy::too_many_arguments, reason = "keywords in Python")]
pub fn mine(
    py: Python<'_>,
    stream: PyArrowType<RecordBatchStreamReader>,
    debias: &str,
    alpha: Option<f64>,
    min_responses: usize,
    min_length: Option<u32>,
    max_length: Option<u32>,
    buckets: usize,
    bucket_scale: bool,
) -> PyResult<(PyArrowType<RecordBatch>, MineSummary)> {
    let debias = match (debias, alpha) {
        ("none", _) => Debias::None,
        ("linear", None) => Debias::LinearAuto,
        ("linear", Some(alpha)) => Debias::Linear(alpha),
        ("bucket", _) => Debias::Bucket { buckets, scale: bucket_scale },
        (other, _) => {
            let message = format!("debias is '{other}', but must be one of none, linear, bucket");
            return Err(to_python(Error::Usage(message)));
        }
    };
    let options = Options { debias, min_responses, filter: Filter { min_length, max_length } };
    let mined = py.detach(|| core_mine(&Columns::new(stream.0)?, &options)).map_err(to_python)?;
    let (dropped, prompts) = (mined.dropped, mined.dropped_prompts);
    let summary = MineSummary {
        alpha: mined.alpha,
        alpha_low: mined.alpha_interval.map(|interval| interval.0),
        alpha_high: mined.alpha_interval.map(|interval| interval.1),
        mean_length_gap_before: mined.gap_before,
        mean_length_gap_after: mined.gap_after,
        curve_alpha: mined.curve.iter().map(|point| point.0).collect(),
        curve_gap: mined.curve.iter().map(|point| point.1).collect(),
        dropped: vec![
            ("null", dropped.null),
            ("not_finite", dropped.not_finite),
            ("truncated", dropped.truncated),
            ("too_short", dropped.too_short),
            ("too_long", dropped.too_long),
            ("too_few_responses", dropped.too_few_responses),
        ],
        dropped_prompts: vec![
            ("too_few_responses", prompts.too_few_responses),
            ("no_contrast", prompts.no_contrast),
        ],
        prompts: mined.prompts,
        rows: mined.rows,
    };
    Ok((PyArrowType(mined.pairs), summary))
}

/// Addresses of the values of (prompt, reward, length) in each batch, as `mine` sees them.
///
/// For the test that nothing is copied on the way in.
#[pyfunction]
pub fn addresses(
    py: Python<'_>,
    stream: PyArrowType<RecordBatchStreamReader>,
) -> PyResult<Vec<(usize, usize, usize)>> {
    let columns = py.detach(|| Columns::new(stream.0)).map_err(to_python)?;
    let batches = columns.batches.iter();
    Ok(batches.map(|b| (b.keys.address(), b.rewards.address(), b.lengths.address())).collect())
}
