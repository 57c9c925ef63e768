//! The rows of each prompt.
//!
//! Input in which every prompt's rows lie together is used in place: a group is a range of rows.
//! Other input is detected, and its rows are listed by sorting (key, row) pairs, packed into 64 bits
//! where they fit.
//!
//! Groups are numbered by ascending key, so that the order of rows never shows in the result.

use rayon::prelude::*;

use crate::Columns;
use crate::columns::{Int, with_ints};
use crate::filter::{BadLength, Dropped, Filter, Point};

/// Rows by prompt, prompts by ascending key.
#[derive(Debug)]
pub enum Groups {
    /// Every prompt's rows lie together.
    Contiguous {
        /// First row of each run, in row order, and the number of rows at the end.
        starts: Vec<u64>,
        /// Run numbers by ascending key; `None` if they already ascend.
        order: Option<Vec<u64>>,
    },
    /// Rows listed by key, then by row number.
    Listed {
        /// Row numbers.
        rows: Rows,
        /// Where each prompt's rows start in `rows`, and their number at the end.
        starts: Vec<u64>,
    },
}

/// A list of row numbers, with their keys in front of them as they were sorted.
#[derive(Debug)]
pub enum Rows {
    /// Key (less the least key) in the upper and row in the lower 32 bits.
    Packed(Vec<u64>),
    /// Key and row.
    Wide(Vec<(u64, u64)>),
}

impl Rows {
    #[inline]
    fn row(&self, index: usize) -> u64 {
        match self {
            Self::Packed(rows) => rows[index] & 0xffff_ffff,
            Self::Wide(rows) => rows[index].1,
        }
    }
}

impl Groups {
    /// Finds the groups of the input.
    pub fn new(columns: &Columns) -> Self {
        Self::contiguous(columns).unwrap_or_else(|| Self::listed(columns))
    }

    /// The groups, if each is one run of rows.
    fn contiguous(columns: &Columns) -> Option<Self> {
        let mut starts = Vec::new();
        let mut ascending = true;
        let mut last: Option<u64> = None;
        for batch in &columns.batches {
            with_ints!(&batch.keys, keys => {
                let mut previous = match last {
                    Some(key) => key,
                    None => {
                        starts.push(0);
                        keys[0].ordinal()
                    }
                };
                for (i, key) in keys.iter().enumerate() {
                    let key = key.ordinal();
                    if key != previous {
                        ascending &= key > previous;
                        starts.push(batch.start + i as u64);
                        previous = key;
                    }
                }
                last = Some(previous);
            });
            // Hardly two rows of a prompt together: sorting the rows is the shorter way.
            if !ascending && starts.len() as u64 > columns.rows / 2 {
                return None;
            }
        }
        let order = if ascending {
            None
        } else {
            let mut order: Vec<u64> = (0..starts.len() as u64).collect();
            let key = |run: u64| columns.key(starts[run as usize]);
            order.par_sort_unstable_by_key(|&run| key(run));
            // A prompt of two runs would be two groups.
            if order.par_windows(2).any(|pair| key(pair[0]) == key(pair[1])) {
                return None;
            }
            Some(order)
        };
        starts.push(columns.rows);
        Some(Self::Contiguous { starts, order })
    }

    /// The groups of rows in any order.
    fn listed(columns: &Columns) -> Self {
        let bounds = columns.batches.par_iter().map(|batch| {
            with_ints!(&batch.keys, keys => (
                keys.iter().min().map_or(u64::MAX, |key| key.ordinal()),
                keys.iter().max().map_or(0, |key| key.ordinal()),
            ))
        });
        let (low, high) = bounds.reduce(|| (u64::MAX, 0), |a, b| (a.0.min(b.0), a.1.max(b.1)));
        let narrow = high - low <= u64::from(u32::MAX) && columns.rows <= 1 << 32;
        let (rows, starts) = if narrow {
            let mut rows = Vec::with_capacity(columns.rows as usize);
            for batch in &columns.batches {
                with_ints!(&batch.keys, keys => rows.extend(keys.iter().enumerate().map(
                    |(i, key)| ((key.ordinal() - low) << 32) | (batch.start + i as u64)
                )));
            }
            rows.par_sort_unstable();
            let starts = starts_of(&rows, |row| row >> 32);
            (Rows::Packed(rows), starts)
        } else {
            let mut rows = Vec::with_capacity(columns.rows as usize);
            for batch in &columns.batches {
                with_ints!(&batch.keys, keys => rows.extend(keys.iter().enumerate().map(
                    |(i, key)| (key.ordinal(), batch.start + i as u64)
                )));
            }
            rows.par_sort_unstable();
            let starts = starts_of(&rows, |row: &(u64, u64)| row.0);
            (Rows::Wide(rows), starts)
        };
        Self::Listed { rows, starts }
    }

    /// Number of prompts.
    pub fn len(&self) -> usize {
        match self {
            Self::Contiguous { starts, .. } | Self::Listed { starts, .. } => starts.len() - 1,
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Replaces `points` by the usable rows of a group, and counts the others.
    ///
    /// # Errors
    /// [`BadLength`] if a length of the group is no count of 32 bits.
    #[inline]
    pub fn gather(
        &self,
        group: usize,
        columns: &Columns,
        filter: &Filter,
        dropped: &mut Dropped,
        points: &mut Vec<Point>,
    ) -> Result<(), BadLength> {
        points.clear();
        match self {
            Self::Contiguous { starts, order } => {
                let run = order.as_ref().map_or(group, |order| order[group] as usize);
                let (mut from, to) = (starts[run], starts[run + 1]);
                // A group may straddle batches.
                while from < to {
                    let (batch, index) = columns.locate(from);
                    let count = (batch.len - index).min((to - from) as usize);
                    filter.apply(batch, index..index + count, dropped, |p| points.push(p))?;
                    from += count as u64;
                }
            }
            Self::Listed { rows, starts } => {
                for place in starts[group]..starts[group + 1] {
                    let (batch, index) = columns.locate(rows.row(place as usize));
                    filter.apply(batch, index..index + 1, dropped, |p| points.push(p))?;
                }
            }
        }
        Ok(())
    }

    /// A row of the group.
    #[inline]
    pub fn first_row(&self, group: usize) -> u64 {
        match self {
            Self::Contiguous { starts, order } => {
                starts[order.as_ref().map_or(group, |order| order[group] as usize)]
            }
            Self::Listed { rows, starts } => rows.row(starts[group] as usize),
        }
    }
}

fn starts_of<T>(sorted: &[T], key: impl Fn(&T) -> u64) -> Vec<u64> {
    let mut starts = vec![0];
    let changes = sorted.windows(2).enumerate();
    starts.extend(changes.filter(|(_, pair)| key(&pair[0]) != key(&pair[1])).map(|(i, _)| i as u64 + 1));
    starts.push(sorted.len() as u64);
    starts
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow_array::{ArrayRef, Float32Array, Int64Array, RecordBatch, UInt32Array};
    use std::sync::Arc;

    /// Rows of these keys, in batches of `size`.
    fn columns(keys: &[i64], size: usize) -> Columns {
        Columns::new(keys.chunks(size).map(|keys| {
            RecordBatch::try_from_iter([
                ("prompt", Arc::new(Int64Array::from(keys.to_vec())) as ArrayRef),
                ("reward", Arc::new(Float32Array::from(vec![0.0; keys.len()]))),
                ("length", Arc::new(UInt32Array::from(vec![1; keys.len()]))),
            ])
        }))
        .unwrap()
    }

    /// The rows of each group.
    fn rows(groups: &Groups, columns: &Columns) -> Vec<Vec<u64>> {
        let mut points = Vec::new();
        (0..groups.len())
            .map(|group| {
                let mut dropped = Dropped::default();
                groups.gather(group, columns, &Filter::default(), &mut dropped, &mut points).unwrap();
                assert!(points.iter().any(|point| point.row == groups.first_row(group)));
                points.iter().map(|point| point.row).collect()
            })
            .collect()
    }

    #[test]
    fn grouped_rows_are_used_in_place_across_batches() {
        for size in 1..7 {
            let columns = columns(&[-5, -5, 0, 0, 0, 9], size);
            let groups = Groups::new(&columns);
            assert!(matches!(&groups, Groups::Contiguous { order: None, .. }));
            assert_eq!(rows(&groups, &columns), [vec![0, 1], vec![2, 3, 4], vec![5]]);
        }
    }

    #[test]
    fn grouped_rows_in_another_order_are_too() {
        let columns = columns(&[9, 9, 9, -5, -5, -5, 0, 0], 3);
        let groups = Groups::new(&columns);
        assert!(matches!(&groups, Groups::Contiguous { order: Some(_), .. }));
        assert_eq!(rows(&groups, &columns), [vec![3, 4, 5], vec![6, 7], vec![0, 1, 2]]);
    }

    #[test]
    fn other_rows_are_listed() {
        // One prompt in two long runs; rows that alternate; keys too far apart to be packed.
        for (keys, packed) in [
            ([1, 1, 1, 0, 0, 0, 1, 1], true),
            ([1, 0, 1, 0, 1, 0, 1, 1], true),
            ([1 << 40, 0, 1 << 40, 0, 1 << 40, 0, 1 << 40, 1 << 40], false),
        ] {
            let columns = columns(&keys, 3);
            let groups = Groups::new(&columns);
            match &groups {
                Groups::Listed { rows, .. } => assert_eq!(matches!(rows, Rows::Packed(_)), packed),
                Groups::Contiguous { .. } => panic!("{keys:?} are not grouped"),
            }
            let of = |wanted: bool| (0..8).filter(|&i| (keys[i as usize] == 0) == wanted).collect();
            assert_eq!(rows(&groups, &columns), [of(true), of(false)] as [Vec<u64>; 2]);
        }
    }
}
