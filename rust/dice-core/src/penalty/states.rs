//! The pairs of one prompt over a bracket of penalties.
//!
//! Best and worst response move along the two hulls ([`hull`](crate::penalty::hull)), the one to ever lower and the
//! other to ever higher rewards. So their rewards are equal in one range of penalties at most. Two responses of equal
//! reward never form a pair. In that range the pair is the one of the greatest margin among those of different reward,
//! as [`best_and_worst`](crate::pairs::order::best_and_worst) has it. The margin of a pair is a line over the penalty
//! that falls with the gap of its lengths; of a greatest margin, these gaps never rise. So the gap of the prompt still
//! falls with the penalty.

use std::cmp::Ordering;

use crate::input::filter::Response;
use crate::pairs::order::{End, compare_margins, others, wider};
use crate::pairs::ties::TieHash;
use crate::penalty::hull::{Bracket, walk};

/// A response, and the penalty from which it is the best or the worst one.
pub(crate) type Winner = (f64, Response);

/// A pair, and the penalty from which on it is the prompt's.
#[derive(Debug, Clone, Copy)]
pub(crate) struct State {
    pub(crate) from: f64,
    pub(crate) pair: (Response, Response),
}

impl State {
    /// Chosen length − rejected length.
    pub(crate) fn gap(&self) -> i64 {
        i64::from(self.pair.0.length) - i64::from(self.pair.1.length)
    }
}

/// Whether any of the best responses has the reward of any of the worst ones.
pub(crate) fn may_tie(best: &[Winner], worst: &[Winner]) -> bool {
    best.iter().any(|(_, a)| worst.iter().any(|(_, b)| a.raw == b.raw))
}

/// The pairs over the bracket, the first from its low end on. `best` and `worst` are the winners of [`walk`] among
/// `chosen` and `rejected`, of which two at least have different rewards.
pub(crate) fn states(
    best: &[Winner],
    worst: &[Winner],
    (chosen, rejected): (&[Response], &[Response]),
    bracket: Bracket,
    ties: TieHash,
) -> Vec<State> {
    let ends = merge(best, worst);
    let mut states: Vec<State> = Vec::with_capacity(ends.len() + 2);
    for (i, end) in ends.iter().enumerate() {
        let (a, b) = end.pair;
        let last = ends.get(i + 1).map_or(bracket.high, |next| next.from.next_down());
        if a.raw != b.raw {
            states.push(*end);
        } else {
            let range = Bracket { low: end.from, high: last };
            let others = [others(chosen, a.raw), others(rejected, a.raw)];
            of_different_reward(end.pair, others, range, ties, &mut states);
        }
    }
    states.dedup_by(|next, last| rows(next) == rows(last));
    states
}

fn rows(state: &State) -> (u64, u64) {
    (state.pair.0.row, state.pair.1.row)
}

/// The pairs of the best and the worst response, whatever their rewards.
fn merge(best: &[Winner], worst: &[Winner]) -> Vec<State> {
    let mut from: Vec<f64> = best.iter().chain(worst).map(|winner| winner.0).collect();
    from.sort_by(f64::total_cmp);
    from.dedup();
    let at = |winners: &[Winner], alpha: f64| {
        let after = winners.partition_point(|winner| winner.0 <= alpha);
        winners[after.saturating_sub(1)].1
    };
    from.into_iter().map(|from| State { from, pair: (at(best, from), at(worst, from)) }).collect()
}

/// Appends the pairs over a range of penalties in which best and worst have equal rewards. `others` are the responses
/// of other rewards that may be chosen and that may be rejected.
fn of_different_reward(
    (best, worst): (Response, Response),
    others: [Vec<Response>; 2],
    range: Bracket,
    ties: TieHash,
    states: &mut Vec<State>,
) {
    let [next_best, next_worst] = [(End::Best, 0), (End::Worst, 1)].map(|(end, side)| {
        let mut winners = Vec::new();
        let mut responses = others[side].clone();
        if !responses.is_empty() {
            walk(&mut responses, end, range, ties, &mut winners);
        }
        winners
    });
    if next_best.is_empty() || next_worst.is_empty() {
        states.extend(next_worst.iter().map(|&(from, other)| State { from, pair: (best, other) }));
        states.extend(next_best.iter().map(|&(from, other)| State { from, pair: (other, worst) }));
        return;
    }
    let both = merge(&next_best, &next_worst);
    for (i, state) in both.iter().enumerate() {
        let last = both.get(i + 1).map_or(range.high, |next| next.from.next_down());
        let (with_best, with_worst) = ((best, state.pair.1), (state.pair.0, worst));
        let at = |alpha: f64| wider(with_best, with_worst, alpha);
        let first = State { from: state.from, pair: at(state.from) };
        states.push(first);
        let later = State { from: last, pair: at(last.min(f64::MAX)) };
        if rows(&later) != rows(&first) {
            let wins = |alpha| compare_margins(&later.pair, &first.pair, alpha) != Ordering::Less;
            states.push(State { from: first_float(wins, first.from, last), ..later });
        }
    }
}

/// The least float of (low, high] for which `holds`, which turns from false to true once.
fn first_float(holds: impl Fn(f64) -> bool, low: f64, high: f64) -> f64 {
    let (mut below, mut at) = (low.to_bits(), high.min(f64::MAX).to_bits());
    while at - below > 1 {
        let middle = below + (at - below) / 2;
        if holds(f64::from_bits(middle)) { at = middle } else { below = middle }
    }
    f64::from_bits(at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pairs::order::best_and_worst;
    use proptest::prelude::*;

    fn responses(points: &[(i32, u32)]) -> Vec<Response> {
        let response = |(&(reward, length), row): (&(i32, u32), u64)| {
            let raw = f64::from(reward) / 8.0;
            Response { score: raw, raw, row, length }
        };
        points.iter().zip(0..).map(response).collect()
    }

    fn states_of(all: &[Response], bracket: Bracket) -> Vec<State> {
        let (mut best, mut worst) = (Vec::new(), Vec::new());
        walk(&mut all.to_vec(), End::Best, bracket, TieHash::default(), &mut best);
        walk(&mut all.to_vec(), End::Worst, bracket, TieHash::default(), &mut worst);
        states(&best, &worst, (all, all), bracket, TieHash::default())
    }

    #[test]
    fn ends_of_equal_reward_give_way_to_the_next() {
        // From 1/35 on the shortest is the best and the longest is the worst, both of reward 0.
        let all = responses(&[(0, 5), (0, 50), (8, 40)]);
        let found: Vec<_> =
            states_of(&all, Bracket::ALL).iter().map(|state| (state.from, rows(state))).collect();
        assert_eq!(found.last(), Some(&(2.0 / 25.0, (0, 2))));
        assert_eq!(found[found.len() - 2].1, (2, 1));
    }

    proptest! {
        #[test]
        fn a_state_is_the_pair_at_every_penalty(
            points in prop::collection::vec((-4i32..4, 0u32..12), 2..9),
            penalties in prop::collection::vec(prop_oneof![0.0f64..2.0, (0u32..64).prop_map(|a| f64::from(a) / 64.0)], 1..20),
            low in prop_oneof![Just(0.0), 0.0f64..0.5],
            width in prop_oneof![Just(0.0), Just(f64::INFINITY), 0.0f64..0.5],
        ) {
            let all = responses(&points);
            prop_assume!(all.iter().any(|response| response.raw != all[0].raw));
            let bracket = Bracket { low, high: low + width };
            let states = states_of(&all, bracket);
            prop_assert_eq!(states[0].from, low);
            prop_assert!(states.windows(2).all(|two| two[0].from < two[1].from && two[0].gap() >= two[1].gap()));
            let ends = states.iter().flat_map(|state| [state.from.next_down(), state.from, state.from.next_up()]);
            for alpha in ends.chain(penalties).filter(|&alpha| low <= alpha && alpha <= bracket.high) {
                let (a, b) = best_and_worst(&all, &all, alpha, TieHash::default()).unwrap();
                let state = states[states.partition_point(|state| state.from <= alpha) - 1];
                prop_assert_eq!(rows(&state), (a.row, b.row), "at {}", alpha);
            }
        }
    }
}
