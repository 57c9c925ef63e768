//! Labels of pairs that depend on all responses of the prompt.

use crate::input::filter::Response;

/// SPPO's estimate of the probability that a response beats the prompt's others (Wu et al., arXiv 2405.00675):
///
/// ```text
/// P_i = 1/n · Σ_j σ((s_i − s_j) / scale)
/// ```
///
/// over the prompt's usable responses j, including i itself; `s = score − alpha · length`.
pub fn win_rate(response: &Response, all: &[Response], alpha: f64, scale: f64) -> f32 {
    let score = |response: &Response| response.score - alpha * f64::from(response.length);
    let own = score(response);
    let sum: f64 = all.iter().map(|other| sigmoid((own - score(other)) / scale)).sum();
    (sum / all.len() as f64) as f32
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// How well two rewards agree on the ranking of one prompt's responses (CREAM, Wang et al., arXiv 2410.12735):
/// `(τ + 1) / 2` with Kendall's `τ = (concordant − discordant) / (n·(n−1)/2)`; ties count for neither. NaN for fewer
/// than two responses.
pub fn consistency(rewards: &[(f64, f64)]) -> f32 {
    let count = rewards.len() as f64;
    let mut balance = 0i64;
    for (i, a) in rewards.iter().enumerate() {
        for b in &rewards[..i] {
            let sign = |x: f64, y: f64| i64::from(x > y) - i64::from(x < y);
            balance += sign(a.0, b.0) * sign(a.1, b.1);
        }
    }
    let tau = balance as f64 / (count * (count - 1.0) / 2.0);
    if rewards.len() < 2 { f32::NAN } else { ((tau + 1.0) / 2.0) as f32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consistency_of_equal_opposite_and_tied_rankings() {
        assert_eq!(consistency(&[(1.0, 5.0), (2.0, 6.0), (3.0, 7.0)]), 1.0);
        assert_eq!(consistency(&[(1.0, 7.0), (2.0, 6.0), (3.0, 5.0)]), 0.0);
        // One pair of three is tied, one agrees and one does not.
        assert_eq!(consistency(&[(1.0, 1.0), (1.0, 2.0), (2.0, 1.5)]), 0.5);
        assert!(consistency(&[(1.0, 1.0)]).is_nan());
    }

    #[test]
    fn a_response_ties_with_itself() {
        let response = |score| Response { score, raw: score, row: 0, length: 1 };
        let all = [response(0.0), response(1.0)];
        let half = 1.0 / (1.0 + (-0.5f64).exp());
        assert_eq!(win_rate(&all[1], &all, 0.0, 2.0), ((0.5 + half) / 2.0) as f32);
    }
}
