//! Vectors of sixteen float32 lanes, with AVX2 if the processor has it.
//!
//! The test of each prompt (`penalty::probe`) is written once, against [`Lanes`]. [`dispatch`] runs it with the widest
//! implementation, chosen at run time. [`Portable`] is plain Rust, which the compiler vectorizes for the target. Both
//! return the same bits: every operation is one IEEE operation per lane.

/// Number of lanes in a vector.
pub const LANES: usize = 16;

/// Operations on [`LANES`] float32 lanes. A mask has bit `i` for lane `i`.
pub trait Lanes: Copy + Send + Sync {
    /// A vector.
    type V: Copy;
    /// The lanes of an array.
    fn load(self, from: &[f32; LANES]) -> Self::V;
    /// The lanes of an array of integers below 2³¹, rounded to float32.
    fn load_ints(self, from: &[u32; LANES]) -> Self::V;
    /// One value in every lane.
    fn splat(self, value: f32) -> Self::V;
    /// a + b
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// a − b
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// a · b
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// |a|
    fn abs(self, a: Self::V) -> Self::V;
    /// The first `count` lanes; the others become NaN.
    fn head(self, a: Self::V, count: usize) -> Self::V;
    /// The greater value of each lane; that of `b` if that of `a` is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The lesser value of each lane; that of `b` if that of `a` is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// The greatest lane. No lane may be NaN.
    fn greatest(self, a: Self::V) -> f32;
    /// The least lane. No lane may be NaN.
    fn least(self, a: Self::V) -> f32;
    /// Mask of the lanes with a ≥ b (false for NaN).
    fn at_least(self, a: Self::V, b: Self::V) -> u32;
    /// Mask of the lanes with a ≤ b (false for NaN).
    fn at_most(self, a: Self::V, b: Self::V) -> u32;
    /// A mask with bit `i` set if `keys[i] != keys[i + 1]`.
    fn changes_32(self, keys: &[u32; 65]) -> u64;
    /// The same for 64-bit keys.
    fn changes_64(self, keys: &[u64; 65]) -> u64;
}

/// A computation that runs on any implementation of [`Lanes`].
pub trait Job {
    /// The result.
    type Output;
    /// Runs it. Must be `#[inline(always)]`: otherwise it is compiled without the vector instructions.
    fn run<L: Lanes>(self, lanes: L) -> Self::Output;
}

/// Runs a job with the widest vectors of this processor.
pub fn dispatch<J: Job>(job: J) -> J::Output {
    #[cfg(target_arch = "x86_64")]
    if let Some(v3) = pulp::x86::V3::try_new() {
        struct WithV3<J>(pulp::x86::V3, J);
        impl<J: Job> pulp::NullaryFnOnce for WithV3<J> {
            type Output = J::Output;
            #[inline(always)]
            fn call(self) -> J::Output {
                self.1.run(self.0)
            }
        }
        return v3.vectorize(WithV3(v3, job));
    }
    job.run(Portable)
}

/// Lanes in plain Rust.
#[derive(Debug, Clone, Copy)]
pub struct Portable;

#[inline(always)]
fn zip_lanes(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

#[inline(always)]
fn mask(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> bool) -> u32 {
    (0..LANES).fold(0, |bits, i| bits | u32::from(f(a[i], b[i])) << i)
}

/// A mask with bit `i` set if `keys[i] != keys[i + 1]`.
#[inline(always)]
pub fn changes<T: PartialEq>(keys: &[T; 65]) -> u64 {
    (0..64).fold(0, |bits, i| bits | u64::from(keys[i] != keys[i + 1]) << i)
}

impl Lanes for Portable {
    type V = [f32; LANES];
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::V {
        *from
    }
    #[inline(always)]
    fn load_ints(self, from: &[u32; LANES]) -> Self::V {
        from.map(|value| value as i32 as f32)
    }
    #[inline(always)]
    fn splat(self, value: f32) -> Self::V {
        [value; LANES]
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        zip_lanes(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        zip_lanes(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        zip_lanes(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn abs(self, a: Self::V) -> Self::V {
        a.map(f32::abs)
    }
    #[inline(always)]
    fn head(self, a: Self::V, count: usize) -> Self::V {
        std::array::from_fn(|i| if i < count { a[i] } else { f32::NAN })
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        zip_lanes(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        zip_lanes(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn greatest(self, a: Self::V) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn least(self, a: Self::V) -> f32 {
        a.into_iter().fold(f32::INFINITY, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn at_least(self, a: Self::V, b: Self::V) -> u32 {
        mask(a, b, |a, b| a >= b)
    }
    #[inline(always)]
    fn at_most(self, a: Self::V, b: Self::V) -> u32 {
        mask(a, b, |a, b| a <= b)
    }
    #[inline(always)]
    fn changes_32(self, keys: &[u32; 65]) -> u64 {
        changes(keys)
    }
    #[inline(always)]
    fn changes_64(self, keys: &[u64; 65]) -> u64 {
        changes(keys)
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{__m128, __m256, __m256i, _CMP_GE_OQ, _CMP_LE_OQ, _CMP_LT_OQ};

    use pulp::x86::V3;

    use super::{LANES, Lanes};

    #[inline(always)]
    fn both(a: [__m256; 2], b: [__m256; 2], f: impl Fn(__m256, __m256) -> __m256) -> [__m256; 2] {
        [f(a[0], b[0]), f(a[1], b[1])]
    }

    impl Lanes for V3 {
        type V = [__m256; 2];
        #[inline(always)]
        fn load(self, from: &[f32; LANES]) -> Self::V {
            pulp::cast(*from)
        }
        #[inline(always)]
        fn load_ints(self, from: &[u32; LANES]) -> Self::V {
            let ints: [__m256i; 2] = pulp::cast(*from);
            ints.map(|half| self.avx._mm256_cvtepi32_ps(half))
        }
        #[inline(always)]
        fn splat(self, value: f32) -> Self::V {
            [self.avx._mm256_set1_ps(value); 2]
        }
        #[inline(always)]
        fn add(self, a: Self::V, b: Self::V) -> Self::V {
            both(a, b, |a, b| self.avx._mm256_add_ps(a, b))
        }
        #[inline(always)]
        fn sub(self, a: Self::V, b: Self::V) -> Self::V {
            both(a, b, |a, b| self.avx._mm256_sub_ps(a, b))
        }
        #[inline(always)]
        fn mul(self, a: Self::V, b: Self::V) -> Self::V {
            both(a, b, |a, b| self.avx._mm256_mul_ps(a, b))
        }
        #[inline(always)]
        fn abs(self, a: Self::V) -> Self::V {
            let sign = self.avx._mm256_set1_ps(-0.0);
            a.map(|half| self.avx._mm256_andnot_ps(sign, half))
        }
        #[inline(always)]
        fn head(self, a: Self::V, count: usize) -> Self::V {
            let place: [__m256; 2] = pulp::cast(std::array::from_fn::<f32, LANES, _>(|i| i as f32));
            let count = self.avx._mm256_set1_ps(count.min(LANES) as f32);
            let nan = self.avx._mm256_set1_ps(f32::NAN);
            both(a, place, |a, place| {
                self.avx._mm256_blendv_ps(nan, a, self.avx._mm256_cmp_ps::<_CMP_LT_OQ>(place, count))
            })
        }
        #[inline(always)]
        fn max(self, a: Self::V, b: Self::V) -> Self::V {
            both(a, b, |a, b| self.avx._mm256_max_ps(a, b))
        }
        #[inline(always)]
        fn min(self, a: Self::V, b: Self::V) -> Self::V {
            both(a, b, |a, b| self.avx._mm256_min_ps(a, b))
        }
        #[inline(always)]
        fn greatest(self, a: Self::V) -> f32 {
            let a = self.avx._mm256_max_ps(a[0], a[1]);
            let a = self
                .sse
                ._mm_max_ps(self.avx._mm256_castps256_ps128(a), self.avx._mm256_extractf128_ps::<1>(a));
            let a: __m128 = self.sse._mm_max_ps(a, self.sse._mm_movehl_ps(a, a));
            self.sse._mm_cvtss_f32(self.sse._mm_max_ss(a, self.sse3._mm_movehdup_ps(a)))
        }
        #[inline(always)]
        fn least(self, a: Self::V) -> f32 {
            let a = self.avx._mm256_min_ps(a[0], a[1]);
            let a = self
                .sse
                ._mm_min_ps(self.avx._mm256_castps256_ps128(a), self.avx._mm256_extractf128_ps::<1>(a));
            let a: __m128 = self.sse._mm_min_ps(a, self.sse._mm_movehl_ps(a, a));
            self.sse._mm_cvtss_f32(self.sse._mm_min_ss(a, self.sse3._mm_movehdup_ps(a)))
        }
        #[inline(always)]
        fn at_least(self, a: Self::V, b: Self::V) -> u32 {
            let half = |i: usize| {
                self.avx._mm256_movemask_ps(self.avx._mm256_cmp_ps::<_CMP_GE_OQ>(a[i], b[i])) as u32
            };
            half(0) | half(1) << 8
        }
        #[inline(always)]
        fn at_most(self, a: Self::V, b: Self::V) -> u32 {
            let half = |i: usize| {
                self.avx._mm256_movemask_ps(self.avx._mm256_cmp_ps::<_CMP_LE_OQ>(a[i], b[i])) as u32
            };
            half(0) | half(1) << 8
        }
        #[inline(always)]
        fn changes_32(self, keys: &[u32; 65]) -> u64 {
            let mut same = 0;
            for i in 0..8 {
                let eight = |from: usize| -> __m256i { pulp::cast(array::<u32, 8>(&keys[from..])) };
                let equal = self.avx2._mm256_cmpeq_epi32(eight(8 * i), eight(8 * i + 1));
                let equal = self.avx._mm256_movemask_ps(self.avx._mm256_castsi256_ps(equal)) as u32;
                same |= u64::from(equal) << (8 * i);
            }
            !same
        }
        #[inline(always)]
        fn changes_64(self, keys: &[u64; 65]) -> u64 {
            let mut same = 0;
            for i in 0..16 {
                let four = |from: usize| -> __m256i { pulp::cast(array::<u64, 4>(&keys[from..])) };
                let equal = self.avx2._mm256_cmpeq_epi64(four(4 * i), four(4 * i + 1));
                let equal = self.avx._mm256_movemask_pd(self.avx._mm256_castsi256_pd(equal)) as u32;
                same |= u64::from(equal) << (4 * i);
            }
            !same
        }
    }

    #[inline(always)]
    fn array<T: Copy, const N: usize>(from: &[T]) -> [T; N] {
        from[..N].try_into().expect("N values")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Floats = [f32; LANES];

    /// The bits of all operations on a pair of vectors.
    struct AllOperations<'a>(&'a Floats, &'a Floats, &'a [u32; LANES], &'a [u32; 65], usize);

    impl Job for AllOperations<'_> {
        type Output = (Vec<u32>, [u64; 2]);
        #[inline(always)]
        fn run<L: Lanes>(self, v: L) -> Self::Output {
            let (a, b, ints) = (v.load(self.0), v.load(self.1), v.load_ints(self.2));
            let low = v.splat(f32::MIN);
            let mut results = Vec::new();
            // Vectors are opaque: comparisons with many floats read them out.
            let vectors = [v.add(a, ints), v.sub(a, b), v.mul(a, ints), v.abs(a), v.max(a, b), v.min(a, b)];
            for vector in vectors {
                let vector = v.head(vector, self.4);
                for bound in self.0.iter().chain(self.1) {
                    results.push(v.at_least(vector, v.splat(*bound)));
                    results.push(v.at_most(vector, v.splat(*bound)));
                }
                // Adding +0 turns −0 into +0.
                results.push((v.greatest(v.max(vector, low)) + 0.0).to_bits());
                results.push((v.least(v.min(vector, low)) + 0.0).to_bits());
            }
            (results, [v.changes_32(self.3), v.changes_64(&self.3.map(|key| u64::from(key) << 33))])
        }
    }

    proptest! {
        #[test]
        fn all_implementations_return_the_same_bits(
            a in prop::array::uniform16(any::<f32>()),
            b in prop::array::uniform16(-9i8..9),
            ints in prop::array::uniform16(0u32..1 << 31),
            keys in prop::collection::vec(0u32..3, 65),
            count in 0usize..20,
        ) {
            let (b, keys) = (b.map(f32::from), keys.try_into().unwrap());
            let job = || AllOperations(&a, &b, &ints, &keys, count);
            prop_assert_eq!(dispatch(job()), job().run(Portable));
        }
    }
}
