//! `sample`: seeded sampling of offline rows.

use std::collections::HashSet;

use arrow_array::ffi_stream::RecordBatchStreamReader;
use arrow_array::{ArrayRef, RecordBatch, UInt64Array};
use arrow_pyarrow::PyArrowType;
use dice_core::Error;
use dice_core::input::columns::no_nulls;
use dice_core::input::numbers::{Floats, Ints};
use dice_core::sampling::{Candidates, sample as core_sample};
use pyo3::prelude::*;
use std::sync::Arc;

use crate::to_python;

fn read<T>(
    stream: RecordBatchStreamReader,
    mut convert: impl FnMut(&RecordBatch, u64) -> Result<T, Error>,
) -> Result<Vec<T>, Error> {
    let mut start = 0;
    stream
        .map(|batch| {
            let batch = batch.map_err(|error| Error::Read(error.to_string()))?;
            let value = convert(&batch, start)?;
            start += batch.num_rows() as u64;
            Ok(value)
        })
        .collect()
}

fn key_column(batch: &RecordBatch, start: u64) -> Result<Ints, Error> {
    let array =
        batch.column_by_name("key").ok_or_else(|| Error::MissingColumn("key".into(), "others".into()))?;
    no_nulls(array, "key", start)?;
    Ints::new(array, "key")
}

/// Sample row numbers from a stream with the columns key and (optionally) weight.
///
/// `exclude` is a stream with the column key, of the same type. Returns at most `count` rows (column row, uint64,
/// ascending) and the number of rows to choose from.
#[pyfunction]
#[pyo3(signature = (offline, exclude, *, count, seed, stream))]
pub fn sample(
    py: Python<'_>,
    offline: PyArrowType<RecordBatchStreamReader>,
    exclude: PyArrowType<RecordBatchStreamReader>,
    count: u64,
    seed: u64,
    stream: u64,
) -> PyResult<(PyArrowType<RecordBatch>, u64)> {
    let (rows, candidates) = py
        .detach(|| {
            let batches = read(offline.0, |batch, start| {
                let weights = batch.column_by_name("weight").map(|array| {
                    no_nulls(array, "weight", start)?;
                    Floats::new(array, "weight")
                });
                Ok(Candidates { keys: key_column(batch, start)?, weights: weights.transpose()? })
            })?;
            let mut excluded = HashSet::new();
            read(exclude.0, |batch, start| {
                let keys = key_column(batch, start)?;
                excluded.extend((0..keys.len()).map(|i| keys.ordinal(i)));
                Ok(())
            })?;
            let sampled = core_sample(&batches, &excluded, count, seed, stream)?;
            let rows = Arc::new(UInt64Array::from(sampled.rows)) as ArrayRef;
            let rows = RecordBatch::try_from_iter([("row", rows)])
                .map_err(|error| Error::Read(error.to_string()))?;
            Ok((rows, sampled.candidates))
        })
        .map_err(to_python)?;
    Ok((PyArrowType(rows), candidates))
}
