//! Seeded inputs for the benches: rewards that grow with length, as implicit rewards do.

use std::sync::Arc;

use arrow_array::{ArrayRef, Float32Array, RecordBatch, UInt32Array};
use dice_core::Columns;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Whether the rows of a prompt are contiguous.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Rows sorted by prompt.
    Grouped,
    /// Rows in random order.
    Shuffled,
}

/// Number of responses per prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Responses {
    /// The same number for every prompt.
    Each(usize),
    /// 1 to 40 responses.
    Ragged,
}

/// About `rows` rows: u32 keys, f32 rewards, u32 lengths of 20 to 2000, in one batch.
pub fn columns(rows: usize, responses: Responses, order: Order, seed: u64) -> Columns {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let mut keys: Vec<u32> = Vec::with_capacity(rows + 64);
    let mut prompt = 0;
    while keys.len() < rows {
        let count = match responses {
            Responses::Each(count) => count,
            Responses::Ragged => generator.random_range(1..=40),
        };
        keys.extend(std::iter::repeat_n(prompt, count));
        prompt += 1;
    }
    if order == Order::Shuffled {
        keys.shuffle(&mut generator);
    }
    let lengths: Vec<u32> = keys.iter().map(|_| generator.random_range(20..2000)).collect();
    let rewards = lengths.iter().map(|&length| generator.random_range(-1.0f32..1.0) + length as f32 * 1e-3);
    let rewards: Vec<f32> = rewards.collect();
    let batch = RecordBatch::try_from_iter([
        ("prompt", Arc::new(UInt32Array::from(keys)) as ArrayRef),
        ("reward", Arc::new(Float32Array::from(rewards))),
        ("length", Arc::new(UInt32Array::from(lengths))),
    ]);
    Columns::new([batch]).expect("three columns of equal length")
}
