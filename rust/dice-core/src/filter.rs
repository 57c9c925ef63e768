//! Which rows are usable, and a count of the others by the first reason that applies.
//!
//! | order | reason | a row is dropped when |
//! | --- | --- | --- |
//! | 1 | `null` | its reward or its length is null |
//! | 2 | `not_finite` | its reward is NaN, infinite, or beyond float32, in which pairs are stored |
//! | 3 | `truncated` | it was cut off by the token limit |
//! | 4 | `too_short` | its length is under `min_length` |
//! | 5 | `too_long` | its length is over `max_length` |
//! | 6 | `duplicate` | it equals a response of its prompt that none of these dropped, on a lower row |
//! | 7 | `too_few_responses` | its prompt has fewer than `min_responses` rows that none of these dropped |

/// One usable response.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// What is compared: the reward, or the reward adjusted by its length bucket. Finite.
    pub score: f64,
    /// The reward as it came in.
    pub raw: f64,
    /// Row number over all batches.
    pub row: u64,
    /// Length in the unit of the input.
    pub length: u32,
}

/// Bounds on the length; both ends are kept.
#[derive(Debug, Clone, Copy, Default)]
pub struct Filter {
    /// The shortest response that is kept.
    pub min_length: Option<u32>,
    /// The longest response that is kept.
    pub max_length: Option<u32>,
}

/// Rows dropped, by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Reward or length null.
    pub null: u64,
    /// Reward NaN, infinite or beyond float32.
    pub not_finite: u64,
    /// Cut off by the token limit.
    pub truncated: u64,
    /// Under `min_length`.
    pub too_short: u64,
    /// Over `max_length`.
    pub too_long: u64,
    /// Equal to a response of the prompt that is kept.
    pub duplicate: u64,
    /// Usable, but on a prompt with too few usable responses.
    pub too_few_responses: u64,
}

impl Dropped {
    /// Adds another count.
    pub fn add(&mut self, other: &Self) {
        self.null += other.null;
        self.not_finite += other.not_finite;
        self.truncated += other.truncated;
        self.too_short += other.too_short;
        self.too_long += other.too_long;
        self.duplicate += other.duplicate;
        self.too_few_responses += other.too_few_responses;
    }
}

/// A length that is negative or needs more than 32 bits was met; see
/// [`Columns::bad_length`](crate::Columns::bad_length).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadLength;
