//! Responses of equal reward: which of them is taken, and how many pairs they would have made.
//!
//! Two responses of equal reward are no preference, so they never form a pair. Where several responses of equal reward
//! are the best or the worst of a prompt, a hash decides, since a fixed choice (the shorter, the first) would be a bias:
//!
//! ```text
//! hash(seed, prompt, row) = m(m(m(seed) ^ prompt) ^ row)        m: splitmix64
//! ```
//!
//! The least hash is taken, then the lower row. `prompt` is the key as a 64-bit two's complement number (for keys that
//! are no integers, their rank among those of the input), `row` the number of the row among those of its prompt, from
//! zero in the order of the input. So the choice depends neither on batches, files, segments or threads nor on the
//! other prompts.

use std::collections::HashMap;

use crate::input::filter::Response;

/// The hash of the responses of one prompt.
#[derive(Debug, Clone, Copy, Default)]
pub struct TieHash {
    salt: u64,
    /// [`Response::row`] of the prompt's first row.
    start: u64,
}

impl TieHash {
    /// For the prompt `key`, whose first row has [`Response::row`] `start`.
    #[inline]
    pub fn new(seed: u64, key: u64, start: u32) -> Self {
        Self { salt: splitmix64(splitmix64(seed) ^ key), start: u64::from(start) }
    }

    /// What decides among responses of equal reward: the least is taken.
    #[inline]
    pub fn rank(self, response: &Response) -> (u64, u64) {
        (splitmix64(self.salt ^ response.row.wrapping_sub(self.start)), response.row)
    }
}

/// The generator of Steele, Lea and Flood (2014, doi 10.1145/2660193.2660195), as a hash of one number.
#[inline]
pub fn splitmix64(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The number of pairs of two responses of equal reward, one from each list, without regard to order. The lists may
/// share responses.
pub(crate) fn count_tied(chosen: &[Response], rejected: &[Response]) -> u64 {
    let mut tagged: Vec<(u64, u64, u8)> = Vec::with_capacity(chosen.len() + rejected.len());
    for (side, responses) in [(1, chosen), (2, rejected)] {
        tagged.extend(responses.iter().map(|response| (bits(response.raw), response.row, side)));
    }
    tagged.sort_unstable();
    let mut pairs = 0;
    for equal in tagged.chunk_by(|a, b| a.0 == b.0) {
        let on = |side: u8| equal.iter().filter(|entry| entry.2 == side).count() as u64;
        let shared = equal.windows(2).filter(|pair| pair[0].1 == pair[1].1).count() as u64;
        // A response is no pair with itself, and two that are in both lists meet twice.
        pairs += on(1) * on(2) - shared - shared * shared.saturating_sub(1) / 2;
    }
    pairs
}

/// Whether a response of one list has the reward of another response of the other list.
pub(crate) fn any_tied(chosen: &[Response], rejected: &[Response]) -> bool {
    let mut rows = HashMap::<u64, (u64, bool)>::new();
    for response in rejected {
        rows.entry(bits(response.raw)).and_modify(|entry| entry.1 = true).or_insert((response.row, false));
    }
    chosen.iter().any(|response| {
        rows.get(&bits(response.raw)).is_some_and(|&(row, several)| several || row != response.row)
    })
}

/// Equal for equal rewards: −0 and +0 are one.
fn bits(reward: f64) -> u64 {
    (reward + 0.0).to_bits()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn splitmix64_is_the_published_one() {
        // The first output from state 0.
        assert_eq!(splitmix64(0), 0xe220_a839_7b1d_cdaf);
    }

    fn responses(rewards: &[(i32, u64)]) -> Vec<Response> {
        let response = |&(reward, row): &(i32, u64)| {
            let raw = f64::from(reward) * if row % 2 == 0 { 1.0 } else { -1.0 };
            Response { score: raw, raw, row, length: 1 }
        };
        rewards.iter().map(response).collect()
    }

    proptest! {
        #[test]
        fn tied_pairs_are_counted_once(rewards in prop::collection::vec(-1i32..2, 0..12), cuts in (0usize..12, 0usize..12)) {
            let all: Vec<(i32, u64)> = rewards.iter().copied().zip(0..).collect();
            let all = responses(&all);
            let (chosen, rejected) = (&all[..cuts.0.min(all.len())], &all[cuts.1.min(all.len())..]);
            let mut expected = std::collections::BTreeSet::new();
            for a in chosen {
                for b in rejected.iter().filter(|b| b.row != a.row && b.raw == a.raw) {
                    expected.insert((a.row.min(b.row), a.row.max(b.row)));
                }
            }
            prop_assert_eq!(count_tied(chosen, rejected), expected.len() as u64);
            prop_assert_eq!(any_tied(chosen, rejected), !expected.is_empty());
        }
    }
}
