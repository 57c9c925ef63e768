//! The pairs, as columns that are filled on the way.

use std::sync::Arc;

use arrow_array::{ArrayRef, Float32Array, RecordBatch, UInt32Array, UInt64Array};
use arrow_schema::{Field, Schema};

use rayon::prelude::*;

use crate::Error;
use crate::numbers::Ints;
use crate::select::{difference, stored};

/// Pairs of some prompts, by ascending key.
#[derive(Debug, Default)]
pub struct Table {
    /// [`Int::ordinal`](crate::numbers::Int::ordinal) of the prompt keys.
    pub keys: Vec<u64>,
    /// Row numbers.
    pub chosen_row: Vec<u64>,
    /// Row numbers.
    pub rejected_row: Vec<u64>,
    /// Rewards as they came in, rounded to float32.
    pub chosen_reward: Vec<f32>,
    /// Rewards as they came in, rounded to float32.
    pub rejected_reward: Vec<f32>,
    /// Differences of score, where it is not that of the rewards above less the penalty.
    pub margin: Vec<f32>,
    /// Rewards as they came in, where they are not float32: chosen, rejected.
    pub wide: Vec<[f64; 2]>,
    /// Lengths.
    pub chosen_length: Vec<u32>,
    /// Lengths.
    pub rejected_length: Vec<u32>,
    /// Win rates (chosen, rejected), where they were asked for.
    pub win_rates: Option<[Vec<f32>; 2]>,
    /// Consistency of each pair's prompt (NaN: null), where it was asked for.
    pub consistency: Option<Vec<f32>>,
}

impl Table {
    /// Number of pairs.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Σ (|chosen| − |rejected|)
    pub fn gap(&self) -> i128 {
        let lengths = self.chosen_length.iter().zip(&self.rejected_length);
        lengths.map(|(&chosen, &rejected)| i128::from(chosen) - i128::from(rejected)).sum()
    }

    /// Sets the margins to the differences of `reward − alpha · length`.
    pub fn penalise(&mut self, alpha: f64) {
        let longer = |i: usize| i64::from(self.chosen_length[i]) - i64::from(self.rejected_length[i]);
        let pairs = 0..self.len();
        self.margin = if self.wide.is_empty() {
            let (chosen, rejected) = (&self.chosen_reward, &self.rejected_reward);
            pairs
                .map(|i| stored(difference(f64::from(chosen[i]), f64::from(rejected[i]), longer(i), alpha)))
                .collect()
        } else {
            pairs.map(|i| stored(difference(self.wide[i][0], self.wide[i][1], longer(i), alpha))).collect()
        };
    }

    /// The columns, with keys of the type of `like`.
    pub fn finish(self, like: &Ints) -> (Arc<Schema>, Vec<ArrayRef>) {
        let key = like.from_ordinals(&self.keys);
        let mut fields = vec![Field::new("prompt", key.data_type().clone(), false)];
        let mut columns = vec![key];
        let mut add = |name: &str, column: ArrayRef| {
            fields.push(Field::new(name, column.data_type().clone(), name == "consistency"));
            columns.push(column);
        };
        add("chosen_row", Arc::new(UInt64Array::from(self.chosen_row)));
        add("rejected_row", Arc::new(UInt64Array::from(self.rejected_row)));
        add("chosen_reward", Arc::new(Float32Array::from(self.chosen_reward)));
        add("rejected_reward", Arc::new(Float32Array::from(self.rejected_reward)));
        add("margin", Arc::new(Float32Array::from(self.margin)));
        add("chosen_length", Arc::new(UInt32Array::from(self.chosen_length)));
        add("rejected_length", Arc::new(UInt32Array::from(self.rejected_length)));
        if let Some([chosen, rejected]) = self.win_rates {
            add("chosen_win_rate", Arc::new(Float32Array::from(chosen)));
            add("rejected_win_rate", Arc::new(Float32Array::from(rejected)));
        }
        if let Some(consistency) = self.consistency {
            let column: Float32Array =
                consistency.into_iter().map(|value| (!value.is_nan()).then_some(value)).collect();
            add("consistency", Arc::new(column));
        }
        (Arc::new(Schema::new(fields)), columns)
    }
}

/// One batch a table, with keys of the type of `like`.
///
/// # Errors
/// [`Error::Read`] if the columns do not fit.
pub fn batches(tables: Vec<Table>, like: &Ints) -> Result<Vec<RecordBatch>, Error> {
    tables
        .into_par_iter()
        .map(|table| {
            let (schema, columns) = table.finish(like);
            RecordBatch::try_new(schema, columns).map_err(|error| Error::Read(error.to_string()))
        })
        .collect()
}
