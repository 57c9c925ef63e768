//! Comparisons and sums of floats without rounding error.
//!
//! Why: two penalized rewards are equal at a break point, so there a comparison would depend on rounding. With exact
//! comparisons, the pairs at a penalty always agree with the number of break points below it. With exact sums, a
//! result does not depend on the order of its terms.

use std::cmp::Ordering;

/// Compares `a − b` with `alpha · n`, exactly.
///
/// Rounding is monotone, so if the rounded sides differ, the exact sides differ the same way. If the rounded sides are
/// equal, the rounding errors decide. Both can be computed exactly: that of the difference by Dekker's Fast2Sum, that
/// of the product by a fused multiply-add. The product's error does not underflow, since α is a multiple of 2⁻¹⁰⁷⁴ and
/// `n` is an integer.
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

/// The least float `alpha` with `a − b <= alpha · n`, for `a > b` and an integer `n >= 1`.
///
/// This is (a − b) / n rounded up, so that for every float α: α reaches the exact quotient if and
/// only if it reaches this value.
#[inline]
pub fn divide_up(a: f64, b: f64, n: f64) -> f64 {
    let mut quotient = (a - b) / n;
    // After two roundings it is at most two floats off.
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

/// A sum of floats that is exact until it is read, so it does not depend on the order of its terms.
///
/// This is Kulisch's accumulator: a fixed-point number that covers the full range of float64.
#[derive(Debug, Clone)]
pub struct ExactSum {
    /// Digits of 32 bits with room for carries. The lowest bit is worth 2⁻¹⁰⁷⁴.
    limbs: [i64; LIMBS],
    /// Number of terms since the carries were last propagated.
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
        let position = (exponent - LOWEST) as usize;
        let shifted = u128::from(mantissa) << (position % 32);
        let sign = if value.is_sign_negative() { -1 } else { 1 };
        for digit in 0..3 {
            self.limbs[position / 32 + digit] += sign * ((shifted >> (32 * digit)) as u32 as i64);
        }
        self.pending += 1;
        if self.pending == 1 << 30 {
            self.propagate_carries();
        }
    }

    /// Adds another sum.
    pub fn merge(&mut self, other: &Self) {
        let mut other = other.clone();
        other.propagate_carries();
        self.propagate_carries();
        for (limb, added) in self.limbs.iter_mut().zip(other.limbs) {
            *limb += added;
        }
        self.propagate_carries();
    }

    /// Brings all digits except the highest into 0..2³².
    fn propagate_carries(&mut self) {
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
        sum.propagate_carries();
        // The highest digit has the sign. The digits of the magnitude do not cancel.
        let negative = sum.limbs[LIMBS - 1] < 0;
        if negative {
            sum.limbs.iter_mut().for_each(|limb| *limb = -*limb);
            sum.propagate_carries();
        }
        // From the lowest digit up, so that the highest is added last.
        let magnitude = sum.limbs.iter().enumerate().fold(0.0, |total, (position, &limb)| {
            total + limb as f64 * power_of_two(32 * position as i32 + LOWEST)
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

    /// Floats that are multiples of 2⁻⁶⁰, so that 128-bit integers represent them exactly.
    fn fixed() -> impl Strategy<Value = f64> {
        (-(1i64 << 52)..1i64 << 52, 0i32..40)
            .prop_map(|(mantissa, shift)| mantissa as f64 * power_of_two(shift - 60))
    }

    fn to_fixed(value: f64) -> i128 {
        (value * power_of_two(60)) as i128
    }

    proptest! {
        #[test]
        fn comparison_is_exact(a in fixed(), b in fixed(), n in 1u32..4096, near in any::<bool>(), alpha in fixed()) {
            // Rounding only matters near the break point.
            let alpha = if near { (a - b) / f64::from(n) } else { alpha };
            prop_assume!(to_fixed(alpha) as f64 * power_of_two(-60) == alpha);
            let expected = (to_fixed(a) - to_fixed(b)).cmp(&(to_fixed(alpha) * i128::from(n)));
            prop_assert_eq!(compare_difference(a, b, alpha, f64::from(n)), expected);
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
        fn sums_do_not_depend_on_order(integers in prop::collection::vec(any::<i32>(), 0..50), cut in 0usize..50) {
            // Magnitudes that differ by more than 53 bits.
            let scale = |(i, &x): (usize, &i32)| f64::from(x) * power_of_two(if i % 2 == 0 { -40 } else { 40 });
            let mut values: Vec<f64> = integers.iter().enumerate().map(scale).collect();
            let sum = |values: &[f64]| {
                let mut sum = ExactSum::default();
                values.iter().for_each(|&value| sum.add(value));
                sum
            };
            let forward = sum(&values);
            let (left, right) = values.split_at(cut.min(values.len()));
            let mut merged = sum(right);
            merged.merge(&sum(left));
            prop_assert_eq!(forward.value(), merged.value());
            let expected: i128 = values.iter().map(|value| (value * power_of_two(40)) as i128).sum();
            let expected = expected as f64 * power_of_two(-40);
            prop_assert!((forward.value() - expected).abs() <= expected.abs() * 1e-15);
            values.reverse();
            prop_assert_eq!(forward.value(), sum(&values).value());
        }
    }
}
