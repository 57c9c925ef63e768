//! `sample`: seeded sampling of offline rows.

use std::collections::HashSet;

use arrow_array::ffi_stream::RecordBatchStreamReader;
use arrow_array::{ArrayRef, RecordBatch, UInt64Array};
use arrow_pyarrow::PyArrowType;
use dice_core::Error;
use dice_core::columns::no_nulls;
use dice_core::numbers::{Floats, Ints};
use dice_core::replay::{Candidates, sample as core_sample};
use pyo3::prelude::*;
use std::sync::Arc;

use crate::to_python;

fn read<T>(
    stream: RecordBatchStreamReader,
    mut each: impl FnMut(&RecordBatch, u64) -> Result<T, Error>,
) -> Result<Vec<T>, Error> {
    let mut start = 0;
    stream
        .map(|batch| {
            let batch = batch.map_err(|error| Error::Read(error.to_string()))?;
            let found = each(&batch, start)?;
            start += batch.num_rows() as u64;
            Ok(found)
        })
        .collect()
}

fn key_column(batch: &RecordBatch, start: u64) -> Result<Ints, Error> {
    let array =
        batch.column_by_name("key").ok_or_else(|| Error::MissingColumn("key".into(), "others".into()))?;
    no_nulls(array, "key", start)?;
    Ints::new(array, "key")
}

/// Sample row numbers from a stream of the columns key and (optionally) weight.
///
/// `exclude` is a stream of the column key, of the same type. Returns the rows (column row, uint64,
/// ascending), at most `count`, and how many there were to choose from.
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
            let found = core_sample(&batches, &excluded, count, seed, stream)?;
            let rows = Arc::new(UInt64Array::from(found.rows)) as ArrayRef;
            let rows = RecordBatch::try_from_iter([("row", rows)])
                .map_err(|error| Error::Read(error.to_string()))?;
            Ok((rows, found.candidates))
        })
        .map_err(to_python)?;
    Ok((PyArrowType(rows), candidates))
}
