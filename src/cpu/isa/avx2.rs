//! AVX2 with FMA and F16C: 8 lanes.

use std::arch::asm;
use std::arch::x86_64::*;

use half::{bf16, f16};

use crate::cpu::kernels::{CpuKernels, TwoBySix, kernels};
use crate::cpu::simd::{Body, Isa, Simd};
use crate::cpu::tuning::{Avx2OnZen3, CpuFamily};

/// Proof that the CPU has avx2, fma and f16c. The `unsafe` blocks below rely on it.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

impl Avx2 {
    pub(super) fn new() -> Option<Self> {
        let has = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        has.then_some(Self(()))
    }
}

impl Isa for Avx2 {
    type Simd = Self;

    #[inline(always)]
    unsafe fn assume() -> Self {
        Self(())
    }

    #[inline(always)]
    fn vectorize<B: Body<Self>>(self, body: B) -> B::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn enabled<B: Body<Avx2>>(s: Avx2, body: B) -> B::Output {
            body.run(s)
        }
        // SAFETY: `self` proves the target features.
        unsafe { enabled(self, body) }
    }
}

/// The kernels, if the CPU has the instructions.
pub(super) fn detect(_: CpuFamily) -> Option<CpuKernels> {
    Some(kernels::<_, TwoBySix, TwoBySix, TwoBySix, Avx2OnZen3>("avx2", Avx2::new()?))
}

/// 2ⁿ for n in [-126, 127].
///
/// # Safety
/// The CPU has avx2.
#[inline(always)]
unsafe fn pow2(n: __m256i) -> __m256 {
    // SAFETY: the caller's contract.
    unsafe {
        _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n, _mm256_set1_epi32(127))))
    }
}

/// See [`Simd::pin`]. Assembly accepts vectors only in a function with the target features.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn pin(mut a: __m256) -> __m256 {
    // SAFETY: the assembly is a comment. The compiler must assume that it changes `a` and memory.
    unsafe { asm!("/* {0} */", inout(ymm_reg) a, options(nostack, preserves_flags)) };
    a
}

impl Simd for Avx2 {
    const LANES: usize = 8;
    const UNROLL: usize = 4;
    type F = __m256;
    type Mask = __m256;

    #[inline(always)]
    fn splat(self, value: f32) -> __m256 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm256_set1_ps(value) }
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn pin(self, a: __m256) -> __m256 {
        // SAFETY: `self` proves the instructions.
        unsafe { pin(a) }
    }
    #[inline(always)]
    fn abs(self, a: __m256) -> __m256 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm256_andnot_ps(_mm256_set1_ps(-0.0), a) }
    }
    #[inline(always)]
    fn round(self, a: __m256) -> __m256 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    /// Two steps: a·2^(n/2) is exact, only the second product can round.
    #[inline(always)]
    fn scale(self, a: __m256, n: __m256) -> __m256 {
        // SAFETY: `self` proves the instructions.
        unsafe {
            let n = _mm256_cvtps_epi32(n);
            let half = _mm256_srai_epi32::<1>(n);
            _mm256_mul_ps(_mm256_mul_ps(a, pow2(half)), pow2(_mm256_sub_epi32(n, half)))
        }
    }
    #[inline(always)]
    fn le(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm256_cmp_ps::<_CMP_LE_OQ>(a, b) }
    }
    #[inline(always)]
    fn select(self, mask: __m256, yes: __m256, no: __m256) -> __m256 {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm256_blendv_ps(no, yes, mask) }
    }

    #[inline(always)]
    unsafe fn load_f32(self, src: *const f32) -> __m256 {
        // SAFETY: `self` proves the instructions, the caller gives 8 readable elements.
        unsafe { _mm256_loadu_ps(src) }
    }
    #[inline(always)]
    unsafe fn store_f32(self, value: __m256, dst: *mut f32) {
        // SAFETY: `self` proves the instructions, the caller gives 8 writable elements.
        unsafe { _mm256_storeu_ps(dst, value) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, src: *const bf16) -> __m256 {
        // SAFETY: `self` proves the instructions, the caller gives 8 readable elements; bf16 is the
        // upper half of f32.
        unsafe {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(src.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        }
    }
    /// The even element of each pair is the lower half of 32 bits.
    #[inline(always)]
    unsafe fn load_bf16_even(self, src: *const bf16) -> __m256 {
        // SAFETY: `self` proves the instructions, the caller gives 16 readable elements.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_loadu_si256(src.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_bf16_odd(self, src: *const bf16) -> __m256 {
        // SAFETY: `self` proves the instructions, the caller gives 16 readable elements.
        unsafe {
            let upper = _mm256_set1_epi32(0xffff_0000u32 as i32);
            _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(src.cast()), upper))
        }
    }
    /// Adds 0x7fff and the last kept bit, then truncates. The saturating pack works on each half of
    /// 128 bits, and the permute joins them.
    #[inline(always)]
    unsafe fn store_bf16(self, value: __m256, dst: *mut bf16) {
        // SAFETY: `self` proves the instructions, the caller gives 8 writable elements.
        unsafe {
            let bits = _mm256_castps_si256(value);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(value, value));
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
            let kept = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan));
            let packed = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(kept, kept));
            _mm_storeu_si128(dst.cast(), _mm256_castsi256_si128(packed));
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, src: *const f16) -> __m256 {
        // SAFETY: `self` proves the instructions, the caller gives 8 readable elements.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(src.cast())) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, value: __m256, dst: *mut f16) {
        // SAFETY: `self` proves the instructions, the caller gives 8 writable elements.
        unsafe { _mm_storeu_si128(dst.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value)) }
    }
}
