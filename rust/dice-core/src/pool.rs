//! The responses of one prompt that count, and those that may be chosen or rejected.
//!
//! - **Duplicates**: of the usable responses of a prompt with equal values in the column `duplicate` only the one on
//!   the lowest row counts. A null equals nothing.
//! - **Pools**: with a column `policy`, the chosen response may be held to those of the newest (greatest) or the oldest
//!   (least) policy among the prompt's usable responses, and the rejected one too.

use std::collections::HashSet;

use crate::Columns;
use crate::block::Block;
use crate::filter::{Dropped, Point};

/// Responses of which policy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PickFrom {
    /// Any.
    #[default]
    Any,
    /// The greatest.
    Newest,
    /// The least.
    Oldest,
}

/// Which responses count, and on which side.
#[derive(Debug, Clone, Copy)]
pub struct Pool<'a> {
    /// The input, in which the columns `duplicate` and `policy` are looked up by row number.
    pub columns: &'a Columns,
    /// Where the chosen response may come from.
    pub chosen: PickFrom,
    /// Where the rejected response may come from.
    pub rejected: PickFrom,
}

/// The responses of one prompt. [`Point::row`] is the place in the block, which rises with the row number.
#[derive(Debug, Default)]
pub struct Group {
    /// All that are usable.
    pub all: Vec<Point>,
    /// Those that may be chosen.
    pub chosen: Vec<Point>,
    /// Those that may be rejected.
    pub rejected: Vec<Point>,
    seen: HashSet<u64>,
}

impl Pool<'_> {
    /// Whether every usable response counts, on both sides.
    pub fn everything(&self) -> bool {
        self.one_pool() && self.columns.batches.iter().all(|batch| batch.duplicate.is_none())
    }

    /// Whether every response that counts may be on both sides.
    pub fn one_pool(&self) -> bool {
        self.chosen == PickFrom::Any && self.rejected == PickFrom::Any
    }

    /// Replaces a group by a prompt of a block, and counts duplicates.
    pub fn fill(&self, block: &Block, prompt: usize, group: &mut Group, dropped: &mut Dropped) {
        block.gather(prompt, &mut group.all);
        let locate = |point: &Point| self.columns.locate(block.row(prompt, point.row as usize));
        if !self.columns.batches.is_empty() && self.columns.batches[0].duplicate.is_some() {
            let before = group.all.len();
            group.seen.clear();
            group.all.retain(|point| {
                let (batch, i) = locate(point);
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
        if self.one_pool() {
            return;
        }
        let policy = |point: &Point| {
            let (batch, i) = locate(point);
            batch.policy.as_ref().map_or(0, |policies| policies.ordinal(i))
        };
        let newest = group.all.iter().map(policy).max();
        let oldest = group.all.iter().map(policy).min();
        for (from, points) in [(self.chosen, &mut group.chosen), (self.rejected, &mut group.rejected)] {
            let held = match from {
                PickFrom::Any => continue,
                PickFrom::Newest => newest,
                PickFrom::Oldest => oldest,
            };
            points.retain(|point| Some(policy(point)) == held);
        }
    }
}
