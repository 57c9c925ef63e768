//! A pass over all rows of an input, in the layout that its rows have.

use crate::error::Error;
use crate::input::block::{Source, Stop};
use crate::input::columns::Columns;
use crate::input::layout::Layout;
use crate::input::records::Records;

/// A pass over all rows, in any layout.
pub(crate) trait RowPass {
    /// The result of the pass.
    type Output;

    /// Does the pass. May be called again with another layout.
    ///
    /// # Errors
    /// [`Stop`] if the pass cannot be completed in this layout.
    fn run<S: Source>(&mut self, source: &S, layout: &Layout) -> Result<Self::Output, Stop>;

    /// Corrects the counts of rows that were dropped while the records were written.
    fn correct(output: &mut Self::Output, records: &Records);
}

/// Runs a pass over an input, in the cheapest layout that its rows allow.
///
/// # Errors
/// The first invalid length; too many rows to sort.
pub(crate) fn run_pass<P: RowPass>(columns: &Columns, mut pass: P) -> Result<P::Output, Error> {
    let explain = |stop| match stop {
        Stop::InvalidLength => columns.invalid_length(),
        Stop::KeyOrder => Error::Read("the prompts changed while they were read".into()),
        Stop::PromptTooLarge => {
            Error::Usage("a prompt has 4294967295 rows or more, which cannot be mined: drop some".into())
        }
    };
    if Layout::seems_in_order(columns) {
        match pass.run(columns, &Layout::InOrder) {
            Err(Stop::KeyOrder) => {}
            other => return other.map_err(explain),
        }
    }
    if let Some(layout) = Layout::runs(columns) {
        return pass.run(columns, &layout).map_err(explain);
    }
    let records = Records::new(columns)?;
    let mut output = pass.run(&records, &Layout::InOrder).map_err(explain)?;
    P::correct(&mut output, &records);
    Ok(output)
}
