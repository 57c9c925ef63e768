//! Which responses of a prompt count, and which of them may be chosen or rejected.
//!
//! - **Duplicates**: of a prompt's usable responses with equal values in the column `duplicate`, only the one on the
//!   lowest row counts. Nulls are never equal.
//! - **Pools**: with a column `policy`, the chosen response can be restricted to the newest (greatest) or the oldest
//!   (least) policy among the prompt's usable responses. So can the rejected one.

use std::collections::HashSet;

use crate::input::block::Block;
use crate::input::columns::Columns;
use crate::input::filter::{Dropped, Response};

/// Which policies a response may come from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PickFrom {
    /// Any policy.
    #[default]
    Any,
    /// The greatest policy number of the prompt.
    Newest,
    /// The least policy number of the prompt.
    Oldest,
}

/// Which responses count, and on which side.
#[derive(Debug, Clone, Copy)]
pub struct Pool<'a> {
    /// The input, whose columns `duplicate` and `policy` are read by row number.
    pub columns: &'a Columns,
    /// Policies of the chosen response.
    pub chosen: PickFrom,
    /// Policies of the rejected response.
    pub rejected: PickFrom,
}

/// The responses of one prompt. [`Response::row`] is the offset in the block, which grows with the row
/// number.
#[derive(Debug, Default)]
pub struct Group {
    /// All usable responses.
    pub all: Vec<Response>,
    /// Responses that may be chosen.
    pub chosen: Vec<Response>,
    /// Responses that may be rejected.
    pub rejected: Vec<Response>,
    /// Values of the column `duplicate` so far.
    seen: HashSet<u64>,
}

impl Pool<'_> {
    /// Whether every usable response counts, on both sides.
    pub fn is_unrestricted(&self) -> bool {
        self.any_policy() && self.columns.batches.iter().all(|batch| batch.duplicate.is_none())
    }

    /// Whether every response that counts may be on both sides: no restriction of policies.
    pub fn any_policy(&self) -> bool {
        self.chosen == PickFrom::Any && self.rejected == PickFrom::Any
    }

    /// Fills a group with the responses of a prompt, and counts duplicates.
    pub fn fill(&self, block: &Block, prompt: usize, group: &mut Group, dropped: &mut Dropped) {
        block.gather(prompt, &mut group.all);
        let locate = |response: &Response| self.columns.locate(block.row(prompt, response.row as usize));
        if !self.columns.batches.is_empty() && self.columns.batches[0].duplicate.is_some() {
            let before = group.all.len();
            group.seen.clear();
            group.all.retain(|response| {
                let (batch, i) = locate(response);
                match &batch.duplicate {
                    Some((hashes, valid)) if valid.as_ref().is_none_or(|valid| valid.is_valid(i)) => {
                        group.seen.insert(hashes.ordinal(i))
                    }
                    _ => true,
                }
            });
            dropped.duplicate += (before - group.all.len()) as u64;
        }
        group.chosen.clone_from(&group.all);
        group.rejected.clone_from(&group.all);
        if self.any_policy() {
            return;
        }
        let policy = |response: &Response| {
            let (batch, i) = locate(response);
            batch.policy.as_ref().map_or(0, |policies| policies.ordinal(i))
        };
        let newest = group.all.iter().map(policy).max();
        let oldest = group.all.iter().map(policy).min();
        for (from, responses) in [(self.chosen, &mut group.chosen), (self.rejected, &mut group.rejected)] {
            let policies = match from {
                PickFrom::Any => continue,
                PickFrom::Newest => newest,
                PickFrom::Oldest => oldest,
            };
            responses.retain(|response| Some(policy(response)) == policies);
        }
    }
}
