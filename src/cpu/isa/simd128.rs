//! WebAssembly's simd128: 4 lanes. It is enabled when the module is built
//! (`-C target-feature=+simd128`). A machine without it refuses the module.

use std::arch::wasm32::*;

use half::{bf16, f16};

use crate::cpu::kernels::{CpuKernels, TwoByFour, kernels};
use crate::cpu::simd::{Body, Isa, Simd};
use crate::cpu::tuning::{CpuFamily, Unmeasured};

/// Proof that there is simd128: this file is not built otherwise.
#[derive(Clone, Copy)]
pub(super) struct Simd128(());

impl Simd128 {
    pub(super) fn new() -> Self {
        Self(())
    }
}

impl Isa for Simd128 {
    type Simd = Self;

    #[inline(always)]
    unsafe fn assume() -> Self {
        Self(())
    }

    #[inline(always)]
    fn vectorize<B: Body<Self>>(self, body: B) -> B::Output {
        body.run(self)
    }
}

/// The kernels.
pub(super) fn detect(_: CpuFamily) -> Option<CpuKernels> {
    Some(kernels::<_, TwoByFour, TwoByFour, TwoByFour, Unmeasured>("simd128", Simd128::new()))
}

/// 2ⁿ for n in [-126, 127].
#[inline(always)]
fn pow2(n: v128) -> v128 {
    i32x4_shl(i32x4_add(n, i32x4_splat(127)), 23)
}

/// a·b + c of the lower two lanes with one rounding.
///
/// The product is exact in f64. The sum is rounded to odd in f64: to nearest and, if that was
/// inexact and left an even last bit, one step towards the exact sum. The second rounding, to f32,
/// then gives the exact sum rounded once.
#[inline(always)]
fn fma_low(a: v128, b: v128, c: v128) -> v128 {
    let c = f64x2_promote_low_f32x4(c);
    let product = f64x2_mul(f64x2_promote_low_f32x4(a), f64x2_promote_low_f32x4(b));
    let sum = f64x2_add(product, c);
    let rest = f64x2_sub(sum, product); // what came of c
    let cut = f64x2_add(f64x2_sub(product, f64x2_sub(sum, rest)), f64x2_sub(c, rest));
    let inexact = f64x2_gt(f64x2_abs(cut), f64x2_splat(0.0)); // not where it is NaN, for an infinite sum
    let even = i64x2_sub(v128_and(sum, i64x2_splat(1)), i64x2_splat(1));
    let step = v128_or(i64x2_shr(v128_xor(cut, sum), 63), i64x2_splat(1)); // away from 0 if their signs agree
    f32x4_demote_f64x2_zero(i64x2_add(sum, v128_and(step, v128_and(inexact, even))))
}

#[inline(always)]
fn upper(a: v128) -> v128 {
    i64x2_shuffle::<1, 1>(a, a)
}

impl Simd for Simd128 {
    const LANES: usize = 4;
    type F = v128;
    type Mask = v128;

    #[inline(always)]
    fn splat(self, value: f32) -> v128 {
        f32x4_splat(value)
    }
    #[inline(always)]
    fn add(self, a: v128, b: v128) -> v128 {
        f32x4_add(a, b)
    }
    #[inline(always)]
    fn sub(self, a: v128, b: v128) -> v128 {
        f32x4_sub(a, b)
    }
    #[inline(always)]
    fn mul(self, a: v128, b: v128) -> v128 {
        f32x4_mul(a, b)
    }
    #[inline(always)]
    fn div(self, a: v128, b: v128) -> v128 {
        f32x4_div(a, b)
    }
    #[inline(always)]
    fn fma(self, a: v128, b: v128, c: v128) -> v128 {
        i64x2_shuffle::<0, 2>(fma_low(a, b, c), fma_low(upper(a), upper(b), upper(c)))
    }
    /// Two roundings: no fused instruction gives the same result on every machine.
    #[inline(always)]
    fn mul_add(self, a: v128, b: v128, c: v128) -> v128 {
        f32x4_add(f32x4_mul(a, b), c)
    }
    #[inline(always)]
    fn abs(self, a: v128) -> v128 {
        f32x4_abs(a)
    }
    #[inline(always)]
    fn round(self, a: v128) -> v128 {
        f32x4_nearest(a)
    }
    /// Two steps: a·2^(n/2) is exact, only the second product can round.
    #[inline(always)]
    fn scale(self, a: v128, n: v128) -> v128 {
        let n = i32x4_trunc_sat_f32x4(n);
        let half = i32x4_shr(n, 1);
        f32x4_mul(f32x4_mul(a, pow2(half)), pow2(i32x4_sub(n, half)))
    }
    #[inline(always)]
    fn le(self, a: v128, b: v128) -> v128 {
        f32x4_le(a, b)
    }
    #[inline(always)]
    fn select(self, mask: v128, yes: v128, no: v128) -> v128 {
        v128_bitselect(yes, no, mask)
    }

    #[inline(always)]
    unsafe fn load_f32(self, src: *const f32) -> v128 {
        // SAFETY: the caller gives 4 readable elements.
        unsafe { v128_load(src.cast()) }
    }
    #[inline(always)]
    unsafe fn store_f32(self, value: v128, dst: *mut f32) {
        // SAFETY: the caller gives 4 writable elements.
        unsafe { v128_store(dst.cast(), value) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, src: *const bf16) -> v128 {
        // SAFETY: the caller gives 4 readable elements; bf16 is the upper half of f32.
        unsafe { u32x4_shl(u32x4_load_extend_u16x4(src.cast()), 16) }
    }
    /// The even element of each pair is the lower half of 32 bits.
    #[inline(always)]
    unsafe fn load_bf16_even(self, src: *const bf16) -> v128 {
        // SAFETY: the caller gives 8 readable elements.
        unsafe { u32x4_shl(v128_load(src.cast()), 16) }
    }
    #[inline(always)]
    unsafe fn load_bf16_odd(self, src: *const bf16) -> v128 {
        // SAFETY: the caller gives 8 readable elements.
        unsafe { v128_and(v128_load(src.cast()), u32x4_splat(0xffff_0000)) }
    }
    /// Adds 0x7fff and the last kept bit, then truncates.
    #[inline(always)]
    unsafe fn store_bf16(self, value: v128, dst: *mut bf16) {
        let odd = v128_and(u32x4_shr(value, 16), u32x4_splat(1));
        let rounded = u32x4_add(value, u32x4_add(odd, u32x4_splat(0x7fff)));
        let quiet = v128_or(value, u32x4_splat(0x0040_0000));
        let kept = u32x4_shr(v128_bitselect(rounded, quiet, f32x4_eq(value, value)), 16);
        // SAFETY: the caller gives 4 writable elements.
        unsafe { v128_store64_lane::<0>(u16x8_narrow_i32x4(kept, kept), dst.cast()) }
    }
    /// Exponent and mantissa in place, as a number 2¹¹² too small; infinite and NaN by their
    /// exponent.
    #[inline(always)]
    unsafe fn load_f16(self, src: *const f16) -> v128 {
        // SAFETY: the caller gives 4 readable elements.
        let bits = unsafe { u32x4_load_extend_u16x4(src.cast()) };
        let size = u32x4_shl(v128_and(bits, u32x4_splat(0x7fff)), 13);
        let finite = f32x4_mul(size, f32x4_splat(f32::from_bits((127 + 112) << 23)));
        let special = v128_and(i32x4_ge(size, i32x4_splat(0x7c00 << 13)), u32x4_splat(0x7f80_0000));
        let sign = u32x4_shl(v128_and(bits, u32x4_splat(0x8000)), 16);
        v128_or(v128_or(finite, special), sign)
    }
    /// One by one.
    #[inline(always)]
    unsafe fn store_f16(self, value: v128, dst: *mut f16) {
        let mut values = [0f32; 4];
        // SAFETY: the buffer has 4 elements, and the caller gives 4.
        unsafe {
            v128_store(values.as_mut_ptr().cast(), value);
            let halves = values.map(f16::from_f32);
            std::ptr::copy_nonoverlapping(halves.as_ptr().cast::<u8>(), dst.cast(), 8);
        }
    }
}
