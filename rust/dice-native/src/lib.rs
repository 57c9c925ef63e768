//! The Python module `dice_py._native`: conversions and errors, nothing else.
//!
//! Arrow streams are passed by the PyCapsule interface and read with the interpreter released. The public functions are
//! in `dice_py/mining/` and `dice_py/replay/`.

mod mining;
mod sampling;

use dice_core::Error;
use pyo3::prelude::*;

mod errors {
    pyo3::import_exception!(dice_py.errors, DataError);
    pyo3::import_exception!(dice_py.errors, UsageError);
}

/// The Python exception of an error, with the same message. Its class has the exit code.
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
    use crate::sampling::sample;
}
