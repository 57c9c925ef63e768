//! The Python module `dice_py._native`: conversions and errors, nothing else.
//!
//! Arrow streams come in by the PyCapsule interface and are read with the interpreter released;
//! `dice_py/mine.py` and `dice_py/replay.py` are what people call.

mod mining;
mod replay;

use dice_core::Error;
use pyo3::prelude::*;

mod errors {
    pyo3::import_exception!(dice_py.errors, DataError);
    pyo3::import_exception!(dice_py.errors, UsageError);
}

/// The Python exception of an error: its sentence, and the class that carries the exit code.
fn to_python(error: Error) -> PyErr {
    match error {
        Error::Usage(_) => errors::UsageError::new_err(error.to_string()),
        _ => errors::DataError::new_err(error.to_string()),
    }
}

#[pymodule(gil_used = false)]
mod _native {
    #[pymodule_export]
    use crate::mining::{MineSummary, SegmentMiner, addresses, mine};
    #[pymodule_export]
    use crate::replay::sample;
}
