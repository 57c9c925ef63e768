//! The correlation of reward and length, from sums that are added up in parallel.

/// Sums over usable rows, for the correlation of reward and length. Values are taken relative to a pivot (the first
/// row), so that no precision is lost where rewards are far from zero.
#[derive(Debug, Clone, Copy, Default)]
pub struct Moments {
    /// Number of rows.
    count: f64,
    /// The reward and the length that the sums are relative to.
    pivot: [f64; 2],
    /// Σ reward, Σ length, Σ reward², Σ length², Σ reward · length
    sums: [f64; 5],
}

impl Moments {
    /// Adds the rows whose `marks` are not NaN. With `CHECKED` false, all rows are usable and lengths are below 2³¹.
    #[inline(always)]
    pub(crate) fn add_rows<const CHECKED: bool>(
        &mut self,
        marks: &[f32],
        lengths: &[u32],
        reward: impl Fn(usize) -> f64,
    ) {
        const WIDE: usize = 8;
        if self.count == 0.0 {
            let Some(first) = marks[..lengths.len()].iter().position(|mark| !mark.is_nan()) else { return };
            self.pivot = [reward(first), f64::from(lengths[first])];
        }
        let [pivot_reward, pivot_length] = self.pivot;
        let mut sums = [[0.0f64; WIDE]; 5];
        let mut count = [0u32; WIDE];
        let mut add_one = |lane: usize, i: usize| {
            let usable = !CHECKED || !marks[i].is_nan();
            let length = if CHECKED { f64::from(lengths[i]) } else { f64::from(lengths[i] as i32) };
            let (x, y) = if usable { (reward(i) - pivot_reward, length - pivot_length) } else { (0.0, 0.0) };
            count[lane] += u32::from(usable);
            sums[0][lane] += x;
            sums[1][lane] += y;
            sums[2][lane] += x * x;
            sums[3][lane] += y * y;
            sums[4][lane] += x * y;
        };
        let rows = lengths.len();
        let vectorized = rows - rows % WIDE;
        let mut at = 0;
        while at < vectorized {
            for lane in 0..WIDE {
                add_one(lane, at + lane);
            }
            at += WIDE;
        }
        for i in vectorized..rows {
            add_one(0, i);
        }
        self.count += f64::from(count.iter().sum::<u32>());
        for (sum, lanes) in self.sums.iter_mut().zip(&sums) {
            *sum += lanes.iter().sum::<f64>();
        }
    }

    /// Adds one row.
    pub fn push(&mut self, reward: f64, length: u32) {
        let length = f64::from(length);
        if self.count == 0.0 {
            self.pivot = [reward, length];
        }
        let (x, y) = (reward - self.pivot[0], length - self.pivot[1]);
        self.count += 1.0;
        self.sums.iter_mut().zip([x, y, x * x, y * y, x * y]).for_each(|(sum, term)| *sum += term);
    }

    /// Adds the rows of other sums.
    pub fn merge(&mut self, other: &Self) {
        if self.count == 0.0 {
            *self = *other;
            return;
        }
        // The other sums, moved to this pivot.
        let (n, [x, y, xx, yy, xy]) = (other.count, other.sums);
        let (u, v) = (other.pivot[0] - self.pivot[0], other.pivot[1] - self.pivot[1]);
        let terms = [
            x + n * u,
            y + n * v,
            xx + 2.0 * u * x + n * u * u,
            yy + 2.0 * v * y + n * v * v,
            xy + u * y + v * x + n * u * v,
        ];
        self.count += n;
        self.sums.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
    }

    /// Pearson's correlation of `reward − alpha · length` with length, to nine decimals (further ones would depend on
    /// the order of rows). NaN if one of them is constant.
    pub fn correlation(&self, alpha: f64) -> f64 {
        let n = self.count;
        let [x, y, xx, yy, xy] = self.sums;
        let (variance_x, variance_y) = (xx / n - (x / n).powi(2), yy / n - (y / n).powi(2));
        let covariance = xy / n - (x / n) * (y / n);
        let penalized = variance_x - 2.0 * alpha * covariance + alpha * alpha * variance_y;
        // A constant leaves nothing but rounding error.
        let scale = (xx + alpha * alpha * yy) / n;
        if !(penalized > 1e-12 * scale && variance_y > 1e-12 * yy / n) {
            return f64::NAN;
        }
        let correlation = (covariance - alpha * variance_y) / (penalized * variance_y).sqrt();
        // Adding zero turns −0 into 0.
        (correlation.clamp(-1.0, 1.0) * 1e9).round() / 1e9 + 0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn correlation_is_precise_far_from_zero_and_when_merged() {
        let rows: Vec<(f64, u32)> =
            (0..1000u32).map(|i| (1e4 + f64::from(i * 7919 % 1000) * 5e-6, 500 + i * 31 % 777)).collect();
        let of = |rows: &[(f64, u32)]| {
            let mut moments = Moments::default();
            rows.iter().for_each(|row| moments.push(row.0, row.1));
            moments
        };
        let mean = |value: &dyn Fn(&(f64, u32)) -> f64| rows.iter().map(value).sum::<f64>() / 1000.0;
        let (x, y) = (mean(&|row| row.0 - 1e4), mean(&|row| f64::from(row.1)));
        let spread =
            |a: &dyn Fn(&(f64, u32)) -> f64, b: &dyn Fn(&(f64, u32)) -> f64| mean(&|row| a(row) * b(row));
        let (u, v) = (|row: &(f64, u32)| row.0 - 1e4 - x, |row: &(f64, u32)| f64::from(row.1) - y);
        let truth = spread(&u, &v) / (spread(&u, &u) * spread(&v, &v)).sqrt();
        let expected = of(&rows).correlation(0.0);
        assert!((expected - truth).abs() < 2e-9, "{expected} is not {truth}");
        let mut parts = of(&rows[..1]);
        parts.merge(&of(&rows[1..400]));
        parts.merge(&Moments::default());
        parts.merge(&of(&rows[400..]));
        assert!((parts.correlation(0.0) - expected).abs() < 2e-9);
        assert!(of(&rows[..1]).correlation(0.0).is_nan());
        assert!(Moments::default().correlation(0.0).is_nan());
    }
}
