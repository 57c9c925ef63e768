//! The pass that writes pairs down when more is asked for than each prompt's best and worst at a penalty.

use rayon::prelude::*;

use crate::block::{Block, Moments, Source};
use crate::bucket::Buckets;
use crate::filter::{Filter, Point};
use crate::labels::{consistency, win_rate};
use crate::lanes::{Job, Lanes, dispatch};
use crate::layout::{Layout, Rising, Stop};
use crate::mine::Totals;
use crate::pairing::Pairing;
use crate::pool::{Group, Pool};
use crate::select::{beats, best, best_first, stored, worst};
use crate::table::Table;

/// How the score of a response comes from its reward r and its length l.
#[derive(Debug, Clone, Copy)]
pub enum Scoring<'a> {
    /// `r − alpha·l`
    Linear(f64),
    /// `r / l`
    PerToken,
    /// The reward adjusted by its length bucket.
    Bucket(&'a Buckets),
}

/// What the pass does.
#[derive(Debug, Clone, Copy)]
pub struct Rules<'a> {
    /// Bounds on lengths.
    pub filter: Filter,
    /// Usable responses that a prompt needs.
    pub min_responses: usize,
    /// Which responses count, and on which side.
    pub pool: Pool<'a>,
    /// Scores.
    pub scoring: Scoring<'a>,
    /// Which responses make pairs.
    pub pairing: Pairing,
    /// Whether to add win rates, at this scale.
    pub win_rates: Option<f64>,
}

/// What the pass finds in some prompts.
#[derive(Debug, Default)]
pub struct Picked {
    /// The pairs.
    pub table: Table,
    /// What else there is to tell.
    pub totals: Totals,
}

/// Passes over all prompts of a layout; one part for each piece of it.
///
/// # Errors
/// [`Stop`] if a length is no count or rows are not in the order of the layout.
pub fn pick<S: Source>(source: &S, layout: &Layout, rules: &Rules) -> Result<Vec<Picked>, Stop> {
    let piece = |piece: std::ops::Range<u64>| {
        let piece = layout.aligned(source, piece);
        dispatch(Piece { source, layout, rules, from: piece.start, end: piece.end })
    };
    layout.pieces(source).into_par_iter().map(piece).collect()
}

struct Piece<'a, S> {
    source: &'a S,
    layout: &'a Layout,
    rules: &'a Rules<'a>,
    from: u64,
    end: u64,
}

impl<S: Source> Job for Piece<'_, S> {
    type Output = Result<Picked, Stop>;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> Self::Output {
        let Self { source, layout, rules, from, end } = self;
        let mut picked = Picked::default();
        if rules.win_rates.is_some() {
            picked.table.win_rates = Some(Default::default());
        }
        if rules.pool.columns.batches.iter().any(|batch| batch.second.is_some()) {
            picked.table.consistency = Some(Vec::new());
        }
        if let Scoring::Linear(alpha) = rules.scoring {
            picked.totals.alpha = alpha;
        }
        let mut work = Work::default();
        let mut block = Block::default();
        let mut rising = Rising::before(layout, source, from);
        let mut at = from;
        while at < end {
            at = layout.fill(lanes, source, at, end, &mut block, &mut picked.totals.dropped)?;
            rising.check(layout, &block)?;
            // Moments are taken of what is left without duplicates.
            block.screen(&rules.filter, &mut picked.totals.dropped, &mut Moments::default());
            for prompt in 0..block.prompts() {
                work.prompt(&block, prompt, rules, &mut picked);
            }
        }
        Ok(picked)
    }
}

#[derive(Default)]
struct Work {
    group: Group,
    pairs: Vec<crate::pairing::Pair>,
    rewards: Vec<(f64, f64)>,
}

impl Work {
    fn prompt(&mut self, block: &Block, prompt: usize, rules: &Rules, picked: &mut Picked) {
        let totals = &mut picked.totals;
        totals.prompts += 1;
        let group = &mut self.group;
        rules.pool.fill(block, prompt, group, &mut totals.dropped);
        let adjust = |point: &mut Point| match rules.scoring {
            Scoring::Linear(_) => {}
            Scoring::PerToken => point.score = point.raw / f64::from(point.length),
            Scoring::Bucket(buckets) => buckets.adjust(point),
        };
        group.all.iter_mut().for_each(adjust);
        for point in &group.all {
            totals.moments.push(point.raw, point.length);
            totals.scores.push(point.score, point.length);
        }
        let usable = group.all.len();
        if usable < rules.min_responses {
            totals.dropped.too_few_responses += usable as u64;
            totals.dropped_prompts.too_few_responses += 1;
            return;
        }
        // By reward alone.
        if let (Some(best), Some(worst)) = (best(&group.chosen, 0.0), worst(&group.rejected, 0.0))
            && beats(best, worst, 0.0)
        {
            totals.contrast += 1;
            totals.gap_before += i128::from(best.length) - i128::from(worst.length);
        }
        group.chosen.iter_mut().for_each(adjust);
        group.rejected.iter_mut().for_each(adjust);
        let alpha = if let Scoring::Linear(alpha) = rules.scoring { alpha } else { 0.0 };
        let number = rules.pool.columns.key_number(block.keys[prompt]);
        self.pairs.clear();
        rules.pairing.pairs(group, alpha, number, &mut self.pairs);
        if self.pairs.is_empty() {
            totals.dropped_prompts.count_pairless(rules.pairing);
            return;
        }
        let table = &mut picked.table;
        if table.consistency.is_some() {
            self.rewards.clear();
            self.rewards.extend(group.all.iter().filter_map(|point| {
                let (batch, i) = rules.pool.columns.locate(block.row(prompt, point.row as usize));
                let (second, valid) = batch.second.as_ref()?;
                let there = valid.as_ref().is_none_or(|valid| valid.is_valid(i)) && second.get(i).is_finite();
                there.then(|| (point.raw, second.get(i)))
            }));
        }
        if rules.win_rates.is_some() {
            // In one order, so that the sums do not depend on that of the rows.
            group.all.sort_unstable_by(|a, b| best_first(a, b, alpha));
        }
        let agreement = consistency(&self.rewards);
        for pair in &self.pairs {
            let (chosen, rejected) = (&pair.chosen, &pair.rejected);
            table.keys.push(block.keys[prompt]);
            table.chosen_row.push(block.row(prompt, chosen.row as usize));
            table.rejected_row.push(block.row(prompt, rejected.row as usize));
            table.chosen_reward.push(chosen.raw as f32);
            table.rejected_reward.push(rejected.raw as f32);
            table.margin.push(stored(pair.margin));
            table.chosen_length.push(chosen.length);
            table.rejected_length.push(rejected.length);
            if let (Some(rates), Some(scale)) = (&mut table.win_rates, rules.win_rates) {
                rates[0].push(win_rate(chosen, &group.all, alpha, scale));
                rates[1].push(win_rate(rejected, &group.all, alpha, scale));
            }
            if let Some(values) = &mut table.consistency {
                values.push(agreement);
            }
        }
    }
}
