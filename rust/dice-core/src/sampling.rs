//! Seeded sampling of offline rows without replacement.
//!
//! The generator is ChaCha8 with a seed ([`seed_from_u64`](rand::SeedableRng::seed_from_u64)) and a stream number. One
//! thread draws row numbers from it, so the result depends neither on threads nor on batches.

use std::collections::HashSet;

use rand::SeedableRng;
use rand::seq::index;
use rand_chacha::ChaCha8Rng;

use crate::error::Error;
use crate::input::numbers::{Floats, Int, Ints, with_ints};

/// Rows to sample from, in one batch.
#[derive(Debug, Clone)]
pub struct Candidates {
    /// Prompt keys.
    pub keys: Ints,
    /// Weights; `None`: all rows have the same weight.
    pub weights: Option<Floats>,
}

/// The result of [`sample`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// Row numbers over all batches, ascending.
    pub rows: Vec<u64>,
    /// Number of rows to draw from: not excluded, and with a weight above zero.
    pub candidates: u64,
}

/// Draws `count` rows without replacement, or all rows if there are fewer.
///
/// Rows whose key ([`Int::ordinal`]) is in `exclude` are never drawn. Without weights, every set of rows is equally
/// likely. With weights, rows are drawn one after another, each with a probability proportional to its weight among the
/// remaining rows: algorithm A-ExpJ (Efraimidis and Spirakis, 2006, doi 10.1016/j.ipl.2005.11.003), as implemented in
/// `rand`.
///
/// # Errors
/// [`Error::Weight`] for a weight of any row that is negative, NaN or infinite.
pub fn sample(
    batches: &[Candidates],
    exclude: &HashSet<u64>,
    count: u64,
    seed: u64,
    stream: u64,
) -> Result<Sample, Error> {
    let (mut rows, weights) = candidates(batches, exclude)?;
    let candidates = rows.len() as u64;
    if count < candidates {
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        generator.set_stream(stream);
        let count = count as usize;
        let drawn = if weights.is_empty() {
            index::sample(&mut generator, rows.len(), count)
        } else {
            // Only ratios matter. With a greatest weight of 1, no key of A-ExpJ overflows.
            let greatest = weights.iter().copied().fold(0.0, f64::max);
            let weight = |i: usize| (weights[i] / greatest).max(f64::MIN_POSITIVE);
            index::sample_weighted(&mut generator, rows.len(), weight, count)
                .map_err(|error| Error::Read(format!("the weights could not be used: {error}")))?
        };
        rows = drawn.iter().map(|i| rows[i]).collect();
        rows.sort_unstable();
    }
    Ok(Sample { rows, candidates })
}

/// Row numbers and weights of the rows to draw from. The weights are empty if the input has none.
fn candidates(batches: &[Candidates], exclude: &HashSet<u64>) -> Result<(Vec<u64>, Vec<f64>), Error> {
    let mut rows = Vec::new();
    let mut weights = Vec::new();
    let mut start = 0;
    for batch in batches {
        if let Some(values) = &batch.weights {
            for i in 0..batch.keys.len() {
                let value = values.get(i);
                if !(value.is_finite() && value >= 0.0) {
                    return Err(Error::Weight { row: start + i as u64, value });
                }
            }
        }
        with_ints!(&batch.keys, keys => for (i, key) in keys.iter().enumerate() {
            let weight = batch.weights.as_ref().map_or(1.0, |values| values.get(i));
            if weight > 0.0 && !exclude.contains(&key.ordinal()) {
                rows.push(start + i as u64);
                if batch.weights.is_some() {
                    weights.push(weight);
                }
            }
        });
        start += batch.keys.len() as u64;
    }
    Ok((rows, weights))
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow_buffer::ScalarBuffer;

    fn batches(keys: &[u32], weights: Option<&[f64]>, size: usize) -> Vec<Candidates> {
        let weights = |i: usize| weights.map(|w| w.chunks(size).nth(i).unwrap_or(&[]).to_vec());
        keys.chunks(size)
            .enumerate()
            .map(|(i, keys)| Candidates {
                keys: Ints::U32(ScalarBuffer::from(keys.to_vec())),
                weights: weights(i).map(|w| Floats::F64(ScalarBuffer::from(w))),
            })
            .collect()
    }

    #[test]
    fn batches_do_not_matter_but_the_stream_does() {
        let keys: Vec<u32> = (0..1000).collect();
        let none = HashSet::new();
        let expected = sample(&batches(&keys, None, 1000), &none, 5, 42, 0).unwrap();
        assert_eq!(expected, sample(&batches(&keys, None, 7), &none, 5, 42, 0).unwrap());
        assert_ne!(expected, sample(&batches(&keys, None, 7), &none, 5, 42, 1).unwrap());
        assert_eq!(expected.rows.len(), 5);
    }

    #[test]
    fn excluded_keys_and_zero_weights_are_never_drawn() {
        let weights = [1.0, 0.0, 1.0, 1.0];
        let batches = batches(&[5, 6, 7, 5], Some(&weights), 3);
        let sampled = sample(&batches, &HashSet::from([5]), 9, 0, 0).unwrap();
        assert_eq!(sampled, Sample { rows: vec![2], candidates: 1 });
    }

    #[test]
    fn rows_are_drawn_in_proportion_to_weights() {
        // Rows with weight 3 are drawn about three times as often as those with weight 1.
        let keys: Vec<u32> = (0..4).collect();
        let batches = batches(&keys, Some(&[1.0, 3.0, 1.0, 3.0]), 4);
        let heavy = (0..4000)
            .filter(|&seed| sample(&batches, &HashSet::new(), 1, seed, 0).unwrap().rows[0] % 2 == 1)
            .count();
        // The expectation is 3000, the standard deviation 27.
        assert!((2850..3150).contains(&heavy), "{heavy}");
    }

    #[test]
    fn any_range_of_weights_works() {
        let keys: Vec<u32> = (0..300).collect();
        let weights: Vec<f64> = (0..300).map(|i| 10f64.powi(2 * i - 300)).collect();
        let sampled = sample(&batches(&keys, Some(&weights), 64), &HashSet::new(), 10, 1, 0).unwrap();
        assert_eq!(sampled.rows.len(), 10);
    }

    #[test]
    fn invalid_weights_are_reported_with_their_row() {
        for bad in [-1.0, f64::NAN, f64::INFINITY] {
            let batches = batches(&[1, 2, 3], Some(&[1.0, 1.0, bad]), 2);
            match sample(&batches, &HashSet::new(), 1, 0, 0) {
                Err(Error::Weight { row: 2, .. }) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}
