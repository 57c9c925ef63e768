//! Which rows are usable, and counts of the dropped rows by the first reason that applies.
//!
//! | order | reason | a row is dropped when |
//! | --- | --- | --- |
//! | 1 | `null` | its reward or its length is null |
//! | 2 | `not_finite` | its reward is NaN, infinite, or beyond the range of float32, the type of the stored pairs |
//! | 3 | `truncated` | it was cut off by the token limit |
//! | 4 | `too_short` | its length is under `min_length` |
//! | 5 | `too_long` | its length is over `max_length` |
//! | 6 | `duplicate` | it equals a kept response of its prompt on a lower row |
//! | 7 | `too_few_responses` | its prompt has fewer than `min_responses` rows left |

/// One usable response.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Response {
    /// The score that is compared: the reward, or the reward adjusted for length. Finite.
    pub score: f64,
    /// The reward of the input.
    pub raw: f64,
    /// Row number over all batches.
    pub row: u64,
    /// Length in the unit of the input.
    pub length: u32,
}

/// Bounds on the length, both inclusive.
#[derive(Debug, Clone, Copy, Default)]
pub struct Filter {
    /// The shortest response that is kept.
    pub min_length: Option<u32>,
    /// The longest response that is kept.
    pub max_length: Option<u32>,
}

/// Numbers of dropped rows, by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Reward or length null.
    pub null: u64,
    /// Reward NaN, infinite or beyond the range of float32.
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
    /// Adds the counts of other rows.
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

/// A length is negative or needs more than 32 bits;
/// [`Columns::invalid_length`](crate::input::columns::Columns::invalid_length) finds the row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InvalidLength;
