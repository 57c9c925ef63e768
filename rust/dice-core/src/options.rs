//! Options of the miner, and the passes that they ask for.

use crate::error::Error;
use crate::input::columns::Columns;
use crate::input::filter::Filter;
use crate::input::layout::Layout;
use crate::pairs::bucket::{Buckets, UsableRows};
use crate::pairs::pairing::Pairing;
use crate::pairs::pick::{PickRules, Scoring};
use crate::pairs::pool::{PickFrom, Pool};
use crate::penalty::hull::Bracket;
use crate::penalty::scan::ScanRequest;
use crate::penalty::steps::Target;

/// How rewards are adjusted for length.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Debias {
    /// Not at all.
    None,
    /// `reward − α·length`, with the α that brings the mean length gap nearest zero.
    LinearAuto,
    /// `reward − α·length`, with a given α: finite and not negative.
    Linear(f64),
    /// `reward / length`. Responses of length 0 are dropped as too short.
    PerToken,
    /// The reward centered inside exact length quantiles.
    Bucket {
        /// Number of quantiles, at least 1.
        buckets: usize,
        /// Whether to divide by the standard deviation too.
        scale: bool,
    },
}

/// Options of [`mine`](crate::mine::mine).
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// How rewards are adjusted for length.
    pub debias: Debias,
    /// Usable responses that a prompt needs, at least 2.
    pub min_responses: usize,
    /// Bounds on the length of a usable response.
    pub filter: Filter,
    /// Which responses make pairs.
    pub pairing: Pairing,
    /// Seed of the choice among responses of equal reward.
    pub seed: u64,
    /// Policies that the chosen response may come from.
    pub chosen_from: PickFrom,
    /// Policies that the rejected response may come from.
    pub rejected_from: PickFrom,
    /// The scale of win rates, if they are added: each pair gets SPPO's estimate of the probability that its responses
    /// beat the prompt's others (Wu et al., arXiv 2405.00675).
    pub win_rates: Option<f64>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            debias: Debias::LinearAuto,
            min_responses: 2,
            filter: Filter::default(),
            pairing: Pairing::MaxMin,
            seed: 0,
            chosen_from: PickFrom::Any,
            rejected_from: PickFrom::Any,
            win_rates: None,
        }
    }
}

impl Options {
    /// Checks that the options fit each other and the columns.
    ///
    /// # Errors
    /// [`Error::Usage`].
    pub(crate) fn check(&self, columns: &Columns) -> Result<(), Error> {
        let refuse = |message: String| Err(Error::Usage(message));
        if self.min_responses < 2 {
            return refuse(format!(
                "min_responses is {}, but a pair takes two responses: set 2 or more",
                self.min_responses
            ));
        }
        if let Filter { min_length: Some(min), max_length: Some(max) } = self.filter
            && min > max
        {
            return refuse(format!("min_length is {min}, but must not be above max_length, which is {max}"));
        }
        let pooled = self.chosen_from != PickFrom::Any || self.rejected_from != PickFrom::Any;
        if pooled && columns.batches.iter().any(|batch| batch.policy.is_none()) {
            return refuse("chosen_from and rejected_from need a column of policies: name it".into());
        }
        match self.debias {
            Debias::Linear(alpha) if !(alpha.is_finite() && alpha >= 0.0) => {
                refuse(format!("alpha is {alpha}, but must be 'auto' or a finite number of zero or more"))
            }
            Debias::Bucket { buckets: 0, .. } => refuse("buckets is 0: set 1 or more".into()),
            Debias::LinearAuto | Debias::Linear(_) | Debias::PerToken | Debias::Bucket { .. }
                if matches!(self.pairing, Pairing::Matched(_)) =>
            {
                refuse("matched pairs are picked by reward alone: remove the other debiasing".into())
            }
            _ => Ok(()),
        }
    }

    /// The filter, including the lengths that the debiasing needs.
    fn length_filter(&self) -> Filter {
        let Filter { min_length, max_length } = self.filter;
        match self.debias {
            Debias::PerToken => Filter { min_length: Some(min_length.unwrap_or(0).max(1)), max_length },
            _ => self.filter,
        }
    }

    /// The linear penalty to solve for, if there is one.
    pub(crate) fn target(&self) -> Option<Target> {
        match self.debias {
            _ if matches!(self.pairing, Pairing::Matched(_)) => None,
            Debias::LinearAuto => Some(Target::LeastGap),
            Debias::Linear(alpha) => Some(Target::At(alpha)),
            Debias::None => Some(Target::At(0.0)),
            Debias::PerToken | Debias::Bucket { .. } => None,
        }
    }

    /// Whether the scan alone gives the pairs: the best and worst of all usable responses, without labels.
    pub(crate) fn scan_gives_pairs(&self, columns: &Columns) -> bool {
        self.pairing == Pairing::MaxMin
            && self.win_rates.is_none()
            && self.pool(columns).is_unrestricted()
            && columns.batches.iter().all(|batch| batch.second.is_none())
    }

    fn pool<'a>(&self, columns: &'a Columns) -> Pool<'a> {
        Pool { columns, chosen: self.chosen_from, rejected: self.rejected_from }
    }

    /// The rows to fit buckets to.
    pub(crate) fn usable_rows<'a, S>(
        &self,
        source: &'a S,
        layout: &'a Layout,
        columns: &'a Columns,
    ) -> UsableRows<'a, S> {
        UsableRows { source, layout, filter: self.length_filter(), pool: self.pool(columns) }
    }

    /// The request for a scan of all penalties.
    pub(crate) fn scan_request<'a>(&self, columns: &'a Columns, pairs: bool) -> ScanRequest<'a> {
        ScanRequest {
            filter: self.length_filter(),
            min_responses: self.min_responses,
            bracket: Bracket::ALL,
            pool: self.pool(columns),
            seed: self.seed,
            pairs,
        }
    }

    /// The rules for a pass that picks pairs, with the penalty or the buckets of the debiasing.
    pub(crate) fn pick_rules<'a>(
        &self,
        columns: &'a Columns,
        alpha: Option<f64>,
        buckets: Option<&'a Buckets>,
    ) -> PickRules<'a> {
        let scoring = match (buckets, self.debias) {
            (Some(buckets), _) => Scoring::Bucket(buckets),
            (None, Debias::PerToken) => Scoring::PerToken,
            _ => Scoring::Linear(alpha.unwrap_or(0.0)),
        };
        PickRules {
            filter: self.length_filter(),
            min_responses: self.min_responses,
            pool: self.pool(columns),
            scoring,
            pairing: self.pairing,
            seed: self.seed,
            win_rates: self.win_rates,
        }
    }
}
