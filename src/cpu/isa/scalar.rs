//! The scalar twin: one lane, plain Rust, on every CPU.

use half::{bf16, f16};

use crate::cpu::kernels::{CpuKernels, EightByTwo, kernels};
use crate::cpu::simd::{Body, Isa, Simd};
use crate::cpu::tuning::{CpuFamily, Scalars};

#[derive(Clone, Copy)]
pub(super) struct Scalar;

impl Isa for Scalar {
    type Simd = Self;

    #[inline(always)]
    unsafe fn assume() -> Self {
        Self
    }

    #[inline(always)]
    fn vectorize<B: Body<Self>>(self, body: B) -> B::Output {
        body.run(self)
    }
}

/// The kernels, which every CPU can run.
pub(super) fn detect(_: CpuFamily) -> Option<CpuKernels> {
    Some(kernels_of_scalars())
}

pub(super) fn kernels_of_scalars() -> CpuKernels {
    kernels::<_, EightByTwo, EightByTwo, EightByTwo, Scalars>("scalar", Scalar)
}

impl Simd for Scalar {
    const LANES: usize = 1;
    type F = f32;
    type Mask = bool;

    #[inline(always)]
    fn splat(self, value: f32) -> f32 {
        value
    }
    #[inline(always)]
    fn add(self, a: f32, b: f32) -> f32 {
        a + b
    }
    #[inline(always)]
    fn sub(self, a: f32, b: f32) -> f32 {
        a - b
    }
    #[inline(always)]
    fn mul(self, a: f32, b: f32) -> f32 {
        a * b
    }
    #[inline(always)]
    fn div(self, a: f32, b: f32) -> f32 {
        a / b
    }
    #[inline(always)]
    fn fma(self, a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
    /// Two roundings: without the instruction `mul_add` is a slow function.
    #[inline(always)]
    fn mul_add(self, a: f32, b: f32, c: f32) -> f32 {
        if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
            a.mul_add(b, c)
        } else {
            a * b + c
        }
    }
    #[inline(always)]
    fn abs(self, a: f32) -> f32 {
        a.abs()
    }
    #[inline(always)]
    fn round(self, a: f32) -> f32 {
        a.round_ties_even()
    }
    /// Two steps: a·2^(n/2) is exact, only the second product can round.
    #[inline(always)]
    fn scale(self, a: f32, n: f32) -> f32 {
        let n = n as i32;
        let pow2 = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
        a * pow2(n >> 1) * pow2(n - (n >> 1))
    }
    #[inline(always)]
    fn le(self, a: f32, b: f32) -> bool {
        a <= b
    }
    #[inline(always)]
    fn select(self, mask: bool, yes: f32, no: f32) -> f32 {
        if mask { yes } else { no }
    }

    #[inline(always)]
    unsafe fn load_f32(self, src: *const f32) -> f32 {
        // SAFETY: the caller gives one readable element.
        unsafe { src.read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_f32(self, value: f32, dst: *mut f32) {
        // SAFETY: the caller gives one writable element.
        unsafe { dst.write_unaligned(value) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, src: *const bf16) -> f32 {
        // SAFETY: the caller gives one readable element.
        unsafe { src.read_unaligned() }.to_f32()
    }
    #[inline(always)]
    unsafe fn load_bf16_even(self, src: *const bf16) -> f32 {
        // SAFETY: the caller gives two readable elements.
        unsafe { src.read_unaligned() }.to_f32()
    }
    #[inline(always)]
    unsafe fn load_bf16_odd(self, src: *const bf16) -> f32 {
        // SAFETY: the caller gives two readable elements.
        unsafe { src.add(1).read_unaligned() }.to_f32()
    }
    #[inline(always)]
    unsafe fn store_bf16(self, value: f32, dst: *mut bf16) {
        // SAFETY: the caller gives one writable element.
        unsafe { dst.write_unaligned(bf16::from_f32(value)) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, src: *const f16) -> f32 {
        // SAFETY: the caller gives one readable element.
        unsafe { src.read_unaligned() }.to_f32()
    }
    #[inline(always)]
    unsafe fn store_f16(self, value: f32, dst: *mut f16) {
        // SAFETY: the caller gives one writable element.
        unsafe { dst.write_unaligned(f16::from_f32(value)) }
    }
}
