//! Seeded sampling of offline rows without replacement.
//!
//! The generator is ChaCha8, seeded by [`seed_from_u64`](rand::SeedableRng::seed_from_u64) and a stream
//! number; it is drawn from by one thread, over row numbers alone, so that neither threads nor batches
//! can change the result.

use std::collections::HashSet;

use rand::SeedableRng;
use rand::seq::index;
use rand_chacha::ChaCha8Rng;

use crate::Error;
use crate::numbers::{Floats, Int, Ints, with_ints};

/// Rows to sample from, in one batch.
#[derive(Debug, Clone)]
pub struct Candidates {
    /// Prompt keys.
    pub keys: Ints,
    /// Weights; `None`: all equal.
    pub weights: Option<Floats>,
}

/// What [`sample`] gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// Row numbers over all batches, ascending.
    pub rows: Vec<u64>,
    /// Rows that could have been drawn: not left out, and of a weight above zero.
    pub candidates: u64,
}

/// Draws `count` of the rows without replacement, or all that there are if they are fewer.
///
/// Rows whose key ([`Int::ordinal`]) is in `exclude` are left out. Without
/// weights every set of rows is equally likely. With them, the rows are drawn one after another, each with
/// probability in proportion to its weight among those that are left: algorithm A-ExpJ (Efraimidis and
/// Spirakis, 2006, doi 10.1016/j.ipl.2005.11.003), as `rand` has it.
///
/// # Errors
/// [`Error::Weight`] for a weight that is negative, NaN or infinite, of any row.
pub fn sample(
    batches: &[Candidates],
    exclude: &HashSet<u64>,
    count: u64,
    seed: u64,
    stream: u64,
) -> Result<Sample, Error> {
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
    let candidates = rows.len() as u64;
    if count < candidates {
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        generator.set_stream(stream);
        let count = count as usize;
        let mut drawn: Vec<u64> = if weights.is_empty() {
            index::sample(&mut generator, rows.len(), count).iter().map(|i| rows[i]).collect()
        } else {
            // Only ratios matter; with the greatest weight at 1, no key of A-ExpJ can overflow.
            let greatest = weights.iter().copied().fold(0.0, f64::max);
            let weight = |i: usize| (weights[i] / greatest).max(f64::MIN_POSITIVE);
            index::sample_weighted(&mut generator, rows.len(), weight, count)
                .map_err(|error| Error::Read(format!("the weights could not be used: {error}")))?
                .iter()
                .map(|i| rows[i])
                .collect()
        };
        drawn.sort_unstable();
        rows = drawn;
    }
    Ok(Sample { rows, candidates })
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
    fn batches_do_not_matter_and_the_generator_is_this_one() {
        let keys: Vec<u32> = (0..1000).collect();
        let none = HashSet::new();
        let whole = sample(&batches(&keys, None, 1000), &none, 5, 42, 0).unwrap();
        assert_eq!(whole, sample(&batches(&keys, None, 7), &none, 5, 42, 0).unwrap());
        assert_ne!(whole, sample(&batches(&keys, None, 7), &none, 5, 42, 1).unwrap());
        assert_eq!(whole.rows.len(), 5);
    }

    #[test]
    fn leaves_out_excluded_keys_and_zero_weights() {
        let weights = [1.0, 0.0, 1.0, 1.0];
        let of = batches(&[5, 6, 7, 5], Some(&weights), 3);
        let found = sample(&of, &HashSet::from([5]), 9, 0, 0).unwrap();
        assert_eq!(found, Sample { rows: vec![2], candidates: 1 });
    }

    #[test]
    fn weights_are_followed() {
        // Rows of weight 3 are drawn about three times as often as those of weight 1.
        let keys: Vec<u32> = (0..4).collect();
        let of = batches(&keys, Some(&[1.0, 3.0, 1.0, 3.0]), 4);
        let heavy = (0..4000)
            .filter(|&seed| sample(&of, &HashSet::new(), 1, seed, 0).unwrap().rows[0] % 2 == 1)
            .count();
        // 3000 expected, standard deviation 27.
        assert!((2850..3150).contains(&heavy), "{heavy}");
    }

    #[test]
    fn any_range_of_weights_is_fine() {
        let keys: Vec<u32> = (0..300).collect();
        let weights: Vec<f64> = (0..300).map(|i| 10f64.powi(2 * i - 300)).collect();
        let found = sample(&batches(&keys, Some(&weights), 64), &HashSet::new(), 10, 1, 0).unwrap();
        assert_eq!(found.rows.len(), 10);
    }

    #[test]
    fn bad_weights_are_named() {
        for bad in [-1.0, f64::NAN, f64::INFINITY] {
            let of = batches(&[1, 2, 3], Some(&[1.0, 1.0, bad]), 2);
            match sample(&of, &HashSet::new(), 1, 0, 0) {
                Err(Error::Weight { row: 2, .. }) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}
