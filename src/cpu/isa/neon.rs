//! NEON: 4 lanes, in every 64-bit ARM that runs an operating system.

use std::arch::aarch64::*;
use std::arch::asm;

use half::{bf16, f16};

use crate::cpu::kernels::{CpuKernels, FourByFive, FourBySix, kernels};
use crate::cpu::simd::{Body, Isa, Simd};
use crate::cpu::tuning::{CpuFamily, Unmeasured};

/// Proof that the CPU has NEON. The `unsafe` blocks below rely on it.
#[derive(Clone, Copy)]
pub(super) struct Neon(());

impl Neon {
    pub(super) fn new() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("neon").then_some(Self(()))
    }
}

impl Isa for Neon {
    type Simd = Self;

    #[inline(always)]
    unsafe fn assume() -> Self {
        Self(())
    }

    #[inline(always)]
    fn vectorize<B: Body<Self>>(self, body: B) -> B::Output {
        #[target_feature(enable = "neon")]
        fn enabled<B: Body<Neon>>(s: Neon, body: B) -> B::Output {
            body.run(s)
        }
        // SAFETY: `self` proves the target features.
        unsafe { enabled(self, body) }
    }
}

/// The kernels, if the CPU has the instructions. bf16 and f16 take five rows, not six: widening
/// needs the registers of the sixth row's sums.
pub(super) fn detect(_: CpuFamily) -> Option<CpuKernels> {
    Some(kernels::<_, FourBySix, FourByFive, FourByFive, Unmeasured>("neon", Neon::new()?))
}

/// 2ⁿ for n in [-126, 127].
///
/// # Safety
/// The CPU has NEON.
#[inline(always)]
unsafe fn pow2(n: int32x4_t) -> float32x4_t {
    // SAFETY: the caller's contract.
    unsafe { vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(n, vdupq_n_s32(127)))) }
}

impl Simd for Neon {
    const LANES: usize = 4;
    const GROUP: usize = 4;
    type F = float32x4_t;
    type Mask = uint32x4_t;

    #[inline(always)]
    fn splat(self, value: f32) -> float32x4_t {
        // SAFETY: `self` proves the instructions.
        unsafe { vdupq_n_f32(value) }
    }
    #[inline(always)]
    fn add(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves the instructions.
        unsafe { vaddq_f32(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves the instructions.
        unsafe { vsubq_f32(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves the instructions.
        unsafe { vmulq_f32(a, b) }
    }
    #[inline(always)]
    fn div(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves the instructions.
        unsafe { vdivq_f32(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves the instructions.
        unsafe { vfmaq_f32(c, a, b) }
    }
    /// `fmla` by element: four values of A are loaded at once and each is selected without an
    /// instruction of its own. Broadcasting would need one.
    #[inline(always)]
    fn mul_add_lane<const LANE: usize>(
        self,
        a: float32x4_t,
        b: float32x4_t,
        c: float32x4_t,
    ) -> float32x4_t {
        // SAFETY: `self` proves the instructions.
        unsafe {
            match LANE {
                0 => vfmaq_laneq_f32::<0>(c, b, a),
                1 => vfmaq_laneq_f32::<1>(c, b, a),
                2 => vfmaq_laneq_f32::<2>(c, b, a),
                _ => vfmaq_laneq_f32::<3>(c, b, a),
            }
        }
    }
    #[inline(always)]
    fn abs(self, a: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves the instructions.
        unsafe { vabsq_f32(a) }
    }
    #[inline(always)]
    fn round(self, a: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves the instructions.
        unsafe { vrndnq_f32(a) }
    }
    /// Two steps: a·2^(n/2) is exact, only the second product can round.
    #[inline(always)]
    fn scale(self, a: float32x4_t, n: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves the instructions.
        unsafe {
            let n = vcvtq_s32_f32(n);
            let half = vshrq_n_s32::<1>(n);
            vmulq_f32(vmulq_f32(a, pow2(half)), pow2(vsubq_s32(n, half)))
        }
    }
    #[inline(always)]
    fn le(self, a: float32x4_t, b: float32x4_t) -> uint32x4_t {
        // SAFETY: `self` proves the instructions.
        unsafe { vcleq_f32(a, b) }
    }
    #[inline(always)]
    fn select(self, mask: uint32x4_t, yes: float32x4_t, no: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves the instructions.
        unsafe { vbslq_f32(mask, yes, no) }
    }

    #[inline(always)]
    unsafe fn load_f32(self, src: *const f32) -> float32x4_t {
        // SAFETY: `self` proves the instructions, the caller gives 4 readable elements.
        unsafe { vld1q_f32(src) }
    }
    #[inline(always)]
    unsafe fn store_f32(self, value: float32x4_t, dst: *mut f32) {
        // SAFETY: `self` proves the instructions, the caller gives 4 writable elements.
        unsafe { vst1q_f32(dst, value) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, src: *const bf16) -> float32x4_t {
        // SAFETY: `self` proves the instructions, the caller gives 4 readable elements; bf16 is the
        // upper half of f32.
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(src.cast()))) }
    }
    /// The even element of each pair is the lower half of 32 bits.
    #[inline(always)]
    unsafe fn load_bf16_even(self, src: *const bf16) -> float32x4_t {
        // SAFETY: `self` proves the instructions, the caller gives 8 readable elements.
        unsafe {
            vreinterpretq_f32_u32(vshlq_n_u32::<16>(vreinterpretq_u32_u16(vld1q_u16(src.cast()))))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_odd(self, src: *const bf16) -> float32x4_t {
        // SAFETY: `self` proves the instructions, the caller gives 8 readable elements.
        unsafe {
            let pairs = vreinterpretq_u32_u16(vld1q_u16(src.cast()));
            vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff_0000)))
        }
    }
    /// Adds 0x7fff and the last kept bit, then truncates.
    #[inline(always)]
    unsafe fn store_bf16(self, value: float32x4_t, dst: *mut bf16) {
        // SAFETY: `self` proves the instructions, the caller gives 4 writable elements.
        unsafe {
            let bits = vreinterpretq_u32_f32(value);
            let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
            let rounded = vaddq_u32(vaddq_u32(bits, odd), vdupq_n_u32(0x7fff));
            let quiet = vorrq_u32(bits, vdupq_n_u32(0x0040_0000));
            let kept = vbslq_u32(vceqq_f32(value, value), rounded, quiet);
            vst1_u16(dst.cast(), vshrn_n_u32::<16>(kept));
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, src: *const f16) -> float32x4_t {
        // SAFETY: `self` proves the instructions, the caller gives 4 readable elements.
        unsafe {
            let halves = vld1_u16(src.cast());
            let out: float32x4_t;
            asm!("fcvtl {out:v}.4s, {halves:v}.4h", out = lateout(vreg) out, halves = in(vreg) halves,
                options(pure, nomem, nostack, preserves_flags));
            out
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, value: float32x4_t, dst: *mut f16) {
        // SAFETY: `self` proves the instructions, the caller gives 4 writable elements.
        unsafe {
            let halves: uint16x4_t;
            asm!("fcvtn {halves:v}.4h, {value:v}.4s", halves = lateout(vreg) halves, value = in(vreg) value,
                options(pure, nomem, nostack, preserves_flags));
            vst1_u16(dst.cast(), halves);
        }
    }
}
