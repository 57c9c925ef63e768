//! The pass over all rows: each prompt's pair at the low end of a bracket of penalties, and its turns inside.
//!
//! Nearly every prompt is decided by a [`Probe`](crate::probe::Probe) in float32. What it leaves open (near ties, and
//! prompts whose choice does change) is done over exactly, by [`hull::walk`](crate::hull::walk); so the result is that
//! of exact arithmetic throughout.

use rayon::prelude::*;

use crate::block::{Block, Moments, Source};
use crate::filter::{Dropped, Filter, Point};
use crate::hull::{Bracket, Break, Side, walk};
use crate::lanes::{Job, LANES, Lanes, dispatch};
use crate::layout::{Layout, Rising, Stop};
use crate::mine::DroppedPrompts;
use crate::pool::{Group, Pool};
use crate::probe::{Choice, Probe};
use crate::select::{beats, best, worst};
use crate::table::Table;

/// A response takes another's place in a pair.
#[derive(Debug, Clone, Copy)]
struct Turn {
    at: f64,
    /// Change of length.
    drop: u32,
    /// The pair's place in the table.
    pair: u32,
    side: Side,
    row: u64,
    reward: f64,
    length: u32,
}

/// What a pass finds in some prompts.
#[derive(Debug, Default)]
pub struct Found {
    /// The pairs at the low end of the bracket, unless they were not wanted.
    pub table: Table,
    turns: Vec<Turn>,
    /// Σ (|best| − |worst|) at the low end of the bracket.
    pub gap: i128,
    /// Σ (|best| − |worst|)² there.
    pub squares: f64,
    /// Σ (|best| − |worst|) by reward alone, of the prompts with contrast.
    pub gap_before: i128,
    /// Prompts whose best response beats the worst by reward alone.
    pub contrast: u64,
    /// Prompts that enter the gap. In pools these may be more than those with contrast.
    pub entered: u64,
    /// Prompts.
    pub prompts: u64,
    /// Rows that are not usable.
    pub dropped: Dropped,
    /// Prompts without a pair.
    pub dropped_prompts: DroppedPrompts,
    /// Sums over the usable rows.
    pub moments: Moments,
}

impl Found {
    /// Adds what was found in other prompts, but for the table and its turns.
    pub fn merge(&mut self, other: &Self) {
        self.gap += other.gap;
        self.squares += other.squares;
        self.gap_before += other.gap_before;
        self.contrast += other.contrast;
        self.entered += other.entered;
        self.prompts += other.prompts;
        self.dropped.add(&other.dropped);
        self.dropped_prompts.add(&other.dropped_prompts);
        self.moments.merge(&other.moments);
    }

    /// Standard deviation of |best| − |worst| at the low end of the bracket.
    pub fn deviation(&self) -> f64 {
        let (count, gap) = (self.entered as f64, self.gap as f64);
        (self.squares / count - (gap / count).powi(2)).max(0.0).sqrt()
    }

    /// The break points inside the bracket.
    pub fn breaks(&self) -> impl Iterator<Item = Break> {
        self.turns.iter().map(|turn| Break { at: turn.at, drop: turn.drop })
    }

    /// Takes the turns up to a penalty of the bracket, and sets the margins.
    pub fn settle(&mut self, alpha: f64) {
        let table = &mut self.table;
        // A prompt's turns lie in order.
        for turn in self.turns.drain(..).filter(|turn| turn.at <= alpha) {
            let pair = turn.pair as usize;
            let (row, reward, length) = match turn.side {
                Side::Chosen => (&mut table.chosen_row, &mut table.chosen_reward, &mut table.chosen_length),
                Side::Rejected => {
                    (&mut table.rejected_row, &mut table.rejected_reward, &mut table.rejected_length)
                }
            };
            row[pair] = turn.row;
            reward[pair] = turn.reward as f32;
            length[pair] = turn.length;
            if let Some(wide) = table.wide.get_mut(pair) {
                wide[usize::from(turn.side == Side::Rejected)] = turn.reward;
            }
        }
        table.penalise(alpha);
    }
}

/// What a pass looks for.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// Bounds on lengths.
    pub filter: Filter,
    /// Usable responses that a prompt needs.
    pub min_responses: usize,
    /// Penalties.
    pub bracket: Bracket,
    /// Which responses count, and on which side.
    pub pool: Pool<'a>,
    /// Whether to write the pairs down.
    pub pairs: bool,
}

/// Passes over all prompts of a layout; one part for each piece of it.
///
/// # Errors
/// [`Stop`] if a length is no count or rows are not in the order of the layout.
pub fn scan<S: Source>(source: &S, layout: &Layout, wanted: &Wanted) -> Result<Vec<Found>, Stop> {
    let pieces = layout.pieces(source);
    let piece = |piece: std::ops::Range<u64>| {
        let piece = layout.aligned(source, piece);
        dispatch(Piece { source, layout, wanted, from: piece.start, end: piece.end })
    };
    pieces.into_par_iter().map(piece).collect()
}

struct Piece<'a, S> {
    source: &'a S,
    layout: &'a Layout,
    wanted: &'a Wanted<'a>,
    from: u64,
    end: u64,
}

/// Best and worst of a prompt, as places in the block.
struct Pick {
    prompt: u32,
    chosen: u32,
    rejected: u32,
}

impl<S: Source> Job for Piece<'_, S> {
    type Output = Result<Found, Stop>;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> Self::Output {
        let Self { source, layout, wanted, from, end } = self;
        let mut found = Found::default();
        let (mut block, mut picks) = (Block::default(), Vec::new());
        let mut exact = Exact::default();
        let everything = wanted.pool.everything();
        let mut rising = Rising::before(layout, source, from);
        let mut at = from;
        while at < end {
            at = layout.fill(lanes, source, at, end, &mut block, &mut found.dropped)?;
            rising.check(layout, &block)?;
            block.screen(&wanted.filter, &mut found.dropped, &mut found.moments);
            found.prompts += block.prompts() as u64;
            picks.clear();
            let probe = everything.then(|| Probe::new(lanes, &block, wanted.bracket)).flatten();
            let pairs = found.table.len();
            let (mut gap, mut gap_before, mut squares, mut contrast) = (0i64, 0i64, 0.0f64, 0u64);
            for prompt in 0..block.prompts() {
                let (start, end) = (block.starts[prompt] as usize, block.starts[prompt + 1] as usize);
                let choice = match &probe {
                    Some(probe) if end - start <= LANES => probe.short(lanes, &block, start, end - start),
                    Some(probe) => probe.long(lanes, &block, start, end),
                    None => Choice::default(),
                };
                if let Choice {
                    chosen: Some(chosen),
                    rejected: Some(rejected),
                    best: Some(best),
                    worst: Some(worst),
                    usable,
                } = choice
                    && usable >= wanted.min_responses
                {
                    let length = |place: u32| i64::from(block.lengths[place as usize]);
                    let difference = length(chosen) - length(rejected);
                    gap += difference;
                    squares += (difference * difference) as f64;
                    gap_before += length(best) - length(worst);
                    contrast += 1;
                    picks.push(Pick { prompt: prompt as u32, chosen, rejected });
                } else {
                    let pair = pairs + picks.len();
                    picks.extend(exact.prompt(&block, prompt, wanted, pair, &choice, &mut found));
                }
            }
            found.gap += i128::from(gap);
            found.gap_before += i128::from(gap_before);
            found.squares += squares;
            found.contrast += contrast;
            found.entered += contrast;
            if wanted.pairs {
                write(&mut found.table, &block, &picks);
            }
        }
        Ok(found)
    }
}

#[inline(always)]
fn write(table: &mut Table, block: &Block, picks: &[Pick]) {
    let row = |pick: &Pick, place: u32| block.row(pick.prompt as usize, place as usize);
    table.keys.extend(picks.iter().map(|pick| block.keys[pick.prompt as usize]));
    table.chosen_row.extend(picks.iter().map(|pick| row(pick, pick.chosen)));
    table.rejected_row.extend(picks.iter().map(|pick| row(pick, pick.rejected)));
    table.chosen_reward.extend(picks.iter().map(|pick| block.rewards[pick.chosen as usize]));
    table.rejected_reward.extend(picks.iter().map(|pick| block.rewards[pick.rejected as usize]));
    table.chosen_length.extend(picks.iter().map(|pick| block.lengths[pick.chosen as usize]));
    table.rejected_length.extend(picks.iter().map(|pick| block.lengths[pick.rejected as usize]));
    if !block.wide.is_empty() {
        let wide = |place: u32| block.wide[place as usize];
        table.wide.extend(picks.iter().map(|pick| [wide(pick.chosen), wide(pick.rejected)]));
    }
}

/// Prompts done in exact arithmetic.
#[derive(Default)]
struct Exact {
    group: Group,
    turns: Vec<(f64, Point)>,
}

impl Exact {
    /// The pick of a prompt, whose pair would be number `pair`; adds its turns and what else there is to count. What is
    /// certain in `choice` is taken from there.
    fn prompt(
        &mut self,
        block: &Block,
        prompt: usize,
        wanted: &Wanted,
        pair: usize,
        choice: &Choice,
        found: &mut Found,
    ) -> Option<Pick> {
        let group = &mut self.group;
        wanted.pool.fill(block, prompt, group, &mut found.dropped);
        let usable = group.all.len();
        if usable < wanted.min_responses {
            found.dropped.too_few_responses += usable as u64;
            found.dropped_prompts.too_few_responses += 1;
            return None;
        }
        let point = |place: u32| block.point(place as usize);
        let best = choice.best.map(point).or_else(|| best(&group.chosen, 0.0).copied())?;
        let worst = choice.worst.map(point).or_else(|| worst(&group.rejected, 0.0).copied())?;
        let contrast = beats(&best, &worst, 0.0);
        if contrast || !wanted.pool.one_pool() {
            found.entered += 1;
        }
        if contrast {
            found.contrast += 1;
            found.gap_before += i128::from(best.length) - i128::from(worst.length);
        } else {
            found.dropped_prompts.no_contrast += 1;
        }
        let mut side = |side: Side, certain: Option<u32>, points: &mut Vec<Point>| {
            if let Some(place) = certain {
                return (place, i64::from(block.lengths[place as usize]));
            }
            walk(points, side, wanted.bracket, &mut self.turns);
            let first = self.turns[0].1;
            let mut previous = first;
            for &(at, point) in &self.turns[1..] {
                found.turns.push(Turn {
                    at,
                    drop: point.length.abs_diff(previous.length),
                    pair: pair as u32,
                    side,
                    row: block.row(prompt, point.row as usize),
                    reward: point.raw,
                    length: point.length,
                });
                previous = point;
            }
            (first.row as u32, i64::from(first.length))
        };
        let chosen = side(Side::Chosen, choice.chosen, &mut group.chosen);
        let rejected = side(Side::Rejected, choice.rejected, &mut group.rejected);
        let difference = chosen.1 - rejected.1;
        found.gap += i128::from(difference);
        found.squares += (difference as f64).powi(2);
        contrast.then_some(Pick { prompt: prompt as u32, chosen: chosen.0, rejected: rejected.0 })
    }
}
