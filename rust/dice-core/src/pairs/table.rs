//! The pairs, as columns that the passes fill.

use std::sync::Arc;

use arrow_array::{ArrayRef, Float32Array, RecordBatch, UInt32Array, UInt64Array};
use arrow_schema::{Field, Schema};
use rayon::prelude::*;

use crate::error::Error;
use crate::input::numbers::Ints;
use crate::pairs::order::{difference, saturate_to_f32};

/// Pairs of some prompts, by ascending key.
#[derive(Debug, Default)]
pub struct Table {
    /// [`Int::ordinal`](crate::input::numbers::Int::ordinal) of the prompt keys.
    pub keys: Vec<u64>,
    /// Row numbers of the chosen responses.
    pub chosen_row: Vec<u64>,
    /// Row numbers of the rejected responses.
    pub rejected_row: Vec<u64>,
    /// Rewards of the chosen responses, rounded to float32.
    pub chosen_reward: Vec<f32>,
    /// Rewards of the rejected responses, rounded to float32.
    pub rejected_reward: Vec<f32>,
    /// Differences of score.
    pub margin: Vec<f32>,
    /// Unrounded rewards (chosen, rejected); empty if the input is float32 or the margins are already set.
    pub rewards_f64: Vec<[f64; 2]>,
    /// Lengths of the chosen responses.
    pub chosen_length: Vec<u32>,
    /// Lengths of the rejected responses.
    pub rejected_length: Vec<u32>,
    /// Win rates (chosen, rejected), if they are requested.
    pub win_rates: Option<[Vec<f32>; 2]>,
    /// Consistency of each pair's prompt (NaN: null), if the input has rewards of a second model.
    pub consistency: Option<Vec<f32>>,
}

impl Table {
    /// Number of pairs.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether there are no pairs.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Σ (|chosen| − |rejected|) over the pairs.
    pub fn gap(&self) -> i128 {
        let lengths = self.chosen_length.iter().zip(&self.rejected_length);
        lengths.map(|(&chosen, &rejected)| i128::from(chosen) - i128::from(rejected)).sum()
    }

    /// Sets the margins to the differences of `reward − alpha · length`.
    pub fn set_margins(&mut self, alpha: f64) {
        let length_diff = |i: usize| i64::from(self.chosen_length[i]) - i64::from(self.rejected_length[i]);
        let pairs = 0..self.len();
        self.margin = if self.rewards_f64.is_empty() {
            let (chosen, rejected) = (&self.chosen_reward, &self.rejected_reward);
            let margin =
                |i: usize| difference(f64::from(chosen[i]), f64::from(rejected[i]), length_diff(i), alpha);
            pairs.map(|i| saturate_to_f32(margin(i))).collect()
        } else {
            let rewards = &self.rewards_f64;
            let margin = |i: usize| difference(rewards[i][0], rewards[i][1], length_diff(i), alpha);
            pairs.map(|i| saturate_to_f32(margin(i))).collect()
        };
    }

    /// The columns, with keys of the type of `like`.
    fn into_columns(self, like: &Ints) -> (Arc<Schema>, Vec<ArrayRef>) {
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

/// One batch per table, with keys of the type of `like`.
///
/// # Errors
/// [`Error::Read`] if Arrow rejects the columns.
pub fn batches(tables: Vec<Table>, like: &Ints) -> Result<Vec<RecordBatch>, Error> {
    tables
        .into_par_iter()
        .map(|table| {
            let (schema, columns) = table.into_columns(like);
            RecordBatch::try_new(schema, columns).map_err(|error| Error::Read(error.to_string()))
        })
        .collect()
}
