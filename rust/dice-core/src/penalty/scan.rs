//! The pass over all rows for a penalty: each prompt's pair at the low end of a bracket, and the break points inside.
//!
//! A [`Probe`](crate::penalty::probe::Probe) in float32 decides nearly every prompt. The others (near ties, and prompts
//! whose pair does change) are done exactly, by [`walk`]. So the result is always that of exact arithmetic.

use std::ops::Range;

use rayon::prelude::*;

use crate::input::block::{Block, Source, Stop};
use crate::input::filter::{Dropped, Filter, Response};
use crate::input::layout::{KeyOrderCheck, Layout};
use crate::numeric::moments::Moments;
use crate::numeric::simd::{Job, LANES, Lanes, dispatch};
use crate::pairs::order::End;
use crate::pairs::pool::{Group, Pool};
use crate::pairs::table::Table;
use crate::pairs::ties::TieHash;
use crate::pairs::totals::{DroppedPrompts, Totals};
use crate::penalty::hull::{Bracket, Breakpoint, walk};
use crate::penalty::probe::{Choice, Probe};
use crate::penalty::states::{State, Winner, may_tie, states};

/// A response that replaces another one in a pair, from a break point on.
#[derive(Debug, Clone, Copy)]
struct Replacement {
    /// The break point.
    at: f64,
    /// The change of length.
    drop: u32,
    /// Index of the pair in the table.
    pair: u32,
    side: End,
    row: u64,
    reward: f64,
    length: u32,
}

/// The pairs, break points and sums of some prompts.
#[derive(Debug, Default)]
pub struct ScanResult {
    /// The pairs at the low end of the bracket, if they are requested.
    pub table: Table,
    replacements: Vec<Replacement>,
    /// Σ (|best| − |worst|) at the low end of the bracket.
    pub gap: i128,
    /// Σ (|best| − |worst|)² at the low end of the bracket.
    pub squares: f64,
    /// Σ (|best| − |worst|) by reward alone, over the prompts with contrast; of equal rewards, the shortest best and the
    /// longest worst, as the least penalty has them.
    pub gap_before: i128,
    /// Prompts whose best response beats the worst by reward alone.
    pub contrast: u64,
    /// Prompts that count in the gap: those with two different rewards. With pools, these may be more than those with
    /// contrast.
    pub counted: u64,
    /// Number of prompts.
    pub prompts: u64,
    /// Rows that are not usable.
    pub dropped: Dropped,
    /// Prompts without a pair.
    pub dropped_prompts: DroppedPrompts,
    /// Sums over the usable rows.
    moments: Moments,
}

impl ScanResult {
    /// Adds the sums and counts of other prompts, without their pairs and break points.
    pub(crate) fn merge(&mut self, other: &Self) {
        self.gap += other.gap;
        self.squares += other.squares;
        self.gap_before += other.gap_before;
        self.contrast += other.contrast;
        self.counted += other.counted;
        self.prompts += other.prompts;
        self.dropped.add(&other.dropped);
        self.dropped_prompts.add(&other.dropped_prompts);
        self.moments.merge(&other.moments);
    }

    /// Standard deviation of |best| − |worst| at the low end of the bracket.
    pub(crate) fn deviation(&self) -> f64 {
        let (count, gap) = (self.counted as f64, self.gap as f64);
        (self.squares / count - (gap / count).powi(2)).max(0.0).sqrt()
    }

    /// The break points inside the bracket.
    pub fn breakpoints(&self) -> impl Iterator<Item = Breakpoint> {
        self.replacements.iter().map(|replacement| Breakpoint { at: replacement.at, drop: replacement.drop })
    }

    /// The totals for pairs at a penalty.
    pub(crate) fn totals(&self, alpha: f64) -> Totals {
        Totals {
            gap_before: self.gap_before,
            contrast: self.contrast,
            prompts: self.prompts,
            dropped: self.dropped,
            dropped_prompts: self.dropped_prompts,
            tied_pairs: 0,
            rewards: self.moments,
            scores: self.moments,
            alpha,
        }
    }

    /// Moves the pairs to a penalty of the bracket: applies the break points up to it and sets the margins.
    pub fn apply_breaks(&mut self, alpha: f64) {
        let table = &mut self.table;
        // The replacements of a prompt are in ascending order of their break points.
        for new in self.replacements.drain(..).filter(|new| new.at <= alpha) {
            let pair = new.pair as usize;
            let (row, reward, length) = match new.side {
                End::Best => (&mut table.chosen_row, &mut table.chosen_reward, &mut table.chosen_length),
                End::Worst => {
                    (&mut table.rejected_row, &mut table.rejected_reward, &mut table.rejected_length)
                }
            };
            row[pair] = new.row;
            reward[pair] = new.reward as f32;
            length[pair] = new.length;
            if let Some(rewards) = table.rewards_f64.get_mut(pair) {
                rewards[usize::from(new.side == End::Worst)] = new.reward;
            }
        }
        table.set_margins(alpha);
    }
}

/// Options of the pass.
#[derive(Debug, Clone, Copy)]
pub struct ScanRequest<'a> {
    /// Bounds on lengths.
    pub filter: Filter,
    /// Usable responses that a prompt needs.
    pub min_responses: usize,
    /// The penalties of interest.
    pub bracket: Bracket,
    /// Which responses count, and on which side.
    pub pool: Pool<'a>,
    /// Seed of the choice among responses of equal reward.
    pub seed: u64,
    /// Whether to write the pairs.
    pub pairs: bool,
}

/// Passes over all prompts of a layout. Returns one result per chunk.
///
/// # Errors
/// [`Stop`] if a length is invalid or rows are not in the order of the layout.
pub fn scan<S: Source>(source: &S, layout: &Layout, request: &ScanRequest) -> Result<Vec<ScanResult>, Stop> {
    let scan_chunk = |chunk: Range<u64>| {
        let chunk = layout.align(source, chunk);
        dispatch(ChunkJob { source, layout, request, from: chunk.start, end: chunk.end })
    };
    layout.chunks(source).into_par_iter().map(scan_chunk).collect()
}

struct ChunkJob<'a, S> {
    source: &'a S,
    layout: &'a Layout,
    request: &'a ScanRequest<'a>,
    from: u64,
    end: u64,
}

/// Best and worst response of a prompt, as offsets in the block.
struct Pick {
    prompt: u32,
    chosen: u32,
    rejected: u32,
}

impl<S: Source> Job for ChunkJob<'_, S> {
    type Output = Result<ScanResult, Stop>;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> Self::Output {
        let Self { source, layout, request, from, end } = self;
        let mut result = ScanResult::default();
        let (mut block, mut picks) = (Block::default(), Vec::new());
        let mut exact = ExactScan::default();
        let unrestricted = request.pool.is_unrestricted();
        let mut order = KeyOrderCheck::new(layout, source, from);
        let mut at = from;
        while at < end {
            at = layout.fill(lanes, source, at, end, &mut block, &mut result.dropped)?;
            order.check(layout, &block)?;
            block.screen(&request.filter, &mut result.dropped, &mut result.moments);
            result.prompts += block.prompts() as u64;
            picks.clear();
            let probe = unrestricted.then(|| Probe::new(lanes, &block, request.bracket)).flatten();
            let pairs = result.table.len();
            let (mut gap, mut gap_before, mut squares, mut contrast) = (0i64, 0i64, 0.0f64, 0u64);
            for prompt in 0..block.prompts() {
                let (start, end) = (block.starts[prompt] as usize, block.starts[prompt + 1] as usize);
                let choice = match &probe {
                    Some(probe) if end - start <= LANES => {
                        probe.choose_short(lanes, &block, start, end - start)
                    }
                    Some(probe) => probe.choose_long(lanes, &block, start, end),
                    None => Choice::default(),
                };
                if let Some([chosen, rejected, best, worst]) = choice.certain()
                    && choice.usable >= request.min_responses
                    // Equal rewards never form a pair.
                    && block.rewards[chosen as usize] != block.rewards[rejected as usize]
                {
                    let length = |offset: u32| i64::from(block.lengths[offset as usize]);
                    let difference = length(chosen) - length(rejected);
                    gap += difference;
                    squares += (difference * difference) as f64;
                    gap_before += length(best) - length(worst);
                    contrast += 1;
                    picks.push(Pick { prompt: prompt as u32, chosen, rejected });
                } else {
                    let pair = pairs + picks.len();
                    picks.extend(exact.add_prompt(&block, prompt, request, pair, &choice, &mut result));
                }
            }
            result.gap += i128::from(gap);
            result.gap_before += i128::from(gap_before);
            result.squares += squares;
            result.contrast += contrast;
            result.counted += contrast;
            if request.pairs {
                write(&mut result.table, &block, &picks);
            }
        }
        Ok(result)
    }
}

#[inline(always)]
fn write(table: &mut Table, block: &Block, picks: &[Pick]) {
    let row = |pick: &Pick, offset: u32| block.row(pick.prompt as usize, offset as usize);
    table.keys.extend(picks.iter().map(|pick| block.keys[pick.prompt as usize]));
    table.chosen_row.extend(picks.iter().map(|pick| row(pick, pick.chosen)));
    table.rejected_row.extend(picks.iter().map(|pick| row(pick, pick.rejected)));
    table.chosen_reward.extend(picks.iter().map(|pick| block.rewards[pick.chosen as usize]));
    table.rejected_reward.extend(picks.iter().map(|pick| block.rewards[pick.rejected as usize]));
    table.chosen_length.extend(picks.iter().map(|pick| block.lengths[pick.chosen as usize]));
    table.rejected_length.extend(picks.iter().map(|pick| block.lengths[pick.rejected as usize]));
    if !block.rewards_f64.is_empty() {
        let reward = |offset: u32| block.rewards_f64[offset as usize];
        table.rewards_f64.extend(picks.iter().map(|pick| [reward(pick.chosen), reward(pick.rejected)]));
    }
}

/// Prompts done in exact arithmetic.
#[derive(Default)]
struct ExactScan {
    group: Group,
    best: Vec<Winner>,
    worst: Vec<Winner>,
}

impl ExactScan {
    /// The pick of a prompt, whose pair would have the index `pair`. Adds its break points, sums and counts. Responses
    /// that are certain in `choice` are not computed again.
    fn add_prompt(
        &mut self,
        block: &Block,
        prompt: usize,
        request: &ScanRequest,
        pair: usize,
        choice: &Choice,
        result: &mut ScanResult,
    ) -> Option<Pick> {
        request.pool.fill(block, prompt, &mut self.group, &mut result.dropped);
        let usable = self.group.all.len();
        if usable < request.min_responses {
            result.dropped.too_few_responses += usable as u64;
            result.dropped_prompts.too_few_responses += 1;
            return None;
        }
        let key = request.pool.columns.key_number(block.keys[prompt]);
        let ties = TieHash::new(request.seed, key, block.starts[prompt]);
        let contrast = self.count(block, choice, result)?;
        let response = |offset: u32| (request.bracket.low, block.response(offset as usize));
        self.best.clear();
        self.worst.clear();
        match choice.chosen {
            Some(offset) => self.best.push(response(offset)),
            None => walk(&mut self.group.chosen, End::Best, request.bracket, ties, &mut self.best),
        }
        match choice.rejected {
            Some(offset) => self.worst.push(response(offset)),
            None => walk(&mut self.group.rejected, End::Worst, request.bracket, ties, &mut self.worst),
        }
        let mut changes = Changes { block, prompt, pair: pair as u32, result };
        let (chosen, rejected) = if may_tie(&self.best, &self.worst) {
            // Walking has removed responses from the lists.
            request.pool.fill(block, prompt, &mut self.group, &mut Dropped::default());
            let lists = (&self.group.chosen[..], &self.group.rejected[..]);
            changes.add_states(&states(&self.best, &self.worst, lists, request.bracket, ties))
        } else {
            (changes.add_winners(End::Best, &self.best), changes.add_winners(End::Worst, &self.worst))
        };
        let difference = i64::from(chosen.length) - i64::from(rejected.length);
        result.gap += i128::from(difference);
        result.squares += (difference as f64).powi(2);
        contrast.then_some(Pick {
            prompt: prompt as u32,
            chosen: chosen.row as u32,
            rejected: rejected.row as u32,
        })
    }

    /// Counts a prompt by its rewards alone. Returns whether the best is above the worst; `None` if all are equal.
    fn count(&self, block: &Block, choice: &Choice, result: &mut ScanResult) -> Option<bool> {
        let Group { chosen, rejected, .. } = &self.group;
        let response = |offset: u32| block.response(offset as usize);
        let best = choice.best.map(response).or_else(|| End::Best.first_by_reward(chosen))?;
        let worst = choice.worst.map(response).or_else(|| End::Worst.first_by_reward(rejected))?;
        let contrast = best.raw > worst.raw;
        if contrast {
            result.contrast += 1;
            result.gap_before += i128::from(best.length) - i128::from(worst.length);
        } else if chosen.iter().chain(rejected).all(|response| response.raw == best.raw) {
            result.dropped_prompts.tied += 1;
            return None;
        } else {
            result.dropped_prompts.no_contrast += 1;
        }
        result.counted += 1;
        Some(contrast)
    }
}

/// Writes the break points of one prompt.
struct Changes<'a> {
    block: &'a Block,
    prompt: usize,
    /// Index of the prompt's pair in the table.
    pair: u32,
    result: &'a mut ScanResult,
}

impl Changes<'_> {
    fn push(&mut self, at: f64, drop: u32, side: End, response: &Response) {
        self.result.replacements.push(Replacement {
            at,
            drop,
            pair: self.pair,
            side,
            row: self.block.row(self.prompt, response.row as usize),
            reward: response.raw,
            length: response.length,
        });
    }

    /// The break points of one side, each a shorter chosen or a longer rejected response. Returns the first response.
    fn add_winners(&mut self, side: End, winners: &[Winner]) -> Response {
        for two in winners.windows(2) {
            let (at, response) = two[1];
            self.push(at, response.length.abs_diff(two[0].1.length), side, &response);
        }
        winners[0].1
    }

    /// The break points of pairs, in which both responses may change. Returns the first pair.
    fn add_states(&mut self, states: &[State]) -> (Response, Response) {
        for two in states.windows(2) {
            let State { from, pair: (chosen, rejected) } = two[1];
            let drop = (two[0].gap() - two[1].gap()) as u64;
            // Both changes are at the same penalty, so only the sum counts.
            let first = drop.min(u64::from(u32::MAX));
            self.push(from, first as u32, End::Best, &chosen);
            self.push(from, (drop - first) as u32, End::Worst, &rejected);
        }
        states[0].pair
    }
}
