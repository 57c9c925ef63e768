//! Comparisons and sums of floats without rounding error.
//!
//! Why: a break point is where two penalised rewards are equal, which is just where rounding would
//! decide. With these, picking pairs at a penalty and counting break points below it always agree,
//! and a sum does not depend on the order of its terms.

use std::cmp::Ordering;

/// Compares `a − b` with `alpha · n`, exactly.
///
/// Rounding is monotone, so if the rounded sides differ, the exact sides differ the same way. If they
/// are equal, their rounding errors decide, and both are floats that can be had exactly: that of a
/// sum by Dekker's Fast2Sum; that of the product by a fused multiply-add, since α is a whole multiple
/// of 2⁻¹⁰⁷⁴ and `n` is whole, so that no part of the error is lost to underflow.
///
/// `a`, `b` and `alpha` are finite, `|a − b|` does not overflow (rewards are within float32), and
/// `|n| < 2⁵³`.
#[inline]
pub fn compare_difference(a: f64, b: f64, alpha: f64, n: f64) -> Ordering {
    let (difference, product) = (a - b, alpha * n);
    if difference < product {
        return Ordering::Less;
    }
    if difference > product {
        return Ordering::Greater;
    }
    let difference_error = if a.abs() >= b.abs() { (a - difference) - b } else { a - (difference + b) };
    let product_error = alpha.mul_add(n, -product);
    difference_error.partial_cmp(&product_error).unwrap_or(Ordering::Equal)
}

/// The least float `alpha` with `a − b <= alpha · n`, for `a > b` and a whole `n >= 1`.
///
/// This is (a − b) / n rounded up, so that for every float α: α reaches the exact quotient if and
/// only if it reaches this value.
#[inline]
pub fn divide_up(a: f64, b: f64, n: f64) -> f64 {
    let mut quotient = (a - b) / n;
    // The two roundings leave it at most two floats away.
    while compare_difference(a, b, quotient, n) == Ordering::Greater {
        quotient = quotient.next_up();
    }
    loop {
        let below = quotient.next_down();
        if below < 0.0 || compare_difference(a, b, below, n) == Ordering::Greater {
            return quotient;
        }
        quotient = below;
    }
}

const LIMBS: usize = 68;
const LOWEST: i32 = -1074;

/// A sum of floats that is exact until it is read, and so does not depend on the order of its terms
/// (Kulisch's accumulator: a fixed-point number that covers the whole range of float64).
#[derive(Debug, Clone)]
pub struct ExactSum {
    /// Digits of 32 bits, the lowest worth 2⁻¹⁰⁷⁴, with room for carries.
    limbs: [i64; LIMBS],
    /// Terms since the carries were last settled.
    pending: u32,
}

impl Default for ExactSum {
    fn default() -> Self {
        Self { limbs: [0; LIMBS], pending: 0 }
    }
}

impl ExactSum {
    /// Adds a finite number.
    #[inline]
    pub fn add(&mut self, value: f64) {
        let bits = value.to_bits();
        let exponent = ((bits >> 52) & 0x7ff) as i32;
        let fraction = bits & ((1 << 52) - 1);
        // A subnormal number has no implicit leading bit and the exponent of the least normal one.
        let (mantissa, exponent) =
            if exponent == 0 { (fraction, LOWEST) } else { (fraction | (1 << 52), exponent - 1075) };
        let place = (exponent - LOWEST) as usize;
        let shifted = u128::from(mantissa) << (place % 32);
        let sign = if value.is_sign_negative() { -1 } else { 1 };
        for digit in 0..3 {
            self.limbs[place / 32 + digit] += sign * ((shifted >> (32 * digit)) as u32 as i64);
        }
        self.pending += 1;
        if self.pending == 1 << 30 {
            self.settle();
        }
    }

    /// Adds another sum.
    pub fn merge(&mut self, other: &Self) {
        let mut other = other.clone();
        other.settle();
        self.settle();
        for (limb, added) in self.limbs.iter_mut().zip(other.limbs) {
            *limb += added;
        }
        self.settle();
    }

    /// Brings all digits but the highest into 0..2³².
    fn settle(&mut self) {
        let mut carry = 0;
        for limb in &mut self.limbs[..LIMBS - 1] {
            let total = *limb + carry;
            *limb = total & 0xffff_ffff;
            carry = total >> 32;
        }
        self.limbs[LIMBS - 1] += carry;
        self.pending = 0;
    }

    /// The sum as a float, within a rounding or two; equal sums give equal floats.
    pub fn value(&self) -> f64 {
        let mut sum = self.clone();
        sum.settle();
        // The highest digit carries the sign: work on the magnitude, where digits do not cancel.
        let negative = sum.limbs[LIMBS - 1] < 0;
        if negative {
            sum.limbs.iter_mut().for_each(|limb| *limb = -*limb);
            sum.settle();
        }
        // From the lowest digit up, so that the highest is rounded last.
        let magnitude = sum.limbs.iter().enumerate().fold(0.0, |total, (place, &limb)| {
            total + limb as f64 * power_of_two(32 * place as i32 + LOWEST)
        });
        if negative { -magnitude } else { magnitude }
    }
}

/// 2 to the power of `exponent`, for −1074 to 1023.
fn power_of_two(exponent: i32) -> f64 {
    if exponent >= -1022 {
        f64::from_bits(((exponent.min(1023) + 1023) as u64) << 52)
    } else {
        f64::from_bits(1 << (exponent + 1074))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_tie_is_a_tie_and_one_float_off_is_not() {
        assert_eq!(compare_difference(0.5, 0.25, 0.25, 1.0), Ordering::Equal);
        // 1 + 2⁻⁶⁰ is not a float: its rounding error must count. So must that of 3 · fl(1/3) = 1 − 2⁻⁵⁴.
        assert_eq!(compare_difference(1.0, -power_of_two(-60), 1.0, 1.0), Ordering::Greater);
        assert_eq!(compare_difference(-power_of_two(-60), -1.0, 1.0, 1.0), Ordering::Less);
        assert_eq!(compare_difference(1.0, 0.0, 1.0 / 3.0, 3.0), Ordering::Greater);
        assert_eq!(compare_difference(0.5, 0.25, 0.25f64.next_up(), 1.0), Ordering::Less);
    }

    #[test]
    fn sums_cancel_exactly() {
        let mut sum = ExactSum::default();
        for value in [1e300, 1.0, -1e300, f64::MIN_POSITIVE / 8.0, -1.0] {
            sum.add(value);
        }
        assert_eq!(sum.value(), f64::MIN_POSITIVE / 8.0);
        sum.add(-3.5);
        assert_eq!(sum.value(), -3.5);
    }

    /// Floats as whole multiples of 2⁻⁶⁰, so that 128-bit integers can say the truth.
    fn fixed() -> impl Strategy<Value = f64> {
        (-(1i64 << 52)..1i64 << 52, 0i32..40)
            .prop_map(|(mantissa, shift)| mantissa as f64 * power_of_two(shift - 60))
    }

    fn whole(value: f64) -> i128 {
        (value * power_of_two(60)) as i128
    }

    proptest! {
        #[test]
        fn comparison_is_exact(a in fixed(), b in fixed(), n in 1u32..4096, near in any::<bool>(), alpha in fixed()) {
            // Near the break point is where it matters.
            let alpha = if near { (a - b) / f64::from(n) } else { alpha };
            prop_assume!(whole(alpha) as f64 * power_of_two(-60) == alpha);
            let truth = (whole(a) - whole(b)).cmp(&(whole(alpha) * i128::from(n)));
            prop_assert_eq!(compare_difference(a, b, alpha, f64::from(n)), truth);
        }

        #[test]
        fn quotient_is_the_least(a in -1e6f64..1e6, b in -1e6f64..1e6, n in 1u32..100_000) {
            prop_assume!(a != b);
            let (a, b, n) = (a.max(b), a.min(b), f64::from(n));
            let alpha = divide_up(a, b, n);
            prop_assert_ne!(compare_difference(a, b, alpha, n), Ordering::Greater);
            prop_assert_eq!(compare_difference(a, b, alpha.next_down(), n), Ordering::Greater);
        }

        #[test]
        fn sums_do_not_depend_on_order(whole in prop::collection::vec(any::<i32>(), 0..50), cut in 0usize..50) {
            // A thousand times more than 53 bits apart.
            let scale = |(i, &x): (usize, &i32)| f64::from(x) * power_of_two(if i % 2 == 0 { -40 } else { 40 });
            let mut values: Vec<f64> = whole.iter().enumerate().map(scale).collect();
            let sum = |values: &[f64]| {
                let mut sum = ExactSum::default();
                values.iter().for_each(|&value| sum.add(value));
                sum
            };
            let forwards = sum(&values);
            let (left, right) = values.split_at(cut.min(values.len()));
            let mut merged = sum(right);
            merged.merge(&sum(left));
            prop_assert_eq!(forwards.value(), merged.value());
            let truth: i128 = values.iter().map(|value| (value * power_of_two(40)) as i128).sum();
            let truth = truth as f64 * power_of_two(-40);
            prop_assert!((forwards.value() - truth).abs() <= truth.abs() * 1e-15);
            values.reverse();
            prop_assert_eq!(forwards.value(), sum(&values).value());
        }
    }
}
