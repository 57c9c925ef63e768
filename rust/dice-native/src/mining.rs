//! `mine` and what it returns.

use arrow_array::ffi_stream::RecordBatchStreamReader;
use arrow_array::{RecordBatch, RecordBatchIterator, RecordBatchReader};
use arrow_pyarrow::PyArrowType;
use dice_core::input::filter::{Dropped, Filter};
use dice_core::pairs::pairing::{Pairing, Tolerance};
use dice_core::pairs::pool::PickFrom;
use dice_core::pairs::totals::DroppedPrompts;
use dice_core::stream::Miner;
use dice_core::{Columns, Debias, Error, Mined, Options, mine as core_mine};
use pyo3::prelude::*;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::to_python;

/// A stream of batches for Python.
type Batches = PyArrowType<Box<dyn RecordBatchReader + Send>>;

/// Penalty, length gaps and counts of mined pairs.
#[pyclass(frozen, get_all, module = "dice_py._native")]
pub struct MineSummary {
    /// The penalty; None without a linear penalty.
    alpha: Option<f64>,
    /// Least penalty with the same best and worst responses; None without a linear penalty.
    alpha_low: Option<f64>,
    /// Least higher penalty with others; infinity if there is none, None without a linear penalty.
    alpha_high: Option<f64>,
    /// Mean of |best| − |worst| by reward alone; NaN without prompts with contrast.
    mean_length_gap_before: f64,
    /// Mean of |chosen| − |rejected| of the pairs; NaN without pairs.
    mean_length_gap_after: f64,
    /// Correlation of reward and length; NaN if one is constant.
    correlation_before: f64,
    /// Correlation of score and length; NaN if one is constant.
    correlation_after: f64,
    /// Penalties of the curve.
    curve_alpha: Vec<f64>,
    /// Mean length gap from each of these penalties on.
    curve_gap: Vec<f64>,
    /// Whether each gap is that of all prompts, rather than of a sample.
    curve_exact: Vec<bool>,
    /// (reason, rows), in the order in which reasons are checked.
    dropped: Vec<(&'static str, u64)>,
    /// (reason, prompts).
    dropped_prompts: Vec<(&'static str, u64)>,
    /// Pairs of equal rewards that were left out, where a prompt can have several pairs.
    tied_pairs: u64,
    /// Prompts in the input.
    prompts: u64,
    /// Rows in the input.
    rows: u64,
}

impl From<&Mined> for MineSummary {
    fn from(mined: &Mined) -> Self {
        Self {
            alpha: mined.alpha,
            alpha_low: mined.alpha_interval.map(|interval| interval.0),
            alpha_high: mined.alpha_interval.map(|interval| interval.1),
            mean_length_gap_before: mined.gap_before,
            mean_length_gap_after: mined.gap_after,
            correlation_before: mined.correlation_before,
            correlation_after: mined.correlation_after,
            curve_alpha: mined.curve.iter().map(|point| point.alpha).collect(),
            curve_gap: mined.curve.iter().map(|point| point.gap).collect(),
            curve_exact: mined.curve.iter().map(|point| point.exact).collect(),
            dropped: reasons(&mined.dropped),
            dropped_prompts: prompt_reasons(&mined.dropped_prompts),
            tied_pairs: mined.tied_pairs,
            prompts: mined.prompts,
            rows: mined.rows,
        }
    }
}

fn reasons(dropped: &Dropped) -> Vec<(&'static str, u64)> {
    vec![
        ("null", dropped.null),
        ("not_finite", dropped.not_finite),
        ("truncated", dropped.truncated),
        ("too_short", dropped.too_short),
        ("too_long", dropped.too_long),
        ("duplicate", dropped.duplicate),
        ("too_few_responses", dropped.too_few_responses),
    ]
}

fn prompt_reasons(dropped: &DroppedPrompts) -> Vec<(&'static str, u64)> {
    vec![
        ("too_few_responses", dropped.too_few_responses),
        ("tied", dropped.tied),
        ("no_contrast", dropped.no_contrast),
        ("no_match", dropped.no_match),
    ]
}

/// Keywords of `mine`: a dict or a typed dict in Python.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct Keywords {
    debias: String,
    alpha: Option<f64>,
    min_responses: usize,
    min_length: Option<u32>,
    max_length: Option<u32>,
    buckets: usize,
    bucket_scale: bool,
    length_tolerance: Option<u32>,
    length_ratio: Option<f64>,
    pairing: String,
    top_k: usize,
    bottom_k: usize,
    pairs_per_prompt: Option<usize>,
    sweet_spot_deviations: f64,
    seed: u64,
    chosen_from: String,
    rejected_from: String,
    win_rates: Option<f64>,
}

impl Keywords {
    /// # Errors
    /// [`Error::Usage`] for an unknown name.
    fn options(&self) -> Result<Options, Error> {
        Ok(Options {
            debias: self.debias()?,
            min_responses: self.min_responses,
            filter: Filter { min_length: self.min_length, max_length: self.max_length },
            pairing: self.pairing()?,
            seed: self.seed,
            chosen_from: pick_from("chosen_from", &self.chosen_from)?,
            rejected_from: pick_from("rejected_from", &self.rejected_from)?,
            win_rates: self.win_rates,
        })
    }

    fn debias(&self) -> Result<Debias, Error> {
        match (self.debias.as_str(), self.alpha) {
            ("none" | "matched", _) => Ok(Debias::None),
            ("linear", None) => Ok(Debias::LinearAuto),
            ("linear", Some(alpha)) => Ok(Debias::Linear(alpha)),
            ("per_token", _) => Ok(Debias::PerToken),
            ("bucket", _) => Ok(Debias::Bucket { buckets: self.buckets, scale: self.bucket_scale }),
            (other, _) => Err(unknown("debias", other, "none, linear, per_token, bucket, matched")),
        }
    }

    fn pairing(&self) -> Result<Pairing, Error> {
        let max_pairs = self.pairs_per_prompt.unwrap_or(usize::MAX);
        match (self.debias.as_str(), self.pairing.as_str()) {
            ("matched", "max_min") => self.tolerance().map(Pairing::Matched),
            ("matched", other) => Err(unknown("pairing", other, "max_min where debias is 'matched'")),
            (_, "max_min") => Ok(Pairing::MaxMin),
            (_, "max_random") => Ok(Pairing::MaxRandom { seed: self.seed }),
            (_, "top_bottom") => Ok(Pairing::TopBottom { top: self.top_k, bottom: self.bottom_k, max_pairs }),
            (_, "max_sweet_spot") => Ok(Pairing::SweetSpot { deviations: self.sweet_spot_deviations }),
            (_, "all_pairs") => Ok(Pairing::All { max_pairs }),
            (_, other) => {
                Err(unknown("pairing", other, "max_min, max_random, top_bottom, max_sweet_spot, all_pairs"))
            }
        }
    }

    fn tolerance(&self) -> Result<Tolerance, Error> {
        match (self.length_tolerance, self.length_ratio) {
            (Some(max), None) => Ok(Tolerance::Absolute(max)),
            (None, Some(max)) => Ok(Tolerance::Relative(max)),
            _ => {
                let message = "debias 'matched' needs one of length_tolerance and length_ratio";
                Err(Error::Usage(message.into()))
            }
        }
    }
}

fn pick_from(keyword: &str, name: &str) -> Result<PickFrom, Error> {
    match name {
        "any" => Ok(PickFrom::Any),
        "newest" => Ok(PickFrom::Newest),
        "oldest" => Ok(PickFrom::Oldest),
        other => Err(unknown(keyword, other, "any, newest, oldest")),
    }
}

fn unknown(keyword: &str, value: &str, known: &str) -> Error {
    Error::Usage(format!("{keyword} is '{value}', but must be one of {known}"))
}

/// Mine pairs from a stream with the columns prompt, reward, length and (optionally) truncated, duplicate, policy and
/// second.
#[pyfunction]
pub fn mine(
    py: Python<'_>,
    stream: PyArrowType<RecordBatchStreamReader>,
    options: Keywords,
) -> PyResult<(Batches, MineSummary)> {
    let mined = py.detach(|| core_mine(&Columns::new(stream.0)?, &options.options()?)).map_err(to_python)?;
    let summary = MineSummary::from(&mined);
    Ok((reader(mined.pairs).map_err(to_python)?, summary))
}

/// Mines an input in segments of complete prompts: `estimate` from a sample, `observe` all segments and `end_pass`
/// while `needs_pass` is true, then call `pairs` for each segment.
#[pyclass(frozen, module = "dice_py._native")]
pub struct SegmentMiner(Mutex<Miner>);

#[pymethods]
impl SegmentMiner {
    #[new]
    fn new(options: Keywords) -> PyResult<Self> {
        let miner = options.options().and_then(Miner::new).map_err(to_python)?;
        Ok(Self(Mutex::new(miner)))
    }

    /// Estimates the penalty from a stream of some of the prompts.
    fn estimate(&self, py: Python<'_>, stream: PyArrowType<RecordBatchStreamReader>) -> PyResult<()> {
        py.detach(|| self.lock().estimate(&Columns::new(stream.0)?)).map_err(to_python)
    }

    /// Whether another pass over all segments is needed before the pairs.
    fn needs_pass(&self, py: Python<'_>) -> bool {
        py.detach(|| self.lock().needs_pass())
    }

    /// Adds a segment to the pass.
    fn observe(&self, py: Python<'_>, stream: PyArrowType<RecordBatchStreamReader>) -> PyResult<()> {
        py.detach(|| self.lock().observe(&Columns::new(stream.0)?)).map_err(to_python)
    }

    /// Ends a pass over all segments.
    fn end_pass(&self, py: Python<'_>) {
        py.detach(|| self.lock().end_pass());
    }

    /// The pairs of a segment, with row numbers of the segment.
    fn pairs(&self, py: Python<'_>, stream: PyArrowType<RecordBatchStreamReader>) -> PyResult<Batches> {
        py.detach(|| self.lock().pairs(&Columns::new(stream.0)?)).and_then(reader).map_err(to_python)
    }

    /// The summary of all segments so far.
    fn summary(&self, py: Python<'_>) -> MineSummary {
        py.detach(|| MineSummary::from(&self.lock().summary()))
    }
}

impl SegmentMiner {
    /// After a panic of another call, the state is used as it is.
    fn lock(&self) -> MutexGuard<'_, Miner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn reader(pairs: Vec<RecordBatch>) -> Result<Batches, Error> {
    let schema = pairs.first().ok_or(Error::Empty)?.schema();
    Ok(PyArrowType(Box::new(RecordBatchIterator::new(pairs.into_iter().map(Ok), schema))))
}

/// Addresses of the values of (prompt, reward, length) in each batch, as `mine` reads them.
///
/// For the test that the input is not copied.
#[pyfunction]
pub fn addresses(
    py: Python<'_>,
    stream: PyArrowType<RecordBatchStreamReader>,
) -> PyResult<Vec<(usize, usize, usize)>> {
    let columns = py.detach(|| Columns::new(stream.0)).map_err(to_python)?;
    let batches = columns.batches.iter();
    Ok(batches.map(|b| (b.keys.address(), b.rewards.address(), b.lengths.address())).collect())
}
