//! The pass that writes the pairs of any pairing, scoring and labels.
//!
//! For the best and worst response at a linear penalty without labels, [`scan`](mod@crate::penalty::scan) is faster.

use std::ops::Range;

use rayon::prelude::*;

use crate::input::block::{Block, Source, Stop};
use crate::input::filter::{Filter, Response};
use crate::input::layout::{KeyOrderCheck, Layout};
use crate::numeric::moments::Moments;
use crate::numeric::simd::{Job, Lanes, dispatch};
use crate::pairs::bucket::Buckets;
use crate::pairs::labels::{consistency, win_rate};
use crate::pairs::order::{End, saturate_to_f32};
use crate::pairs::pairing::{Pair, Pairing};
use crate::pairs::pool::{Group, Pool};
use crate::pairs::table::Table;
use crate::pairs::ties::TieHash;
use crate::pairs::totals::Totals;

/// How the score of a response is computed from its reward r and its length l.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Scoring<'a> {
    /// `r − alpha·l`
    Linear(f64),
    /// `r / l`
    PerToken,
    /// The reward adjusted by its length bucket.
    Bucket(&'a Buckets),
}

impl Scoring<'_> {
    /// Sets the score of a response, without a linear penalty.
    fn adjust(self, response: &mut Response) {
        match self {
            Self::Linear(_) => {}
            Self::PerToken => response.score = response.raw / f64::from(response.length),
            Self::Bucket(buckets) => buckets.adjust(response),
        }
    }

    /// The linear penalty.
    fn alpha(self) -> f64 {
        if let Self::Linear(alpha) = self { alpha } else { 0.0 }
    }
}

/// Options of the pass.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PickRules<'a> {
    /// Bounds on lengths.
    pub(crate) filter: Filter,
    /// Usable responses that a prompt needs.
    pub(crate) min_responses: usize,
    /// Which responses count, and on which side.
    pub(crate) pool: Pool<'a>,
    /// How scores are computed.
    pub(crate) scoring: Scoring<'a>,
    /// Which responses make pairs.
    pub(crate) pairing: Pairing,
    /// Seed of the choice among responses of equal reward.
    pub(crate) seed: u64,
    /// The scale of win rates, if they are added.
    pub(crate) win_rates: Option<f64>,
}

/// The pairs and totals of some prompts.
#[derive(Debug, Default)]
pub(crate) struct PickResult {
    /// The pairs.
    pub(crate) table: Table,
    /// Sums and counts.
    pub(crate) totals: Totals,
}

/// Passes over all prompts of a layout. Returns one result per chunk.
///
/// # Errors
/// [`Stop`] if a length is invalid or rows are not in the order of the layout.
pub(crate) fn pick<S: Source>(
    source: &S,
    layout: &Layout,
    rules: &PickRules,
) -> Result<Vec<PickResult>, Stop> {
    let pick_chunk = |chunk: Range<u64>| {
        let chunk = layout.align(source, chunk);
        dispatch(ChunkJob { source, layout, rules, from: chunk.start, end: chunk.end })
    };
    layout.chunks(source).into_par_iter().map(pick_chunk).collect()
}

struct ChunkJob<'a, S> {
    source: &'a S,
    layout: &'a Layout,
    rules: &'a PickRules<'a>,
    from: u64,
    end: u64,
}

impl<S: Source> Job for ChunkJob<'_, S> {
    type Output = Result<PickResult, Stop>;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> Self::Output {
        let Self { source, layout, rules, from, end } = self;
        let mut result = PickResult::default();
        if rules.win_rates.is_some() {
            result.table.win_rates = Some(Default::default());
        }
        if rules.pool.columns.batches.iter().any(|batch| batch.second.is_some()) {
            result.table.consistency = Some(Vec::new());
        }
        result.totals.alpha = rules.scoring.alpha();
        let mut picker = Picker::default();
        let mut block = Block::default();
        let mut order = KeyOrderCheck::new(layout, source, from);
        let mut at = from;
        while at < end {
            at = layout.fill(lanes, source, at, end, &mut block, &mut result.totals.dropped)?;
            order.check(layout, &block)?;
            // The moments of the totals are those without duplicates, which are not known yet.
            block.screen(&rules.filter, &mut result.totals.dropped, &mut Moments::default());
            for prompt in 0..block.prompts() {
                picker.add_prompt(&block, prompt, rules, &mut result);
            }
        }
        Ok(result)
    }
}

/// Picks the pairs of one prompt at a time.
#[derive(Default)]
struct Picker {
    group: Group,
    pairs: Vec<Pair>,
    /// Rewards of the two models.
    rewards: Vec<(f64, f64)>,
}

impl Picker {
    fn add_prompt(&mut self, block: &Block, prompt: usize, rules: &PickRules, result: &mut PickResult) {
        let number = rules.pool.columns.key_number(block.keys[prompt]);
        let ties = TieHash::new(rules.seed, number, block.starts[prompt]);
        if !self.prepare(block, prompt, rules, &mut result.totals) {
            return;
        }
        self.pairs.clear();
        let alpha = rules.scoring.alpha();
        let left_out = rules.pairing.pairs(&mut self.group, alpha, number, ties, &mut self.pairs);
        result.totals.tied_pairs += left_out.pairs;
        if self.pairs.is_empty() {
            result.totals.dropped_prompts.count_pairless(rules.pairing, left_out.prompt);
            return;
        }
        if result.table.consistency.is_some() {
            self.collect_rewards(block, prompt, rules);
        }
        self.write(block, prompt, rules, ties, &mut result.table);
    }

    /// Collects the responses of a prompt and sets their scores. Returns whether they are enough for a pair.
    fn prepare(&mut self, block: &Block, prompt: usize, rules: &PickRules, totals: &mut Totals) -> bool {
        let group = &mut self.group;
        totals.prompts += 1;
        rules.pool.fill(block, prompt, group, &mut totals.dropped);
        let adjust = |response: &mut Response| rules.scoring.adjust(response);
        group.all.iter_mut().for_each(adjust);
        for response in &group.all {
            totals.rewards.push(response.raw, response.length);
            totals.scores.push(response.score, response.length);
        }
        let usable = group.all.len();
        if usable < rules.min_responses {
            totals.dropped.too_few_responses += usable as u64;
            totals.dropped_prompts.too_few_responses += 1;
            return false;
        }
        // By reward alone: the scores of these two lists are not adjusted yet.
        let best = End::Best.first_by_reward(&group.chosen);
        let worst = End::Worst.first_by_reward(&group.rejected);
        if let (Some(best), Some(worst)) = (best, worst)
            && best.raw > worst.raw
        {
            totals.contrast += 1;
            totals.gap_before += i128::from(best.length) - i128::from(worst.length);
        }
        group.chosen.iter_mut().for_each(adjust);
        group.rejected.iter_mut().for_each(adjust);
        true
    }

    /// Collects the rewards of both models, where the second is neither null nor infinite.
    fn collect_rewards(&mut self, block: &Block, prompt: usize, rules: &PickRules) {
        self.rewards.clear();
        self.rewards.extend(self.group.all.iter().filter_map(|response| {
            let (batch, i) = rules.pool.columns.locate(block.row(prompt, response.row as usize));
            let (second, valid) = batch.second.as_ref()?;
            let usable = valid.as_ref().is_none_or(|valid| valid.is_valid(i)) && second.get(i).is_finite();
            usable.then(|| (response.raw, second.get(i)))
        }));
    }

    /// Appends the pairs to a table.
    fn write(&mut self, block: &Block, prompt: usize, rules: &PickRules, ties: TieHash, table: &mut Table) {
        let alpha = rules.scoring.alpha();
        let group = &mut self.group;
        if rules.win_rates.is_some() {
            // In a fixed order, so that the sums do not depend on the order of rows.
            End::Best.sort(&mut group.all, alpha, ties);
        }
        let agreement = consistency(&self.rewards);
        for pair in &self.pairs {
            let (chosen, rejected) = (&pair.chosen, &pair.rejected);
            table.keys.push(block.keys[prompt]);
            table.chosen_row.push(block.row(prompt, chosen.row as usize));
            table.rejected_row.push(block.row(prompt, rejected.row as usize));
            table.chosen_reward.push(chosen.raw as f32);
            table.rejected_reward.push(rejected.raw as f32);
            table.margin.push(saturate_to_f32(pair.margin));
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
